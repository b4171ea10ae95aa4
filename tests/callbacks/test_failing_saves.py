"""Saves that fail while a run goes on: reported, nothing good is lost, and the next attempt is made."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.checkpoint.store import find_checkpoints, load_arrays


class InTheWay(nf.Callback):
    """Puts a file where the checkpoints go, for some steps: nothing can be written there meanwhile."""

    def __init__(self, directory: Path, steps: range):
        self.directory = directory
        self.steps = steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step, aside = trainer.global_step, self.directory.with_name("aside")
        if step == self.steps.start:
            trainer.wait_for_checkpoints()
            self.directory.rename(aside)
            self.directory.write_text("in the way")
        if step == self.steps.stop:
            self.directory.unlink()
            aside.rename(self.directory)


def fit(directory: Path, blocked: range, **options):
    checkpoint = nf.ModelCheckpoint(dirpath=directory, every_n_train_steps=1, **options)
    module = Scalar(1.0, 0.5)
    callbacks = [InTheWay(directory, blocked), checkpoint]
    trainer = quiet(max_steps=8, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(module, targets(*range(8)))
    return module, trainer, checkpoint


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_and_the_next_attempt_is_made(tmp_path, caplog, asynchronous):
    whole = Scalar(1.0, 0.5)
    quiet(max_steps=8).fit(whole, targets(*range(8)))
    directory = tmp_path / "checkpoints"
    with caplog.at_level(logging.ERROR, logger="nnx_fit"):
        module, trainer, checkpoint = fit(directory, range(3, 6), save_top_k=-1, async_save=asynchronous)
    assert module.w[...].tobytes() == whole.w[...].tobytes()
    assert trainer.global_step == 8
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, said
    assert "could not be written" in said[0]
    assert "Training goes on" in said[0]
    steps = sorted(int(path.name.partition("step=")[2]) for path in find_checkpoints(directory) if "step=" in path.name)
    assert steps == [1, 2, 3, 7, 8]
    assert Path(checkpoint.best_model_path).name == "epoch=0-step=8"


def test_what_a_failed_save_would_have_displaced_stays(tmp_path):
    """The newest is kept: while nothing can be written, the one before."""
    directory = tmp_path / "checkpoints"
    seen: list[list[str]] = []

    class Looks(nf.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.wait_for_checkpoints()
                seen.append(sorted(path.name for path in directory.iterdir()))

    checkpoint = nf.ModelCheckpoint(dirpath=directory, every_n_train_steps=1, save_top_k=1, save_last=False)
    trainer = quiet(
        max_steps=8,
        enable_checkpointing=True,
        callbacks=[InTheWay(directory, range(3, 6)), Looks(), checkpoint],
    )
    trainer.fit(Scalar(1.0, 0.5), targets(*range(8)))
    assert "epoch=0-step=3" in seen[0], "the last good one, although three others were attempted since"
    assert sorted(path.name for path in directory.iterdir()) == ["epoch=0-step=8"]


def test_a_run_that_cannot_save_its_end_says_so(tmp_path):
    directory = tmp_path / "checkpoints"
    with pytest.raises(nf.CheckpointError, match="could not be written"):
        fit(directory, range(3, 100))
    good = find_checkpoints(tmp_path / "aside")
    assert good and load_arrays(good[0])["params"]["w"].shape == ()


def test_a_mistake_of_the_users_is_no_bad_luck(tmp_path):
    class Odd(nf.Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["odd"] = object()

    checkpoint = nf.ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=1)
    with pytest.raises(nf.CheckpointError, match="not JSON"):
        quiet(max_steps=8, enable_checkpointing=True, callbacks=[Odd(), checkpoint]).fit(Scalar(), targets(*range(8)))
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
