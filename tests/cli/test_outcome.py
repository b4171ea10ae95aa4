"""How a run ended, and which start finds it."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from nnx_fit.cli import main, outcome

MINE = outcome.Outcome("it was stopped", 4, 0.5, {"val/loss": float("inf")}, tested=False)


@pytest.fixture
def settings() -> DictConfig:
    return OmegaConf.create({"seed": 1, "trainer": {"max_epochs": 2}, "resume": None, "ckpt_path": None})


@pytest.fixture
def record(folder: Path, settings: DictConfig) -> Path:
    place = folder / ".hydra"
    place.mkdir()
    OmegaConf.save(settings, place / "config.yaml")
    outcome.save(MINE, place)
    return place


def test_outcome_is_that_of_the_same_settings(record: Path, settings: DictConfig) -> None:
    assert outcome.of_same_settings(record.parent, settings) == MINE
    same = OmegaConf.merge(settings, {"resume": "auto", "name": "x", "ckpt_path": "y", "test_after_fit": False})
    assert isinstance(same, DictConfig)
    assert outcome.of_same_settings(record.parent, same) == MINE
    for key, value in {"trainer.max_epochs": 3, "seed": 2, "+model.width": 4}.items():
        other = settings.copy()
        OmegaConf.update(other, key.lstrip("+"), value)
        assert outcome.of_same_settings(record.parent, other) is None, key


@pytest.mark.parametrize("text", ["", "\0" * 90, '{"reason": "it was', "[]", "null", '{"reason": "it was stopped"}'])
def test_damaged_outcome_is_as_good_as_none(
    record: Path, settings: DictConfig, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (record / "outcome.json").write_text(text)
    assert outcome.of_same_settings(record.parent, settings) is None
    assert f"{record / 'outcome.json'} is damaged" in caplog.text


def test_outcome_of_an_earlier_start_is_none_of_a_later_one(record: Path, settings: DictConfig) -> None:
    later = record / "resumed-1"
    later.mkdir()
    OmegaConf.save(settings, later / "config.yaml")
    assert outcome.of_same_settings(record.parent, settings) is None


@pytest.mark.slow
def test_run_whose_time_is_over_is_not_finished(project_folder: Path) -> None:
    # Each start has its own time, so that the same command trains on.
    words = ["experiment=mine", "name=slow", "test_after_fit=false", "trainer.max_time={seconds: 0}"]
    assert main.run(words) == 0
    assert (project_folder / "outputs/slow/.hydra/config.yaml").is_file()
    assert not (project_folder / "outputs/slow/.hydra/outcome.json").exists()
