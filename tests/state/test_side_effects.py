"""What a step's Python code does to plain attributes is seen, named, and never half done."""

from __future__ import annotations

import warnings

import pytest
from flax import nnx
from nets import Regressor, loader, quiet

import nnx_fit as nf
from nnx_fit.state.guard import StateWarning


class Noting(Regressor):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.seen, self.calls, self.names = [], 0, {}


class Appends(Noting):
    def training_step(self, batch):
        self.seen.append("step")
        return super().training_step(batch)


class Counts(Noting):
    def training_step(self, batch):
        self.calls += 1
        return super().training_step(batch)


class Leaks(Noting):
    def training_step(self, batch):
        self.seen.append(batch["x"])
        return super().training_step(batch)


class LeaksPlainly(Noting):
    def training_step(self, batch):
        self.last = super().training_step(batch)
        return self.last


class LeaksInDict(Noting):
    def validation_step(self, batch):
        self.names["x"] = (batch["x"],)


def fit(module, **options):
    quiet(max_epochs=1, **options).fit(module, loader(), loader())


@pytest.mark.parametrize(("make", "name"), [(Appends, "seen"), (Counts, "calls")])
def test_a_side_effect_that_runs_only_once_is_a_warning_naming_the_attribute(make, name):
    module = make(rngs=nnx.Rngs(0))
    with pytest.warns(StateWarning, match=rf"training_step changed the attribute `{name}`.*\nFix: .*nnx\.Variable"):
        fit(module)
    assert (module.seen, module.calls) == ([], 0)


def test_the_guard_can_be_silenced():
    fit(Counts(rngs=nnx.Rngs(0)), state_guard="off")


@pytest.mark.parametrize(("make", "name"), [(Leaks, "seen"), (LeaksPlainly, "last"), (LeaksInDict, "names")])
def test_a_traced_value_kept_in_an_attribute_is_an_error_and_is_taken_out_again(make, name):
    module = make(rngs=nnx.Rngs(0))
    with pytest.raises(nf.StateError, match=rf"kept a traced value in `{name}`.*\nFix: return it from the step"):
        fit(module)
    assert (module.seen, module.names) == ([], {})


@pytest.mark.parametrize("attribute", ["is_training", "train", "inference"])
def test_a_mode_like_attribute_that_nothing_toggles_is_a_warning_naming_the_layer(attribute):
    module = Regressor(rngs=nnx.Rngs(0))
    setattr(module.blocks[1], attribute, True)
    with pytest.warns(StateWarning, match=rf"layer `blocks\.1` \(Block\) has an attribute `{attribute}`"):
        fit(module)


def test_a_mode_like_argument_that_nothing_passes_is_a_warning():
    class Layer(nnx.Module):
        def __call__(self, x, is_train=False):
            return x

    module = Regressor(rngs=nnx.Rngs(0))
    module.extra = Layer()
    with pytest.warns(StateWarning, match=r"layer `extra` \(Layer\) has an argument `is_train` of __call__"):
        fit(module)


def test_an_ordinary_module_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Noting(rngs=nnx.Rngs(0)))
