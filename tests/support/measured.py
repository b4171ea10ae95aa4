"""A module whose steps log metric objects, and data with an uneven last batch whose numbers scikit-learn gives."""

from __future__ import annotations

import jax.numpy as jnp
import metrax
import metrax.nnx
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn import metrics as sk

import nnx_fit as nf

RNG = np.random.default_rng(0)


CLASSES = 3


LOGITS = RNG.normal(size=(10, CLASSES)).astype(np.float32)


LABELS = RNG.integers(0, CLASSES, 10).astype(np.int32)


VALUES = RNG.gamma(2.0, size=10).astype(np.float32)


PREDICTED = LOGITS.argmax(-1)


def batches(logits=LOGITS, labels=LABELS, values=VALUES):
    """Batches of 4, 4 and 2 examples."""
    parts = [slice(start, start + 4) for start in range(0, len(labels), 4)]
    return [{"logits": logits[part], "labels": labels[part], "values": values[part]} for part in parts]


BATCHES = batches()


ACCURACY = sk.accuracy_score(LABELS, PREDICTED)


BATCH_ACCURACIES = [sk.accuracy_score(b["labels"], b["logits"].argmax(-1)) for b in BATCHES]


RUNNING = [sk.accuracy_score(LABELS[:n], PREDICTED[:n]) for n in (4, 8, 10)]


class Base(nf.FitModule):
    """Trains one parameter; what it measures is in the batch."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(()))

    def training_step(self, batch):
        return (self.w[...] ** 2) * batch["values"].mean()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return optax.sgd(0.01)


class Measured(Base):
    """Logs an accuracy in both steps: of Flax's own, of metrax's wrapper, and of a metrax metric that is merged."""

    def __init__(self, **options):
        super().__init__()
        self.train_accuracy, self.accuracy = nnx.metrics.Accuracy(), nnx.metrics.Accuracy()
        self.wrapped = metrax.nnx.Accuracy()
        self.options = tuple(options.items())

    def training_step(self, batch):
        self.train_accuracy.update(logits=batch["logits"], labels=batch["labels"])
        self.log("train/accuracy", self.train_accuracy, **dict(self.options))
        self.log("train/merged", merged(batch), **dict(self.options))
        return super().training_step(batch)

    def validation_step(self, batch):
        self.accuracy.update(logits=batch["logits"], labels=batch["labels"])
        self.wrapped.update(predictions=batch["logits"].argmax(-1), labels=batch["labels"])
        self.log("val/accuracy", self.accuracy)
        self.log("val/wrapped", self.wrapped)
        self.log("val/merged", merged(batch))


def merged(batch):
    return metrax.Accuracy.from_model_output(predictions=batch["logits"].argmax(-1), labels=batch["labels"])


def close(values):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in values]


class Multi(Base):
    def __init__(self):
        super().__init__()
        self.metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), mean=nnx.metrics.Average())

    def validation_step(self, batch):
        self.metrics.update(logits=batch["logits"], labels=batch["labels"], values=batch["values"])
        self.log("val", self.metrics, prog_bar=True)
        self.log("again", self.metrics)
        self.log_dict(self.metrics)
        self.log_dict({"mine": self.metrics.accuracy, "sum": batch["values"].sum()}, reduce="mean")


def logging(name="m", value=lambda self, batch: merged(batch), **options):
    """A module that logs one thing in validation."""

    class Logs(Base):
        def __init__(self):
            super().__init__()
            self.accuracy, self.curve = nnx.metrics.Accuracy(), metrax.nnx.AUCROC()

        def validation_step(self, batch):
            self.log(name, value(self, batch), **options)

    return Logs()
