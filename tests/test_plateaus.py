"""Plateaus: the learning rate falls when a metric stops falling, counted in values of that metric."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nets import Scalar, quiet, targets
from optax.contrib import reduce_on_plateau

import nnx_fit as nf

# A metric that improves twice, then stays: with a patience of 2 the rate falls after every second value that is no
# improvement.
VALUES = [5.0, 4.0, 4.0, 4.5, 4.0, 4.0, 3.0, 3.5]


class Watching(Scalar):
    """Logs given values as its validation loss, one for each validation."""

    def __init__(self, values=tuple(VALUES), monitor="val/loss"):
        super().__init__(1.0, 0.5)
        self.values = tuple(values)
        self.monitor = monitor

    def on_validation_epoch_end(self):
        if self.trainer.sanity_checking:
            return
        epoch = self.current_epoch
        self.log("val/loss", self.values[epoch])

    def configure_optimizers(self):
        plateau = reduce_on_plateau(factor=0.5, patience=2)
        return nf.OptimizerSpec(
            lambda rate: optax.chain(optax.sgd(rate), plateau), schedule=self.learning_rate, monitor=self.monitor
        )


def scales(values, patience=2, factor=0.5):
    """The scale after each value, computed as `torch.optim.lr_scheduler.ReduceLROnPlateau` counts it.

    Optax reduces when the number of values without improvement reaches the patience, PyTorch when it exceeds it.
    """
    best, waited, scale, found = np.inf, 0, 1.0, []
    for value in values:
        if value < best * (1 - 1e-4):
            best, waited = value, 0
        else:
            waited += 1
        if waited == patience:
            waited, scale = 0, scale * factor
        found.append(scale)
    return found


def rates(history):
    return [value for _, value in history["lr"]]


def test_the_rate_falls_when_the_metric_stops_falling():
    """Three updates in each epoch see the plateau that the validation before them left."""
    trainer = quiet(max_epochs=8, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()])
    history = trainer.fit(Watching(), targets(0, 0, 0), targets(0))
    expected = np.repeat(0.5 * np.array([1.0, *scales(VALUES)[:-1]]), 3)
    np.testing.assert_allclose(rates(history), expected, rtol=1e-6)
    assert scales(VALUES)[-1] < 0.5, "the values do reduce the rate"
    assert trainer.compilations == ["first call"]


def test_the_update_has_the_rate_that_is_logged():
    module = Watching()
    history = quiet(max_epochs=8, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()]).fit(
        module, targets(0, 0), targets(0)
    )
    np.testing.assert_allclose(module.w[...], np.prod([1 - rate for rate in rates(history)]), rtol=1e-5)


def test_a_resumed_run_goes_on_waiting(tmp_path):
    def fit(module, steps, ckpt_path=None):
        trainer = quiet(max_epochs=8, max_steps=steps, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()])
        return trainer, trainer.fit(module, targets(0, 0), targets(0), ckpt_path=ckpt_path)

    _, whole = fit(Watching(), 16)
    for stop in (7, 8, 9):
        first, _ = fit(Watching(), stop)
        first.save_checkpoint(tmp_path / str(stop))
        _, history = fit(Watching(), 16, tmp_path / str(stop))
        assert rates(history)[-3:] == rates(whole)[-3:]


def test_a_training_metric_counts_once_in_an_epoch():
    class Training(Scalar):
        """Never improves after the first epoch."""

        def __init__(self):
            super().__init__(1.0, 0.5)

        def training_step(self, batch):
            self.log("train/flat", jnp.float32(1.0), on_step=True, on_epoch=True)
            return super().training_step(batch)

        def configure_optimizers(self):
            tx = optax.chain(optax.sgd(0.5), reduce_on_plateau(factor=0.5, patience=2))
            return nf.OptimizerSpec(tx, schedule=0.5, monitor="train/flat")

    history = quiet(max_epochs=6, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()]).fit(
        Training(), targets(0, 0)
    )
    expected = np.repeat(0.5 * np.array([1.0, *scales([1.0] * 5)]), 2)
    np.testing.assert_allclose(rates(history), expected, rtol=1e-6)


def test_without_a_monitor_a_plateau_sees_the_loss_of_each_update():
    class Flat(Scalar):
        def training_step(self, batch):
            return 1.0 + 0.0 * self.w[...]

        def configure_optimizers(self):
            return nf.OptimizerSpec(
                optax.chain(optax.sgd(0.5), reduce_on_plateau(factor=0.5, patience=2)), schedule=0.5
            )

    history = quiet(max_steps=6, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()]).fit(
        Flat(1.0), targets(*[0] * 6)
    )
    np.testing.assert_allclose(rates(history), 0.5 * np.array(scales([1.0] * 6)), rtol=1e-6)


def test_a_metric_that_nothing_logs_is_named():
    class Plain(Watching):
        def on_validation_epoch_end(self):
            self.log("val/los", 1.0)

    says = r"OptimizerSpec\(monitor='val/loss'\).*\n?.*Did you mean 'val/los'"
    with pytest.raises(nf.ConfigurationError, match=says):
        quiet(max_epochs=3).fit(Plain(), targets(0), targets(0))


def test_a_monitor_without_a_plateau_is_an_error():
    class Nothing(Scalar):
        def configure_optimizers(self):
            return nf.OptimizerSpec(optax.sgd(0.1), monitor="val/loss")

    with pytest.raises(nf.ConfigurationError, match=r"no optax\.contrib\.reduce_on_plateau"):
        quiet(max_epochs=1).fit(Nothing(), targets(0))
