"""Class-wise metrics: a confusion matrix, and accuracy, precision, recall and F1 of each class.

Flax and metrax have none. These are `nnx.Metric`s like any other: update them in a step and log them; `FitModule.log`
records one number for each class and shows a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit.errors import ConfigurationError

Normalize = Literal["true", "predicted", "all"]
Kind = Literal["precision", "recall", "f1", "iou", "support"]


class ConfusionMatrix(nnx.Metric):
    """Counts how often an example of one class was taken for one of another.

    `compute()` has the shape `(num_classes, num_classes)`: rows are the true classes, columns the predicted ones, as in
    scikit-learn.

    Args:
        num_classes: Number of classes.
        normalize: `None` for counts; `"true"`: each row sums to 1; `"predicted"`: each column does; `"all"`: all do.
            What was never seen is 0.
        class_names: Names of the classes, for records and figures.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from nnx_fit.metrics import ConfusionMatrix
        >>> matrix = ConfusionMatrix(2)
        >>> matrix.update(logits=jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), labels=jnp.array([0, 1, 1]))
        >>> matrix.compute().tolist()
        [[1.0, 0.0], [1.0, 1.0]]
    """

    axis_names = ("true", "predicted")

    def __init__(
        self,
        num_classes: int,
        *,
        normalize: Normalize | None = None,
        class_names: Sequence[str] | None = None,
    ):
        owner = type(self).__name__
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ConfigurationError(f"{owner}(num_classes={num_classes!r}): expected a whole number above 1.")
        if normalize is not None and normalize not in get_args(Normalize):
            known = ", ".join(map(repr, get_args(Normalize)))
            raise ConfigurationError(f"{owner}(normalize={normalize!r}): unknown. Use None or one of {known}.")
        if class_names is not None and (isinstance(class_names, str) or len(class_names) != num_classes):
            raise ConfigurationError(
                f"{owner}(num_classes={num_classes}, class_names={class_names!r}): expected {num_classes} names."
            )
        self.num_classes = num_classes
        self.normalize = normalize
        self.class_names = None if class_names is None else tuple(str(name) for name in class_names)
        self.counts = nnx.metrics.MetricState(jnp.zeros((num_classes, num_classes), jnp.int32))

    def reset(self) -> None:
        """Forgets everything."""
        self.counts[...] = jnp.zeros((self.num_classes, self.num_classes), jnp.int32)

    def update(
        self,
        *,
        labels: Any,
        logits: Any = None,
        predictions: Any = None,
        mask: Any = None,
        **_: Any,
    ) -> None:
        """Counts a batch.

        Args:
            labels: True classes, whole numbers of any shape. A label outside of `0..num_classes - 1` is not counted,
                such as the -1 or 255 of pixels without one.
            logits: Scores, shape of `labels` + `(num_classes,)`; the largest is the prediction.
            predictions: Predicted classes instead, shape of `labels`.
            mask: Which examples to count, shape of `labels`. Default: all.
            **_: Whatever else a `MultiMetric` is updated with.

        Raises:
            ConfigurationError: Both or neither of `logits` and `predictions` were given, or shapes do not fit.
        """
        owner = f"{type(self).__name__}.update"
        if (logits is None) == (predictions is None):
            raise ConfigurationError(f"{owner}: pass either logits= or predictions=.")
        labels = jnp.asarray(labels)
        guess = jnp.argmax(logits, axis=-1) if predictions is None else jnp.asarray(predictions)
        width = None if logits is None else jnp.shape(logits)[-1:]
        if guess.shape != labels.shape or width not in (None, (self.num_classes,)):
            given = f"predictions of shape {guess.shape}" if width is None else f"logits of shape {guess.shape + width}"
            raise ConfigurationError(
                f"{owner}: {given} do not fit labels of shape {labels.shape} and {self.num_classes} classes."
            )
        for name, value in (("labels", labels), ("predictions", guess)):
            if not jnp.issubdtype(value.dtype, jnp.integer):
                raise ConfigurationError(f"{owner}: {name} are {value.dtype}; expected whole numbers, a class each.")
        labels, guess = labels.astype(jnp.int32), guess.astype(jnp.int32)
        counted = jnp.ones(labels.shape, bool) if mask is None else jnp.broadcast_to(mask, labels.shape).astype(bool)
        for value in (labels, guess):
            counted &= (value >= 0) & (value < self.num_classes)
        cell = jnp.where(counted, labels * self.num_classes + guess, 0).reshape(-1)
        added = jax.ops.segment_sum(counted.reshape(-1).astype(jnp.int32), cell, self.num_classes**2)
        self.counts[...] = self.counts[...] + added.reshape(self.num_classes, self.num_classes)

    def compute(self) -> jax.Array:
        """The matrix, float32 of shape `(num_classes, num_classes)`."""
        counts = self.counts[...].astype(jnp.float32)
        if self.normalize is None:
            return counts
        axis = {"true": 1, "predicted": 0, "all": None}[self.normalize]
        return _ratio(counts, counts.sum(axis=axis, keepdims=True))


class ClassMetrics(ConfusionMatrix):
    """Precision, recall, F1 or the like of each class.

    `compute()` is a dict of vectors of shape `(num_classes,)`, so that `self.log("val", metric)` records
    `val/recall/<class>` and shows a bar chart `val/recall`. A class that was never seen, or never predicted, has 0
    where a ratio would divide by zero, as in scikit-learn with `zero_division=0`.

    Args:
        num_classes: Number of classes.
        kinds: What to compute: `"precision"`; `"recall"`, which is the accuracy within a class; `"f1"`; `"iou"`, the
            intersection over union of a segmentation; `"support"`, the number of examples.
        class_names: Names of the classes, for records and figures.

    Raises:
        ConfigurationError: An argument is wrong.
    """

    def __init__(
        self,
        num_classes: int,
        kinds: Sequence[Kind] = ("precision", "recall", "f1"),
        *,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__(num_classes, class_names=class_names)
        known = get_args(Kind)
        if isinstance(kinds, str) or not kinds or any(kind not in known for kind in kinds):
            raise ConfigurationError(
                f"ClassMetrics(kinds={kinds!r}): expected a list with some of {', '.join(map(repr, known))}."
            )
        self.kinds = tuple(kinds)

    def compute(self) -> Any:
        """A vector of shape `(num_classes,)` for each kind."""
        counts = self.counts[...].astype(jnp.float32)
        hits, true, predicted = jnp.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
        found = {
            "precision": _ratio(hits, predicted),
            "recall": _ratio(hits, true),
            "f1": _ratio(2 * hits, true + predicted),
            "iou": _ratio(hits, true + predicted - hits),
            "support": true,
        }
        return {kind: found[kind] for kind in self.kinds}


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0.0)
