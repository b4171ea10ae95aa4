"""Precision: what a step sees, what is kept, and float16's loss scale, against closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, Scalar, arrays, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError, StateError
from nnx_fit.programs import precision

DTYPES = {
    # precision: what a step sees of floating parameters and batches, and what parameters and optimizer are kept in
    "32": (jnp.float32, jnp.float32),
    "bf16-mixed": (jnp.bfloat16, jnp.float32),
    "bf16-true": (jnp.bfloat16, jnp.bfloat16),
    "16-mixed": (jnp.float16, jnp.float32),
}


def optimizer_state(trainer: nf.Trainer) -> Any:
    assert trainer._run is not None and trainer._run.train_program is not None
    return trainer._run.train_program.optimizer_state


def loss_scale(trainer: nf.Trainer) -> list[Any]:
    assert trainer._run is not None and trainer._run.train_program is not None
    return [np.asarray(part).item() for part in trainer._run.train_program.loss_scale]


@pytest.mark.parametrize("name", DTYPES)
def test_each_kind_of_state_has_its_dtype_in_the_step_and_after_it(name):
    seen: dict[str, Any] = {}

    class Sees(Regressor):
        def training_step(self, batch):
            seen["train"] = (batch["x"].dtype, self.head.kernel[...].dtype, batch["label"].dtype)
            seen["stats"] = self.blocks[0].norm.mean[...].dtype
            return super().training_step(batch)

        def validation_step(self, batch):
            seen["validate"] = (batch["x"].dtype, self.head.kernel[...].dtype, batch["label"].dtype)
            super().validation_step(batch)

    data = arrays(16) | {"label": np.arange(16)}
    module = Sees(rngs=nnx.Rngs(0))
    trainer = quiet(max_epochs=2, precision=name)
    history = trainer.fit(module, nf.ArrayLoader(data, 8), nf.ArrayLoader(data, 8))
    compute, kept = DTYPES[name]
    assert seen["train"] == seen["validate"] == (compute, compute, jnp.int32)
    assert seen["stats"] == jnp.float32
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert {value[...].dtype for _, value in state} == {jnp.dtype(kept)}
    assert {value[...].dtype for _, value in nnx.to_flat_state(nnx.state(module, nnx.BatchStat))} == {jnp.dtype("f4")}
    floats = {x.dtype for x in jax.tree.leaves(optimizer_state(trainer)) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(kept)}
    assert np.isfinite([value for _, value in history["val/loss"]]).all()
    assert len(trainer.compilations) == 1


@pytest.mark.parametrize(("given", "meant"), [(32, "32"), ("32-true", "32"), (16, "16-mixed"), ("bf16", "bf16-mixed")])
def test_lightnings_other_ways_to_write_a_precision_are_understood(given, meant):
    assert quiet(precision=given).options.precision == meant


@pytest.mark.parametrize("value", ["64", "fp8", 8, None, True, 16.0])
def test_an_unknown_precision_is_refused_with_those_that_are_known(value):
    with pytest.raises(ConfigurationError, match=r"precision=.*'bf16-mixed', 'bf16-true', '16-mixed'"):
        quiet(precision=value)


def trained(name, target=3.0, start=1.001, steps=1, rate=0.1, **options):
    module = Scalar(start, rate)
    quiet(max_steps=steps, precision=name, **options).fit(module, targets(*[target] * steps))
    return module.w[...]


def test_mixed_computes_short_and_updates_exactly():
    # In bfloat16, 1.001 is 1: the gradient is exactly -2, and the update is applied to 1.001 itself.
    np.testing.assert_allclose(trained("32"), 1.001 + 0.1 * 1.999, rtol=1e-6)
    np.testing.assert_allclose(trained("bf16-mixed"), 1.001 + 0.1 * 2, rtol=1e-6)
    assert float(trained("bf16-true")) == float(jnp.bfloat16(1) + jnp.bfloat16(0.1 * 2))


def test_small_updates_add_up_where_parameters_are_kept_long():
    # Each is 1e-3 of the parameter, below what bfloat16 tells apart from it.
    assert float(trained("bf16-true", target=2.0, start=1.0, steps=50, rate=1e-3)) == 1.0
    assert float(trained("bf16-mixed", target=2.0, start=1.0, steps=50, rate=1e-3)) > 1.04


def test_the_guard_tells_a_cast_from_a_write():
    class Writes(Scalar):
        def training_step(self, batch):
            self.w[...] = self.w[...] * 0.5
            return super().training_step(batch)

    with pytest.raises(StateError, match=r"`?w`?"):
        quiet(max_steps=1, precision="bf16-mixed").fit(Writes(), targets(1.0))


def test_a_target_network_that_the_step_moves_is_moved_exactly():
    class Target(Scalar):
        def __init__(self):
            super().__init__()
            self.target = nnx.Param(jnp.float32(1.0))
            self.freeze("target")

        def training_step(self, batch):
            self.target[...] = 0.999 * self.target[...] + 0.001 * 2.0
            return super().training_step(batch)

    module = Target()
    quiet(max_steps=3, precision="bf16-mixed").fit(module, targets(1.0, 1.0, 1.0))
    np.testing.assert_allclose(module.target[...], 2 - 0.999**3, rtol=1e-6)
    assert module.target[...].dtype == jnp.float32


# --- float16 ----------------------------------------------------------------------------------------------------------


class Tiny(Scalar):
    """A gradient of 1e-8, which float16 cannot hold."""

    def training_step(self, batch):
        return (self.w[...] * batch["target"] * batch["target"]).mean()


def test_a_gradient_too_small_for_float16_survives_by_the_scale():
    assert float(jax.grad(lambda w: w * jnp.float16(1e-4) * jnp.float16(1e-4))(jnp.float16(1))) == 0
    module = Tiny(start=0.0, learning_rate=1e8)
    quiet(max_steps=1, precision="16-mixed").fit(module, targets(1e-4))
    np.testing.assert_allclose(module.w[...], -1.0, rtol=0.01)


class Overflows(nf.FitModule):
    """Batches of which some are too large for float16, with all kinds of state."""

    def __init__(self):
        self.w = nnx.Param(jnp.float32(1.0))
        self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        self.seen = nnx.Variable(jnp.float32(0.0))

    def training_step(self, batch):
        self.seen[...] += 1.0
        loss = (self.norm(batch["x"]) * 0).mean() + (self.w[...] * batch["x"]).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return optax.adam(0.1)


def batch_of(value):
    return {"x": np.full((2, 1), value, np.float32)}


def test_an_overflow_skips_the_update_and_is_not_counted():
    steps: list[tuple[int, float]] = []

    class Notes(nf.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            steps.append((trainer.global_step, loss_scale(trainer)[0]))

    module = Overflows()
    trainer = quiet(max_epochs=1, precision="16-mixed", log_every_n_steps=1, callbacks=Notes())
    history = trainer.fit(module, [batch_of(1.0), batch_of(1e6), batch_of(60000.0), batch_of(2.0)])
    # 1e6 is infinite in float16; 60000 is not, but its scaled gradient is.
    first = precision.FIRST_SCALE
    assert steps == [(1, first), (1, first / 2), (1, first / 4), (2, first / 4)]
    assert [step for step, _ in history["loss"]] == [1, 2]
    expected, tx = jnp.float32(1.0), optax.adam(0.1)
    state = tx.init(expected)
    for gradient in (1.0, 2.0):
        change, state = tx.update(jnp.float32(gradient), state, expected)
        expected = expected + change
    np.testing.assert_allclose(module.w[...], expected, rtol=1e-6)
    assert int(optimizer_state(trainer)[0].count) == 2
    assert float(module.seen[...]) == 2.0
    assert np.isfinite(module.norm.mean[...]).all() and np.isfinite(module.norm.var[...]).all()


def test_max_steps_counts_updates_that_were_made():
    module = Overflows()
    trainer = quiet(max_steps=2, precision="16-mixed")
    trainer.fit(module, [batch_of(1e6), batch_of(1.0)])
    assert trainer.global_step == 2 and trainer.current_epoch == 2


def test_an_overflow_drops_its_whole_window():
    module = Overflows()
    trainer = quiet(max_epochs=1, precision="16-mixed", accumulate_grad_batches=2)
    trainer.fit(module, [batch_of(1.0), batch_of(1e6), batch_of(1.0), batch_of(3.0)])
    assert trainer.global_step == 1
    np.testing.assert_allclose(module.w[...], 0.9, rtol=1e-4)


def test_the_scale_grows_after_updates_without_overflow(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    module = Overflows()
    trainer = quiet(max_epochs=1, precision="16-mixed")
    trainer.fit(module, [batch_of(1e6), *[batch_of(0.001)] * 4])
    assert loss_scale(trainer) == [precision.FIRST_SCALE, 1]


def test_a_resumed_run_has_its_scale(tmp_path):
    data = [batch_of(1.0), batch_of(1e6), batch_of(0.5)]
    trainer = quiet(max_epochs=1, precision="16-mixed")
    trainer.fit(Overflows(), data)
    trainer.save_checkpoint(tmp_path / "c")
    resumed = quiet(max_epochs=2, precision="16-mixed")
    module = Overflows()
    resumed.fit(module, data, ckpt_path=tmp_path / "c")
    whole = quiet(max_epochs=2, precision="16-mixed")
    expected = Overflows()
    whole.fit(expected, data)
    assert loss_scale(resumed) == loss_scale(whole) == [precision.FIRST_SCALE / 4, 1]
    assert float(module.w[...]) == float(expected.w[...]) and resumed.global_step == whole.global_step == 4
