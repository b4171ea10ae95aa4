"""The guard names every write that a step should not make, and stays silent for models that are right."""

from __future__ import annotations

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, arrays, loader, quiet

import nnx_fit as nf
from nnx_fit.state.guard import StateWarning


def run(module, **options):
    trainer = quiet(max_epochs=1, **options)
    trainer.fit(module, loader(), loader())
    return trainer


class LeakyNorm(nnx.Module):
    """Keeps a running mean in a plain Variable, and does not look at the mode."""

    def __init__(self, features):
        self.mean = nnx.Variable(jnp.zeros(features))

    def __call__(self, x):
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return x - self.mean[...]


class ModalNorm(LeakyNorm):
    def __call__(self, x, train: bool):
        return super().__call__(x) if train else x - self.mean[...]


class WithLayer(Regressor):
    def __init__(self, layer, *, rngs):
        super().__init__(rngs=rngs)
        self.layer = layer

    def __call__(self, x):
        return super().__call__(self.layer(x))


class NormInTrainMode(Regressor):
    def validation_step(self, batch):
        self.blocks[0].norm(batch["x"], use_running_average=False)
        super().validation_step(batch)


class WritesParameterInEval(Regressor):
    def validation_step(self, batch):
        self.head.kernel[...] *= 2
        super().validation_step(batch)


class WritesParameterInTraining(Regressor):
    def training_step(self, batch):
        loss = super().training_step(batch)
        self.head.kernel[...] *= 2
        return loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            NormInTrainMode,
            r"validation_step changed 2 running statistics:\n    blocks\.0\.norm\.mean, blocks\.0\.norm\.var\n"
            r"The layer `blocks\.0\.norm` ran in training mode.*\nFix: pass `use_running_average=not self\.training`",
        ),
        (
            lambda *, rngs: WithLayer(LeakyNorm(8), rngs=rngs),
            r"changed 1 running statistic:\n    layer\.mean\nThe layer `layer` \(LeakyNorm\).*\n.*Fix: take a `train`",
        ),
        (WritesParameterInEval, r"validation_step changed 1 parameter:\n    head\.kernel\nValidation must leave"),
        (
            WritesParameterInTraining,
            r"training_step wrote 1 trained parameter by hand:\n    head\.kernel\n.*Fix: .*freeze\(\"head\.kernel\"",
        ),
    ],
)
def test_a_wrong_write_is_an_error_that_names_path_and_fix(make, message):
    with pytest.raises(nf.StateError, match=re.compile(message, re.DOTALL)):
        run(make(rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_the_guard_watches_test_and_predict(verb):
    module = WithLayer(LeakyNorm(8), rngs=nnx.Rngs(0))
    with pytest.raises(nf.StateError, match=rf"{verb}_step changed 1 running statistic"):
        getattr(quiet(), verb)(module, loader())


def test_warn_drops_the_change_and_goes_on():
    module = WithLayer(LeakyNorm(8), rngs=nnx.Rngs(0))
    with pytest.warns(StateWarning, match=r"layer\.mean"):
        quiet(state_guard="warn").validate(module, loader())
    np.testing.assert_array_equal(module.layer.mean[...], np.zeros(8))


def test_off_drops_the_change_and_says_nothing():
    module = WithLayer(LeakyNorm(8), rngs=nnx.Rngs(0))
    quiet(state_guard="off").validate(module, loader())
    np.testing.assert_array_equal(module.layer.mean[...], np.zeros(8))


@pytest.mark.parametrize("guard", ["warn", "off"])
def test_a_parameter_written_by_hand_keeps_the_optimizers_value(guard):
    plain, writing = Regressor(rngs=nnx.Rngs(0)), WritesParameterInTraining(rngs=nnx.Rngs(0))
    quiet(max_steps=3).fit(plain, loader())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StateWarning)
        quiet(max_steps=3, state_guard=guard).fit(writing, loader())
    np.testing.assert_allclose(writing.head.kernel[...], plain.head.kernel[...], rtol=1e-6)


def test_an_unknown_guard_is_refused():
    with pytest.raises(nf.ConfigurationError, match=r"state_guard='loud'.*\"error\", \"warn\" or \"off\""):
        nf.Trainer(max_epochs=1, state_guard="loud")


def test_a_layer_that_follows_its_flag_raises_nothing():
    module = WithLayer(ModalNorm(8), rngs=nnx.Rngs(0))
    run(module)
    assert np.abs(module.layer.mean[...]).sum() > 0


def test_eval_mutable_lets_a_variable_change():
    class Counting(Regressor):
        eval_mutable = nnx.PathContains("seen")

        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.seen = nnx.Variable(jnp.array(0))

        def validation_step(self, batch):
            self.seen[...] += batch["x"].shape[0]

    module = Counting(rngs=nnx.Rngs(0))
    quiet().validate(module, loader(64))
    assert int(module.seen[...]) == 64


def test_a_frozen_target_network_may_be_written_in_training():
    class Target(Regressor):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.target = nnx.Linear(8, 1, rngs=rngs)
            self.freeze("target")

        def training_step(self, batch):
            self.target.kernel[...] = 0.5 * self.target.kernel[...] + 0.5 * self.head.kernel[...]
            return super().training_step(batch)

    module = Target(rngs=nnx.Rngs(0))
    before = module.target.kernel[...]
    run(module)
    assert not np.array_equal(before, module.target.kernel[...])


def nested(transform):
    class Nested(Regressor):
        def __call__(self, x):
            return transform(lambda module, x: Regressor.__call__(module, x))(self, x)

    return Nested


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat, lambda f: nnx.jit(nnx.remat(nnx.jit(f)))])
def test_nested_transforms_are_seen_through_in_both_directions(transform):
    run(nested(transform)(rngs=nnx.Rngs(0)))

    class Wrong(nested(transform)):
        def validation_step(self, batch):
            def leak(module, x):
                return module.blocks[1].norm(x, use_running_average=False)

            transform(leak)(self, batch["x"])

    with pytest.raises(nf.StateError, match=r"blocks\.1\.norm\.mean"):
        run(Wrong(rngs=nnx.Rngs(0)))


