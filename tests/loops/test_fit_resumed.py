"""The fit loop where a run continues: what was done is not done again, and what was still to do is."""

from __future__ import annotations

import shutil
import signal

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from nets import SavesIn, Scalar, quiet, targets

import nnx_fit as nf


class Logs(Scalar):
    """Logs in the hooks that begin and end something."""

    def on_train_start(self):
        self.log("begun", 1, reduce="sum")

    def on_train_epoch_start(self):
        self.log("epochs", 1, reduce="sum")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("batch", batch_idx)


def saving_last(path, hook: str, call: int) -> SavesIn:
    """Saves after the module's own hook."""
    saver = SavesIn(path, hook, call)
    saver.phase = "save"
    return saver


def fit(callbacks=(), ckpt_path=None, **options):
    options = {"max_epochs": 2, "log_every_n_steps": 1, **options}
    trainer = quiet(jit=False, callbacks=list(callbacks), **options)
    return dict(trainer.fit(Logs(), targets(1, 2, 3, 4), targets(5), ckpt_path=ckpt_path))


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_train_start", 1),
        ("on_train_epoch_start", 1),
        ("on_train_epoch_start", 2),
        ("on_train_batch_start", 1),
        ("on_train_batch_end", 2),
        ("on_train_batch_end", 6),
        ("on_train_epoch_end", 1),
    ],
)
def test_what_hooks_log_that_are_called_again_counts_once(tmp_path, hook, call):
    whole = fit([saving_last(tmp_path / "cut", hook, call)])
    assert whole["begun"] == [(4, 1.0)] and whole["epochs"] == [(4, 1.0), (8, 1.0)]
    assert fit(ckpt_path=tmp_path / "cut") == whole


def test_a_batch_within_a_window_is_no_log_point(tmp_path):
    options = {"accumulate_grad_batches": 2}
    whole = fit([saving_last(tmp_path / "cut", "on_train_batch_end", 3)], **options)
    assert whole["batch"] == [(1, 1.0), (2, 3.0), (3, 1.0), (4, 3.0)]
    assert fit(ckpt_path=tmp_path / "cut", **options) == whole


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end"])
@pytest.mark.parametrize("steps", [3, 4])  # within the epoch, or with its last batch
def test_a_run_saved_after_its_last_step_still_ends_its_epoch_once(tmp_path, hook, steps):
    call = steps if hook == "on_train_batch_end" else 1
    whole = fit([saving_last(tmp_path / "cut", hook, call)], max_steps=steps)
    assert whole["val/target"] == [(steps, 5.0)] and whole["epochs"] == [(steps, 1.0)]
    assert fit(ckpt_path=tmp_path / "cut", max_steps=steps) == whole


def test_a_validation_that_stops_the_run_stops_it_also_where_it_comes_first(tmp_path):
    class Stops(nf.Callback):
        def on_validation_end(self, trainer, module):
            trainer.should_stop = True

    options = {"val_check_interval": 2}
    whole = fit([saving_last(tmp_path / "cut", "on_train_batch_end", 2), Stops()], **options)
    assert whole["epochs"] == [(2, 1.0)]
    assert fit([Stops()], ckpt_path=tmp_path / "cut", **options) == whole


class First(nf.Callback):
    """Notes what it hears of."""

    def __init__(self):
        self.heard: list[tuple[str, int]] = []

    def on_validation_end(self, trainer, module):
        self.heard.append(("validation", trainer.global_step))

    def on_train_epoch_end(self, trainer, module):
        self.heard.append(("epoch", trainer.global_step))


class Second(First):
    pass


class Deciding(First):
    phase = "decide"


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_who_had_not_heard_of_a_hook_when_the_run_was_saved_in_it_hears_of_it(tmp_path, hook):
    whole, rest = ([First(), Second(), Deciding()] for _ in range(2))
    fit([whole[0], SavesIn(tmp_path / "cut", hook, 1), *whole[1:]])
    fit(rest, ckpt_path=tmp_path / "cut")
    at = {"on_validation_end": ("validation", 4), "on_train_epoch_end": ("epoch", 4)}[hook]
    index = whole[0].heard.index(at)
    assert rest[0].heard == whole[0].heard[index + 1 :]
    assert rest[1].heard == rest[2].heard == whole[1].heard[index:]


def test_a_hook_that_fails_is_called_again_and_those_after_it_as_well(tmp_path):
    class Fails(nf.Callback):
        def on_train_epoch_end(self, trainer, module):
            raise KeyError("failed")

    whole, cut, rest = ([First(), Second()] for _ in range(3))
    fit(whole)
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    with pytest.raises(KeyError):
        fit([cut[0], Fails(), cut[1]], **saving)
    fit(rest, ckpt_path="last", **saving)
    assert [mine.heard + others.heard for mine, others in zip(cut, rest, strict=True)] == [each.heard for each in whole]


def test_what_a_validation_had_recorded_of_its_batches_is_not_recorded_again(tmp_path):
    class Steps(Scalar):
        def validation_step(self, batch):
            self.log("val", batch["target"].mean(), on_step=True, on_epoch=True)

    def run(*callbacks, **how):
        loaders = [targets(5, 6, 7), targets(8, 9)]
        trainer = quiet(max_epochs=2, val_check_interval=2, jit=False, callbacks=[*callbacks])
        return dict(trainer.fit(Steps(), targets(1, 2, 3, 4), loaders, **how))

    whole = run(*(SavesIn(tmp_path / str(call), "on_validation_batch_end", call) for call in (1, 4, 7)))
    for call in (1, 4, 7):
        assert run(ckpt_path=tmp_path / str(call)) == whole


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_validation_end"])
def test_a_plateau_counts_a_validation_that_a_run_does_again(tmp_path, hook):
    class Flat(Scalar):
        def configure_optimizers(self):
            reduce = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
            return nf.OptimizerSpec(optax.chain(optax.sgd(0.1), reduce), monitor="val")

        def validation_step(self, batch):
            self.log("val", 1.0)

    def run(*callbacks, **how):
        module = Flat(0.0)
        trainer = quiet(max_epochs=2, val_check_interval=1, jit=False, callbacks=[*callbacks])
        trainer.fit(module, targets(1, 2, 3, 4), targets(5), **how)
        return float(module.w[...])

    whole = run(SavesIn(tmp_path / "cut", hook, 2))
    assert run(ckpt_path=tmp_path / "cut") == whole


def test_a_validation_that_a_signal_cuts_off_leaves_nothing(tmp_path):
    """What the first loader of two has counted is counted again by the run that continues."""

    class Counts(Scalar):
        eval_mutable = nnx.BatchStat

        def __init__(self):
            super().__init__()
            self.seen = nnx.BatchStat(jnp.zeros(()))

        def validation_step(self, batch):
            self.seen[...] += 1
            self.log("val", self.seen[...])

    class Cut(nf.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx):
            if trainer.global_step == 2 and dataloader_idx == 1:
                signal.raise_signal(signal.SIGTERM)

    def run(*callbacks, **how):
        module = Counts()
        options = {"val_check_interval": 2, "enable_checkpointing": True, "default_root_dir": tmp_path}
        trainer = quiet(max_epochs=1, callbacks=[*callbacks], **options)
        history = dict(trainer.fit(module, targets(1, 2, 3, 4), [targets(5, 6), targets(7, 8)], **how))
        return history, float(module.seen[...])

    whole = run()
    assert whole[1] == 8
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(SystemExit):
        run(Cut())
    assert run(ckpt_path="last") == whole
