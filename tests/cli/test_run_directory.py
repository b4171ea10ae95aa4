"""Whose a run directory is."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nnx_fit.cli import run_directory
from nnx_fit.errors import ConfigurationError


def test_second_claim_of_a_directory_is_refused(folder: Path) -> None:
    run = folder / "outputs" / "mine"
    run.mkdir(parents=True)
    assert run_directory.claim(run, resume=False) is False
    with pytest.raises(ConfigurationError, match=r"name=mine: outputs/mine exists") as error:
        run_directory.claim(run, resume=False)
    assert "resume=auto" in str(error.value)
    assert run_directory.claim(run, resume=True) is True


def test_directory_with_anything_in_it_is_taken(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="exists"):
        run_directory.claim(folder, resume=False)
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]


def test_fresh_run_under_resume_auto_is_not_a_continuation(folder: Path) -> None:
    assert run_directory.claim(folder, resume=True) is False


def test_record_is_resolved_and_survives_a_continuation(folder: Path) -> None:
    run_directory.claim(folder, resume=False)
    hydra = OmegaConf.create({"overrides": {"task": ["a=1"]}, "runtime": {"cwd": "/", "output_dir": str(folder)}})
    run_directory.write_record(folder, OmegaConf.create({"a": 1, "b": "${a}"}), hydra, resumed=False)
    run_directory.write_record(folder, OmegaConf.create({"a": 2, "b": "${a}"}), hydra, resumed=True)
    assert OmegaConf.load(folder / ".hydra" / "config.yaml") == {"a": 1, "b": 1}
    assert OmegaConf.load(folder / ".hydra" / "overrides.yaml") == ["a=1"]
    assert OmegaConf.load(folder / ".hydra" / "resumed-1" / "config.yaml") == {"a": 2, "b": 2}


def test_only_an_empty_run_is_discarded(folder: Path) -> None:
    run = folder / "outputs" / "day" / "time"
    for name in (".hydra", "checkpoints"):
        (run / name).mkdir(parents=True)
    (run / "run.log").write_text("")
    run_directory.discard_if_empty(run)
    assert run.is_dir()
    (run / "checkpoints").rmdir()
    run_directory.discard_if_empty(run)
    assert list(folder.iterdir()) == []


def test_working_directory_is_never_removed(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    run_directory.discard_if_empty(run)
    assert folder.is_dir()
    assert not run.exists()
