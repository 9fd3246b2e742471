"""`fit` inside a Ray TorchTrainer: the same run as `kronos-nb fit`, on workers that Ray places.

One machine, two workers on its CPU:

    pip install "ray[train]"
    python examples/ray_fit.py --preset quickstart --out runs/ray --workers 2

Several machines. The package must be installed on each of them, and OUT and the files of bars must lie on a disk that
all of them
see under the same path (NFS, EFS, Filestore, ...): rank 0 writes the run's folder, the other ranks read the finished
models there.

    ray start --head --port=6379                          # on the first machine; it prints the address for the others
    ray start --address=FIRST_MACHINE:6379                # on each other machine
    python examples/ray_fit.py /shared/bars/*.parquet --preset kaggle_stock --out /shared/runs/stocks \\
        --workers 8 --gpu --address auto                  # on any of them: 8 workers, one GPU each
    ray stop                                              # on each, when done

`batch_size` is per worker, so the batch of an optimizer step is batch_size * accumulation_steps * workers. When a
worker or a machine
dies, Ray starts all workers again (`--failures` times) and the run goes on from its last checkpoint; the same command
goes on later,
too, with the same number of workers.
"""

import argparse, json
from pathlib import Path
from kronos_nb.cli import settings
from kronos_nb.config import Config
from kronos_nb.training.learner import Callback


class Report(Callback):
    "Hands each validation to Ray, on all workers at once, as Ray asks for"

    order = 99

    def after_validate(self, learn):
        from ray import train

        train.report(
            dict(step=learn.step, epoch=learn.epoch + 1)
            | {k: v for k, v in learn.metrics.items() if isinstance(v, float)}
        )


def work(a: dict):
    "What each worker does"
    from kronos_nb.train import fit
    from ray import train

    result = fit(a['data'] or None, Config.load(json.loads(a['config'])), a['out'], callbacks=[Report()])
    if train.get_context().get_world_rank() == 0:
        print(result, flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', nargs='*', help='files of bars; none: the bundled sample')
    p.add_argument('--preset', default='quickstart')
    p.add_argument(
        '--set', action='append', default=[], metavar='KEY=VALUE', help='any setting, such as predictor.lr=1e-5'
    )
    p.add_argument('--out', default='runs/ray', help='folder of the run, seen by all machines')
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--gpu', action='store_true', help='one GPU for each worker')
    p.add_argument('--cpus', type=float, default=1, help='CPUs for each worker')
    p.add_argument('--failures', type=int, default=2, help='how often Ray may start the workers again')
    p.add_argument(
        '--address', help="a running cluster ('auto': the one this machine belongs to); none: Ray on this machine alone"
    )
    a = p.parse_args(argv)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cfg = Config.preset(
        a.preset, **settings(a.set), **{'runtime.progress': False} | ({} if a.gpu else {'runtime.device': 'cpu'})
    )
    ray.init(
        address=a.address,
        include_dashboard=False,
        **({} if a.address else dict(num_cpus=max(a.workers * a.cpus + 1, 2))),
    )
    out = Path(a.out).absolute()
    job = dict(data=[str(Path(o).absolute()) for o in a.data], config=json.dumps(cfg.to_dict()), out=str(out))
    TorchTrainer(
        work,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=a.workers, use_gpu=a.gpu, resources_per_worker=dict(CPU=a.cpus) | (dict(GPU=1) if a.gpu else {})
        ),
        run_config=RunConfig(
            name=out.name, storage_path=str(out.parent / 'ray'), failure_config=FailureConfig(max_failures=a.failures)
        ),
    ).fit()
    ray.shutdown()
    print(f"Report: {out / 'report.md'}")


if __name__ == '__main__':
    main()
