"""Mode by call flag: every flag, however it is declared and wherever the call is; the class left as it was found."""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import quiet

import nnx_fit as nf
from nnx_fit.state.call_flags import FLAGS, filled
from nnx_fit.state.modes import marked

# A flag whose value in train mode is False reads "not training".
IN_TRAIN = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}

DECLARATIONS = {
    "required": "self, x, {flag}",
    "default": "self, x, {flag}=None",
    "wrong default": "self, x, {flag}='unset'",
    "keyword only": "self, x, *, {flag}",
    "keyword only with default": "self, x, *, {flag}=None",
    "after another": "self, x, mask=None, {flag}=None",
    "before another": "self, x, {flag}=None, mask=None",
    "with rest": "self, x, *rest, {flag}=None, **options",
}


def layer_class(signature: str, flag: str) -> Any:
    """A layer whose call returns the flag it was given."""
    scope: dict[str, Any] = {}
    exec(f"def __call__({signature}):\n    return {flag}", scope)
    return type("Layer", (nnx.Module,), {"__call__": scope["__call__"]})


def test_the_flags_are_the_six_of_the_field():
    assert FLAGS == IN_TRAIN


@pytest.mark.parametrize("flag", IN_TRAIN)
@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_a_flag_that_is_not_passed_gets_the_modes_value(flag, declaration):
    layer = layer_class(DECLARATIONS[declaration].format(flag=flag), flag)()
    for training in (True, False):
        with filled(layer, training):
            assert layer(0) is (IN_TRAIN[flag] if training else not IN_TRAIN[flag])


@pytest.mark.parametrize("flag", IN_TRAIN)
@pytest.mark.parametrize("training", [True, False])
def test_an_explicit_value_always_wins(flag, training):
    by_position = layer_class(f"self, x, {flag}=None", flag)()
    by_keyword = layer_class(f"self, x, *, {flag}=None", flag)()
    with filled(by_position, training):
        for value in (True, False, None, "other"):
            assert by_position(0, value) is value
            assert by_position(0, **{flag: value}) is value
    with filled(by_keyword, training):
        assert by_keyword(0, **{flag: "other"}) == "other"


@pytest.mark.parametrize("flag", ["deterministic", "training", "use_running_average", "inference", "is_training"])
def test_a_layers_own_attribute_wins_over_the_mode(flag):
    layer = layer_class(f"self, x, {flag}=None", flag)()
    for own in (True, False):
        setattr(layer, flag, own)
        for training in (True, False):
            with filled(layer, training):
                assert layer(0) is own


def test_an_attribute_that_is_no_bool_does_not_count():
    layer = layer_class("self, x, deterministic=None", "deterministic")()
    layer.deterministic = None
    with filled(layer, True):
        assert layer(0) is False


class Base(nnx.Module):
    def __call__(self, x, *, train):
        return [("base", train)]


class Middle(Base):
    def __call__(self, x, train=None):
        return [("middle", train), *super().__call__(x)]


class Outer(Middle):
    def __call__(self, x):
        return super().__call__(x)


def test_super_calls_are_filled_too():
    outer = Outer()
    for training in (True, False):
        with filled(outer, training):
            assert outer(0) == [("middle", training), ("base", training)]


def test_an_explicit_value_does_not_leak_into_the_layers_below():
    class Wrapping(nnx.Module):
        def __init__(self):
            self.inner = Base()

        def __call__(self, x, train=None):
            return [("outer", train), *self.inner(x)]

    with filled(module := Wrapping(), True):
        assert module(0, train=False) == [("outer", False), ("base", True)]


def test_eval_modules_get_the_eval_value():
    class Two(nnx.Module):
        def __init__(self):
            self.backbone, self.head = Middle(), Middle()

    two = Two()
    with marked(two, True, ("backbone",)), filled(two, True):
        assert two.backbone(0) == [("middle", False), ("base", False)]
        assert two.head(0) == [("middle", True), ("base", True)]
    with filled(two, True):
        assert two.backbone(0) == [("middle", True), ("base", True)]


