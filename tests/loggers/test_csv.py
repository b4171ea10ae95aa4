"""CSVLogger, read back with the csv module."""

import csv
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from full_disk import file_size_limit

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.csv import CSVLogger


def read(directory):
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_columns_are_step_and_the_union_of_all_names(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5}, step=1)
    logger.log_metrics({"train/loss": 0.25, 'odd, "name"': 1e-17}, step=2)
    logger.log_metrics({"val/loss": float("nan")}, step=3)
    logger.finalize("success")
    rows = read(tmp_path)
    assert list(rows[0]) == ["step", "train/loss", 'odd, "name"', "val/loss"]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["val/loss"] == "" and float(rows[1]['odd, "name"']) == 1e-17
    assert rows[2]["train/loss"] == "" and math.isnan(float(rows[2]["val/loss"]))


def test_values_of_one_step_share_a_row(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0, "b": 100000.0}, step=1)
    logger.log_metrics({"c": 2.0}, step=1)
    logger.log_metrics({"b": 3.0}, step=1)
    logger.log_metrics({"a": 4.0}, step=2)
    logger.finalize("success")
    assert read(tmp_path) == [
        {"step": "1", "a": "1.0", "b": "3.0", "c": "2.0"},
        {"step": "2", "a": "4.0", "b": "", "c": ""},
    ]


def test_logging_after_finalize_appends(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    logger.log_metrics({"test/a": 2.0}, step=1)
    logger.finalize("success")
    assert [(row["a"], row["test/a"]) for row in read(tmp_path)] == [("1.0", ""), ("", "2.0")]


def test_rows_survive_a_sigkill_right_after_the_call(tmp_path):
    script = f"""
import os, signal
from nnx_fit.loggers.csv import CSVLogger
logger = CSVLogger({str(tmp_path)!r})
logger.log_metrics({{"a": 1.0}}, 1)
logger.log_metrics({{"a": 2.0}}, 2)
logger.log_metrics({{"b": 3.0}}, 2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [list(row.values()) for row in read(tmp_path)] == [["1", "1.0", ""], ["2", "2.0", "3.0"]]


def test_hyperparameters_are_yaml_of_plain_values(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"model": {"width": 64, "path": Path("a/b")}, "betas": (0.9, 0.999), "clip": None})
    loaded = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert loaded == {"model": {"width": 64, "path": "a/b"}, "betas": [0.9, 0.999], "clip": None}


def test_nothing_is_created_before_the_first_record(tmp_path):
    logger = CSVLogger(tmp_path / "run")
    logger.log_metrics({}, step=1)
    logger.flush()
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


def test_named_runs_get_a_directory_each(tmp_path):
    directories = []
    for _ in range(2):
        logger = CSVLogger(tmp_path, name="mnist")
        logger.log_metrics({"a": 1.0}, step=1)
        logger.finalize("success")
        directories.append(logger.log_dir)
    assert directories == [tmp_path / "mnist" / "version_0", tmp_path / "mnist" / "version_1"]


def test_second_run_in_one_directory_is_appended_and_reported(tmp_path, caplog):
    for value in (1.0, 2.0):
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"a": value}, step=1)
        logger.finalize("success")
    assert [row["a"] for row in read(tmp_path)] == ["1.0", "2.0"]
    assert caplog.text.count("already holds the record of another run") == 1


def test_continued_run_replaces_the_rows_after_its_checkpoint(tmp_path, caplog):
    first = CSVLogger(tmp_path)
    for step in range(1, 6):
        first.log_metrics({"a": float(step)}, step)
    first.finalize("interrupted")
    second = CSVLogger(tmp_path)
    second.continue_from(3)
    second.log_metrics({"a": 14.0, "b": 1.0}, 4)
    second.finalize("success")
    assert [(row["step"], row["a"], row["b"]) for row in read(tmp_path)] == [
        ("1", "1.0", ""), ("2", "2.0", ""), ("3", "3.0", ""), ("4", "14.0", "1.0"),
    ]  # fmt: skip
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["b", "new"])  # the row is written, or the file with a wider header
def test_row_of_the_step_that_a_run_continues_from_goes_on(tmp_path, name):
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0, "b": 0.1}, 1)
    first.log_metrics({"a": 2.0}, 2)
    first.finalize("interrupted")
    second = CSVLogger(tmp_path)
    second.continue_from(2)
    second.log_metrics({name: 0.25}, 2)
    second.log_metrics({"a": 3.0}, 3)
    second.finalize("success")
    assert [(row["step"], row["a"], row[name]) for row in read(tmp_path)][1:] == [
        ("2", "2.0", "0.25"),
        ("3", "3.0", ""),
    ]


@pytest.mark.parametrize("step", [2, 3])  # the row that is there already grows, or a new one begins
@pytest.mark.parametrize("name", ["b", "new"])  # the row is written, or the file with a wider header
def test_a_full_disk_loses_no_earlier_row_and_the_row_comes_with_the_next_write(tmp_path, step, name):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0, "b": 2.0}, 1)
    logger.log_metrics({"a": 3.0}, 2)
    before = (tmp_path / "metrics.csv").read_bytes()
    with file_size_limit(len(before) + 2), pytest.raises(OSError, match="too large"):
        logger.log_metrics({name: 0.123456789}, step)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    logger.log_metrics({"a": 5.0}, step)
    logger.finalize("success")
    rows = read(tmp_path)
    assert rows[0]["a"] == "1.0" and rows[0]["b"] == "2.0"
    assert (rows[-1]["step"], rows[-1]["a"], rows[-1][name]) == (str(step), "5.0", "0.123456789")
    assert len(rows) == step


def test_a_directory_that_was_removed_is_an_error_and_then_begun_anew(tmp_path):
    logger = CSVLogger(tmp_path / "run")
    logger.log_metrics({"a": 1.0}, 1)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="removed"):
        logger.log_metrics({"a": 2.0}, 2)
    logger.log_metrics({"b": 3.0}, 3)
    logger.finalize("success")
    assert read(tmp_path / "run") == [{"step": "3", "b": "3.0"}]


def test_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    logger = CSVLogger(tmp_path / "file")
    with pytest.raises(ConfigurationError, match=r"CSVLogger cannot write to (.|\n)*Fix: choose"):
        logger.log_hyperparams({"seed": 0})
