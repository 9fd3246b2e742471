"""Fine-tune Kronos on your own bars, judge it on bars that it has not seen, and forecast with every path kept

The names below are the front door; each loads its module, and torch, only when you use it.
`import kronos_nb as kn`, then `help(kn.fit)`. Everything else lives in the modules that the README lists.
"""

__version__ = "0.1.0"

import importlib as _importlib
import os as _os
import sys as _sys

# Idle threads sleep, unless the user decided otherwise; torch reads this once, when it is imported (see `machine`)
if 'torch' not in _sys.modules:
    _os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

_DOOR = dict(
    Config='config', Forecaster='forecast', Studio='panel.studio', average_checkpoints='average',
    check_klines='data.check', compare='judging.compare', evaluate='evaluate', fetch_klines='data.fetch', fit='train',
    load='train', push='hub', read_klines='data.read', repair_klines='data.repair', sample_klines='data.read',
    tune='tune')

__all__ = [*_DOOR, '__version__']


def __getattr__(name):
    if name not in _DOOR:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it has: {", ".join(_DOOR)}')
    module = _importlib.import_module(f'{__name__}.{_DOOR[name]}')
    return module if name == _DOOR[name] else getattr(module, name)


def __dir__():
    return sorted(__all__)
