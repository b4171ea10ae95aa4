"""What a training step costs through the Trainer, against loops written by hand.

Four ways train the same network on the same batches, in turns, in one process:

    trainer         `Trainer.fit` with a TensorBoard logger that logs every 50 steps
    flat loop       the loop an expert writes: `jax.jit` over one flat list of donated leaves, `nnx.merge` in the trace
    nnx.jit         the loop of the Flax tutorial: `nnx.jit` on module and `nnx.Optimizer`
    cached_partial  the same with `nnx.cached_partial`, Flax's own answer to the cost of `nnx.jit`

There is one `fit`, each epoch of it is a round, and the other ways run between its epochs; all are compiled before, and
timed from an idle device to an idle device. The network is so small that much of a step is Python and dispatch. On a
busy machine look at the time of the main thread as well.

    python benchmarks/dispatch.py --steps 300 --rounds 31 --blocks 4 16
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from nnx_fit import ArrayLoader, Callback, FitModule, TensorBoardLogger, Trainer

BATCH, WIDTH, CLASSES = 32, 64, 10


class Times(NamedTuple):
    """Seconds that passed, and seconds that the main thread itself worked."""

    elapsed: float
    thread: float


Run = Callable[[int], Times]  # from a number of steps to the times per step


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


class Net(nnx.Module):
    def __init__(self, blocks: int, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(rngs) for _ in range(blocks)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Module(FitModule):
    def __init__(self, blocks: int, *, rngs: nnx.Rngs) -> None:
        self.net = Net(blocks, rngs)

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        loss = loss_of(self.net, batch)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adam(1e-3)


def loss_of(net: Net, batch: dict[str, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(net(batch["x"]), batch["y"]).mean()


@functools.cache
def loader_of(steps: int) -> ArrayLoader:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * steps, WIDTH)).astype(np.float32)
    y = rng.integers(0, CLASSES, size=BATCH * steps).astype(np.int32)
    return ArrayLoader({"x": x, "y": y}, BATCH)


def now() -> Times:
    return Times(time.perf_counter(), time.thread_time())


def since(start: Times, steps: int) -> Times:
    end = now()
    return Times((end.elapsed - start.elapsed) / steps, (end.thread - start.thread) / steps)


def timed(step: Callable[[Any], Any], steps: int) -> Times:
    """Time per call of `step`, from an idle device to an idle device."""
    result = None
    start = now()
    for batch in loader_of(steps):
        result = step(batch)
    jax.block_until_ready(result)
    return since(start, steps)


def flat_loop(blocks: int) -> Run:
    net = Net(blocks, nnx.Rngs(0))
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    tx = optax.adam(1e-3)
    leaves, treedef = jax.tree.flatten((params, rest, tx.init(params)))

    @functools.partial(jax.jit, donate_argnums=0)
    def program(leaves: list[jax.Array], batch: dict[str, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        params, rest, opt_state = jax.tree.unflatten(treedef, leaves)

        def loss_fn(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            net = nnx.merge(graphdef, params, rest, copy=True)
            return loss_of(net, batch), nnx.state(net, nnx.Not(nnx.Param))

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), rest, opt_state)), loss

    def step(batch: dict[str, np.ndarray]) -> jax.Array:
        nonlocal leaves
        leaves, loss = program(leaves, batch)
        return loss

    return functools.partial(timed, step)


def tutorial_step(net: Net, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(net, batch)
    optimizer.update(net, grads)
    return loss


def nnx_jit(blocks: int) -> Run:
    net = Net(blocks, nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
    program = nnx.jit(tutorial_step)
    return functools.partial(timed, lambda batch: program(net, optimizer, batch))


def cached_partial(blocks: int) -> Run:
    net = Net(blocks, nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
    return functools.partial(timed, nnx.cached_partial(nnx.jit(tutorial_step), net, optimizer))


class Rounds(Callback):
    """Makes every epoch of a `fit` a round: before it the other ways run, then the epoch itself is timed.

    What the trainer is held against runs last, right before it: the speed of a machine changes within seconds.
    """

    reads_module = False

    def __init__(self, ways: dict[str, Run], steps: int) -> None:
        self.times: dict[str, list[Times]] = {TRAINER: [], **{name: [] for name in ways}}
        self._ways = ways
        self._steps = steps
        self._start = Times(0, 0)

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        if trainer.current_epoch > 0:
            for name in sorted(self._ways, key=BASE.__eq__):
                self.times[name].append(self._ways[name](self._steps))
        jax.block_until_ready(trainer.peek(...))
        self._start = now()

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        jax.block_until_ready(trainer.peek(...))
        if trainer.current_epoch > 0:  # the first epoch compiles
            self.times[TRAINER].append(since(self._start, self._steps))


def trainer_of(directory: Path, epochs: int, callbacks: list[Callback], **options: object) -> Trainer:
    """A Trainer with a TensorBoard logger that logs every 50 steps, and nothing that is not asked for."""
    return Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(directory),
        log_every_n_steps=50,
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )


TRAINER, BASE = "trainer", "flat loop"
WAYS: dict[str, Callable[[int], Run]] = {BASE: flat_loop, "nnx.jit": nnx_jit, "cached_partial": cached_partial}
SLOW = ("nnx.jit", "cached_partial")


def measure(blocks: int, steps: int, rounds: int, names: Sequence[str]) -> dict[str, list[Times]]:
    """Times per step of each way in each round."""
    ways = {name: WAYS[name](blocks) for name in names}
    for name in SLOW:
        if name in ways:  # they are slow enough to be timed with a fifth of the steps
            ways[name] = functools.partial(lambda run, steps: run(max(steps // 5, 1)), ways[name])
    for run in ways.values():
        run(steps)  # compiles
    watch = Rounds(ways, steps)
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(Path(directory), rounds + 1, [watch])
        trainer.fit(Module(blocks, rngs=nnx.Rngs(0)), loader_of(steps))
    return watch.times


def report(blocks: int, times: dict[str, list[Times]]) -> None:
    print(f"\n{blocks} blocks, {jax.default_backend()}: medians over {len(times[BASE])} rounds")
    print(f"  {'us per step':<16}{'elapsed':>10}{'main thread':>14}{'elapsed, to the flat loop':>28}")
    for name, rounds in times.items():
        elapsed = statistics.median(each.elapsed for each in rounds) * 1e6
        thread = statistics.median(each.thread for each in rounds) * 1e6
        low, middle, high = statistics.quantiles(ratios(rounds, times[BASE]), n=4)
        print(f"  {name:<16}{elapsed:>10.0f}{thread:>14.0f}{middle:>12.2f}x ({low:.2f}..{high:.2f})")
    if "nnx.jit" in times:
        faster = statistics.median(ratios(times["nnx.jit"], times[TRAINER]))
        print(f"  the trainer is {faster:.1f} times as fast as nnx.jit")


def ratios(rounds: Sequence[Times], base: Sequence[Times]) -> list[float]:
    return [one.elapsed / other.elapsed for one, other in zip(rounds, base, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps per way and round (default 300)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds, at least 2 (default 31)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16], help="sizes of the network (default 4 16)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="besides the trainer (default all)")
    args = parser.parse_args()
    for blocks in args.blocks:
        report(blocks, measure(blocks, args.steps, args.rounds, list(dict.fromkeys([BASE, *args.ways]))))


if __name__ == "__main__":
    main()
