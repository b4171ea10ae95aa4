"""What hooks change of a module beyond its values reaches the compiled steps, at the price of one compilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, Scalar, loader, quiet, targets

import nnx_fit as nf


class Annealed(Scalar):
    """Logs a plain attribute that its step reads."""

    def __init__(self):
        super().__init__()
        self.beta, self.best = 0.0, 0.0

    def training_step(self, batch):
        self.log("beta", self.beta)
        return super().training_step(batch)


class PerEpoch(Annealed):
    def on_train_epoch_start(self):
        self.beta = float(self.current_epoch)


class PerBatch(Annealed):
    def on_train_batch_start(self, batch, batch_idx):
        self.beta = self.global_step / 10


class Keeping(Annealed):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.best = float(batch_idx)


def test_an_attribute_set_at_an_epochs_start_reaches_the_step(caplog):
    trainer = quiet(max_epochs=3, log_every_n_steps=1)
    with caplog.at_level("INFO", "nnx_fit"):
        history = trainer.fit(PerEpoch(), targets(1, 2))
    assert [value for _, value in history["beta"]] == [0, 0, 1, 1, 2, 2]
    assert trainer.compilations == ["first call", *["a hook changed the module: attribute beta"] * 2]
    assert "A hook changed the module (attribute beta): its steps are compiled again." in caplog.text


def test_an_attribute_set_before_a_batch_reaches_its_step():
    history = quiet(max_epochs=1, log_every_n_steps=1).fit(PerBatch(), targets(1, 2, 3))
    np.testing.assert_allclose([value for _, value in history["beta"]], [0, 0.1, 0.2])


def test_an_attribute_that_no_step_reads_costs_no_compilation():
    trainer = quiet(max_epochs=3)
    trainer.fit(module := Keeping(), targets(1, 2, 3), targets(1))
    assert trainer.compilations == ["first call"]
    assert module.best == 2


def test_an_attribute_of_a_flax_layer_reaches_the_step():
    class LessDropout(Regressor):
        def on_train_epoch_start(self):
            for block in self.blocks:
                block.dropout.rate = 0.0

    plain = Regressor(rngs=nnx.Rngs(0))
    for block in plain.blocks:
        block.dropout.rate = 0.0
    quiet(max_epochs=2).fit(plain, loader())
    quiet(max_epochs=2).fit(changed := LessDropout(rngs=nnx.Rngs(0)), loader())
    np.testing.assert_allclose(changed.head.kernel[...], plain.head.kernel[...], rtol=1e-5)


class Thawing(Regressor):
    """Trains the head alone for one epoch, then everything."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.freeze("blocks")

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.unfreeze("blocks")


class Watching(nf.Callback):
    """Keeps Adam's state and the first kernel at the end of each epoch."""

    def __init__(self):
        self.states, self.kernels = [], []

    def on_train_epoch_end(self, trainer, module):
        state = trainer._run.train_program.optimizer_state
        self.states.append(jax.tree.map(np.array, state))
        self.kernels.append(np.array(module.blocks[0].linear.kernel[...]))


def test_unfreezing_between_epochs_trains_more_and_keeps_the_optimizers_state_of_the_rest():
    watching = Watching()
    trainer = quiet(max_epochs=2, callbacks=watching)
    start = np.array((module := Thawing(rngs=nnx.Rngs(0))).blocks[0].linear.kernel[...])
    trainer.fit(module, loader())
    assert len(trainer.compilations) == 2
    np.testing.assert_array_equal(watching.kernels[0], start)
    assert not np.array_equal(watching.kernels[1], start)
    first, second = (state[0] for state in watching.states)
    assert (int(first.count), int(second.count)) == (4, 8)
    assert set(first.mu) == {"head"}
    assert set(second.mu) == {"head", "blocks"}

    # The head's moments went on: an epoch that starts from zero moments would leave other ones.
    alone = Watching()
    quiet(max_epochs=1, callbacks=alone).fit(fresh := Thawing(rngs=nnx.Rngs(0)), loader())
    np.testing.assert_array_equal(alone.states[0][0].mu["head"]["kernel"], first.mu["head"]["kernel"])
    assert np.abs(second.mu["head"]["kernel"] - first.mu["head"]["kernel"]).max() > 0
    assert fresh.head.kernel.shape == (8, 1)


def test_freezing_between_epochs_stops_training():
    class Freezing(Regressor):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.freeze("blocks.0")

    watching = Watching()
    quiet(max_epochs=3, callbacks=watching).fit(Freezing(rngs=nnx.Rngs(0)), loader())
    np.testing.assert_array_equal(watching.kernels[0], watching.kernels[2])


