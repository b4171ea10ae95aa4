"""Whatever a hook changes of a module, and whenever, is what its steps are made of from then on."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import quiet, targets

import nnx_fit as nf
from nnx_fit.callbacks.callback import pausing


class Logs(nf.FitModule):
    """Logs what its step sees of a plain attribute; a hook of the test's own changes it."""

    def __init__(self, seen: Any = 1.0):
        self.w, self.v = nnx.Param(jnp.ones(())), nnx.Param(jnp.ones(()))
        self.seen, self.unread = seen, 0

    @property
    def value(self) -> Any:
        return self.seen

    def training_step(self, batch):
        self.log("seen", self.value)
        return (self.w[...] ** 2 + self.v[...] ** 2) / 2 + 0 * batch["target"].mean()

    def validation_step(self, batch):
        self.log("val/seen", self.value)

    def test_step(self, batch):
        self.log("test/seen", self.value)

    def configure_optimizers(self):
        return optax.sgd(0.1)


def module_with(base: type = Logs, **hooks: Any) -> Any:
    return type("Module", (base,), hooks)()


def values(
    module: Any, *, epochs: int = 1, batches: int = 4, validate: bool = False, name: str = "seen"
) -> list[float]:
    data = targets(*[0.0] * batches)
    history = quiet(max_epochs=epochs, log_every_n_steps=1).fit(module, data, data[:1] if validate else None)
    return [value for _, value in history[name]]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_an_attribute_set_before_the_first_step_is_what_it_sees(hook):
    module = module_with(**{hook: lambda self: setattr(self, "seen", 5.0)})
    assert values(module, epochs=2, batches=2) == [5.0] * 4


def test_an_attribute_set_before_the_first_batch_is_what_it_sees():
    def start(self, batch, batch_idx):
        if self.global_step == 0:
            self.seen = 5.0

    assert values(module_with(on_train_batch_start=start)) == [5.0] * 4


@pytest.mark.parametrize("nested", [False, True])
def test_a_list_changed_in_place_is_followed_there_and_back(nested):
    script = [5.0, 1.0, 1.0, 5.0, 1.0]

    def start(self, batch, batch_idx):
        (self.seen["x"] if nested else self.seen)[0] = script[batch_idx]

    read = property(lambda self: (self.seen["x"] if nested else self.seen)[0])
    module = type("Module", (Logs,), {"on_train_batch_start": start, "value": read})({"x": [1.0]} if nested else [1.0])
    assert values(module, batches=5) == script


class Chain(nf.FitModule):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x))).mean()

    def training_step(self, batch):
        out = self(batch["x"])
        self.log("out", out)
        return out

    def validation_step(self, batch):
        self.log("val/out", self(batch["x"]))

    def configure_optimizers(self):
        return optax.sgd(0.0)


def test_layers_that_change_places_do_so_in_the_steps():
    def swap(self):
        if self.current_epoch == 1:
            first, second = self.layers
            self.layers[0], self.layers[1] = second, first

    x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    module = module_with(Chain, on_train_epoch_start=swap)
    before = float(module(x))
    history = quiet(max_epochs=2, log_every_n_steps=1).fit(module, [{"x": x}], [{"x": x}])
    after = float(module(x))
    assert abs(before - after) > 1e-3
    np.testing.assert_allclose([value for _, value in history["out"]], [before, after], rtol=1e-5)
    np.testing.assert_allclose([value for _, value in history["val/out"]], [before, after], rtol=1e-5)


def test_freezing_and_unfreezing_in_a_batch_hook_hold_from_the_next_batch():
    moved: list[tuple[bool, bool]] = []

    def end(self, outputs, batch, batch_idx):
        now = (float(self.w[...]), float(self.v[...]))
        moved.append((now[0] != self.last[0], now[1] != self.last[1]))
        self.last = now
        if batch_idx == 1:
            self.unfreeze("v")
        if batch_idx == 3:
            self.freeze("w")

    module = module_with(on_train_batch_end=end, last=(1.0, 1.0))
    module.freeze("v")
    values(module, batches=6)
    assert moved == [(True, False)] * 2 + [(True, True)] * 2 + [(False, True)] * 2


def test_what_trains_may_be_a_property():
    moved = []

    class ByEpoch(Logs):
        @property
        def trainable(self):
            return nnx.PathContains("w") if self.current_epoch == 1 else nnx.Param

        @trainable.setter
        def trainable(self, value):
            raise AssertionError(value)

        def on_train_epoch_end(self):
            moved.append(float(self.v[...]))

    values(ByEpoch(), epochs=3, batches=1)
    np.testing.assert_allclose(moved, [0.9, 0.9, 0.81], rtol=1e-6)


class Identity(nnx.Module):
    def __call__(self, x):
        return x


class Sevenfold(nnx.Module):
    def __call__(self, x):
        return 7 * x


@pytest.mark.parametrize("hook", ["epoch", "batch"])
def test_a_layer_without_variables_is_replaced_also_beside_an_attribute_that_nobody_reads(hook):
    class Acts(Logs):
        def __init__(self):
            super().__init__()
            self.act = Identity()

        @property
        def value(self):
            return self.act(jnp.ones(()))

        def change(self):
            self.unread += 1
            if self.unread == 2:
                self.act = Sevenfold()

    if hook == "epoch":
        module = module_with(Acts, on_train_epoch_start=lambda self: self.change())
        assert values(module, epochs=3, batches=1) == [1, 7, 7]
    else:
        module = module_with(Acts, on_train_batch_start=lambda self, batch, batch_idx: self.change())
        assert values(module, batches=3) == [1, 7, 7]


def test_sub_modules_may_be_kept_in_eval_mode_from_an_epoch_on():
    class Normed(Logs):
        def __init__(self):
            super().__init__()
            self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

        def training_step(self, batch):
            return super().training_step(batch) + 0 * self.norm(batch["target"][:, None]).mean()

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.eval_modules = ("norm",)

        def on_train_epoch_end(self):
            means.append(float(self.norm.mean[...][0]))

    means: list[float] = []
    quiet(max_epochs=3).fit(Normed(), targets(1.0, 1.0))
    assert means[0] == means[1] == means[2] != 0


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_start"])
def test_what_a_validations_first_hooks_set_is_what_it_sees(hook):
    module = module_with(**{hook: lambda self: setattr(self, "seen", float(self.global_step))})
    assert values(module, epochs=3, batches=2, validate=True, name="val/seen") == [2, 4, 6]


def test_what_a_tests_first_hook_sets_is_what_it_sees():
    module = module_with(on_test_start=lambda self: setattr(self, "seen", 9.0))
    assert quiet().test(module, targets(0.0)) == [{"test/seen": 9.0}]


def test_what_costs_no_compilation():
    class Counts(Logs):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.unread += 1
            self.nothing = float("nan")

    trainer = quiet(max_epochs=3)
    trainer.fit(Counts(), targets(0, 0, 0), targets(0))
    assert trainer.compilations == ["first call"]


def test_a_callback_that_paused_in_one_fit_is_awake_in_the_next():
    calls: list[int] = []

    class Pauses(nf.Callback):
        @pausing
        def on_train_batch_end(self, trainer, module, *args):
            calls.append(trainer.global_step)
            self.paused_until = trainer.global_step + 3

    trainer = quiet(max_epochs=1, callbacks=Pauses())
    for _ in range(2):
        trainer.fit(Logs(), targets(0, 0, 0, 0, 0))
    assert calls == [1, 4] * 2
