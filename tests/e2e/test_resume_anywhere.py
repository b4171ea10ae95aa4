"""Wherever a run is saved, cut off and continued, and however it is set up, it ends with the bits of an untouched one.

`test_faults.py` kills a process of one set-up; here Hypothesis draws set-ups, and runs end within this process: by an
error in a hook, that nothing is saved on, or by SIGTERM. Each part has a module, a Trainer and loaders of its own.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from nets import quiet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nnx_fit as nf
from nnx_fit.checkpoint.store import find_checkpoints

# The same few in every `make test`; `make nightly` draws others each time.
EXAMPLES = int(os.environ.get("NNX_FIT_EXAMPLES", "10"))
NIGHTLY = "NNX_FIT_EXAMPLES" in os.environ
FEATURES = 3


class Net(nf.FitModule):
    """Every kind of state in few operations, and every way to log."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(rngs.params.normal((FEATURES,)))
        self.norm = nnx.BatchNorm(FEATURES, use_bias=False, use_scale=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.rows = nnx.Variable(jnp.int32(0))
        self.epochs = nnx.Variable(jnp.int32(0))
        self.average = nnx.metrics.Average()

    def loss(self, batch):
        return ((self.dropout(self.norm(batch["x"] * self.kernel[...])).sum(1) - batch["y"]) ** 2).mean()

    def training_step(self, batch):
        loss = self.loss(batch)
        self.rows[...] += len(batch["x"])
        self.average.update(values=loss)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce="max")
        self.log("average", self.average, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch):
        loss = self.loss(batch)
        self.average.update(values=loss)
        self.log("val/loss", loss)
        self.log("val/average", self.average)

    def on_train_epoch_start(self):
        self.log("host/epoch", self.current_epoch, reduce="sum")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("host/step", outputs["loss"])
        self.log("host/sum", batch_idx, on_step=False, on_epoch=True, reduce="sum")

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx):
        self.log("val/host", batch_idx, reduce="sum")

    def on_train_epoch_end(self):
        self.epochs[...] += 1
        self.log("host/rows", float(self.rows[...]))

    def configure_optimizers(self):
        schedule = optax.exponential_decay(0.05, 3, 0.8)
        return nf.OptimizerSpec(lambda rate: optax.sgd(rate, momentum=0.9), schedule=schedule)


