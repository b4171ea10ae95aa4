"""Which checkpoint a run continues from when some are damaged, and that nothing is touched before that is known."""

import logging
import shutil

import pytest
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.checkpoint import checksums
from nnx_fit.checkpoint.directories import newest_undamaged
from nnx_fit.checkpoint.store import load_meta
from nnx_fit.errors import CheckpointError, ConfigurationError


class Watch(nf.Callback):
    """Has a state of its own, and notes what it is given."""

    def __init__(self):
        self.given = []

    def state_dict(self):
        return {"mine": 1}

    def load_state_dict(self, state):
        self.given.append(dict(state))

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.given.append("loaded")


def trainer(directory, watch=None, **options):
    checkpoint = nf.ModelCheckpoint(directory, save_top_k=-1, save_last=False, every_n_train_steps=1)
    callbacks = [checkpoint] if watch is None else [watch, checkpoint]
    return quiet(**{"max_epochs": 1, "jit": False, "enable_checkpointing": True, "callbacks": callbacks} | options)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """What a run of four updates left: a checkpoint after each."""
    directory = tmp_path_factory.mktemp("run")
    mine = trainer(directory, Watch())
    mine.fit(Scalar(), targets(1, 2, 3, 4))
    assert sorted(load_meta(path)["global_step"] for path in directory.iterdir()) == [1, 2, 3, 4]
    return directory


@pytest.fixture
def run(template, tmp_path):
    return shutil.copytree(template, tmp_path / "checkpoints")


def of_step(run, step):
    return next(path for path in run.glob("epoch=*") if load_meta(path)["global_step"] == step)


