"""LearningRateMonitor."""

import nets
import optax
import pytest

import nnx_fit as nf


class Scheduled(nets.Scalar):
    def __init__(self, name=None):
        super().__init__()
        self.name = name

    def configure_optimizers(self):
        schedule = optax.linear_schedule(0.5, 0.0, 4)
        return nf.OptimizerSpec(optax.sgd, schedule=schedule, name=self.name)


@pytest.mark.parametrize(("name", "tag"), [(None, "lr"), ("head", "lr-head")])
def test_rate_of_each_update_is_logged(name, tag):
    trainer = nets.quiet(max_epochs=1, log_every_n_steps=1, callbacks=nf.LearningRateMonitor())
    history = trainer.fit(Scheduled(name), nets.targets(*[0.5] * 4))
    assert history[tag] == [(1, 0.5), (2, 0.375), (3, 0.25), (4, 0.125)]


def test_an_interval_that_is_none_is_refused():
    with pytest.raises(nf.ConfigurationError, match=r"logging_interval='batch'(.|\n)*log_every_n_steps"):
        nf.LearningRateMonitor("batch")


def test_an_epochs_rate_is_the_one_it_begins_with():
    trainer = nets.quiet(max_epochs=2, log_every_n_steps=1, callbacks=nf.LearningRateMonitor("epoch"))
    history = trainer.fit(Scheduled(), nets.targets(0.5, 0.5))
    assert history["lr"] == [(2, 0.5), (4, 0.25)]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_momentum_and_weight_decay_are_those_of_the_optimizer(interval):
    class Injected(nets.Scalar):
        def configure_optimizers(self):
            adam = optax.inject_hyperparams(optax.adamw)(0.1, b1=0.75, weight_decay=0.25)
            return nf.OptimizerSpec(adam, name="main")

    monitor = nf.LearningRateMonitor(interval, log_momentum=True, log_weight_decay=True)
    history = nets.quiet(max_epochs=1, log_every_n_steps=1, callbacks=monitor).fit(Injected(), nets.targets(0.5))
    assert history["lr-main-momentum"] == [(1, 0.75)]
    assert history["lr-main-weight_decay"] == [(1, 0.25)]


def test_a_rate_that_cannot_be_read_is_said_once_with_the_fix(caplog):
    trainer = nets.quiet(max_epochs=2, callbacks=nf.LearningRateMonitor())
    trainer.fit(nets.Scalar(), nets.targets(0.5, 0.5))
    said = [record.getMessage() for record in caplog.records if "learning rate" in record.getMessage()]
    assert len(said) == 1
    assert "Fix: return nnx_fit.OptimizerSpec(optax.adam, schedule=1e-3)" in said[0]


def test_a_rate_that_can_be_read_needs_no_words(caplog):
    nets.quiet(max_epochs=1, callbacks=nf.LearningRateMonitor()).fit(Scheduled(), nets.targets(0.5))
    assert "learning rate" not in caplog.text
