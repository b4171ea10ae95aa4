"""What a run ran on and with."""

import platform
import subprocess
from importlib import metadata

import jax

from nnx_fit.loggers.environment import environment, environment_text


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_versions_platform_and_devices_are_those_of_this_process():
    found = environment()
    assert found["jax"] == jax.__version__ and found["flax"] == metadata.version("flax")
    assert found["python"] == platform.python_version()
    assert found["devices"].startswith(f"{jax.device_count()} x cpu")
    assert found["processes"] == "1"
    assert all(found.values())


def test_the_revision_is_that_of_the_working_directory_with_changes_to_tracked_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git revision" not in environment()
    git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "untracked").write_text("x")
    clean = environment()
    assert clean["git revision"] == git(tmp_path, "rev-parse", "HEAD") and clean["git branch"] == "trunk"
    assert "git changes" not in clean
    (tmp_path / "file").write_text("two")
    assert environment()["git changes"] == "1 tracked files differ"


def test_without_git_the_rest_is_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = environment()
    assert "git revision" not in found and "jax" in found


def test_the_text_is_a_table_with_a_row_for_each(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a|b\n--c")
    lines = environment_text().splitlines()
    assert lines[:2] == ["| what | value |", "|---|---|"]
    assert len(lines) == 2 + len(environment())
    assert "| XLA_FLAGS | --a\\|b --c |" in lines
