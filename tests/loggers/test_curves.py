"""Precision-recall curves against counts made one by one, and against scikit-learn's."""

import numpy as np
import pytest

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.curves import THRESHOLDS, pr_curve


def test_counts_equal_those_made_one_threshold_at_a_time():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (20, 5)), rng.random((20, 5))
    curve = pr_curve("x", labels, scores)
    for place, threshold in enumerate(np.linspace(0, 1, THRESHOLDS)):
        predicted = scores >= threshold
        tp, fp = (predicted & (labels == 1)).sum(), (predicted & (labels == 0)).sum()
        fn, tn = (~predicted & (labels == 1)).sum(), (~predicted & (labels == 0)).sum()
        assert (curve.tp[place], curve.fp[place], curve.fn[place], curve.tn[place]) == (tp, fp, fn, tn)


def test_rates_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    labels = np.array([0, 1, 1, 0, 1, 1])
    scores = np.array([0, 21, 42, 63, 84, 126]) / 126  # thresholds themselves: a score of one reaches it
    precision, recall, thresholds = metrics.precision_recall_curve(labels, scores)
    curve = pr_curve("x", labels, scores)
    for p, r, threshold in zip(precision, recall, thresholds, strict=False):
        place = round(threshold * 126)
        assert (curve.precision[place], curve.recall[place]) == pytest.approx((p, r))


def test_without_positives_nothing_is_divided_by_zero():
    curve = pr_curve("x", np.zeros(3, bool), np.zeros(3))
    assert curve.precision.tolist() == curve.recall.tolist() == [0.0] * THRESHOLDS
    assert curve.fp[0] == 3 and curve.tn[1] == 3


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.5], r"labels have shape \(2,\)"),
        ([[0, 1]], [0.5, 0.5], "shape"),
        ([], [], "shape"),
        ([0, 2], [0.5, 0.5], "neither 0 nor 1.*labels == c"),
        ([0, 1], [0.5, 1.5], "not in 0..1.*sigmoid"),
        ([0, 1], [0.5, float("nan")], "not in 0..1"),
    ],
)
def test_what_is_no_binary_classification_is_refused(labels, scores, message):
    with pytest.raises(ConfigurationError, match=message):
        pr_curve("x", np.array(labels), np.array(scores))