class Stacked(nf.FitModule):
    """Layers made with vmap and applied with scan, batch norm inside."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Sequential(nnx.Linear(8, 8, use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)

        self.layers = make(rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return layer(x)

        return self.head(forward(self.layers, x))

    def training_step(self, batch):
        return ((self(batch["x"]) - batch["y"]) ** 2).mean()

    def validation_step(self, batch):
        self.log("val/loss", self.training_step(batch))

    def configure_optimizers(self):
        return optax.sgd(0.01)


def test_layers_inside_a_scan_raise_nothing_and_their_statistics_move_in_training_only():
    module = Stacked(rngs=nnx.Rngs(0))
    run(module)
    moved = np.array(module.layers.layers[1].mean[...])
    assert np.abs(moved).sum() > 0
    quiet().validate(module, loader())
    np.testing.assert_array_equal(moved, module.layers.layers[1].mean[...])


def test_a_branch_that_hands_statistics_through_is_no_change():
    class Branching(Regressor):
        def __call__(self, x):
            return nnx.cond(x.sum() > 0, lambda m, x: m.norm(x), lambda m, x: m.norm(2 * x), self.blocks[0], x).mean(
                -1, keepdims=True
            ) * Regressor.__call__(self, x)

    run(Branching(rngs=nnx.Rngs(0)))


FLAX_LAYERS = {
    "BatchNorm": lambda rngs: nnx.BatchNorm(8, rngs=rngs),
    "LayerNorm": lambda rngs: nnx.LayerNorm(8, rngs=rngs),
    "RMSNorm": lambda rngs: nnx.RMSNorm(8, rngs=rngs),
    "GroupNorm": lambda rngs: nnx.GroupNorm(8, num_groups=2, rngs=rngs),
    "InstanceNorm": lambda rngs: nnx.InstanceNorm(8, rngs=rngs),
    "SpectralNorm": lambda rngs: nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs),
    "WeightNorm": lambda rngs: nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs),
    "Dropout": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
    "LoRA": lambda rngs: nnx.LoRA(8, 2, 8, rngs=rngs),
    "LoRALinear": lambda rngs: nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs),
    "Einsum": lambda rngs: nnx.Einsum("bi,io->bo", (8, 8), (8,), rngs=rngs),
    "LinearGeneral": lambda rngs: nnx.LinearGeneral(8, 8, rngs=rngs),
    "PReLU": lambda rngs: nnx.PReLU(),
}


@pytest.mark.parametrize("name", FLAX_LAYERS)
def test_no_false_alarm_on_flax_layers(name):
    run(WithLayer(FLAX_LAYERS[name](nnx.Rngs(1)), rngs=nnx.Rngs(0)))


class Sequence(nf.FitModule):
    """A layer on sequences of shape (batch, 4, 8)."""

    def __init__(self, layer, rngs):
        self.layer = layer
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def training_step(self, batch):
        out = self.layer(jnp.stack([batch["x"]] * 4, axis=1))
        return ((self.head(out[:, -1]) - batch["y"]) ** 2).mean()

    def validation_step(self, batch):
        self.log("val/loss", self.training_step(batch))

    def configure_optimizers(self):
        return optax.sgd(0.01)


def attention(rngs, decode):
    layer = nnx.MultiHeadAttention(2, 8, decode=decode, dropout_rate=0.1, rngs=rngs)
    if decode:
        layer.init_cache((16, 4, 8))
    return layer


SEQUENCE_LAYERS = {
    "MultiHeadAttention": lambda rngs: attention(rngs, decode=False),
    "LSTM": lambda rngs: nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs), rngs=rngs),
    "GRU": lambda rngs: nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs), rngs=rngs),
    "SimpleCell": lambda rngs: nnx.RNN(nnx.SimpleCell(8, 8, rngs=rngs), rngs=rngs),
}


@pytest.mark.parametrize("name", SEQUENCE_LAYERS)
def test_no_false_alarm_on_sequence_layers(name):
    run(Sequence(SEQUENCE_LAYERS[name](nnx.Rngs(1)), nnx.Rngs(0)))


def test_an_attention_cache_may_change_in_prediction():
    class Decoder(nf.FitModule):
        def __init__(self):
            self.layer = attention(nnx.Rngs(0), decode=True)

        def predict_step(self, batch):
            return self.layer(jnp.ones((16, 1, 8)))

    module = Decoder()
    quiet(limit_predict_batches=3).predict(module, loader())
    assert int(module.layer.cache_index[...]) == 3


def test_weight_norm_trains_as_in_a_hand_written_loop():
    def make():
        return WithLayer(FLAX_LAYERS["WeightNorm"](nnx.Rngs(1)), rngs=nnx.Rngs(0))

    ours, theirs = make(), make()
    quiet(max_epochs=2).fit(ours, nf.ArrayLoader(arrays(), 16))
    theirs.train()
    optimizer = nnx.Optimizer(theirs, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, batch):
        grads = nnx.grad(lambda module: module.loss(batch))(module)
        optimizer.update(module, grads)

    data = arrays()
    for _ in range(2):
        for start in range(0, 64, 16):
            step(theirs, optimizer, jax.tree.map(lambda array, s=start: array[s : s + 16], data))
    compare = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
    jax.tree.map(compare, nnx.as_pure(nnx.state(ours, nnx.Param)), nnx.as_pure(nnx.state(theirs, nnx.Param)))


def test_metric_states_start_over_in_each_eval_loop_and_training_ones_are_left_alone():
    class Measured(Regressor):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.seen, self.trained = nnx.metrics.Average("x"), nnx.metrics.Average("x")

        def training_step(self, batch):
            self.trained.update(x=batch["x"])
            return super().training_step(batch)

        def validation_step(self, batch):
            self.seen.update(x=batch["x"])

    module = Measured(rngs=nnx.Rngs(0))
    quiet(max_epochs=3).fit(module, loader(), loader(32))
    assert float(module.seen.count[...]) == 32 * 8
    assert float(module.trained.count[...]) == 3 * 64 * 8


def test_randomness_in_evaluation_is_advice_and_leaves_the_streams(caplog):
    class Sampling(Regressor):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.noise = rngs.fork()

        def validation_step(self, batch):
            self.log("val/noise", jax.random.normal(self.noise()))

    module = Sampling(rngs=nnx.Rngs(0))
    before = int(module.noise.default.count[...])
    with caplog.at_level("INFO", "nnx_fit"):
        quiet().validate(module, loader())
    assert "validation_step draws random numbers (noise.default.count)" in caplog.text
    assert int(module.noise.default.count[...]) == before


def test_a_flag_passed_explicitly_is_named_as_the_cause():
    class Told(WithLayer):
        def __call__(self, x):
            return Regressor.__call__(self, self.layer(x, train=True))

    with pytest.raises(nf.StateError, match=r"was told to train by an explicit `train`.*\nFix: leave `train` out"):
        quiet().validate(Told(ModalNorm(8), rngs=nnx.Rngs(0)), loader())


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_dropout_that_draws_nothing_in_evaluation_is_not_advised_on(transform, caplog):
    with caplog.at_level("INFO", "nnx_fit"):
        quiet().validate(nested(transform)(rngs=nnx.Rngs(0)), loader())
    assert "draws random numbers" not in caplog.text


# --- correct in unusual words -----------------------------------------------------------------------------------------


def mixed(self, x):
    return 0.9 * self.mean[...] + 0.1 * x.mean(0)


def with_where(self, x, train):
    self.mean[...] = jnp.where(train, mixed(self, x), self.mean[...])


def with_an_array_flag(self, x, train):
    self.mean[...] = jnp.where(jnp.logical_not(jnp.asarray(not train)), mixed(self, x), self.mean[...])


def with_cond(self, x, train):
    self.mean[...] = jax.lax.cond(train, lambda: mixed(self, x), lambda: self.mean[...])


def with_switch(self, x, train):
    self.mean[...] = jax.lax.switch(int(train), [lambda: self.mean[...], lambda: mixed(self, x)])


def with_select(self, x, train):
    self.mean[...] = jax.lax.select(jnp.full(8, train), mixed(self, x), self.mean[...])


def with_stop_gradient(self, x, train):
    self.mean[...] = jax.lax.stop_gradient(mixed(self, x) if train else self.mean[...])


WORDINGS = [with_where, with_an_array_flag, with_cond, with_switch, with_select, with_stop_gradient]


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit, nnx.remat], ids=["plain", "jit", "remat"])
def test_a_write_that_the_flag_turns_off_is_no_change(wording, transform):
    class Layer(LeakyNorm):
        def __call__(self, x, train):
            transform(lambda layer, x: wording(layer, x, train))(self, x)
            return x - self.mean[...]

    module = WithLayer(Layer(8), rngs=nnx.Rngs(0))
    run(module)
    assert np.abs(module.layer.mean[...]).sum() > 0


@pytest.mark.parametrize("wording", WORDINGS)
def test_the_same_write_with_the_flag_on_is_an_error(wording):
    class Layer(LeakyNorm):
        def __call__(self, x, train):
            wording(self, x, True)
            return x - self.mean[...]

    with pytest.raises(nf.StateError, match=r"layer\.mean\n.*or wrote in spite of it.*\nFix: .*write only `if`"):
        run(WithLayer(Layer(8), rngs=nnx.Rngs(0)))


def test_layers_stacked_along_another_axis_raise_nothing():
    axes = nnx.StateAxes({nnx.RngState: 0, ...: 1})

    class Along(Stacked):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)

            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=axes)
            def make(rngs):
                return nnx.Sequential(nnx.Linear(8, 8, use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))

            self.layers = make(rngs)

        def __call__(self, x):
            forward = nnx.scan(lambda layer, x: layer(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
            return self.head(forward(self.layers, x))

    module = Along(rngs=nnx.Rngs(0))
    assert module.layers.layers[1].mean.shape == (8, 3)
    run(module)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_flag_of_another_method_is_named_with_what_to_pass():
    class Encoder(LeakyNorm):
        def encode(self, x, train=True):
            return LeakyNorm.__call__(self, x) if train else x

        def __call__(self, x):
            return self.encode(x)

    fix = r"has `train` in `encode`.*\nFix: pass `train=self\.training` to `encode`"
    with pytest.raises(nf.StateError, match=fix):
        run(WithLayer(Encoder(8), rngs=nnx.Rngs(0)))


def test_only_the_layers_of_the_cause_are_counted():
    class Both(Regressor):
        def validation_step(self, batch):
            self.head.kernel[...] *= 2
            self.blocks[0].norm(batch["x"], use_running_average=False)
            super().validation_step(batch)

    message = r"changed 3 Variables:\n.*\nThe layer `blocks\.0\.norm` ran in training mode"
    with pytest.raises(nf.StateError, match=message):
        run(Both(rngs=nnx.Rngs(0)))


class Node(nnx.Pytree):
    """A layer that is no `nnx.Module`."""

    def __init__(self):
        self.mean = nnx.Variable(jnp.zeros(8))
        self.training = False

    def __call__(self, x, train):
        assert train == self.training
        if train:
            self.mean[...] = x.mean(0)
        return x


def test_a_layer_that_is_a_pytree_has_modes_and_is_named():
    module = WithLayer(Node(), rngs=nnx.Rngs(0))
    run(module)
    assert np.abs(module.layer.mean[...]).sum() > 0
    assert module.layer.training is False

    class Leaky(Node):
        def __call__(self, x):
            self.mean[...] = x.mean(0)
            return x

    message = r"The layer `layer` \(Leaky\) wrote in spite of its `training`.*\nFix: write only `if self\.training`"
    with pytest.raises(nf.StateError, match=message):
        run(WithLayer(Leaky(), rngs=nnx.Rngs(0)))


def test_a_variable_of_the_modules_own_is_told_of_the_modules_mode():
    class Counts(Regressor):
        def loss(self, batch):
            self.calls[...] += 1
            return super().loss(batch)

    module = Counts(rngs=nnx.Rngs(0))
    module.calls = nnx.Variable(jnp.zeros((), jnp.int32))
    message = r"\n    calls\nThe module itself \(Counts\) wrote.*\nFix: write only `if self\.training`"
    with pytest.raises(nf.StateError, match=message):
        run(module)
