"""What every logger has, whatever its store can hold."""

import inspect

import numpy as np
import pytest

import nnx_fit as nf
from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.loggers.logger import RECORDING, Histogram, Logger

KINDS = [Logger, nf.TensorBoardLogger, nf.CSVLogger, nf.WandbLogger, nf.MLFlowLogger]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [*RECORDING, "continue_from"])
def test_all_loggers_take_the_same_arguments(kind, name):
    expected = list(inspect.signature(getattr(Logger, name)).parameters)
    assert list(inspect.signature(getattr(kind, name)).parameters) == expected


def test_a_logger_of_ones_own_may_leave_out_what_it_has_no_place_for(tmp_path):
    for logger in (Logger(), nf.CSVLogger(tmp_path / "run")):
        logger.log_image("x", np.zeros((2, 2, 3)), 1)
        logger.log_figure("x", object(), 1)  # it is not even drawn
        logger.log_embedding("x", np.eye(2), 1)
        logger.log_pr_curve("x", [0], [0.5], 1)
        logger.log_text("x", "y")
        assert logger.experiment is None
    assert not (tmp_path / "run").exists()


def test_histograms_reach_a_logger_that_takes_one_at_a_time():
    class One(Logger):
        def __init__(self):
            self.got = {}

        def log_histogram(self, tag, counts, edges, step, moments):
            self.got[tag] = (counts, edges, step, moments)

    logger = One()
    logger.log_histograms({"a": Histogram(np.array([1]), np.array([0, 1]), {"num": 1})}, 3)
    assert logger.got == {"a": (np.array([1]), pytest.approx(np.array([0, 1])), 3, {"num": 1})}


def test_methods_of_a_mixin_are_guarded_as_well(caplog):
    class Broken:
        def log_metrics(self, metrics, step):
            raise OSError("gone")

    class Mine(Broken, Logger):
        pass

    logger = Mine()
    FanOut([logger])
    logger.log_metrics({"a": 1.0}, 1)
    assert "Mine failed in log_metrics at step 1" in caplog.text
