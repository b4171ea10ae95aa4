"""What a run leaves for its reader."""

from pathlib import Path

import numpy as np
import pytest

import nnx_fit as nf
from nnx_fit.cli import report

LOGGERS = (nf.TensorBoardLogger, nf.CSVLogger)  # the first has dashboards


def test_predictions_are_joined_batch_by_batch_under_the_names_of_their_leaves(tmp_path: Path) -> None:
    batches = [{"digit": np.array([1, 2]), "p": (np.ones((2, 3)),)}, {"digit": np.array([3]), "p": (np.zeros((1, 3)),)}]
    (file,) = report.save_predictions([batches], tmp_path / "predictions")
    with np.load(file) as saved:
        assert sorted(saved) == ["digit", "p.0"]
        assert saved["digit"].tolist() == [1, 2, 3]
        assert saved["p.0"].shape == (3, 3)


def test_each_loader_has_a_file_of_its_own(tmp_path: Path) -> None:
    files = report.save_predictions([[np.arange(2)], [np.arange(3), np.arange(1)]], tmp_path)
    assert [file.name for file in files] == ["loader_0.npz", "loader_1.npz"]
    with np.load(files[1]) as saved:
        assert saved["prediction"].tolist() == [0, 1, 2, 0]


def test_lines_to_be_copied_stand_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "a-very-long-name" / ("x" * 120)
    trainers = [nf.Trainer(max_epochs=1, default_root_dir=run, logger=kind(run)) for kind in LOGGERS]
    with caplog.at_level("INFO", logger="nnx_fit"):
        for trainer in trainers:
            report.announce(run, trainer)
    shown = str(run.relative_to(tmp_path))
    assert [message.split()[-1] for message in caplog.messages] == [shown] * 3
    assert caplog.messages[1].endswith(f"tensorboard --logdir {shown}")


def test_metrics_are_plain_lines_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="nnx_fit"):
        report.final_metrics({"val/loss": 0.25, "val/accuracy": 0.9875})
        report.final_metrics({})
    assert caplog.messages == ["Final metrics\n  val/accuracy  0.9875\n  val/loss      0.25"]
