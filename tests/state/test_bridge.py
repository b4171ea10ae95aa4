"""Linen modules in NNX train, evaluate and predict as in a loop written for Linen."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from nets import arrays, loader, quiet

import nnx_fit as nf
from nnx_fit.state.call_flags import filled
from nnx_fit.state.guard import StateWarning


class Net(linen.Module):
    """All three kinds of state behind a required flag; no bias before the norm, whose true gradient would be zero."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(8, use_bias=False)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.Dropout(0.3, deterministic=not train)(linen.relu(x))
        return linen.Dense(1)(x)


class Bridged(nf.FitModule):
    """A Linen module as a layer, called without a flag."""

    def __init__(self, module: Any = None, *, rngs: nnx.Rngs, **flags: Any):
        wrapper = nnx.bridge.ToNNX(module or Net(), rngs=rngs)
        self.net = nnx.bridge.lazy_init(wrapper, jnp.ones((2, 8)), **(flags or {"train": False}))

    def __call__(self, x):
        return self.net(x)

    def loss(self, batch):
        return ((self(batch["x"]) - batch["y"]) ** 2).mean()

    def training_step(self, batch):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val", self.loss(batch))

    def predict_step(self, batch):
        return self(batch["x"])

    def configure_optimizers(self):
        return optax.adam(1e-2)


def bridged(module: Any = None, **flags: Any) -> Bridged:
    return Bridged(module, rngs=nnx.Rngs(params=0, dropout=1), **flags)


def collections(module: Bridged) -> dict[str, Any]:
    """What `Net.apply` takes, from the Variables of the bridged module."""
    found: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for row in nf.partition(module).rows:
        if row.role != "rngs":
            _, layer, name = row.path.split(".")
            kind = {"params": "params", "stats": "batch_stats"}[row.role]
            found[kind].setdefault(layer, {})[name] = jnp.array(getattr(module.net, layer)[name][...])
    return found


def by_hand(variables: Any, stream: Any, first: int, batches: list[Any]) -> Any:
    """The same training with `linen.apply` and Optax, one step a batch."""
    optimizer = optax.adam(1e-2)
    params, statistics = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, statistics, state, batch, count):
        def loss(params):
            out, updates = Net().apply(
                {"params": params, "batch_stats": statistics},
                batch["x"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(stream, count)},
            )
            return ((out - batch["y"]) ** 2).mean(), updates["batch_stats"]

        (_, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), statistics, state

    for count, batch in enumerate(batches, start=first):
        params, statistics, state = step(params, statistics, state, batch, count)
    return {"params": params, "batch_stats": statistics}


def close(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, theirs)


def same(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def raw(module: Any) -> Any:
    """A copy of every value, keys as their data."""
    return [
        np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)
        for value in jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))
    ]


def test_every_leaf_has_one_role_and_the_table_shows_it():
    parts = nf.partition(bridged())
    assert {row.path: (row.role, row.type) for row in parts.rows} == {
        "net.BatchNorm_0.bias": ("params", "Param"),
        "net.BatchNorm_0.mean": ("stats", "BatchStat"),
        "net.BatchNorm_0.scale": ("params", "Param"),
        "net.BatchNorm_0.var": ("stats", "BatchStat"),
        "net.Dense_0.kernel": ("params", "Param"),
        "net.Dense_1.bias": ("params", "Param"),
        "net.Dense_1.kernel": ("params", "Param"),
        "net.to_nnx__rngs.dropout.count": ("rngs", "RngCount"),
        "net.to_nnx__rngs.dropout.key": ("rngs", "RngKey"),
        "net.to_nnx__rngs.params.count": ("rngs", "RngCount"),
        "net.to_nnx__rngs.params.key": ("rngs", "RngKey"),
    }
    lines = parts.table().splitlines()
    assert any(line.split()[:3] == ["net.BatchNorm_0.mean", "stats", "BatchStat"] for line in lines)


@pytest.mark.parametrize("compiled", [True, False])
def test_fit_equals_a_loop_written_for_linen(compiled):
    module = bridged()
    before, stream = collections(module), module.net.to_nnx__rngs.dropout
    key, first = jnp.array(stream.key[...]), int(stream.count[...])
    quiet(max_epochs=2, jit=compiled).fit(module, loader(), loader())
    data = arrays()
    batches = [{k: v[i : i + 16] for k, v in data.items()} for i in range(0, 64, 16)] * 2
    close(collections(module), by_hand(before, key, first, batches))


