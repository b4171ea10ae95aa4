"""What the command says when something is wrong: one to three lines, with the nearest valid name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nnx_fit.cli import main

MISTAKES = {
    # unknown keys
    "trainer.max_epoch=3": "trainer.max_epoch: no such setting. Did you mean trainer.max_epochs?",
    "max_epochs=3": "Did you mean trainer.max_epochs?",
    "+trainer.max_epoch=3": "Did you mean trainer.max_epochs?",
    "+trainer.foo=1": "trainer.foo: no such setting.",
    "optimizer.lr=3": "Did you mean optimizer.learning_rate?",
    "optimizer.foo=3": "optimizer.foo: adamw takes no such argument. It takes learning_rate, b1, b2,",
    "model.widht=3": "Did you mean model.width?",
    "+moniter=x": "moniter: no such setting. Did you mean monitor?",
    "callbacks.early_stopping.patiense=3": "Did you mean callbacks.early_stopping.patience?",
    "+callbacks.early_stopping.patiense=3": "Did you mean callbacks.early_stopping.patience?",
    "+callbacks.early_stoping.patience=3": "callbacks.early_stoping has no _target_. Did you mean early_stopping?",
    "logger.tensorboard.save_dr=3": "Did you mean logger.tensorboard.save_dir?",
    "hydra.run.dirr=x": "hydra.run.dirr: no such setting.",
    "~callbacks.foo": "'callbacks.foo' does not exist",
    "experiment=null model.width=3": "model.width: no such setting, since model is null.",
    # what has a group of its own
    "trainer.callbacks=[]": "It is set by the group callbacks",
    "+trainer.logger=false": "It is set by the group logger (logger=csv, logger=none).",
    "trainer.optimizer=sgd": "It is set by the groups optimizer and schedule",
    "trainer.strategy=auto": "It is set by the group strategy",
    "trainer.default_root_dir=x": "name=NAME or hydra.run.dir=DIRECTORY",
    # groups and options
    "optimzer=sgd": "optimzer: no such setting. Did you mean optimizer?",
    "optimizer=sdg": "optimizer=sdg: expected one of adafactor, adam, adamw, lion, rmsprop, sgd. Did you mean sgd?",
    "trainer=5": "trainer=5: expected one of barebones, default.",
    "debug=fst": "Did you mean fast?",
    "hydra/launcher=foo": "expected one of basic",
    # types
    "trainer.max_epochs=abc": "trainer.max_epochs=abc: expected int or null.",
    "+trainer.max_epochs=[1,2]": "trainer.max_epochs=[1,2]: expected int or null.",
    "trainer.limit_val_batches=abc": "trainer.limit_val_batches=abc: expected int or float.",
    "callbacks.early_stopping.patience=x": "callbacks.early_stopping.patience=x: expected int.",
    "seed=a": "seed=a: expected int, got str.",
    # values
    "trainer.precision=bf16mixed": "expected one of 32, bf16-mixed, bf16-true, 16-mixed. Did you mean bf16-mixed?",
    "callbacks.early_stopping.mode=mx": "expected one of min, max. Did you mean max?",
    "resume=never name=x": "resume=never: expected one of auto.",
    "seed=-1": "seed=-1: expected a number from 0",
    "name=../x": "name=../x: expected a directory name below outputs/.",
    "resume=auto": "resume=auto needs name=NAME",
    "experiment=null": "model=null: nothing is chosen.",
    # the command line itself
    "model={a:1": "model={a:1: not an override that can be read",
    "a=b(c)": "Unknown function 'b'",
    "test": "test needs ckpt_path=PATH",
    "predict ckpt_path=last": "predict cannot take ckpt_path=last",
    "-m trainer.max_epoch=1,2": "Did you mean trainer.max_epochs?",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake_is_named_in_at_most_three_lines(line: str, fails: Callable[[str], str]) -> None:
    said = fails(line)
    assert said.startswith("ConfigurationError: ")
    assert MISTAKES[line] in said
    assert len(said.splitlines()) <= 3


@pytest.mark.parametrize("line", ["seed=a", "name=fixed resume=never", "+trainer.foo=1", "name=../x"])
def test_refused_run_leaves_nothing_behind(line: str, fails: Callable[[str], str], folder: Path) -> None:
    fails(line)
    assert list(folder.iterdir()) == []


def test_broken_yaml_is_named_by_file_and_line(fails: Callable[[str], str], folder: Path) -> None:
    file = folder / "conf" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nmodel:\n  a: [1\nb: 2\n")
    said = fails("experiment=mine")
    assert str(file) in said
    assert "line 4" in said


def test_wrong_type_in_a_file_names_the_file(fails: Callable[[str], str], folder: Path) -> None:
    file = folder / "conf" / "trainer" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("max_epochs: many\n")
    said = fails("trainer=mine")
    assert "trainer.max_epochs" in said
    assert "Expected int or null." in said
    assert "trainer/mine" in said


def test_place_that_cannot_be_written_to_is_named(fails: Callable[[str], str], folder: Path) -> None:
    (folder / "taken").write_text("a file")
    said = fails("hydra.run.dir=taken/run")
    assert said.startswith("ConfigurationError: cannot write to")
    assert "hydra.run.dir" in said


def test_exception_in_user_code_shows_the_users_frames_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.py").write_text("def build():\n    return inner()\n\n\ndef inner():\n    return 1 / 0\n")
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nmodel: {_target_: broken.build}\ndata: {_target_: broken.build}\n"
    )
    assert main.run(["experiment=mine"]) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in said
    assert said.count('broken.py"') == 2
    assert "hydra" not in said
    assert "site-packages" not in said


def test_file_that_user_code_cannot_read_is_no_mistake_of_the_settings(
    project_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (project_folder / "tiny.py").open("a") as file:
        file.write("\n\ndef points():\n    import pathlib\n\n    return pathlib.Path('no.npy').read_bytes()\n")
    assert main.run(["experiment=mine", "data._target_=tiny.points"]) == 1
    said = capsys.readouterr().err
    assert "No such file or directory: 'no.npy'" in said
    assert "cannot write" not in said
    assert "in points" in said


def test_traceback_is_shown_on_request(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNX_FIT_TRACEBACK", "1")
    assert main.run(["trainer.max_epochs=abc"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_job_line_of_hydra_is_left_out(fails: Callable[[str], str]) -> None:
    assert "Error executing job" not in fails("seed=a")