def test_a_layer_added_between_epochs_is_trained():
    class Growing(Regressor):
        def __call__(self, x):
            return super().__call__(self.extra(x)) if hasattr(self, "extra") else super().__call__(x)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.extra = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    module = Growing(rngs=nnx.Rngs(0))
    quiet(max_epochs=2).fit(module, loader())
    assert not np.array_equal(module.extra.kernel[...], nnx.Linear(8, 8, rngs=nnx.Rngs(1)).kernel[...])


def test_lora_trains_the_adapters_alone():
    class Adapted(Regressor):
        trainable = nnx.LoRAParam

        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.head = nnx.LoRALinear(8, 1, lora_rank=2, rngs=rngs)

        def configure_optimizers(self):
            return optax.sgd(0.1)

    module = Adapted(rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(module, nnx.Param)))
    quiet(max_epochs=1).fit(module, loader())
    after = nnx.as_pure(nnx.state(module, nnx.Param))
    np.testing.assert_array_equal(before["head"]["kernel"], after["head"]["kernel"])
    np.testing.assert_array_equal(before["blocks"][0]["linear"]["kernel"], after["blocks"][0]["linear"]["kernel"])
    assert not np.array_equal(before["head"]["lora"]["lora_b"], after["head"]["lora"]["lora_b"])


def test_parameter_groups_have_settings_of_their_own():
    class Grouped(Regressor):
        def configure_optimizers(self):
            def label(path, _):
                return "head" if path[0].key == "head" else "body"

            return optax.multi_transform(
                {"head": optax.sgd(0.1), "body": optax.set_to_zero()},
                lambda params: jax.tree_util.tree_map_with_path(label, params),
            )

    module = Grouped(rngs=nnx.Rngs(0))
    body, head = np.array(module.blocks[0].linear.kernel[...]), np.array(module.head.kernel[...])
    quiet(max_epochs=1).fit(module, loader())
    np.testing.assert_array_equal(module.blocks[0].linear.kernel[...], body)
    assert not np.array_equal(module.head.kernel[...], head)


def test_a_value_of_another_shape_written_at_an_epochs_start_is_refused_by_name():
    class Reshaping(Regressor):
        def on_train_epoch_start(self):
            self.head.bias.set_value(jnp.zeros(3))

    with pytest.raises(nf.StateError, match=r"`head\.bias` was given a value of shape \(3,\)"):
        quiet(max_epochs=1).fit(Reshaping(rngs=nnx.Rngs(0)), loader())


def test_an_evaluation_leaves_the_history_of_the_fit_alone():
    trainer = quiet(max_epochs=1)
    history = trainer.fit(module := Regressor(rngs=nnx.Rngs(0)), loader(), loader())
    before = history.state_dict()
    trainer.validate(module, loader(32))
    assert history.state_dict() == before
    assert trainer.history is history


def test_a_dict_changed_in_place_reaches_the_step():
    class Configured(Annealed):
        def __init__(self):
            super().__init__()
            self.config = {"weight": 0.0}

        def training_step(self, batch):
            self.log("weight", self.config["weight"])
            return Scalar.training_step(self, batch)

        def on_train_epoch_start(self):
            self.config["weight"] = float(self.current_epoch)

    history = quiet(max_epochs=3, log_every_n_steps=1).fit(Configured(), targets(1))
    assert [value for _, value in history["weight"]] == [0, 1, 2]


def test_an_attribute_of_a_layer_set_before_a_batch_reaches_its_step():
    class Hotter(Regressor):
        def training_step(self, batch):
            self.log("rate", self.blocks[0].dropout.rate)
            return super().training_step(batch)

        def on_train_batch_start(self, batch, batch_idx):
            self.blocks[0].dropout.rate = 0.1 * (batch_idx + 1)

    history = quiet(max_steps=3, log_every_n_steps=1).fit(Hotter(rngs=nnx.Rngs(0)), loader())
    np.testing.assert_allclose([value for _, value in history["rate"]], [0.1, 0.2, 0.3], rtol=1e-6)


def test_stages_of_their_own_mode_cost_no_compilation():
    class Looking(Regressor):
        def on_train_epoch_start(self):
            self.looked = True

        def on_validation_epoch_end(self):
            self.looked = False

    trainer = quiet(max_epochs=3)
    trainer.fit(Looking(rngs=nnx.Rngs(0)), loader(), loader())
    assert trainer.compilations == ["first call"]
