"""ModelCheckpoint in real fits: what is on disk, when, and under which name."""

import datetime
import math
import os
import signal

import jax.numpy as jnp
import nets
import numpy as np
import pytest
from scripted import scripted_fit

import nnx_fit as nf
from nnx_fit.checkpoint.store import find_checkpoints, is_complete, load_arrays, load_meta


def fit(values, checkpoint, *, batches=2, ckpt_path=None, **options):
    trainer = nets.quiet(
        callbacks=[*options.pop("callbacks", []), checkpoint],
        enable_checkpointing=True,
        **{"max_epochs": len(values), "jit": False, **options},
    )
    return scripted_fit(values, trainer, batches=batches, ckpt_path=ckpt_path)


def on_disk(directory):
    names = sorted(path.name for path in directory.iterdir())
    assert all(is_complete(directory / name) for name in names)
    return names


def steps(directory):
    return {path.name: load_meta(path)["global_step"] for path in directory.iterdir()}


def weight(path):
    return float(load_arrays(path)["params"]["w"])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_newest_and_last_without_a_monitor(tmp_path, asynchronous):
    checkpoint = nf.ModelCheckpoint(tmp_path, async_save=asynchronous)
    trainer = fit([1, 1, 1], checkpoint)
    assert on_disk(tmp_path) == ["epoch=2-step=6", "last"]
    assert checkpoint.best_model_path == str(tmp_path / "epoch=2-step=6")
    assert checkpoint.best_model_score is None
    assert checkpoint.last_model_path == str(tmp_path / "last")
    assert weight(tmp_path / "last") == pytest.approx(float(trainer.module.w[...]), rel=1e-6)


def test_default_directory_is_the_runs(tmp_path):
    checkpoint = nf.ModelCheckpoint()
    fit([1], checkpoint, default_root_dir=tmp_path / "run")
    assert on_disk(tmp_path / "run" / "checkpoints") == ["epoch=0-step=2", "last"]
    checkpoint = nf.ModelCheckpoint()
    fit([1], checkpoint, logger=nf.CSVLogger(tmp_path, name="a"), default_root_dir=tmp_path / "run")
    assert on_disk(tmp_path / "a" / "version_0" / "checkpoints") == ["epoch=0-step=2", "last"]


def test_best_by_the_monitored_metric(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target", mode="max", filename="{epoch}-{val/target:.1f}")
    fit([1, 3, 2, 3], checkpoint)
    assert on_disk(tmp_path) == ["epoch=1-val_target=3.0", "last"]
    assert checkpoint.best_model_path == str(tmp_path / "epoch=1-val_target=3.0")
    assert checkpoint.best_model_score == 3.0
    assert steps(tmp_path) == {"epoch=1-val_target=3.0": 4, "last": 8}


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [(0, []), (2, [1, 3]), (-1, [0, 1, 2, 3])],
)
def test_number_of_checkpoints_kept(tmp_path, top_k, kept):
    fit([3, 1, 2, 0], nf.ModelCheckpoint(tmp_path, monitor="val/target", save_top_k=top_k))
    assert on_disk(tmp_path) == [*(f"epoch={epoch}-step={2 * epoch + 2}" for epoch in kept), "last"]


