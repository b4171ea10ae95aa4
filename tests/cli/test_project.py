"""The user's folder in front of the packaged files."""

from pathlib import Path

import pytest

from nnx_fit.cli import main, project
from nnx_fit.cli.run_directory import shown_path


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) if "--help" in words else _nothing():
        assert main.run(list(words)) == 0
    return capsys.readouterr().out


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_users_file_wins_over_the_packaged_one_of_the_same_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "conf" / "optimizer" / "adamw.yaml", "_target_: mine.optimizer\nlearning_rate: 0.5\n")
    said = shown(capsys, "--cfg", "job", "-p", "optimizer")
    assert "mine.optimizer" in said
    assert "weight_decay" not in said


def test_users_experiment_starts_from_a_clean_slate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "conf" / "experiment" / "mine.yaml", "# @package _global_\ntrainer: {max_epochs: 7}\nmine: 1\n")
    said = shown(capsys, "--cfg", "job", "experiment=mine")
    for line in ("model: null", "data: null", "monitor: null", "schedule: null", "max_epochs: 7", "mine: 1"):
        assert line in said.splitlines() or f"  {line}" in said.splitlines()
    assert "early_stopping" not in said


def test_without_a_conf_folder_the_packaged_files_stand_alone(folder: Path) -> None:
    assert project.project_conf(folder) is None
    assert project.project_conf(project.packaged_conf().parent) is None  # the repository itself


def test_groups_are_the_folders_with_their_options(folder: Path) -> None:
    write(folder / "conf" / "optimizer" / "mine.yaml", "")
    groups = project.config_groups(project.packaged_conf(), folder / "conf", None)
    assert {"mine", "sgd"} <= groups["optimizer"]
    assert "hydra/output" in groups


def test_packaged_conf_holds_the_primary_config() -> None:
    assert (project.packaged_conf() / "config.yaml").is_file()


def test_paths_are_shown_from_where_the_command_was_given(folder: Path) -> None:
    (folder / "there").mkdir()
    with project.working_in(folder / "there"):
        assert Path.cwd() == folder / "there"
        assert project.shell_directory() == folder
        assert shown_path(folder / "outputs" / "a") == "outputs/a"
    assert Path.cwd() == project.shell_directory() == folder
