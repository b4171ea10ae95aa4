"""A trial runs a copy, with the module's hooks and without its set-up, and leaves everything as it was."""

from __future__ import annotations

import logging
import random
import threading

import jax
import nets
import numpy as np
import pytest
import torch
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.finder import GivenData
from nnx_fit.trial import SilentLogger, Trial, twin


class Events(nf.Callback):
    """What a trial shows to its callbacks."""

    def __init__(self):
        self.seen: list[object] = []

    def setup(self, trainer, module, stage):
        self.seen.append("setup")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(batch["target"][0]))

    def on_train_end(self, trainer, module):
        self.seen.append((trainer.global_step, trainer.estimated_steps))


class Telling(nets.Scalar):
    """Keeps a list outside of the graph, logs to whatever logger there is, and builds a layer when it is set up."""

    def __init__(self):
        super().__init__()
        self.heard: list[str] = []

    def setup(self, stage):
        self.heard.append("setup")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.heard.append("batch")
        self.trainer.logger.log_image("weights", np.zeros((2, 2)), self.global_step)
        self.trainer.logger.experiment.add_mesh("mesh", vertices=[1, 2]).close()
        self.trainer.logger.save_anything(1)

    def teardown(self, stage):
        self.heard.append("teardown")


def trial(callbacks, loaders, trainer=None, **arguments):
    trainer = nets.quiet(max_epochs=5) if trainer is None else trainer
    return Trial(trainer, GivenData("fit", loaders), callbacks, max_steps=3, **arguments)


def test_hooks_of_the_module_are_called_on_a_copy_but_not_its_setup(tmp_path):
    module, events = Telling(), Events()
    trainer = nets.quiet(max_epochs=5, logger=nf.CSVLogger(tmp_path))
    trial([events], nets.targets(0.5, 0.25), trainer).run(module)
    assert events.seen == [0.5, 0.25, 0.5, (3, 10)]  # schedules are as long as the real run
    assert (module.heard, float(module.w[...])) == ([], 1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_logger_takes_anything_and_is_no_protocol_it_does_not_know():
    logger = SilentLogger()
    logger.log_metrics({"loss": 1.0}, 1)
    logger.log_anything(1, two=3)
    assert logger.log_dir is None
    with pytest.raises(AttributeError):
        logger.__array__  # noqa: B018


def test_a_twin_shares_nothing_and_has_the_same_hyperparameters():
    class Outer(nf.FitModule):
        def __init__(self, width: int, *, rngs: nnx.Rngs):
            self.inner = nets.Regressor(width, rngs=rngs)

    module = Outer(4, rngs=nnx.Rngs(0))
    copied = twin(module)
    assert (copied.hparams, copied.inner.hparams) == (module.hparams, module.inner.hparams) and copied.hparams
    copied.inner.hparams["features"] = 1
    assert module.inner.hparams["features"] == 4
    mine, theirs = jax.tree.leaves(nnx.state(module)), jax.tree.leaves(nnx.state(copied))
    assert len(mine) == len(theirs) > 0
    assert not set(map(id, mine)) & set(map(id, theirs))


def test_what_cannot_be_copied_is_named():
    module = nets.Scalar()
    module.lock = threading.Lock()
    with pytest.raises(nf.ConfigurationError, match=r"Scalar, which cannot be copied: .*lock"):
        twin(module)


class Drawing:
    """A loader that draws from every global generator."""

    def __iter__(self):
        for _ in range(2):
            drawn = random.random() + np.random.rand() + float(torch.rand(()))
            yield {"target": np.full(2, drawn, np.float32)}


def test_global_random_generators_are_as_they_were():
    loader = Drawing()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [float(batch["target"][0]) for batch in loader]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    trial([], loader).run(nets.Scalar())
    assert [float(batch["target"][0]) for batch in loader] == expected


def test_loaders_are_where_they_were():
    loader = nf.ArrayLoader({"target": np.arange(8, dtype=np.float32)}, 2, shuffle=True)
    for _ in zip(range(2), loader, strict=False):
        pass
    state = loader.get_state()
    trial([], loader).run(nets.Scalar())
    assert loader.get_state() == state


def test_an_iterator_that_cannot_go_back_is_an_error():
    class Once:
        def __iter__(self):
            return self

        def __next__(self):
            return {"target": np.ones(2, np.float32)}

    with pytest.raises(nf.ConfigurationError, match="a Once is an iterator, which cannot be taken back"):
        trial([], Once()).run(nets.Scalar())


def test_a_function_that_returns_an_iterator_is_fine():
    events = Events()
    trial([events], lambda: iter(nets.targets(0.5, 0.25))).run(nets.Scalar())
    assert events.seen[:3] == [0.5, 0.25, 0.5]


def test_the_trial_has_the_settings_of_the_real_run():
    trainer = nets.quiet(max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5, precision="bf16-mixed")
    options = trial([], None, trainer).options
    assert (options.accumulate_grad_batches, options.gradient_clip_val) == (2, 0.5)
    assert (options.precision, options.max_steps) == ("bf16-mixed", 3)


def test_the_data_module_is_set_up_once_and_what_a_loader_method_keeps_stays_in_the_copy(caplog):
    class Data(nf.DataModule):
        calls = 0

        def setup(self, stage):
            raise AssertionError("it is set up already")

        def train_dataloader(self):
            self.calls += 1
            return nets.targets(0.5)

        teardown = setup

    data = Data()
    with caplog.at_level(logging.WARNING):
        Trial(nets.quiet(max_epochs=1), GivenData("fit", datamodule=data), [], max_steps=2).run(nets.Scalar())
    assert (data.calls, data.trainer, caplog.text) == (0, None, "")
