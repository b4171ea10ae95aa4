"""What `VariableMonitor` costs a run: the same training with it and without it.

Two fits run in one process, each in a thread of its own, and take turns: an epoch of the one, then an epoch of the
other, never both. Each is timed from an idle device to an idle device; what is printed is the median ratio over the
rounds, with and without the monitor, and the time that the fit's own thread worked. Two cases, each with about 200
watched Variables:

    stats    the default: 100 layers of batch normalization, so 200 running statistics with their drift
    params   `params=True`: 66 running statistics, 134 parameters, their gradients and updates

    python benchmarks/monitor.py --steps 200 --rounds 15 --every 100
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path

import jax
from dispatch import Module, Times, loader_of
from flax import nnx
from turns import alternate, quartiles, trainer_of

from nnx_fit import Callback, VariableMonitor

CASES = {"stats": (100, False), "params": (33, True)}


def fit(
    monitor: VariableMonitor | None, blocks: int, directory: Path, turns: Callback, epochs: int, steps: int
) -> None:
    trainer = trainer_of(directory, epochs, [turns] if monitor is None else [turns, monitor])
    if monitor is None:  # a TensorBoard logger brings one
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, VariableMonitor)]
    trainer.fit(Module(blocks, rngs=nnx.Rngs(0)), loader_of(steps))


def report(name: str, with_monitor: list[Times], without: list[Times]) -> None:
    print(f"\n{name}, {jax.default_backend()}: medians over {len(without)} rounds")
    print(f"  {'us per step':<18}{'elapsed':>10}{'main thread':>14}")
    for label, times in (("with monitor", with_monitor), ("without", without)):
        elapsed, thread = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
        print(f"  {label:<18}{elapsed:>10.0f}{thread:>14.0f}")
    for column in Times._fields:
        low, middle, high = quartiles(with_monitor, without, column)
        print(f"  {column} ratio: {middle:.3f} ({low:.3f}..{high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps per round (default 200)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, at least 2 (default 15)")
    parser.add_argument("--every", type=int, default=100, help="steps between two records (default 100)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to watch (default both)")
    args = parser.parse_args()
    for name in args.cases:
        blocks, params = CASES[name]
        monitor = VariableMonitor(every_n_steps=args.every, params=params)
        runs = (functools.partial(fit, monitor, blocks), functools.partial(fit, None, blocks))
        report(name, *alternate(*runs, args.steps, args.rounds))


if __name__ == "__main__":
    main()