class Batches:
    """Batches that can be read again and again and know no position."""

    def __init__(self, arrays: dict[str, np.ndarray], size: int):
        self.batches = [{k: v[i : i + size] for k, v in arrays.items()} for i in range(0, len(arrays["x"]), size)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run, without where it is interrupted."""

    trainer: dict[str, Any]
    checkpoint: dict[str, Any]
    ema: dict[str, Any] | None
    rows: int
    loader: dict[str, Any] | None  # `None`: one without a position
    validation: int
    windows: dict[int, int] | None
    patience: int | None = None

    def train_loader(self) -> Any:
        arrays = data(0, self.rows)
        return Batches(arrays, 2) if self.loader is None else nf.ArrayLoader(arrays, 2, **self.loader)

    def val_loaders(self) -> Any:
        loaders = [nf.ArrayLoader(data(1 + i, 3), 2) for i in range(self.validation)]
        return loaders or None

    def fit(self, directory: Path, *, extra: Any = (), ckpt_path: Any = None, **options: Any) -> Any:
        """Runs it, or a part of it, in a directory; returns the module and its Trainer."""
        saves = options.pop("save_on_exception", False)
        checkpoint = nf.ModelCheckpoint(directory / "checkpoints", **self.checkpoint, save_on_exception=saves)
        callbacks = [nf.EMAWeights(**self.ema)] if self.ema is not None else []
        if self.windows is not None:
            callbacks.append(nf.GradientAccumulationScheduler(self.windows))
        if self.patience is not None:
            callbacks.append(nf.EarlyStopping("val/loss", patience=self.patience))
        # It records how a run ends, which one that goes on for more epochs has had and the other has not.
        watching_nothing = nf.VariableMonitor(include=lambda path, value: False)
        trainer = quiet(
            **{**self.trainer, **options},
            jit=False,
            state_guard="off",
            enable_checkpointing=True,
            default_root_dir=directory,
            logger=[nf.CSVLogger(directory), nf.TensorBoardLogger(directory)],
            callbacks=[*callbacks, checkpoint, nf.LearningRateMonitor(), watching_nothing, *extra],
        )
        begins = ckpt_path is None or (ckpt_path == "last" and not find_checkpoints(directory / "checkpoints"))
        seed = 0 if begins else 7  # of another seed, so that whatever is not restored differs
        module = Net(rngs=nnx.Rngs(params=seed, dropout=seed + 1))
        trainer.fit(module, self.train_loader(), self.val_loaders(), ckpt_path=ckpt_path)
        return module, trainer


def data(seed: int, rows: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(rows, FEATURES)).astype(np.float32)
    return {"x": x, "y": x.sum(1)}


HOOKS = [
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
]


class KilledError(Exception):
    """What ends a part of a run that had no chance to save."""


class At(nf.Callback):
    """Does something in one hook, at its n-th call, after all others there."""

    phase = "save"

    def __init__(self, hook: str, call: int, what: Any):
        self.left = call

        def counting(trainer, module, *args):
            self.left -= 1
            if self.left == 0:
                what(trainer)

        setattr(self, hook, counting)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run: where it saves, how it ends, and what the next one continues from."""

    save: tuple[str, int] | None
    end: tuple[str, int]
    how: str
    resume: int | None  # `None`: "last"; else one of all there is
    fewer_epochs: int = 0


def kill(trainer: Any) -> None:
    raise KilledError


def terminate(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted(setup: Setup, parts: list[Part], directory: Path) -> Any:
    """The run in parts; returns what the last one returns, and what was continued from."""
    ckpt_path: Any = "last"
    origins = set()
    for number, part in enumerate(parts):
        own = directory / "saved" / str(number)
        extra = [At(*part.save, lambda trainer, own=own: trainer.save_checkpoint(own))] if part.save else []
        extra.append(At(*part.end, terminate if part.how == "terminate" else kill))
        epochs = max(1, setup.trainer["max_epochs"] - part.fewer_epochs)
        try:
            setup.fit(
                directory, extra=extra, ckpt_path=ckpt_path, max_epochs=epochs, save_on_exception=part.how == "fail"
            )
            ended = "finished"
        except KilledError:
            ended = "killed"
        except SystemExit as ending:
            assert ending.code == 143
            ended = "terminated"
        event(f"part {ended}")
        found = [*find_checkpoints(directory / "checkpoints")]
        if number == len(parts) - 1:  # in its own directory a run that is cut off would know nothing of these
            found += find_checkpoints(directory / "saved")
        ckpt_path = found[part.resume % len(found)] if part.resume is not None and found else "last"
        if ckpt_path != "last":
            origins.add(ckpt_path)
        elif there := find_checkpoints(directory / "checkpoints"):
            origins.add(there[0])
        note(f"part {number} {ended}; {[path.name for path in found]}; continuing from {ckpt_path}")
    return setup.fit(directory, ckpt_path=ckpt_path), origins


def everything(module: Net, trainer: nf.Trainer, directory: Path) -> dict[str, Any]:
    """All that a run leaves."""

    def plain(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    arrays = jax.tree_util.tree_leaves_with_path(
        {"module": nnx.state(module), "optimizer": trainer._run.train_program.optimizer_state}
    )
    found: dict[str, Any] = {jax.tree_util.keystr(path): plain(leaf).tobytes() for path, leaf in arrays}
    for callback in trainer.callbacks:
        if isinstance(callback, nf.EMAWeights):
            found |= {f"average of {name}": plain(leaf).tobytes() for name, leaf in callback.weights.items()}
    checkpoint = trainer.checkpoint_callback
    return found | {
        "history": dict(trainer.history),
        "callback_metrics": trainer.callback_metrics,
        "logged_metrics": trainer.logged_metrics,
        "progress_bar_metrics": trainer.progress_bar_metrics,
        "csv": (directory / "metrics.csv").read_text(),
        "curves": curves(directory),
        "kept": checkpoint.state_dict()["shelf"]["kept"],
        "best": (checkpoint.best_model_score, Path(checkpoint.best_model_path).name),
        "at": (trainer.global_step, trainer.current_epoch),
    }


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(events.Tags()["scalars"])
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def present(directory: Path) -> set[str]:
    return {path.name for path in find_checkpoints(directory / "checkpoints")}


def assert_same(setup: Setup, parts: list[Part]) -> None:
    with TemporaryDirectory() as whole, TemporaryDirectory() as cut:
        expected = everything(*setup.fit(Path(whole)), Path(whole))
        (module, trainer), origins = interrupted(setup, parts, Path(cut))
        got = everything(module, trainer, Path(cut))
        assert got.keys() == expected.keys()
        different = [name for name, value in expected.items() if got[name] != value]
        shown = "".join(f"\n{name}:\n    {got[name]}\n    {expected[name]}" for name in different)
        assert not different, f"{different} differ from the run that nobody touched:{shown}"
        # What a run was continued from stays as well.
        left = present(Path(cut)) - present(Path(whole))
        allowed = {path.name for path in origins} | {n for n in left if n.startswith(("resumed-", "last"))}
        assert left <= allowed, f"{left - allowed} left"
        assert set(expected["kept"]) <= present(Path(cut))


MONITORS = st.sampled_from([None, "val/loss", "loss_epoch"])


@st.composite
def setups(draw: Any) -> Setup:
    rows = draw(st.integers(3, 9))
    loader = draw(
        st.none()
        | st.fixed_dictionaries({"shuffle": st.booleans(), "drop_last": st.booleans(), "seed": st.integers(0, 3)})
    )
    batches = rows // 2 if loader is not None and loader["drop_last"] else -(-rows // 2)
    validation = draw(st.sampled_from([0, 1, 1, 1, 2]))
    windows = draw(st.none() | st.fixed_dictionaries({0: st.integers(1, 3), 1: st.integers(1, 3)}))
    every_epochs = draw(st.sampled_from([1, 1, 2, None]))
    longest = batches if every_epochs is not None else batches + 2
    trainer = {
        "max_epochs": draw(st.integers(1, 3)),
        "accumulate_grad_batches": 1 if windows is not None else draw(st.integers(1, 3)),
        "log_every_n_steps": draw(st.integers(0, 3)),
        "check_val_every_n_epoch": every_epochs,
        "val_check_interval": draw(
            st.integers(1, longest) if every_epochs is None else st.sampled_from([1.0, 0.5]) | st.integers(1, longest)
        ),
        "max_steps": draw(st.sampled_from([-1, -1, 1, 2, 3, 4, 5])),
        "num_sanity_val_steps": draw(st.integers(0, 1)),
    }
    monitor = draw(MONITORS)
    if monitor == "val/loss" and (validation == 0 or every_epochs != 1):
        monitor = None
    if monitor == "val/loss" and validation == 2:
        monitor = "val/loss/dataloader_idx_1"
    every = draw(st.sampled_from(["every_n_train_steps", "every_n_epochs"]))
    checkpoint = {
        "monitor": monitor,
        "save_top_k": draw(st.sampled_from([-1, 0, 1] if monitor is None else [-1, 1, 2])),
        every: draw(st.integers(1, 4 if every == "every_n_train_steps" else 2)),
        "save_last": draw(st.booleans()),
        "async_save": draw(st.booleans()),
    }
    if monitor == "loss_epoch" and every == "every_n_train_steps":
        checkpoint["monitor"] = None
        checkpoint["save_top_k"] = min(1, checkpoint["save_top_k"])
    ema = draw(
        st.none()
        | st.fixed_dictionaries(
            {
                "decay": st.just(0.5),
                "every_n_steps": st.integers(1, 2),
                "start_step": st.integers(0, 2),
                "use_for_eval": st.booleans(),
            }
        )
    )
    patience = draw(st.none() | st.integers(0, 2)) if (validation, every_epochs) == (1, 1) else None
    return Setup(trainer, checkpoint, ema, rows, loader, validation, windows, patience)


MOMENTS = st.tuples(st.sampled_from(HOOKS), st.integers(1, 9))
PARTS = st.builds(
    Part,
    save=st.none() | MOMENTS,
    end=MOMENTS,
    how=st.sampled_from(["kill", "kill", "terminate", "fail"]),
    resume=st.none() | st.integers(0, 20),
    fewer_epochs=st.integers(0, 1),
)

PHASES = [phase for phase in Phase if phase is not Phase.explain]


@settings(
    derandomize=not NIGHTLY,
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=PHASES,
)
@given(setups(), st.lists(PARTS, min_size=1, max_size=3))
def test_a_run_in_parts_equals_the_run_that_nobody_touched(setup, parts):
    assert_same(setup, parts)