def test_evaluation_and_prediction_leave_the_module_and_use_the_statistics():
    module = bridged()
    trainer = quiet(max_epochs=1)
    trainer.fit(module, loader())
    before = raw(module)
    metrics = trainer.validate(module, loader())
    predictions = trainer.predict(module, loader())
    same(raw(module), before)
    data = arrays()
    expected = Net().apply(collections(module), data["x"], train=False)
    np.testing.assert_allclose(np.concatenate(predictions), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_number(metrics, "val"), ((expected - data["y"]) ** 2).mean(), rtol=1e-5)


def _number(metrics: Any, name: str) -> float:
    return float((metrics[0] if isinstance(metrics, list) else metrics)[name])


def test_the_statistics_move_in_training_only():
    module = bridged()
    start = collections(module)["batch_stats"]["BatchNorm_0"]["mean"]
    quiet().validate(module, loader())
    same(collections(module)["batch_stats"]["BatchNorm_0"]["mean"], start)
    quiet(max_epochs=1).fit(module, loader())
    assert np.abs(collections(module)["batch_stats"]["BatchNorm_0"]["mean"] - start).max() > 0


def test_a_frozen_bridged_module_in_eval_mode_stays_as_it_is():
    class Headed(Bridged):
        eval_modules = ("net",)

        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            self.head = nnx.Linear(1, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(super().__call__(x))

    module = Headed(rngs=nnx.Rngs(params=0, dropout=1))
    module.freeze("net")
    before = collections_of_net(module)
    quiet(max_epochs=1).fit(module, loader(), loader())
    same(collections_of_net(module), before)


def collections_of_net(module: Any) -> Any:
    layers = ("Dense_0", "BatchNorm_0", "Dense_1")
    return {layer: {k: np.array(v[...]) for k, v in getattr(module.net, layer).items()} for layer in layers}


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat, lambda f: nnx.jit(nnx.remat(f))])
def test_a_bridged_module_inside_a_transform_trains_the_same(transform):
    class Inside(Bridged):
        def __call__(self, x):
            return transform(lambda net, x: net(x))(self.net, x)

    plain, inside = bridged(), Inside(rngs=nnx.Rngs(params=0, dropout=1))
    for module in (plain, inside):
        quiet(max_epochs=1).fit(module, loader(), loader())
    close(collections(inside), collections(plain))


# --- flags ------------------------------------------------------------------------------------------------------------


class Flagged(linen.Module):
    """Returns the flag it was called with."""

    own: bool | None = None

    @linen.compact
    def __call__(self, x, mask=None, *, deterministic=None):
        self.param("weight", linen.initializers.ones, ())
        return deterministic

    def encode(self, x, training):
        return training


def flagged(module: Any = None, **options: Any) -> Any:
    return nnx.bridge.lazy_init(nnx.bridge.ToNNX(module or Flagged(), rngs=nnx.Rngs(0)), jnp.ones(1), **options)


@pytest.mark.parametrize("training", [True, False])
def test_flags_are_those_of_the_linen_method_and_an_explicit_value_wins(training):
    layer = flagged()
    call = vars(nnx.bridge.ToNNX)["__call__"]
    with filled(layer, training):
        assert layer(1.0) is not training
        assert layer(1.0, None) is not training
        assert layer(1.0, deterministic=training) is training
        assert layer.encode(1.0) is training
        assert layer(1.0, method="encode") is training
        assert layer(1.0, method=Flagged.encode) is training
        assert layer.encode(1.0, not training) is not training
        assert layer.encode(1.0, training=not training) is not training
    assert vars(nnx.bridge.ToNNX)["__call__"] is call


def test_the_wrapper_is_left_as_it_was_after_a_step_that_fails():
    class Fails(Bridged):
        def training_step(self, batch):
            raise RuntimeError(str(self.net(batch["x"]).shape))

    call = vars(nnx.bridge.ToNNX)["__call__"]
    module = Fails(rngs=nnx.Rngs(params=0, dropout=1))
    names = set(vars(module.net))
    with pytest.raises(RuntimeError, match=r"\(16, 1\)"):
        quiet(max_epochs=1).fit(module, loader())
    assert vars(nnx.bridge.ToNNX)["__call__"] is call
    assert set(vars(module.net)) == names


