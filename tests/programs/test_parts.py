"""Several optimizers: each trains its part, and together they are what separate Optax loops would make of it."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import loader, quiet

import nnx_fit as nf


class Pair(nf.FitModule):
    """Two layers for two optimizers, and a parameter that neither asks for."""

    def __init__(self, optimizers, *, rngs: nnx.Rngs):
        self.body = nnx.Linear(8, 4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)
        self.scale = nnx.Param(jnp.float32(1.5))
        self._optimizers = nnx.static(optimizers)

    def training_step(self, batch):
        return loss_of(nnx.to_pure_dict(nnx.state(self, nnx.Param)), batch)

    def configure_optimizers(self):
        return self._optimizers


def loss_of(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["body"]["kernel"] + params["body"]["bias"])
    out = (hidden @ params["head"]["kernel"] + params["head"]["bias"]) * params["scale"]
    return ((out - batch["y"]) ** 2).mean()


def spec(tx, part, **options):
    return nf.OptimizerSpec(tx, trainable=part, **options)


def fitted(optimizers, epochs=2, **options):
    module = Pair(optimizers, rngs=nnx.Rngs(0))
    trainer = quiet(max_epochs=epochs, log_every_n_steps=1, **options)
    trainer.fit(module, loader())
    return module, trainer


def by_hand(parts, epochs=2):
    """The same training with one Optax loop for each part, on gradients of everything."""
    params = nnx.to_pure_dict(nnx.state(Pair(None, rngs=nnx.Rngs(0)), nnx.Param))
    states = {name: tx.init(params[name]) for name, tx in parts.items()}
    for _ in range(epochs):
        for batch in loader():
            grads = jax.grad(loss_of)(params, batch)
            for name, tx in parts.items():
                updates, states[name] = tx.update(grads[name], states[name], params[name])
                params[name] = optax.apply_updates(params[name], updates)
    return params


def test_each_optimizer_trains_its_part_as_it_would_alone():
    module, trainer = fitted({"slow": spec(optax.sgd(0.01), "body"), "fast": spec(optax.adam(0.1), "head")})
    expected = by_hand({"body": optax.sgd(0.01), "head": optax.adam(0.1)})
    for path, value in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        wanted = expected
        for key in path:
            wanted = wanted[key]
        np.testing.assert_allclose(value[...], wanted, rtol=2e-5, atol=1e-6, err_msg=str(path))
    assert trainer.global_step == 2 * len(loader()), "a step counts once, however many optimizers it has"
    assert len(trainer.compilations) == 1


def test_parameters_that_no_optimizer_trains_stay_and_are_announced(caplog):
    with caplog.at_level(logging.WARNING, logger="nnx_fit"):
        module, trainer = fitted([spec(optax.sgd(0.1), "body"), spec(optax.sgd(0.1), "head")])
    assert float(module.scale[...]) == 1.5
    assert "No optimizer trains 1 parameter, which stay as they are: scale." in caplog.text
    assert [row.path for row in trainer.partition.rows if row.role == "frozen"] == ["scale"]
    assert {part.name: part.params for part in trainer.optimizers} == {
        "0": ["body.bias", "body.kernel"],
        "1": ["head.bias", "head.kernel"],
    }


def test_overlapping_parts_are_an_error_that_names_both():
    with pytest.raises(nf.ConfigurationError, match=r"'a' and 'b' would both train head.bias, head.kernel\."):
        fitted({"a": spec(optax.sgd(0.1), ("body", "head")), "b": spec(optax.sgd(0.1), "head")})
    with pytest.raises(nf.ConfigurationError, match="trainable='body'"):
        fitted({"a": optax.sgd(0.1), "b": optax.adam(0.1)})


def test_two_optimizers_of_one_name_are_an_error():
    with pytest.raises(nf.ConfigurationError, match="two optimizers of the name 'x'"):
        fitted([spec(optax.sgd(0.1), "body", name="x"), spec(optax.sgd(0.1), "head", name="x")])
    with pytest.raises(nf.ConfigurationError, match="no optimizer"):
        fitted([])


def test_the_learning_rate_of_each_is_logged_under_its_name():
    module = Pair(
        {
            "slow": spec(optax.sgd, "body", schedule=optax.linear_schedule(0.1, 0.0, 10)),
            "fast": spec(optax.inject_hyperparams(optax.adam)(0.2), "head"),
        },
        rngs=nnx.Rngs(0),
    )
    trainer = quiet(max_steps=3, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()])
    history = trainer.fit(module, loader())
    np.testing.assert_allclose([value for _, value in history["lr-slow"]], [0.1, 0.09, 0.08], rtol=1e-6)
    np.testing.assert_allclose([value for _, value in history["lr-fast"]], [0.2, 0.2, 0.2], rtol=1e-6)


def test_the_norm_that_is_clipped_is_that_of_all_gradients():
    parts = {"a": spec(optax.sgd(1.0), "body"), "b": spec(optax.sgd(1.0), "head")}
    module, _ = fitted(parts, gradient_clip_val=1e-3, max_steps=1)
    start = nnx.to_pure_dict(nnx.state(Pair(None, rngs=nnx.Rngs(0)), nnx.Param))
    moved = jax.tree.map(lambda new, old: new - old, nnx.to_pure_dict(nnx.state(module, nnx.Param)), start)
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-3)


def test_the_schedule_of_a_part_begins_with_its_first_update():
    class Late(Pair):
        def on_fit_start(self):
            self.freeze("body")

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.unfreeze("body")

    ramp = optax.linear_schedule(0.0, 0.4, 4)
    parts = {"late": spec(optax.sgd, "body", schedule=ramp), "rest": spec(optax.sgd(0.1), "head")}
    trainer = quiet(max_epochs=2, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()])
    history = trainer.fit(Late(parts, rngs=nnx.Rngs(0)), loader())
    np.testing.assert_allclose([value for _, value in history["lr-late"]][-4:], [0, 0.1, 0.2, 0.3], atol=1e-6)


def test_a_frozen_part_rests_and_its_optimizer_goes_on_where_it_was():
    class Resting(Pair):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.freeze("body")
            if self.current_epoch == 2:
                self.unfreeze("body")

    parts = {"a": spec(optax.adam(0.01), "body"), "b": spec(optax.adam(0.01), "head")}
    module = Resting(parts, rngs=nnx.Rngs(0))
    trainer = quiet(max_epochs=3)
    trainer.fit(module, loader())
    steps = len(loader())
    counts = {part.name: int(part.state[0].count) for part in trainer.optimizers}
    assert counts == {"a": 2 * steps, "b": 3 * steps}
    assert trainer.optimizers[0].params == ["body.bias", "body.kernel"]


def test_a_resumed_run_has_every_optimizers_state(tmp_path):
    parts = {"a": spec(optax.adam(0.01), "body"), "b": spec(optax.adam(0.02), "head")}
    whole, _ = fitted(parts, epochs=3)
    first = Pair(parts, rngs=nnx.Rngs(0))
    trainer = quiet(max_epochs=3, max_steps=len(loader()) + 2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "saved")
    second = Pair(parts, rngs=nnx.Rngs(1))
    quiet(max_epochs=3).fit(second, loader(), ckpt_path=tmp_path / "saved")
    for one, other in zip(jax.tree.leaves(nnx.state(whole)), jax.tree.leaves(nnx.state(second)), strict=True):
        assert np.array_equal(one, other)


def test_optimizers_that_look_at_the_loss_are_given_it():
    """Under SGD after `scale_by_loss` a scalar moves by rate * loss * gradient."""

    class One(nf.FitModule):
        def __init__(self):
            self.w = nnx.Param(jnp.float32(2.0))

        def training_step(self, batch):
            return 0.5 * self.w[...] ** 2 + 0 * batch["x"].sum()

        def configure_optimizers(self):
            def update(updates, state, params=None, *, value, **_):
                return jax.tree.map(lambda g: -0.1 * value * g, updates), state

            return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    for accumulate in (1, 2):
        module = One()
        quiet(max_steps=2, accumulate_grad_batches=accumulate).fit(module, loader())
        w = 2.0
        for _ in range(2):
            w -= 0.1 * (0.5 * w**2) * w
        np.testing.assert_allclose(module.w[...], w, rtol=1e-6)


def test_a_part_that_matches_nothing_is_named():
    with pytest.raises(nf.ConfigurationError, match=r"optimizer 'b' would train nothing(.|\n)*Did you mean 'head'"):
        fitted({"a": spec(optax.sgd(0.1), "body"), "b": spec(optax.sgd(0.1), "haed")})
    with pytest.raises(nf.ConfigurationError, match=r"optimizer would train nothing: .*'boddy'(.|\n)*'body'"):
        fitted(spec(optax.sgd(0.1), "boddy"))


def test_tied_weights_in_two_parts_are_said_to_be_tied():
    class Tied(Pair):
        def __init__(self, optimizers, *, rngs):
            super().__init__(optimizers, rngs=rngs)
            self.tied = nnx.Linear(8, 4, rngs=rngs)
            self.tied.kernel = self.body.kernel

    module = Tied({"a": spec(optax.sgd(0.1), "body"), "b": spec(optax.sgd(0.1), "tied")}, rngs=nnx.Rngs(0))
    with pytest.raises(nf.ConfigurationError, match=r"body\.kernel and tied\.kernel are one Variable"):
        quiet(max_steps=1).fit(module, loader())


def test_short_hyperparameters_are_refused():
    """In bfloat16 Adam's 0.999 is 1.0, and its correction of the bias 0/0."""
    with pytest.raises(nf.ConfigurationError, match=r"b2(.|\n)*hyperparam_dtype=jnp\.float32"):
        fitted(optax.inject_hyperparams(optax.adam)(1e-2), precision="bf16-true", max_steps=1)
    tx = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(1e-2)
    module, _ = fitted(tx, precision="bf16-true", max_steps=2)
    assert bool(jnp.isfinite(module.body.kernel[...]).all())


def test_the_rate_behind_multi_steps_is_that_of_the_updates_it_lets_through():
    tx = optax.MultiSteps(optax.sgd(optax.polynomial_schedule(0.4, 0.0, 1, 4)), 2)
    schedule = optax.polynomial_schedule(0.4, 0.0, 1, 4)
    parts = nf.OptimizerSpec(tx.gradient_transformation(), schedule=schedule)
    trainer = quiet(max_steps=4, log_every_n_steps=1, callbacks=[nf.LearningRateMonitor()])
    history = trainer.fit(Pair(parts, rngs=nnx.Rngs(0)), loader())
    np.testing.assert_allclose([value for _, value in history["lr"]], [0.4, 0.4, 0.4, 0.3], rtol=1e-6)
