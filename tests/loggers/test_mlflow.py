"""MLFlowLogger on a local database, read back with MLflow's client."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.mlflow import MLFlowLogger

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")


@pytest.fixture(autouse=True)
def local(monkeypatch):
    """Nothing touches the network, and no server of whoever runs the tests is asked."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A database, which takes MLflow two seconds to make."""
    return tmp_path_factory.mktemp("mlruns")


def history(logger, name):
    found = logger.experiment.get_metric_history(logger.run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


def run_of(logger):
    return logger.experiment.get_run(logger.run_id)


class Pictures(nf.Callback):
    def on_train_end(self, trainer, module):
        logger, step = trainer.logger, trainer.global_step
        logger.log_image("samples", np.zeros((2, 3, 3), np.uint8), step)
        logger.log_pr_curve("curve", [0, 1], [0.25, 0.75], step)
        logger.log_embedding("points", np.eye(2), step, metadata=["a", "b"])


def fit(logger, *callbacks, **options):
    trainer = quiet(max_epochs=1, log_every_n_steps=1, logger=logger, callbacks=list(callbacks), **options)
    trainer.fit(Scalar(start=1.0), targets(3.0, 3.0, 3.0))


def test_a_fit_leaves_its_metrics_settings_status_and_artifacts(store):
    logger = MLFlowLogger("digits", run_name="wide", save_dir=store, tags={"team": 1}, prefix="p/")
    fit(logger, Pictures())
    run = run_of(logger)
    # w moves from 1 to 3 by a tenth of the way in each step
    assert history(logger, "p/loss") == [
        (step, pytest.approx(0.5 * (2.0 * 0.9 ** (step - 1)) ** 2)) for step in (1, 2, 3)
    ]
    assert run.data.params == {"start": "1.0", "learning_rate": "0.1"}
    assert run.data.tags["team"] == "1" and run.info.run_name == "wide" and run.info.status == "FINISHED"
    assert logger.experiment.get_experiment(run.info.experiment_id).name == "digits"
    files = {path.relative_to(store).as_posix() for path in (store / "artifacts").rglob("*") if path.is_file()}
    names = {Path(file).name for file in files if logger.run_id in file}
    assert {"config.md", "environment.md", "partition.md", "curve-3.json", "tensors.tsv", "metadata.tsv"} <= names
    assert any(name.endswith(".png") for name in names)
    (curve,) = (store / "artifacts" / logger.run_id).rglob("curve-3.json")
    assert json.loads(curve.read_text())["recall"][63] == 1.0


def test_a_fit_that_continues_goes_on_in_the_run_of_its_name(store, tmp_path):
    first = MLFlowLogger("digits", run_name="resumed", save_dir=store)
    fit(first, nf.ModelCheckpoint(dirpath=tmp_path), enable_checkpointing=True)
    second = MLFlowLogger("digits", run_name="resumed", save_dir=store)
    trainer = quiet(log_every_n_steps=1, logger=second, max_epochs=2)
    trainer.settings = {"start": 1.0, "learning_rate": 0.5, "new": "x"}
    trainer.fit(Scalar(start=1.0), targets(3.0, 3.0, 3.0), ckpt_path=tmp_path / "last")
    assert second.run_id == first.run_id
    assert [step for step, _ in history(second, "loss")] == [1, 2, 3, 4, 5, 6]
    run = run_of(second)
    assert run.data.params == {"start": "1.0", "learning_rate": "0.1", "new": "x"}
    assert run.data.tags["resumed.learning_rate"] == "0.5" and run.info.status == "FINISHED"
    third = MLFlowLogger("digits", run_name="resumed", save_dir=store)
    third.log_metrics({"a": 1.0}, 1)  # from the beginning: a run of its own
    third.finalize("interrupted")
    assert third.run_id != first.run_id and run_of(third).info.status == "KILLED"


def test_a_failed_fit_is_a_failed_run(store):
    class Breaks(nf.Callback):
        def on_train_end(self, trainer, module):
            raise RuntimeError("broken")

    logger = MLFlowLogger("digits", save_dir=store)
    with pytest.raises(RuntimeError, match="broken"):
        fit(logger, Breaks())
    assert run_of(logger).info.status == "FAILED" and len(history(logger, "loss")) == 3


def test_names_and_values_that_mlflow_refuses_are_made_to_fit(store):
    logger = MLFlowLogger("digits", save_dir=store)
    logger.log_hyperparams({"a@b": "x" * 9000, **{f"p{i}": i for i in range(150)}})
    logger.log_metrics({"top5 (raw)@": 1.0, "nan": float("nan")}, 1)
    logger.log_metrics({f"m{i}": float(i) for i in range(1500)}, 2)
    logger.finalize("success")
    run = run_of(logger)
    assert len(run.data.params) == 151 and len(run.data.params["a_b"]) == 6000
    assert history(logger, "top5 _raw__") == [(1, 1.0)] and np.isnan(history(logger, "nan")[0][1])
    assert history(logger, "m1499") == [(2, 1499.0)]


def test_while_the_database_is_locked_training_goes_on_and_nothing_is_lost(store, monkeypatch):
    logger = MLFlowLogger("digits", save_dir=store)
    logger.log_metrics({"loss": 0.0}, 0)
    logger.flush()
    with contextlib.closing(sqlite3.connect(store / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for step in range(1, 50):
            logger.log_metrics({"loss": float(step)}, step)  # returns at once
        other.execute("COMMIT")
    logger.finalize("success")
    assert history(logger, "loss") == [(step, float(step)) for step in range(50)]


def test_the_end_leaves_no_thread_behind_that_waits_for_the_store(store):
    logger = MLFlowLogger("digits", save_dir=store)
    logger.log_metrics({"loss": 0.0}, 0)
    logger.finalize("success")
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "nnx_fit-logger")


def test_making_a_logger_starts_nothing(tmp_path):
    logger = MLFlowLogger(save_dir=tmp_path / "runs")
    logger.continue_from(3)
    logger.flush()
    logger.finalize("success")
    assert logger.log_dir is None and logger.run_id is None
    assert not (tmp_path / "runs").exists()


def test_a_store_that_cannot_be_reached_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"MLFlowLogger cannot start a run in sqlite:(.|\n)*Fix: check"):
        MLFlowLogger(save_dir=tmp_path / "file").log_metrics({"a": 1.0}, 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigurationError, match=r"cannot start a run in http://127.0.0.1:1(.|\n)*server is up"):
        MLFlowLogger(tracking_uri="http://127.0.0.1:1").log_metrics({"a": 1.0}, 1)


def test_without_mlflow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("nnx_fit.loggers.mlflow.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "nnx-fit\[mlflow\]"'):
        MLFlowLogger()


@pytest.mark.slow
def test_processes_that_start_together_share_one_new_database(tmp_path):
    script = """
import sys
from nnx_fit.loggers.mlflow import MLFlowLogger
logger = MLFlowLogger("digits", run_name=sys.argv[2], save_dir=sys.argv[1])
logger.log_metrics({"loss": 1.0}, 1)
logger.finalize("success")
"""
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen([*command, name], cwd=root, stderr=subprocess.PIPE, text=True) for name in "ab"]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    logger = MLFlowLogger("digits", save_dir=tmp_path)
    experiment = logger.experiment.get_experiment_by_name("digits")
    runs = logger.experiment.search_runs([experiment.experiment_id], "metrics.loss = 1")
    assert sorted(run.info.run_name for run in runs) == ["a", "b"]
    logger.finalize("success")
