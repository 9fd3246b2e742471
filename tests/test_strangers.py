"Files, names and numbers of strangers: they are shown, refused or survived, and never do anything else"
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kronos_nb.core import md_text, one_line, safe_name, symbol_of

hostile = ['BTC/USDT', '../x', '../../x', '/etc/x', 'a\\b', 'C:\\x', '$', '$SPX_$VIX', '', '.', '..', '.hidden', 'x.',
           'CON', 'nul.txt', 'com1', 'LPT9.csv', 'x'*300, 'é 😀', '贵州茅台', 'nan', '-rf', '__proto__', 'a\0b', 'a\nb',
           '\x1b[31mred', '\udcff', '<img src=x onerror=alert(1)>', 'A|B', '`x`', '[c](javascript:alert(1))', '~',
           '~2F']


# names
@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_safe_name_is_one_part_of_a_path_and_gives_its_symbol_back(symbol):
    name = safe_name(symbol)
    assert re.fullmatch(r'[A-Za-z0-9_~-][A-Za-z0-9_.~-]{0,127}', name) and not name.endswith('.')
    assert not re.fullmatch(r'(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?', name)
    assert symbol_of(name, [symbol]) == symbol
    assert symbol_of(name) == (None if '~~' in name else symbol)


@pytest.mark.parametrize('symbol', hostile)
def test_hostile_symbols_become_files_of_their_folder(tmp_path, symbol):
    inside = tmp_path/'inside'
    inside.mkdir()
    (inside/f'forecast_{safe_name(symbol)}.png').touch()
    assert len(os.listdir(inside)) == 1 and os.listdir(tmp_path) == ['inside']


def test_no_two_symbols_share_a_name():
    assert len(set(map(safe_name, hostile))) == len(hostile)
    assert safe_name('x'*300) != safe_name('x'*301)


# text
@given(st.text())
@settings(max_examples=200, deadline=None)
def test_text_from_data_stays_on_its_line_and_makes_no_tag(text):
    shown = md_text(text)
    assert '<' not in shown and '\n' not in shown and shown.isprintable() == one_line(text).isprintable()
    assert shown.encode().decode() == shown
