"""A training process to be killed: everything that has state is in it. Started again, it continues.

    python fault_run.py DIRECTORY [--pace SECONDS] [--checkpoints DIRECTORY] [--address HOST:PORT]

With an address the process is one that `jax.distributed` looks after, with its preemption service. At the end
`result.json` in the directory holds all that must not depend on how often it was killed: the bits of every array, the
History, the best checkpoints.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nnx_fit as nf


class Net(nf.FitModule):
    """Batch norm, dropout, a Variable that nobody knows, a metric object."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)
        self.seen = nnx.Variable(jnp.int32(0))
        self.average = nnx.metrics.Average()

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.first(x)))))

    def training_step(self, batch):
        loss = ((self(batch["x"]) - batch["y"]) ** 2).mean()
        self.seen[...] += len(batch["x"])
        self.average.update(values=loss)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/average", self.average, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch):
        self.log("val/loss", ((self(batch["x"]) - batch["y"]) ** 2).mean())

    def on_train_epoch_end(self):
        self.log("seen", float(self.seen[...]))

    def configure_optimizers(self):
        return nf.OptimizerSpec(optax.adam, schedule=optax.cosine_decay_schedule(1e-2, 40))


class Pace(nf.Callback):
    """Gives whoever kills the process the time for it."""

    reads_module = False

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_start(self, trainer, module):
        print("training", flush=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        time.sleep(self.seconds)


def loader(seed: int, count: int, shuffle: bool) -> nf.ArrayLoader:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6)).astype(np.float32)
    return nf.ArrayLoader({"x": x, "y": x[:, :1] * 2}, 8, shuffle=shuffle)


def bits(array) -> str:
    data = jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return np.asarray(data).tobytes().hex()


def main(directory: Path, checkpoints: Path | None, seconds: float) -> None:
    checkpoint = nf.ModelCheckpoint(checkpoints, monitor="val/loss", save_top_k=2, every_n_train_steps=2)
    ema = nf.EMAWeights(decay=0.9)
    trainer = nf.Trainer(
        max_epochs=3,
        accumulate_grad_batches=2,
        val_check_interval=0.5,
        log_every_n_steps=1,
        callbacks=[ema, checkpoint, nf.LearningRateMonitor(), Pace(seconds)],
        logger=[nf.TensorBoardLogger(directory), nf.CSVLogger(directory)],
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net(rngs=nnx.Rngs(params=0, dropout=1))
    # 13 batches: the last window of an epoch has one, and a validation falls into a window.
    history = trainer.fit(module, loader(0, 100, True), loader(1, 20, False), ckpt_path="last")
    result = {
        "arrays": {
            jax.tree_util.keystr(path): bits(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(module))
        },
        "average": {name: bits(array) for name, array in ema.weights.items()},
        "history": dict(history),
        "best": [checkpoint.best_model_score, Path(checkpoint.best_model_path).name],
        "kept": checkpoint.state_dict()["shelf"]["kept"],
        "steps": trainer.global_step,
    }
    (directory / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    if arguments.address:
        jax.distributed.initialize(arguments.address, num_processes=1, process_id=0)
    main(arguments.directory, arguments.checkpoints, arguments.pace)
