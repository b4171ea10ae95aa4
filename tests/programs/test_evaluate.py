"""The eval programs: what they see, what they leave alone, and the little that comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, Scalar, loader, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import StateError


def snapshot(module: Any) -> dict[Any, np.ndarray]:
    """Every Variable's bits."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = variable.get_raw_value()
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        found[path] = np.asarray(jax.random.key_data(value) if is_key else value)
    return found


def assert_bit_identical(left: dict[Any, np.ndarray], right: dict[Any, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=str(path))


class Noisy(Regressor):
    """Draws noise in evaluation: Monte Carlo dropout, from the module's own stream."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.rngs = rngs

    def validation_step(self, batch):
        super().validation_step(batch)
        self.log("val/noise", jax.random.uniform(self.rngs.noise()), reduce="max")

    def test_step(self, batch):
        super().test_step(batch)
        self.log("noise", jax.random.uniform(self.rngs.noise()), reduce="max")

    def predict_step(self, batch):
        return self(batch["x"]), jax.random.uniform(self.rngs.noise())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("compiled", [True, False])
def test_evaluation_leaves_every_variable_bit_identical(verb, compiled):
    module = Noisy(rngs=nnx.Rngs(0, noise=1))
    before = snapshot(module)
    getattr(quiet(jit=compiled), verb)(module, loader(24, 8))
    assert_bit_identical(before, snapshot(module))


def test_training_with_and_without_validation_is_bit_identical():
    states = []
    for options, data in (
        ({}, None),
        ({"num_sanity_val_steps": 2, "val_check_interval": 1}, loader(40, 16)),
        ({"num_sanity_val_steps": -1, "check_val_every_n_epoch": 2}, [loader(40, 16), loader(8, 8)]),
    ):
        module = Noisy(rngs=nnx.Rngs(0, noise=1))
        trainer = quiet(max_epochs=2, **options)
        trainer.fit(module, loader(48, 16), data)
        assert trainer._run is not None
        assert trainer._run.train_program is not None
        state = snapshot(module)
        for index, leaf in enumerate(jax.tree.leaves(trainer._run.train_program.optimizer_state)):
            state["optimizer", index] = np.asarray(leaf)
        states.append(state)
    assert_bit_identical(states[0], states[1])
    assert_bit_identical(states[0], states[2])


def test_noise_differs_from_batch_to_batch_and_repeats_from_run_to_run():
    module = Noisy(rngs=nnx.Rngs(0, noise=1))
    trainer = quiet()
    drawn = [[float(noise) for _, noise in trainer.predict(module, loader(24, 8))] for _ in range(2)]
    assert len(set(drawn[0])) == 3
    assert drawn[0] == drawn[1]
    rngs = nnx.Rngs(0, noise=1)
    np.testing.assert_allclose(drawn[0], [jax.random.uniform(rngs.noise()) for _ in range(3)], rtol=1e-6)


def test_noise_goes_on_from_one_loader_to_the_next():
    module = Noisy(rngs=nnx.Rngs(0, noise=1))
    first, second = quiet().predict(module, [loader(16, 8), loader(8, 8)])
    rngs = nnx.Rngs(0, noise=1)
    drawn = [float(noise) for _, noise in [*first, *second]]
    np.testing.assert_allclose(drawn, [jax.random.uniform(rngs.noise()) for _ in range(3)], rtol=1e-6)


def test_evaluation_uses_the_running_statistics_and_no_dropout():
    module = Regressor(rngs=nnx.Rngs(0))
    quiet(max_steps=4, max_epochs=1).fit(module, loader())
    batch = next(iter(loader()))
    copy = nnx.clone(module)
    copy.eval()
    (predicted,) = quiet(limit_predict_batches=1).predict(module, loader())
    np.testing.assert_allclose(predicted, copy(batch["x"]), rtol=1e-5)
    assert isinstance(predicted, np.ndarray)
    result = quiet(limit_test_batches=1).test(module, loader())
    np.testing.assert_allclose(result[0]["test/loss"], copy.loss(batch), rtol=1e-5)


def test_validation_in_the_middle_of_training_sees_the_weights_of_that_step():
    class Watching(Scalar):
        def validation_step(self, batch):
            self.log("w", self.w[...])

    trainer = quiet(max_steps=4, val_check_interval=2)
    history = trainer.fit(Watching(), targets(*[0.0] * 4), targets(0.0))
    np.testing.assert_allclose(history["w"], [(2, 0.9**2), (4, 0.9**4)], rtol=1e-6)


# --- what may change --------------------------------------------------------------------------------------------------


class Recording(nf.FitModule):
    """Writes what an eval step may write, and more if it is told to."""

    def __init__(self, *, more: bool = False):
        self.weight = nnx.Param(jnp.ones(()))
        self.cache = nnx.Cache(jnp.zeros(()))
        self.intermediate = nnx.Intermediate(jnp.zeros(()))
        self.metric = nnx.metrics.Average("value")
        self.stat = nnx.BatchStat(jnp.zeros(()))
        self.memory = nnx.Variable({"seen": jnp.zeros(()), "label": "text"})
        self.bare = jnp.zeros(())
        self.more = more

    def training_step(self, batch):
        return (self.weight[...] * batch).sum()

    def validation_step(self, batch):
        self.cache[...] = self.cache[...] + batch.sum()
        self.intermediate[...] = self.intermediate[...] + batch.sum()
        self.metric.update(value=batch)
        if self.more:
            self.stat[...] = self.stat[...] + batch.sum()
            self.memory["seen"] = self.memory["seen"] + 1
        self.log("seen", self.memory["seen"], reduce="max")

    def configure_optimizers(self):
        return optax.sgd(0.1)


def values(module: Recording) -> list[float]:
    found = (module.cache[...], module.intermediate[...], module.stat[...], module.memory["seen"], module.bare)
    return [float(value) for value in found]


BATCHES = [np.full(2, value, np.float32) for value in (1.0, 2.0)]


def test_caches_intermediates_and_metric_states_come_back_and_nothing_else():
    module = Recording()
    quiet().validate(module, BATCHES)
    assert values(module) == [6, 6, 0, 0, 0]
    assert float(module.metric.compute()) == 1.5
    assert module.memory["label"] == "text"


@pytest.mark.parametrize("selector", [[nnx.BatchStat, nnx.PathContains("memory")], nnx.Variable])
def test_what_eval_mutable_matches_comes_back_but_never_a_trained_param(selector):
    module = Recording(more=True)
    module.eval_mutable = selector
    hash(nnx.graphdef(module))
    (metrics,) = quiet().validate(module, BATCHES)
    assert values(module) == [6, 6, 6, 2, 0]
    assert metrics["seen"] == 2  # each batch saw what the one before it wrote
    np.testing.assert_array_equal(module.weight[...], 1.0)


def test_what_comes_back_is_trained_on_and_costs_no_compilation():
    module = Recording()
    trainer = quiet(max_epochs=3, val_check_interval=1)
    trainer.fit(module, [np.ones(2, np.float32)] * 2, BATCHES)
    assert values(module)[:3] == [6 * 3 * 2, 6 * 3 * 2, 0]
    np.testing.assert_allclose(module.weight[...], 1 - 6 * 0.1 * 2, rtol=1e-5)
    assert trainer.compilations == ["first call"]


def test_a_variable_that_an_eval_step_adds_is_refused_by_name():
    class Adding(Recording):
        def validation_step(self, batch):
            self.extra = nnx.Variable(jnp.ones(()))

    with pytest.raises(StateError, match=r"validation_step changed which Variables(?s:.*)added extra"):
        quiet().validate(Adding(), BATCHES)


def test_validation_and_sanity_check_share_one_compilation():
    class Traced(Scalar):
        def validation_step(self, batch):
            traces.append(batch["target"].shape)
            super().validation_step(batch)

    traces: list[Any] = []
    trainer = quiet(max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(Traced(), targets(0.0), targets(0.0, 1.0))
    assert traces == [(2,)]


def test_metrics_beyond_the_first_places_are_kept():
    class Chatty(Scalar):
        def validation_step(self, batch):
            for index in range(70):
                self.log(f"m{index}", batch["target"].mean() + index)

    (metrics,) = quiet().validate(Chatty(), targets(1.0, 3.0))
    assert metrics == {f"m{index}": 2.0 + index for index in range(70)}


def test_outputs_reach_the_batch_hook_and_predictions_come_as_numpy():
    class Returning(Scalar):
        def validation_step(self, batch):
            return {"twice": batch["target"] * 2}

        def predict_step(self, batch, batch_idx):
            return {"twice": batch["target"] * 2, "index": batch_idx}

        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append((np.asarray(outputs["twice"]).tolist(), batch_idx, dataloader_idx))

    seen: list[Any] = []
    module = Returning()
    quiet().validate(module, [targets(1.0, 2.0), targets(3.0)])
    assert seen == [([2, 2], 0, 0), ([4, 4], 1, 0), ([6, 6], 0, 1)]
    predicted = quiet().predict(module, targets(1.0, 2.0))
    assert [(item["twice"].tolist(), int(item["index"])) for item in predicted] == [([2, 2], 0), ([4, 4], 1)]
    assert all(isinstance(item["twice"], np.ndarray) for item in predicted)
