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


def test_interval_is_the_trainers():
    with pytest.raises(nf.ConfigurationError, match=r"logging_interval='epoch'(.|\n)*log_every_n_steps"):
        nf.LearningRateMonitor("epoch")