# --- what a class looks like afterwards -------------------------------------------------------------------------------


def calls_of(*classes: type) -> list[Any]:
    return [vars(cls).get("__call__") for cls in classes]


def test_classes_are_left_exactly_as_they_were_found():
    before = calls_of(Outer, Middle, Base)
    with filled(Outer(), True):
        assert vars(Middle)["__call__"] is not before[1]
    after = calls_of(Outer, Middle, Base)
    assert all(mine is theirs for mine, theirs in zip(after, before, strict=True))


def test_classes_are_restored_after_an_exception_and_after_nesting():
    before = calls_of(Outer, Middle, Base)
    outer = Outer()
    with pytest.raises(RuntimeError), filled(outer, True):
        with filled(outer, False):
            assert outer(0) == [("middle", False), ("base", False)]
        assert outer(0) == [("middle", True), ("base", True)]
        raise RuntimeError
    assert all(mine is theirs for mine, theirs in zip(calls_of(Outer, Middle, Base), before, strict=True))
    with pytest.raises(TypeError, match="train"):
        Base()(0)


def test_a_layer_that_is_a_pytree_and_no_module_is_filled_too():
    class Layer(nnx.Pytree):
        def __call__(self, x, train):
            return train

    class Holder(nnx.Module):
        def __init__(self):
            self.layer, self.rngs = Layer(), nnx.Rngs(0)

    holder = Holder()
    for training in (True, False):
        with filled(holder, training), marked(holder, training):
            assert holder.layer(1.0) is training
            assert list(vars(holder.rngs)) == list(vars(nnx.Rngs(0)))


def test_flax_layers_are_not_touched():
    classes = (nnx.BatchNorm, nnx.Dropout, nnx.MultiHeadAttention)
    before = calls_of(*classes)
    with filled(nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)), True):
        assert all(mine is theirs for mine, theirs in zip(calls_of(*classes), before, strict=True))


def test_other_threads_see_the_class_as_it_was():
    layer = Base()
    found: list[Any] = []

    def elsewhere():
        found.append(layer(0, train="mine"))
        try:
            layer(0)
        except TypeError as error:
            found.append(type(error))

    with filled(layer, True):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found == [[("base", "mine")], TypeError]


# --- in real steps ----------------------------------------------------------------------------------------------------


class Noisy(nnx.Module):
    """Doubles in training, keeps in evaluation; a required flag, used as a Python bool."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, x, train: bool):
        return x * self.weight[...] * (2 if train else 1)


class Plain(nf.FitModule):
    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)

    def training_step(self, batch):
        value = self(batch).mean()
        self.log("train", value)
        return value

    def validation_step(self, batch):
        self.log("val", self(batch).mean())

    def configure_optimizers(self):
        return optax.sgd(0.0)


def factors(module: Any, **options: Any) -> tuple[float, float]:
    """What one step of training and of validation computes from ones."""
    ones = [np.ones(2, np.float32)]
    before = {cls: vars(cls)["__call__"] for cls in type(module.layer).__mro__ if "__call__" in vars(cls)}
    history = quiet(max_steps=1, log_every_n_steps=1, **options).fit(module, ones, ones)
    assert all(vars(cls)["__call__"] is call for cls, call in before.items())
    return history["train"][0][1], history["val"][0][1]


class Rematerialized(nnx.Module):
    """The inner call is inside a `nnx.remat`."""

    def __init__(self):
        self.inner = Noisy()

    def __call__(self, x):
        return nnx.remat(lambda inner, x: inner(x))(self.inner, x)


class Scanned(nnx.Module):
    """The inner call is inside a `nnx.scan` over stacked layers."""

    def __init__(self):
        @nnx.vmap(in_axes=0, out_axes=0, axis_size=3)
        def make(_):
            return Noisy()

        self.layers = make(jnp.arange(3))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return forward(x, self.layers)


class Jitted(nnx.Module):
    """The call itself is jitted, and needs the flag as a Python bool."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    @nnx.jit
    def __call__(self, x, train: bool = False):
        return x * self.weight[...] * (2 if train else 1)