def break_array(path):
    """Flips a bit in the largest file of arrays, which Orbax reads without complaint where it is in the data."""
    file = max((path / "arrays").rglob("*"), key=lambda each: each.stat().st_size if each.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.relative_to(path).as_posix()


def continued(run, caplog, ckpt_path="last"):
    caplog.clear()
    mine = trainer(run, max_epochs=2)
    with caplog.at_level(logging.INFO):
        mine.fit(Scalar(start=9.0), targets(1, 2, 3, 4), ckpt_path=ckpt_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    starts = [record.args[1] for record in caplog.records if record.msg.startswith("Continuing from")]
    assert mine.global_step == 8
    return starts, warnings


def test_last_takes_the_one_before_a_damaged_array_and_says_so_once(run, caplog):
    newest = of_step(run, 4)
    name = break_array(newest)
    starts, warnings = continued(run, caplog)
    assert starts == [3]
    assert len(warnings) == 1 and str(newest) in warnings[0] and f"\n    {name} " in warnings[0]


def test_each_damaged_one_is_named_once_and_all_of_them_are_passed_over(run, caplog):
    damaged = [of_step(run, step) for step in (4, 3, 2)]
    break_array(damaged[0])
    (damaged[1] / "meta" / "meta.json").write_text("{}")
    shutil.rmtree(damaged[2] / "arrays")
    starts, warnings = continued(run, caplog)
    assert starts == [1] and len(warnings) == 3
    assert all(sum(str(path) in warning for warning in warnings) == 1 for path in damaged)


def test_after_going_back_on_purpose_last_is_of_the_new_branch(run, caplog):
    """The abandoned branch got further; clocks do not matter, since copies of a directory have the times of copying."""
    before = of_step(run, 2)
    mine = trainer(run, max_epochs=1, max_steps=3)
    mine.fit(Scalar(start=9.0), targets(1, 2, 3, 4), ckpt_path=before)
    assert [load_meta(of_step(run, step))["life"] for step in (1, 2, 3, 4)] == [1, 1, 2, 1]
    shutil.copytree(run, moved := run.with_name("moved"), copy_function=shutil.copy)
    assert continued(moved, caplog) == ([3], [])
    # That life has saved to the end, and is the newest by now.
    assert load_meta(of_step(moved, 8))["life"] == 3


def test_after_going_back_last_is_where_it_went_back_to_even_before_a_new_one_is_saved(run, caplog):
    class Cut(nf.Callback):
        def on_train_start(self, trainer, module):
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        trainer(run, Cut()).fit(Scalar(), targets(1, 2, 3, 4), ckpt_path=of_step(run, 2))
    assert newest_undamaged(run) == run / "epoch=0-step=2"
    assert continued(run, caplog) == ([2], [])
    assert {load_meta(path)["life"] for path in run.glob("epoch=*")} == {1, 3}
    assert newest_undamaged(run) == run / "epoch=1-step=8"


def test_continuing_from_a_checkpoint_of_another_run_changes_nothing_there(run, tmp_path):
    before = sorted(path.name for path in run.iterdir())
    trainer(tmp_path / "mine").fit(Scalar(), targets(1, 2, 3, 4), ckpt_path=of_step(run, 2))
    assert sorted(path.name for path in run.iterdir()) == before
    assert newest_undamaged(run) == run / "epoch=0-step=4"


def test_one_that_was_not_finished_is_no_news(run, caplog):
    (of_step(run, 4) / "commit_success.txt").unlink()
    assert continued(run, caplog) == ([3], [])


def test_with_all_of_them_damaged_the_run_starts_fresh_and_says_why(run, caplog):
    for path in run.iterdir():
        break_array(path)
    starts, warnings = continued(run, caplog)
    assert starts == [] and len(warnings) == 5
    assert warnings[-1] == f'ckpt_path="last": there is no checkpoint that is not damaged in {run}; starting fresh.'


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error_that_names_the_next_good_one(run, verb):
    newest, before = of_step(run, 4), of_step(run, 3)
    name = break_array(newest)
    watch, module = Watch(), Scalar(start=9.0)
    mine = trainer(run, watch)
    with pytest.raises(CheckpointError) as caught:
        getattr(mine, verb)(module, targets(1), ckpt_path=newest)
    assert f"{newest} is damaged:\n    {name} has changed" in str(caught.value)
    assert f"Fix: use {before}," in str(caught.value)
    assert watch.given == [] and float(module.w[...]) == 9.0 and mine.global_step == 0 and not mine.history


def test_the_best_has_none_before_it(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="loss")
    mine = quiet(max_epochs=1, jit=False, enable_checkpointing=True, callbacks=[checkpoint])
    mine.fit(Scalar(), targets(1, 2))
    name = break_array(tmp_path / checkpoint.best_model_path)
    with pytest.raises(CheckpointError, match=f"is damaged:\n    {name} has changed"):
        mine.validate(Scalar(), targets(1), ckpt_path="best")


def test_no_older_checkpoint_stands_in_for_one_of_a_newer_version(run):
    newest = of_step(run, 4)
    meta = newest / "meta" / "meta.json"
    meta.write_bytes(checksums.sealed({**checksums.unsealed(meta.read_bytes()), "format": 2}))
    watch, module = Watch(), Scalar(start=9.0)
    with pytest.raises(CheckpointError, match=f"{newest} has format 2; this nnx_fit reads up to 1. Fix: update"):
        trainer(run, watch).fit(module, targets(1), ckpt_path="last")
    assert watch.given == [] and float(module.w[...]) == 9.0


def test_a_run_directory_is_told_from_its_checkpoints(run):
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint(.|\n)*checkpoints in .*/checkpoints: epoch=0-step=4, "
    ):
        quiet(max_epochs=1).fit(Scalar(), targets(1), ckpt_path=run.parent)


def test_weights_alone_are_refused_before_anything_is_touched(tmp_path):
    mine = quiet(max_epochs=1, jit=False)
    mine.fit(Scalar(), targets(2))
    mine.save_checkpoint(tmp_path / "w", weights_only=True)
    watch = Watch()
    with pytest.raises(CheckpointError, match=r"weights only(.|\n)*Scalar.load_from_checkpoint"):
        quiet(max_epochs=1, jit=False, callbacks=[watch]).fit(Scalar(), targets(2), ckpt_path=tmp_path / "w")
    assert watch.given == []


@pytest.mark.parametrize("word", ["best", "last"])
def test_words_need_a_callback_that_knows_what_they_mean(word):
    with pytest.raises(ConfigurationError, match=f'ckpt_path="{word}"'):
        quiet(max_epochs=1).validate(Scalar(), targets(1), ckpt_path=word)
