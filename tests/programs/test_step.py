"""Running one step hook: its arguments, its scope, and what may be a loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import Scalar, quiet, targets

from nnx_fit.errors import ConfigurationError


def fitted(training_step: Any) -> Any:
    module = type("Model", (Scalar,), {"training_step": training_step})()
    return quiet(max_steps=2, log_every_n_steps=1).fit(module, targets(1.0, 1.0))


# --- losses -----------------------------------------------------------------------------------------------------------

BAD_LOSSES = {
    "nothing": (lambda self, batch: None, "nothing"),
    "no loss key": (lambda self, batch: {"los": self.w[...]}, "without \"loss\".*'los'"),
    "a vector": (lambda self, batch: self.w[...] * batch["target"], r"loss of shape \(2,\).*\n.*mean"),
    "one element": (lambda self, batch: self.w[...].reshape(1), r"loss of shape \(1,\)"),
    "an integer": (lambda self, batch: jnp.argmax(self.w[...] * batch["target"]), "dtype int32.*differentiated"),
    "a bool": (lambda self, batch: True, "a bool as loss"),
    "a string": (lambda self, batch: "loss", "a str as loss"),
    "a tuple": (lambda self, batch: (self.w[...], 1), "a tuple as loss"),
    "a None in a dict": (lambda self, batch: {"loss": None}, "a NoneType as loss"),
    "a constant": (lambda self, batch: 1.5, "does not depend on any trained parameter"),
    "the data alone": (lambda self, batch: batch["target"].mean(), "does not depend on any trained parameter"),
    "a NumPy number": (lambda self, batch: np.float32(1.5), "loss"),
    "complex": (lambda self, batch: self.w[...] * 1j, "dtype complex64.*differentiated"),
}


@pytest.mark.parametrize("mistake", BAD_LOSSES)
def test_what_is_no_loss_is_one_clear_error(mistake):
    step, message = BAD_LOSSES[mistake]
    with pytest.raises(ConfigurationError, match=rf"Model\.training_step returned .*{message}"):
        fitted(step)


@pytest.mark.parametrize(
    "step",
    [
        lambda self, batch: self.w[...] ** 2,
        lambda self, batch: {"loss": self.w[...] ** 2, "extra": batch},
        lambda self, batch: self.w**2,
        lambda self, batch: (self.w[...] ** 2).astype(jnp.bfloat16),
        lambda self, batch: nnx.jit(lambda module: module.w[...] ** 2)(self),
        lambda self, batch: nnx.remat(lambda module: module.w[...] ** 2)(self),
        lambda self, batch: jax.checkpoint(lambda w: w**2)(self.w[...]),
        lambda self, batch: jax.lax.scan(lambda c, _: (c * self.w[...], None), self.w[...], None, length=1)[0],
    ],
)
def test_every_scalar_that_depends_on_the_parameters_is_a_loss(step):
    fitted(step)


def test_a_loss_that_depends_on_frozen_parameters_alone_is_an_error():
    class Two(Scalar):
        def __init__(self):
            super().__init__()
            self.frozen = nnx.Param(jnp.ones(()))
            self.freeze("frozen")

        def training_step(self, batch):
            return self.frozen[...] ** 2

    with pytest.raises(ConfigurationError, match="does not depend on any trained parameter"):
        quiet(max_steps=1).fit(Two(), targets(1.0))


# --- arguments --------------------------------------------------------------------------------------------------------


def logging_step(signature: str, index: str = "0") -> Any:
    body = f"self.log('index', {index}); return (self.w[...] * batch['target']).mean()"
    scope: dict[str, Any] = {}
    exec(f"def training_step({signature}): {body}", scope)
    return scope["training_step"]


@pytest.mark.parametrize(
    ("signature", "index", "expected"),
    [
        ("self, batch", "7", [7, 7]),
        ("self, batch, batch_idx", "batch_idx", [0, 1]),
        ("self, batch, index", "index", [0, 1]),
        ("self, batch, batch_idx, dataloader_idx", "batch_idx + dataloader_idx", [0, 1]),
        ("self, batch, dataloader_idx", "dataloader_idx", [0, 0]),
        ("self, batch, dataloader_idx, batch_idx", "batch_idx", [0, 1]),
        ("self, batch, batch_idx=None", "batch_idx", [0, 1]),
        ("self, batch, scale=3", "scale", [3, 3]),
        ("self, batch, *, batch_idx", "batch_idx", [0, 1]),
        ("self, batch, batch_idx, /", "batch_idx", [0, 1]),
        ("self, batch, *rest", "rest[0]", [0, 1]),
        ("self, batch, **rest", "4", [4, 4]),
    ],
)
def test_a_step_takes_what_its_signature_asks_for(signature, index, expected):
    history = fitted(logging_step(signature, index))
    assert [value for _, value in history["index"]] == expected


@pytest.mark.parametrize("signature", ["self, batch, a, b, c", "self, batch, *, something"])
def test_a_step_that_asks_for_more_is_an_error_that_says_what_there_is(signature):
    with pytest.raises(ConfigurationError, match="batch_idx and dataloader_idx"):
        fitted(logging_step(signature))


def test_a_jitted_step_is_a_step():
    @nnx.jit
    def training_step(self, batch, batch_idx):
        return (self.w[...] * batch["target"]).mean() + batch_idx

    fitted(training_step)


# --- the batch's size -------------------------------------------------------------------------------------------------


def test_batches_whose_leaves_disagree_need_a_size_only_for_an_epoch_mean():
    ragged = [{"target": np.ones(2, np.float32), "other": np.ones(3, np.float32)}]

    class OnStep(Scalar):
        def validation_step(self, batch):
            self.log("max", batch["other"].max(), reduce="max")

    quiet(max_steps=1, log_every_n_steps=1).fit(OnStep(), ragged, ragged)

    class OnEpoch(Scalar):
        def training_step(self, batch):
            self.log("mean", self.w[...], on_epoch=True)
            return self.w[...] ** 2

    with pytest.raises(ConfigurationError, match=r"(?s)length 3.*length 2.*batch_size=.*training_step"):
        quiet(max_steps=1).fit(OnEpoch(), ragged)

    class Sized(OnEpoch):
        def batch_size(self, batch):
            return batch["other"].shape[0]

    quiet(max_steps=1).fit(Sized(), ragged)


def in_jit(module, x):
    return nnx.jit(lambda inner, x: inner.noted((inner.w[...] * x).mean()))(module, x)


def in_grad(module, x):
    return nnx.value_and_grad(lambda inner: module.noted((inner.w[...] * x).mean()))(module)[0]


def in_scan(module, x):
    return jax.lax.scan(lambda total, row: (module.noted(total + row.sum()), None), 0.0, x)[0]


def in_vmap(module, x):
    return jax.vmap(lambda row: module.noted(row.sum()))(x).mean()


def in_cond(module, x):
    return jax.lax.cond(x.sum() > 0, lambda: module.noted(x.sum()), lambda: x.sum())


def in_remat(module, x):
    return jax.checkpoint(lambda x: module.noted(x.sum()))(x)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("nested", [in_jit, in_grad, in_scan, in_vmap, in_cond, in_remat])
def test_a_value_that_exists_only_within_a_nested_transform_cannot_be_logged(nested, jit):
    class Nests(Scalar):
        def noted(self, value):
            self.log("inner", value)
            return value

        def training_step(self, batch):
            return self.w[...] ** 2 + nested(self, batch["target"])

    with pytest.raises(
        ConfigurationError, match=r"(?s)self\.log\('inner'.*inside a transform within training_step.*Fix"
    ):
        quiet(max_steps=1, jit=jit).fit(Nests(), targets(1.0))


def test_values_from_around_a_nested_transform_can_be_logged_in_it():
    class Nests(Scalar):
        def training_step(self, batch):
            target, w = batch["target"].mean(), self.w[...]

            def loss_of(w):
                self.log("constant", 2.0)
                self.log("batch", target)
                self.log("outer", w_outside)
                return (w - target) ** 2

            w_outside = w * 3
            loss, gradient = jax.value_and_grad(loss_of)(w)
            self.log("gradient", gradient)
            return loss

    history = quiet(max_steps=1, log_every_n_steps=1).fit(Nests(start=1.0), targets(2.0))
    assert {name: history[name] for name in history} == {
        "constant": [(1, 2.0)],
        "batch": [(1, 2.0)],
        "outer": [(1, 3.0)],
        "gradient": [(1, -2.0)],
    }