def test_metric_that_is_nan_is_worse_than_any_number(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target")
    fit([math.nan, 7, math.nan], checkpoint)
    assert checkpoint.best_model_score == 7.0
    assert on_disk(tmp_path) == ["epoch=1-step=4", "last"]


def test_no_last_when_not_asked_for(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target", save_last=False)
    fit([1, 2, 3], checkpoint)
    assert on_disk(tmp_path) == ["epoch=0-step=2"]
    assert checkpoint.last_model_path == ""


class Watch(nf.Callback):
    """Notes what is on disk after each step and epoch."""

    phase = "save"

    def __init__(self, directory, hook):
        self.seen = []
        self._directory = directory
        setattr(self, hook, self._look)

    def _look(self, trainer, *args):
        trainer.wait_for_checkpoints()
        names = [path.name for path in self._directory.iterdir()] if self._directory.exists() else []
        self.seen.append(sorted(names))


def test_a_state_that_is_not_among_the_best_is_kept_as_last_meanwhile(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target", async_save=False)
    watch = Watch(tmp_path, "on_train_epoch_end")
    trainer = nets.quiet(max_epochs=4, callbacks=[checkpoint, watch], enable_checkpointing=True)
    scripted_fit([2, 3, 1, 5], trainer)
    assert watch.seen == [
        ["epoch=0-step=2"],
        ["epoch=0-step=2", "last"],
        ["epoch=2-step=6"],
        ["epoch=2-step=6", "last"],
    ]


def test_every_n_train_steps(tmp_path):
    fit([1, 1], nf.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2), batches=3)
    assert steps(tmp_path) == {"epoch=0-step=2": 2, "epoch=1-step=4": 4, "epoch=1-step=6": 6, "last": 6}


def test_every_n_epochs(tmp_path):
    fit([1] * 5, nf.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=2))
    assert on_disk(tmp_path) == ["epoch=1-step=4", "epoch=3-step=8", "last"]


@pytest.mark.parametrize(
    "interval", [datetime.timedelta(microseconds=1), {"microseconds": 1}, 1e-6], ids=["timedelta", "dict", "seconds"]
)
def test_time_interval(tmp_path, interval):
    fit([1], nf.ModelCheckpoint(tmp_path, save_top_k=-1, train_time_interval=interval))
    assert on_disk(tmp_path) == ["epoch=0-step=1", "epoch=0-step=2", "last"]


def test_long_time_interval_saves_the_last_state_only(tmp_path):
    fit([1], nf.ModelCheckpoint(tmp_path, train_time_interval={"hours": 1}))
    assert on_disk(tmp_path) == ["last"]


def test_step_triggered_save_waits_for_the_validation_metric(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target", save_top_k=-1, every_n_train_steps=1)
    fit([5, 4], checkpoint, batches=4)
    # Four steps and one validation in each epoch: what became due in between is saved at the validation.
    assert on_disk(tmp_path) == ["epoch=0-step=4", "epoch=1-step=8", "last"]
    assert checkpoint.best_model_score == 4.0


def test_step_triggered_save_by_a_training_metric_does_not_wait(tmp_path):
    fit([5, 4], nf.ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1, every_n_train_steps=2), batches=4)
    assert on_disk(tmp_path) == ["epoch=0-step=2", "epoch=0-step=4", "epoch=1-step=6", "epoch=1-step=8", "last"]


def test_validations_within_an_epoch_are_saved_where_they_happen(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target", save_top_k=-1)
    fit([4, 3, 2, 1], checkpoint, batches=4, max_epochs=2, val_check_interval=0.5)
    assert on_disk(tmp_path) == ["epoch=0-step=2", "epoch=0-step=4", "epoch=1-step=6", "epoch=1-step=8", "last"]


def test_validation_in_every_second_epoch(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target", save_top_k=-1)
    fit([4, 3], checkpoint, max_epochs=4, check_val_every_n_epoch=2)
    assert on_disk(tmp_path) == ["epoch=1-step=4", "epoch=3-step=8", "last"]


def test_monitored_metric_that_nobody_logs_lists_those_that_exist(tmp_path):
    with pytest.raises(nf.ConfigurationError, match=r"ModelCheckpoint\(monitor='val/acc'\)(.|\n)*: loss, val/target\."):
        fit([1, 1], nf.ModelCheckpoint(tmp_path, monitor="val/acc"))
    with pytest.raises(nf.ConfigurationError, match=r"ModelCheckpoint\(monitor='val/acc'\)"):
        fit([1, 1, 1], nf.ModelCheckpoint(tmp_path / "b", monitor="val/acc", every_n_train_steps=1), max_epochs=2)


def test_last_is_the_state_an_error_ended(tmp_path):
    class Failing(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        fit([1, 1], nf.ModelCheckpoint(tmp_path), callbacks=[Failing()])
    assert steps(tmp_path) == {"epoch=0-step=2": 2, "last": 3}
    with pytest.raises(RuntimeError, match=r"^mine$"):
        fit([1, 1], nf.ModelCheckpoint(tmp_path / "b", save_on_exception=False), callbacks=[Failing()])
    assert steps(tmp_path / "b") == {"epoch=0-step=2": 2}


def test_last_is_the_state_after_the_modules_own_end_hook(tmp_path):
    class Averaged(nets.Scalar):
        def on_train_end(self):
            self.w[...] = jnp.asarray(42.0)

    checkpoint = nf.ModelCheckpoint(tmp_path)
    trainer = nets.quiet(max_epochs=1, callbacks=checkpoint, enable_checkpointing=True)
    trainer.fit(Averaged(), nets.targets(0.5))
    assert weight(tmp_path / "last") == 42.0
    assert weight(tmp_path / "epoch=0-step=1") != 42.0


def test_run_that_never_trained_leaves_nothing(tmp_path):
    fit([1], nf.ModelCheckpoint(tmp_path / "c"), limit_train_batches=0)
    assert not (tmp_path / "c").exists()


def test_second_run_in_one_directory_leaves_the_first_alone(tmp_path):
    fit([1], nf.ModelCheckpoint(tmp_path))
    before = {path.name: (path / "commit_success.txt").stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = nf.ModelCheckpoint(tmp_path)
    fit([1], second)
    assert on_disk(tmp_path) == ["epoch=0-step=2", "epoch=0-step=2-v1", "last", "last-v1"]
    assert second.last_model_path == str(tmp_path / "last-v1")
    for name, written in before.items():
        assert (tmp_path / name / "commit_success.txt").stat().st_mtime_ns == written


def test_continued_run_in_its_own_directory_ends_with_one_last(tmp_path):
    fit([3, 1], nf.ModelCheckpoint(tmp_path, monitor="val/target"))
    resumed = nf.ModelCheckpoint(tmp_path, monitor="val/target")
    fit([2, 0.5], resumed, max_epochs=4, ckpt_path=tmp_path / "epoch=1-step=4")
    # The checkpoint that the run came from is neither the best nor the last any more, and still there.
    assert steps(tmp_path) == {"epoch=1-step=4": 4, "epoch=3-step=8": 8, "last": 8}
    assert resumed.best_model_score == 0.5


def test_continued_run_knows_the_best_of_its_first_life(tmp_path):
    fit([3, 1], nf.ModelCheckpoint(tmp_path, monitor="val/target"))
    resumed = nf.ModelCheckpoint(tmp_path, monitor="val/target")
    fit([2, 3], resumed, max_epochs=4, ckpt_path=tmp_path / "epoch=1-step=4")
    assert steps(tmp_path) == {"epoch=1-step=4": 4, "last": 8}
    assert (resumed.best_model_path, resumed.best_model_score) == (str(tmp_path / "epoch=1-step=4"), 1.0)


def test_continuing_from_last_keeps_it_under_another_name(tmp_path):
    fit([1, 1], nf.ModelCheckpoint(tmp_path))
    fit([1, 1], nf.ModelCheckpoint(tmp_path), max_epochs=4, ckpt_path=tmp_path / "last")
    assert steps(tmp_path) == {"epoch=3-step=8": 8, "last": 8, "resumed-step=4": 4}


def test_continuing_in_another_directory_touches_nothing_in_the_first(tmp_path):
    fit([3, 1], nf.ModelCheckpoint(tmp_path / "a", monitor="val/target"))
    before = steps(tmp_path / "a")
    resumed = nf.ModelCheckpoint(tmp_path / "b", monitor="val/target")
    fit([2, 1.5], resumed, max_epochs=4, ckpt_path=tmp_path / "a" / "last")
    assert steps(tmp_path / "a") == before
    assert steps(tmp_path / "b") == {"epoch=3-step=8": 8, "last": 8}
    # The best of the whole run is still the one of its first part.
    assert (resumed.best_model_path, resumed.best_model_score) == (str(tmp_path / "a" / "epoch=1-step=4"), 1.0)


def test_weights_only(tmp_path):
    fit([1], nf.ModelCheckpoint(tmp_path / "w", save_weights_only=True))
    fit([1], nf.ModelCheckpoint(tmp_path / "all"))
    assert set(load_arrays(tmp_path / "w" / "last")) < set(load_arrays(tmp_path / "all" / "last"))


def test_newest_complete_checkpoint_is_found_while_the_run_goes_on(tmp_path):
    class Look(nf.Callback):
        phase = "save"

        def on_train_epoch_end(self, trainer, module):
            trainer.wait_for_checkpoints()
            newest = find_checkpoints(tmp_path)[0]
            assert load_meta(newest)["global_step"] == trainer.global_step
            assert weight(newest) == np.float32(module.w[...])

    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target")
    trainer = nets.quiet(max_epochs=5, callbacks=[checkpoint, Look()], enable_checkpointing=True)
    scripted_fit([3, 2, 4, 5, 1], trainer)


def test_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(nf.CheckpointError, match=r"cannot be saved in .*file/run: .*/file is a file\.(.|\n)*Fix: pass"):
        fit([1], nf.ModelCheckpoint(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_top_k": 3}, "save_top_k=3, monitor=None"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 1.0}, "save_top_k=1.0"),
        ({"mode": "auto"}, "mode='auto'"),
        ({"every_n_train_steps": 5, "every_n_epochs": 1}, "only one of them"),
        ({"every_n_train_steps": -5}, "every_n_train_steps=-5"),
        ({"train_time_interval": 0}, "train_time_interval=0"),
        ({"train_time_interval": {"fortnights": 1}}, "train_time_interval="),
        ({"filename": "a/b"}, "filename='a/b'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        nf.ModelCheckpoint(**arguments)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_last_is_the_state_a_signal_ended(tmp_path, number, error):
    class Interrupts(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                os.kill(os.getpid(), number)

    checkpoint = nf.ModelCheckpoint(tmp_path)
    with pytest.raises(error):
        fit([1, 1], checkpoint, callbacks=[Interrupts()])
    assert steps(tmp_path) == {"epoch=0-step=2": 2, "last": 3}
    assert checkpoint.last_model_path == str(tmp_path / "last")


def test_best_is_that_of_the_last_fit(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target")
    trainer = nets.quiet(max_epochs=2, jit=False, callbacks=checkpoint, enable_checkpointing=True)
    scripted_fit([2, 1], trainer)
    scripted_fit([6, 5], trainer)
    assert (checkpoint.best_model_path, checkpoint.best_model_score) == (str(tmp_path / "epoch=1-step=4-v1"), 5.0)
    assert on_disk(tmp_path) == ["epoch=1-step=4", "epoch=1-step=4-v1", "last", "last-v1"]


def test_one_callback_in_two_trainers_saves_in_the_directory_of_each(tmp_path):
    checkpoint = nf.ModelCheckpoint(monitor="val/target")
    fit([2], checkpoint, default_root_dir=tmp_path / "a")
    fit([1], checkpoint, default_root_dir=tmp_path / "b")
    assert checkpoint.best_model_path == str(tmp_path / "b" / "checkpoints" / "epoch=0-step=2")
    assert on_disk(tmp_path / "a" / "checkpoints") == ["epoch=0-step=2", "last"]
