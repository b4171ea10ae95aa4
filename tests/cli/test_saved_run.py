"""An evaluation starts from the config of the run that its checkpoint belongs to."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nnx_fit.cli import main, saved_run

SAVED = {
    "seed": 3,
    "name": "theirs",
    "monitor": "val/loss",
    "trainer": {"max_epochs": 7},
    "model": {"_target_": "theirs.Net", "width": 5},
    "data": {"_target_": "theirs.Data", "path": "x"},
    "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.5},
    "callbacks": None,
}


@pytest.fixture
def run_dir(folder: Path) -> Path:
    run = folder / "outputs" / "theirs"
    (run / ".hydra").mkdir(parents=True)
    logger = {"tensorboard": {"_target_": "nnx_fit.TensorBoardLogger", "save_dir": str(run)}}
    OmegaConf.save(OmegaConf.create({**SAVED, "logger": logger}), run / ".hydra" / "config.yaml")
    runtime = {"cwd": str(folder / "elsewhere"), "output_dir": str(run)}
    OmegaConf.save(OmegaConf.create({"hydra": {"runtime": runtime}}), run / ".hydra" / "hydra.yaml")
    return run


def composed(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main.run(["test", "--cfg", "job", *words]) == 0
    return OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))  # type: ignore[return-value]


def test_saved_settings_are_taken_and_what_belongs_to_the_run_is_not(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = composed(capsys, "ckpt_path=outputs/theirs/checkpoints/epoch=2-step=15", "seed=4")
    assert cfg["model"] == SAVED["model"]
    assert cfg["trainer"]["max_epochs"] == 7
    assert cfg["trainer"]["precision"] == "32"
    assert cfg["monitor"] == "val/loss"
    assert cfg["seed"] == 4
    assert cfg["name"] is None
    assert cfg["ckpt_path"] == "outputs/theirs/checkpoints/epoch=2-step=15"
    assert cfg["logger"]["tensorboard"]["save_dir"] == "${run_dir:}"


def test_other_option_replaces_the_saved_group(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = composed(capsys, "ckpt_path=outputs/theirs/checkpoints/last", "data=digits", "logger=none")
    assert cfg["data"]["_target_"] == "nnx_fit.demo.digits.DigitsData"
    assert "path" not in cfg["data"]
    assert cfg["logger"] is None
    assert cfg["model"] == SAVED["model"]


def test_types_are_checked_as_in_the_run_itself(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["test", "ckpt_path=outputs/theirs/checkpoints/last", "trainer.max_epochs=abc"]) == 1
    assert "trainer.max_epochs=abc: expected int or null." in capsys.readouterr().err
    assert main.run(["test", "ckpt_path=outputs/theirs/checkpoints/last", "trainer.max_epoch=1"]) == 1
    assert "Did you mean trainer.max_epochs?" in capsys.readouterr().err


def test_checkpoint_outside_of_any_run_uses_the_packaged_config(folder: Path) -> None:
    assert saved_run.run_of(folder / "somewhere" / "checkpoint") is None
    assert saved_run.primary_config(["ckpt_path=somewhere/checkpoint"]) == "config"
    assert saved_run.primary_config([]) == "config"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("place", ["elsewhere", "outputs/theirs", "."])
def test_nothing_is_imported_from_where_a_run_says_that_its_modules_are(
    run_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str], command: str, place: str
) -> None:
    """The run may be a stranger's, who says so of a folder of theirs."""
    there = folder / place
    there.mkdir(exist_ok=True)
    settings = OmegaConf.load(run_dir / ".hydra" / "hydra.yaml")
    OmegaConf.update(settings, "hydra.runtime.cwd", str(there))
    OmegaConf.save(settings, run_dir / ".hydra" / "hydra.yaml")
    if place != ".":
        (there / "theirs.py").write_text("from pathlib import Path\nPath('RAN').touch()\nNet = Data = object\n")
    assert main.run([command, "ckpt_path=outputs/theirs/checkpoints/last"]) == 1
    assert not list(folder.rglob("RAN"))
    said = capsys.readouterr().err
    assert "there is no module theirs." in said
    assert (f"If those of the run are meant: cd {there}" in said) == (place != ".")


def test_saved_config_says_nothing_of_how_it_is_composed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**SAVED, "defaults": [{"optimizer": "adamw"}], "hydra": {"job": {"env_set": {"THEIRS": "1"}}}}
    OmegaConf.save(OmegaConf.create(config), run_dir / ".hydra" / "config.yaml")
    cfg = composed(capsys, "ckpt_path=outputs/theirs/checkpoints/last")
    assert cfg["optimizer"] == SAVED["optimizer"]
    assert "hydra" not in cfg and "defaults" not in cfg
