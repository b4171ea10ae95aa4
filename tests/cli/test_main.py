"""`nnx-fit` from the outside: a user's project, and what each command leaves behind."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnx_fit.cli import main

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_help_names_commands_and_groups_and_imports_no_jax(folder: Path) -> None:
    program = (
        "import sys\nfrom nnx_fit.cli.main import run\n"
        "try: run(['--help'])\nexcept SystemExit: pass\n"
        "print('LOADED', [name for name in ('jax', 'flax', 'optax', 'orbax', 'tensorboardX') if name in sys.modules])"
    )
    root = str(Path(main.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": ""}
    )
    assert "nnx-fit [fit|validate|test|predict]" in done.stdout
    assert "optimizer: adafactor" in done.stdout
    assert "LOADED []" in done.stdout
    assert list(folder.iterdir()) == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import nnx_fit

    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"nnx-fit {nnx_fit.__version__}\n"


@pytest.mark.slow
def test_fit_in_a_users_folder_leaves_a_complete_run(project_folder: Path, command: Command) -> None:
    done = command("experiment=mine", "model.start=1.0", "data.count=12", "logger=both")
    assert done.returncode == 0, done.stderr
    run = only(project_folder, "outputs/*/*")
    assert re.fullmatch(r"\d\d-\d\d-\d\d-[0-9a-f]{6}", run.name)
    lines = done.stdout.splitlines()
    assert f"Run directory: {run.relative_to(project_folder)}" in lines
    assert f"Dashboards:    tensorboard --logdir {run.relative_to(project_folder)}" in lines
    assert any(re.fullmatch(r"  test/loss +\d.*", line) for line in lines)
    best = lines[next(i for i, line in enumerate(lines) if line.startswith("Best checkpoint (val/loss=")) + 1]
    assert (project_folder / best).is_dir()
    assert (project_folder / best).parent == run / "checkpoints"

    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    assert config.model == {"_target_": "tiny.Line", "start": 1.0}
    assert config.callbacks.model_checkpoint.monitor == "val/loss"
    assert config.logger.csv.save_dir == str(run)
    assert "+model.start=1.0" in OmegaConf.load(run / ".hydra" / "overrides.yaml")
    assert "test/loss" in (run / "run.log").read_text()
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"train/loss", "val/loss", "test/loss", "lr"} <= set(events.Tags()["scalars"])
    assert (run / "metrics.csv").is_file()


@pytest.mark.slow
def test_each_evaluation_starts_from_the_runs_own_config(
    project_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["experiment=mine", "name=first", "data.count=12", "test_after_fit=false"]) == 0
    assert "test/loss" not in capsys.readouterr().out
    checkpoint = next(p for p in (project_folder / "outputs/first/checkpoints").iterdir() if "epoch=" in p.name)
    before = sorted((project_folder / "outputs/first").rglob("*"))
    word = f"ckpt_path={checkpoint.relative_to(project_folder)}"
    for verb, metric in (("validate", "val/loss"), ("test", "test/loss")):
        assert main.run([verb, word, f"name={verb}"]) == 0, capsys.readouterr().err
        assert metric in capsys.readouterr().out
        assert OmegaConf.load(project_folder / f"outputs/{verb}/.hydra/config.yaml").data.count == 12
    assert main.run(["predict", word, "name=predict"]) == 0
    with np.load(project_folder / "outputs/predict/predictions/loader_0.npz") as saved:
        assert saved["prediction"].shape == (12,)
    assert sorted((project_folder / "outputs/first").rglob("*")) == before


@pytest.mark.slow
def test_sweep_runs_every_job_in_its_own_directory_and_returns_the_metric(project_folder: Path) -> None:
    words = ["-m", "experiment=mine", "optimizer.learning_rate=0.01,0.1", "+hydra.callbacks.keep._target_=tiny.Keep"]
    assert main.run(words) == 0
    runs = sorted(project_folder.glob("multirun/*/*/[0-9]"))
    assert [run.name for run in runs] == ["0", "1"]
    rates = [OmegaConf.load(run / ".hydra" / "config.yaml").optimizer.learning_rate for run in runs]
    assert rates == [0.01, 0.1]
    returned = sys.modules["tiny"].RETURNED
    assert len(returned) == 2
    assert returned[1] < returned[0]
    assert all(isinstance(value, float) for value in returned)


@pytest.mark.slow
def test_named_run_is_refused_a_second_time_and_continued_on_request(
    project_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=mine", "name=fixed", "test_after_fit=false"]
    assert main.run([*words, "trainer.max_epochs=1", "resume=auto"]) == 0
    checkpoints = {path.name for path in (project_folder / "outputs/fixed/checkpoints").iterdir()}
    capsys.readouterr()
    assert main.run(words) == 1
    assert "name=fixed: outputs/fixed exists" in capsys.readouterr().err
    assert {path.name for path in (project_folder / "outputs/fixed/checkpoints").iterdir()} == checkpoints
    assert OmegaConf.load(project_folder / "outputs/fixed/.hydra/config.yaml").trainer.max_epochs == 1
    assert main.run([*words, "trainer.max_epochs=3", "resume=auto"]) == 0
    names = {path.name for path in (project_folder / "outputs/fixed/checkpoints").iterdir()}
    assert any(name.startswith("epoch=2-step=6") for name in names), names
    assert OmegaConf.load(project_folder / "outputs/fixed/.hydra/resumed-1/config.yaml").trainer.max_epochs == 3


@pytest.mark.slow
def test_runs_that_start_in_the_same_second_have_directories_of_their_own(project_folder: Path) -> None:
    words = ["experiment=mine", "trainer.fast_dev_run=true", "hydra.run.dir=runs/${oc.env:NNX_FIT_RUN_ID}"]
    for _ in range(3):
        assert main.run(words) == 0
    assert len(list((project_folder / "runs").iterdir())) == 3


def test_optimizer_that_the_module_ignores_is_refused(project_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["experiment=mine", "model._target_=tiny.OwnOptimizer", "optimizer.learning_rate=1"]) == 1
    said = capsys.readouterr().err
    assert "optimizer.learning_rate=1 has no effect: OwnOptimizer has a configure_optimizers of its own." in said
    assert not (project_folder / "outputs").exists()


@pytest.mark.slow
def test_module_with_its_own_optimizer_trains_without_the_group(project_folder: Path) -> None:
    assert main.run(["experiment=mine", "model._target_=tiny.OwnOptimizer", "trainer.fast_dev_run=true"]) == 0


@pytest.mark.slow
def test_exception_in_a_step_shows_the_users_line(project_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["experiment=mine", "model._target_=tiny.Broken", "name=broken"]) == 1
    said = capsys.readouterr().err
    assert 'return batch["no such key"]' in said
    assert "KeyError: 'no such key'" in said
    assert "site-packages" not in said
    assert "Traceback" in (project_folder / "outputs/broken/run.log").read_text()


def test_completion_works_behind_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COMP_LINE", "nnx-fit test optimizer=s")
    assert main.run(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["optimizer=sgd"]
