"""Precision and recall of a binary classifier over its thresholds, in the form TensorBoard draws them from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nnx_fit.errors import ConfigurationError

THRESHOLDS = 127


class PRCurve(NamedTuple):
    """Counts and rates at thresholds that rise from 0 to 1; every field has shape `(THRESHOLDS,)`.

    Attributes:
        thresholds: A probability of at least this is a predicted 1.
        tp: True positives.
        fp: False positives.
        tn: True negatives.
        fn: False negatives.
        precision: `tp / (tp + fp)`; 0 where nothing is predicted to be 1.
        recall: `tp / (tp + fn)`; 0 where nothing is 1.
    """

    thresholds: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    tn: np.ndarray
    fn: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def pr_curve(tag: str, labels: Any, probabilities: Any) -> PRCurve:
    """Counts how often each threshold is right.

    Args:
        tag: The curve's name, for messages.
        labels: Truth, 0 or 1; any shape.
        probabilities: Predicted probability of a 1, of the same shape.

    Raises:
        ConfigurationError: They do not belong together, or are no labels and no probabilities.
    """
    truth, scores = np.asarray(labels).ravel(), np.asarray(probabilities).ravel().astype(np.float64)
    if truth.shape != scores.shape or not truth.size or np.shape(labels) != np.shape(probabilities):
        raise ConfigurationError(
            f'log_pr_curve("{tag}", ...): labels have shape {np.shape(labels)} and probabilities '
            f"{np.shape(probabilities)}. Fix: pass a probability for each label; for several classes a curve each."
        )
    if not np.isin(truth, (0, 1)).all():
        raise ConfigurationError(
            f'log_pr_curve("{tag}", ...): a label is neither 0 nor 1. Fix: for a class c, pass labels == c.'
        )
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ConfigurationError(
            f'log_pr_curve("{tag}", ...): a probability is not in 0..1. Fix: pass jax.nn.sigmoid(logits).'
        )
    thresholds = np.linspace(0.0, 1.0, THRESHOLDS)
    # The last threshold that each score reaches; scores that are one, but for rounding, do.
    reached = np.searchsorted(thresholds, scores + 1e-9, side="right") - 1
    positive = truth.astype(bool)
    tp = _at_least(reached[positive])
    fp = _at_least(reached[~positive])
    fn, tn = positive.sum() - tp, (~positive).sum() - fp
    return PRCurve(thresholds, tp, fp, tn, fn, tp / np.maximum(tp + fp, 1), tp / np.maximum(tp + fn, 1))


def _at_least(reached: np.ndarray) -> np.ndarray:
    counts = np.bincount(reached, minlength=THRESHOLDS)
    return counts[::-1].cumsum()[::-1]