@pytest.mark.parametrize("layer", [linen.Dropout(0.5), linen.BatchNorm()])
def test_linens_own_layers_follow_the_mode(layer):
    class Wrapped(Bridged):
        def __call__(self, x):
            return self.net(x).sum(-1, keepdims=True) * self.scale[...]

    flag = "deterministic" if isinstance(layer, linen.Dropout) else "use_running_average"
    module = Wrapped(layer, rngs=nnx.Rngs(params=0, dropout=1), **{flag: True})
    module.scale = nnx.Param(jnp.ones(()))
    quiet(max_epochs=1).fit(module, loader(), loader())


def test_a_fields_own_value_wins_and_is_warned_of():
    module = bridged(linen.BatchNorm(use_running_average=True), mask=None)
    with pytest.warns(StateWarning, match=r"`net` \(BatchNorm\) has an attribute `use_running_average`.*\nFix: take"):
        quiet(max_epochs=1).fit(module, loader())
    np.testing.assert_array_equal(module.net.mean[...], np.zeros(8))


def test_a_mode_like_argument_that_nothing_passes_is_a_warning():
    class Gate(linen.Module):
        @linen.compact
        def __call__(self, x, is_train=False):
            return linen.Dense(1)(x)

    with pytest.warns(StateWarning, match=r"layer `net` \(Gate\) has an argument `is_train` of __call__"):
        quiet(max_epochs=1).fit(bridged(Gate(), is_train=False), loader())


# --- the guard --------------------------------------------------------------------------------------------------------


def test_a_correct_bridged_module_raises_and_advises_nothing(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(max_epochs=1).fit(bridged(), loader(), loader())
    assert "random numbers" not in caplog.text


def test_statistics_written_in_an_evaluation_are_an_error_that_names_path_and_fix():
    class Wrong(Bridged):
        def validation_step(self, batch):
            self.net(batch["x"], train=True, mutable=["batch_stats"])

    named = r"2 running statistics:\n    net\.BatchNorm_0\.mean, net\.BatchNorm_0\.var"
    with pytest.raises(nf.StateError, match=named) as e:
        quiet().validate(Wrong(rngs=nnx.Rngs(params=0, dropout=1)), loader())
    assert "(Net) was told to train by an explicit `train`" in str(e.value)
    assert "Fix: leave `train` out of the call" in str(e.value)


def test_what_an_evaluation_writes_is_dropped_under_warn():
    class Wrong(Bridged):
        def validation_step(self, batch):
            self.net(batch["x"], train=True, mutable=["batch_stats"])

    module = Wrong(rngs=nnx.Rngs(params=0, dropout=1))
    before = raw(module)
    with pytest.warns(StateWarning, match=r"net\.BatchNorm_0\.mean"):
        quiet(state_guard="warn").validate(module, loader())
    same(raw(module), before)


def test_a_collection_that_a_step_makes_is_refused_by_name():
    class Sows(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(1)(x)
            self.sow("intermediates", "hidden", x)
            return x

    class Wrong(Bridged):
        def __call__(self, x):
            return self.net(x, mutable=["intermediates"])

    module = Wrong(Sows(), rngs=nnx.Rngs(0), mutable=False)
    with pytest.raises(nf.StateError, match=r"(?s)training_step changed which Variables.*added net\.hidden.*\nFix: "):
        quiet(max_epochs=1).fit(module, loader())


def test_a_custom_collection_is_carried_in_training():
    class Counts(linen.Module):
        @linen.compact
        def __call__(self, x, train: bool):
            calls = self.variable("tally", "calls", lambda: jnp.zeros((), jnp.int32))
            if train and not self.is_initializing():
                calls.value += 1
            return linen.Dense(1)(x)

    module = bridged(Counts(), train=False)
    assert {row.path: row.role for row in nf.partition(module).rows}["net.calls"] == "stats"
    quiet(max_epochs=1).fit(module, loader(), loader())
    assert int(module.net.calls[...]) == 4
