"""Optimizers as host hooks see them: hyperparameters are read and set between steps, and nothing is compiled for it."""

from __future__ import annotations

import numpy as np
import optax
import pytest
from nets import Scalar, quiet, targets

import nnx_fit as nf


class Injected(Scalar):
    def configure_optimizers(self):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=self.learning_rate)


def test_a_rate_set_in_a_hook_is_that_of_the_next_update():
    """w <- w - rate * w, with the rate halved after every step."""

    class Halving(Injected):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            optimizer = self.optimizers()
            read.append(optimizer.hyperparams["learning_rate"])
            optimizer.hyperparams["learning_rate"] = optimizer.learning_rate / 2

    read: list[float] = []
    module = Halving(1.0, 0.4)
    trainer = quiet(max_steps=4, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()])
    history = trainer.fit(module, targets(0, 0, 0, 0))
    rates = [0.4, 0.2, 0.1, 0.05]
    np.testing.assert_allclose(module.w[...], np.prod([1 - rate for rate in rates]), rtol=1e-6)
    np.testing.assert_allclose(read, rates, rtol=1e-6)
    np.testing.assert_allclose([value for _, value in history["lr"]], rates, rtol=1e-6, err_msg="what was applied")
    assert trainer.compilations == ["first call"]


def test_what_was_set_is_saved_with_the_optimizer(tmp_path):
    class Setting(Injected):
        def on_train_start(self):
            if self.global_step == 0:
                self.optimizers().hyperparams["learning_rate"] = 0.25

    trainer = quiet(max_steps=1)
    trainer.fit(Setting(1.0), targets(0, 0))
    trainer.save_checkpoint(tmp_path / "saved")
    module = Setting(1.0)
    resumed = quiet(max_steps=2)
    resumed.fit(module, targets(0, 0), ckpt_path=tmp_path / "saved")
    np.testing.assert_allclose(module.w[...], 0.75**2, rtol=1e-6)
    assert resumed.optimizers[0].learning_rate == 0.25


def test_hyperparameters_are_found_wherever_they_are_nested():
    class Nested(Scalar):
        def configure_optimizers(self):
            inner = optax.chain(
                optax.inject_hyperparams(optax.clip)(max_delta=1.0), optax.inject_hyperparams(optax.sgd)(0.5)
            )
            return optax.chain(optax.identity(), inner)

    class Setting(Nested):
        def on_train_start(self):
            self.optimizers().hyperparams["max_delta"] = 0.5
            self.optimizers().hyperparams["learning_rate"] = 0.25

    module = Setting(3.0)
    trainer = quiet(max_steps=1)
    trainer.fit(module, targets(0))
    assert dict(trainer.optimizers[0].hyperparams) == {"max_delta": 0.5, "learning_rate": 0.25}
    np.testing.assert_allclose(module.w[...], 3.0 - 0.25 * 0.5)


def hook(body):
    class Hooked(Injected):
        def on_train_start(self):
            body(self)

    return Hooked(1.0)


def test_mistakes_name_what_there_is():
    def set_unknown(module):
        module.optimizers().hyperparams["momentum"] = 0.5

    def set_shape(module):
        module.optimizers().hyperparams["learning_rate"] = [0.1, 0.2]

    def remove(module):
        del module.optimizers().hyperparams["learning_rate"]

    def update(module):
        module.optimizers().update(None)

    for body, says in [
        (set_unknown, "no hyperparameter 'momentum'; it has: learning_rate"),
        (set_shape, r"shape \(\), but a value of shape \(2,\)"),
        (remove, "cannot be removed"),
        (update, "called in a host hook"),
        (lambda module: module.optimizers("other"), "no optimizer 'other'"),
    ]:
        with pytest.raises(nf.ConfigurationError, match=says):
            quiet(max_steps=1).fit(hook(body), targets(0))
    with pytest.raises(KeyError, match="no hyperparameter 'momentum'"):
        quiet(max_steps=1).fit(hook(lambda module: module.optimizers().hyperparams["momentum"]), targets(0))


def test_a_scheduled_hyperparameter_cannot_be_set():
    class Scheduled(Scalar):
        def configure_optimizers(self):
            return optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.5, 0.0, 10))

        def on_train_start(self):
            self.optimizers().hyperparams["learning_rate"] = 0.1

    with pytest.raises(nf.ConfigurationError, match="follows a schedule"):
        quiet(max_steps=1).fit(Scheduled(1.0), targets(0))


def test_optimizers_are_there_from_on_train_start_on():
    class Early(Injected):
        def on_fit_start(self):
            self.optimizers()

    with pytest.raises(nf.ConfigurationError, match="Fix: ask in on_train_start"):
        quiet(max_steps=1).fit(Early(1.0), targets(0))
    assert quiet(max_steps=1).optimizers == []
