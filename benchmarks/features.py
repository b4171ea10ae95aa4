"""What each feature of the Trainer costs a batch: the same training with it and without it.

For each feature two fits run in one process and take turns: an epoch with it, an epoch without. What is printed is the
median ratio of the time per batch over the rounds, and its quartiles. The network is small (12 blocks of Linear,
BatchNorm and Dropout, 202 Variables, Adam), so that what a feature costs is not hidden behind matrix products.

    python benchmarks/features.py --steps 200 --rounds 15
    python benchmarks/features.py --features clipping ema
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from dispatch import Module, loader_of, loss_of
from flax import nnx
from turns import alternate, quartiles, trainer_of

import nnx_fit as nf

BLOCKS = 12


class TwoOptimizers(Module):
    def configure_optimizers(self) -> dict[str, nf.OptimizerSpec]:
        parts = {"head": "net.head", "blocks": "net.blocks"}
        return {name: nf.OptimizerSpec(optax.adam(1e-3), trainable=part) for name, part in parts.items()}


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch: dict[str, jax.Array]) -> None:
        loss, grads = self.value_and_grad(lambda: loss_of(self.net, batch))
        self.optimizers().update(grads)
        self.log("train/loss", loss)


# Name: the module, arguments of the Trainer, callbacks.
Feature = tuple[type[Module], dict[str, Any], Callable[[], list[nf.Callback]]]
FEATURES: dict[str, Feature] = {
    "accumulation of 4": (Module, {"accumulate_grad_batches": 4}, list),
    "clipping": (Module, {"gradient_clip_val": 1.0}, list),
    "bf16-mixed": (Module, {"precision": "bf16-mixed"}, list),
    "bf16-true": (Module, {"precision": "bf16-true"}, list),
    "16-mixed": (Module, {"precision": "16-mixed"}, list),
    "two optimizers": (TwoOptimizers, {}, list),
    "manual": (Manual, {}, list),
    "ema": (Module, {}, lambda: [nf.EMAWeights()]),
    "learning rate": (Module, {}, lambda: [nf.LearningRateMonitor()]),
    "gradient norms": (Module, {}, lambda: [nf.GradientMonitor()]),
    "variables": (Module, {}, lambda: [nf.VariableMonitor(every_n_steps=100)]),
    "throughput": (Module, {}, lambda: [nf.ThroughputMonitor()]),
    "device stats": (Module, {}, lambda: [nf.DeviceStatsMonitor()]),
    "detect_nonfinite": (Module, {"detect_nonfinite": True}, list),
    "nothing": (Module, {}, list),
}


def fit(feature: Feature, directory: Path, turns: nf.Callback, epochs: int, steps: int) -> None:
    module, options, callbacks = feature
    asked = [turns, *callbacks()]
    trainer = trainer_of(directory, epochs, asked, **options)
    trainer.callbacks = [callback for callback in trainer.callbacks if callback in asked]  # none that came by itself
    trainer.fit(module(BLOCKS, rngs=nnx.Rngs(0)), loader_of(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="batches per round (default 200)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, at least 2 (default 15)")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES), help="default all")
    args = parser.parse_args()
    print(f"{jax.default_backend()}: time per batch with the feature to that without it, over {args.rounds} rounds")
    bare = functools.partial(fit, FEATURES["nothing"])
    for name in args.features:
        times, without = alternate(functools.partial(fit, FEATURES[name]), bare, args.steps, args.rounds)
        low, middle, high = quartiles(times, without, "elapsed")
        print(f"  {name:<20}{middle:>6.2f}x ({low:.2f}..{high:.2f})", flush=True)


if __name__ == "__main__":
    main()
