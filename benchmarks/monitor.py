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
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
from dispatch import Module, Times, loader_of, now, since
from flax import nnx

from nnx_fit import Callback, FitModule, TensorBoardLogger, Trainer, VariableMonitor

CASES = {"stats": (100, False), "params": (33, True)}


class Turns(Callback):
    """Makes every epoch of a `fit` a round that begins when the other fit's has ended."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore, steps: int) -> None:
        self.times: list[Times] = []
        self._mine, self._other, self._steps = mine, other, steps
        self._start = Times(0, 0)

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        self._mine.acquire()
        jax.block_until_ready(nnx.state(module))
        self._start = now()

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        jax.block_until_ready(nnx.state(module))
        if trainer.current_epoch > 0:  # the first epoch compiles
            self.times.append(since(self._start, self._steps))
        self._other.release()


def fit(blocks: int, directory: Path, turns: Turns, monitor: VariableMonitor | None, epochs: int, steps: int) -> None:
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[turns] if monitor is None else [turns, monitor],
        logger=TensorBoardLogger(directory),
        log_every_n_steps=50,
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if monitor is None:  # a TensorBoard logger brings one
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, VariableMonitor)]
    trainer.fit(Module(blocks, rngs=nnx.Rngs(0)), loader_of(steps))


def measure(blocks: int, params: bool, steps: int, rounds: int, every: int) -> tuple[list[Times], list[Times]]:
    """Times per step of each round, with and without the monitor."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    with_monitor, without = Turns(first, second, steps), Turns(second, first, steps)
    monitor = VariableMonitor(every_n_steps=every, params=params)
    with tempfile.TemporaryDirectory() as directory:
        runs: list[tuple[Turns, Any]] = [(with_monitor, monitor), (without, None)]
        threads = [
            threading.Thread(target=fit, args=(blocks, Path(directory, str(i)), *run, rounds + 1, steps), daemon=True)
            for i, run in enumerate(runs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return with_monitor.times, without.times


def report(name: str, with_monitor: list[Times], without: list[Times]) -> None:
    print(f"\n{name}, {jax.default_backend()}: medians over {len(without)} rounds")
    print(f"  {'us per step':<18}{'elapsed':>10}{'main thread':>14}")
    for label, times in (("with monitor", with_monitor), ("without", without)):
        elapsed, thread = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
        print(f"  {label:<18}{elapsed:>10.0f}{thread:>14.0f}")
    for column in Times._fields:
        ratios = [getattr(a, column) / getattr(b, column) for a, b in zip(with_monitor, without, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
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
        report(name, *measure(blocks, params, args.steps, args.rounds, args.every))


if __name__ == "__main__":
    main()
