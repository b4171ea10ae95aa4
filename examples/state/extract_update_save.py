"""Taking state out of a model, putting it back, and saving it: before, during and after training.

    python examples/state/extract_update_save.py

`nnx.state` and `nnx.update` are Flax's own functions. The Trainer keeps the values in its program's buffers while it
trains, and gives them back wherever you can look: in every hook, and after `fit`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class Regressor(nf.FitModule):
    """Parameters, running statistics and a random stream."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 16, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.dropout(nnx.relu(self.norm(self.linear(x)))))

    def training_step(self, batch: dict[str, jax.Array]) -> jax.Array:
        loss = optax.squared_error(self(batch["x"]), batch["y"]).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, jax.Array]) -> None:
        self.log("val/loss", optax.squared_error(self(batch["x"]), batch["y"]).mean())

    def configure_optimizers(self) -> optax.GradientTransformation:
        return optax.adam(1e-2)


class KeepBest(nf.Callback):
    """Takes the parameters out in a hook when the validation loss is the best so far, and puts them back at the end."""

    best = float("inf")

    def on_validation_end(self, trainer: nf.Trainer, module: Regressor) -> None:
        if trainer.sanity_checking or trainer.callback_metrics["val/loss"] >= self.best:
            return
        self.best = trainer.callback_metrics["val/loss"]
        self.state = nnx.clone(nnx.state(module, nnx.Not(nnx.RngState)))

    def on_fit_end(self, trainer: nf.Trainer, module: Regressor) -> None:
        nnx.update(module, self.state)


def make_data(seed: int) -> nf.ArrayLoader:
    x = np.random.default_rng(seed).normal(size=(256, 4)).astype(np.float32)
    return nf.ArrayLoader({"x": x, "y": np.sin(x.sum(1, keepdims=True))}, batch_size=32, shuffle=True)


def make_trainer(epochs: int, *callbacks: nf.Callback) -> nf.Trainer:
    return nf.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def build() -> Regressor:
    return Regressor(rngs=nnx.Rngs(params=0, dropout=1))


def take_out_and_put_back() -> bool:
    """State taken from one model and given to another makes both predict the same."""
    source, target = build(), Regressor(rngs=nnx.Rngs(99))
    make_trainer(2).fit(source, make_data(0))
    nnx.update(target, nnx.state(source, (nnx.Param, nnx.BatchStat)))
    x = make_data(1)
    losses = [make_trainer(1).validate(model, x)[0]["val/loss"] for model in (source, target)]
    print(f"validation loss of the source and of the model its state went to: {losses}")
    return losses[0] == losses[1]


def update_in_a_hook() -> tuple[float, float]:
    """State taken out in one hook and put back in another: the model ends with its best values."""
    model, keeper = build(), KeepBest()
    make_trainer(4, keeper).fit(model, make_data(0), make_data(1))
    now = make_trainer(1).validate(model, make_data(1))[0]["val/loss"]
    print(f"best validation loss {keeper.best:.4f}; the model as fit left it: {now:.4f}")
    return keeper.best, now


def save_and_continue(directory: Path) -> bool:
    """Two epochs, a checkpoint, and two more in another model equal four in a row, bit for bit."""
    whole = build()
    make_trainer(4).fit(whole, make_data(0))

    first = make_trainer(2)
    first.fit(build(), make_data(0))
    first.save_checkpoint(directory / "half_way")

    second = Regressor(rngs=nnx.Rngs(99))  # its values do not matter: all of them come from the checkpoint
    make_trainer(4).fit(second, make_data(0), ckpt_path=directory / "half_way")
    same = all(
        np.array_equal(a, b)
        for a, b in zip(
            *(jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Not(nnx.RngKey)))) for model in (whole, second)),
            strict=True,
        )
    )
    print(f"saved after two epochs and continued in another model: the same bit for bit: {same}")
    return same


def load_weights(directory: Path) -> bool:
    """An evaluation from a checkpoint takes the values and nothing else."""
    model = Regressor(rngs=nnx.Rngs(99))
    loaded = make_trainer(1).validate(model, make_data(1), ckpt_path=directory / "half_way")
    again = make_trainer(1).validate(model, make_data(1))
    print(f"validation loss from the checkpoint {loaded[0]['val/loss']:.4f}, and the model has its values now")
    return loaded == again


def main() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        return {
            "moved": take_out_and_put_back(),
            "best": update_in_a_hook(),
            "continued": save_and_continue(Path(directory)),
            "loaded": load_weights(Path(directory)),
        }


if __name__ == "__main__":
    main()