class JittedStatically(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    @functools.partial(nnx.jit, static_argnames="train")
    def __call__(self, x, *, train: bool):
        return x * self.weight[...] * (2 if train else 1)


class JittedOutside(nnx.Module):
    def __init__(self):
        self.inner = Noisy()

    @nnx.jit
    def __call__(self, x):
        return self.inner(x)


class RematerializedCall(nnx.Module):
    """The call itself is rematerialized, with a static flag."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    @functools.partial(nnx.remat, static_argnums=2)
    def __call__(self, x, train: bool):
        return x * self.weight[...] * (2 if train else 1)


class RematerializedWithMask(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    @functools.partial(nnx.remat, static_argnums=3)
    def __call__(self, x, mask=None, train: bool = False):
        return x * self.weight[...] * (2 if train else 1)


class Conditional(nnx.Module):
    def __init__(self):
        self.inner = Noisy()

    def __call__(self, x):
        return nnx.cond(x.mean() > 0, lambda m, x: m(x), lambda m, x: x, self.inner, x)


class Mapped(nnx.Module):
    def __init__(self):
        self.inner = Noisy()

    def __call__(self, x):
        return nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(self.inner, x)


class JittedFunction(nnx.Module):
    """Two calls of one jitted function, whose trace must not be shared between the modes."""

    def __init__(self):
        self.inner = Noisy()

    def __call__(self, x):
        return jitted_function(self.inner, x)


@nnx.jit
def jitted_function(layer, x):
    return layer(x)


class RematerializedFunction(JittedFunction):
    def __call__(self, x):
        return rematerialized_function(self.inner, x)


@nnx.remat
def rematerialized_function(layer, x):
    return layer(x)


class ScannedFunction(Scanned):
    def __call__(self, x):
        return scanned_function(x, self.layers)


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def scanned_function(x, layer):
    return layer(x)


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (JittedFunction, 2),
        (RematerializedFunction, 2),
        (ScannedFunction, 8),
        (Noisy, 2),
        (Rematerialized, 2),
        (Scanned, 8),
        (Jitted, 2),
        (JittedStatically, 2),
        (JittedOutside, 2),
        (RematerializedCall, 2),
        (RematerializedWithMask, 2),
        (Conditional, 2),
        (Mapped, 2),
    ],
)
def test_a_call_inside_a_transform_gets_the_flag(layer, factor):
    assert factors(Plain(layer())) == (factor, 1)


def test_a_call_gets_the_flag_in_an_eager_step():
    assert factors(Plain(Scanned()), jit=False) == (8, 1)


def test_layers_in_containers_get_the_flag():
    assert factors(Plain(nnx.Sequential(Noisy(), nnx.Sequential(Noisy())))) == (4, 1)


def test_the_modules_own_call_gets_the_flag():
    class Own(Plain):
        def __call__(self, x, deterministic: bool):
            assert isinstance(deterministic, bool)
            return self.layer(x) * (10 if deterministic else 100)

    assert factors(Own(Noisy())) == (200, 10)


def test_the_flag_survives_an_eval_module_inside_a_scan():
    module = Plain(Scanned())
    module.eval_modules = ("layer.layers",)
    assert factors(module) == (1, 1)


def test_a_step_that_fails_leaves_the_class_alone():
    class Failing(Plain):
        def training_step(self, batch):
            self(batch)
            raise RuntimeError("stop here")

    before = vars(Noisy)["__call__"]
    with pytest.raises(RuntimeError, match="stop here"):
        factors(Failing(Noisy()))
    assert vars(Noisy)["__call__"] is before
    with pytest.raises(TypeError, match="train"):
        Noisy()(jnp.ones(()))


def test_a_call_made_before_the_run_does_not_decide_what_the_run_traces():
    class Optional(Noisy):
        def __call__(self, x, train: bool = False):
            return super().__call__(x, train)

    module = Plain(JittedOutside())
    module.layer.inner = Optional()
    assert module(jnp.ones(2)).mean() == 1
    assert factors(module) == (2, 1)
    assert module(jnp.ones(2)).mean() == 1
