"""What a step's Python code does to plain attributes is seen, named, and never half done."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from typing import Any

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


# --- where values hide ------------------------------------------------------------------------------------------------


class Box:
    """An object of the user's that holds something."""

    def __init__(self):
        self.value: Any = "before"


def hiding(write: Any, **held: Any) -> Any:
    """A module that holds values as they are and writes to them in its training step."""

    class Hiding(Regressor):
        def training_step(self, batch):
            write(self, batch["x"])
            return super().training_step(batch)

    module = Hiding(rngs=nnx.Rngs(0))
    for name, value in held.items():
        setattr(module, name, nnx.static(value))
    return module


FILLED = {
    "a list in a dict": ({"a": []}, lambda held, value: held["a"].append(value), {"a": []}),
    "a dict in a tuple": (({},), lambda held, value: held[0].update(a=value), ({},)),
    "a deque": (deque([1]), lambda held, value: held.append(value), deque([1])),
    "a list": ([1], lambda held, value: held.append(value), [1]),
}


@pytest.mark.parametrize("name", ["record", "_record"])
@pytest.mark.parametrize("kind", FILLED)
def test_a_container_that_a_step_fills_is_named_and_emptied_wherever_it_is(kind, name):
    held, fill, before = FILLED[kind]
    module = hiding(lambda self, x: fill(getattr(self, name), "a text"), **{name: copy.deepcopy(held)})
    with pytest.warns(StateWarning, match=rf"changed the attribute `{name}`"):
        fit(module)
    assert getattr(module, name) == before
    module = hiding(lambda self, x: fill(getattr(self, name), x), **{name: copy.deepcopy(held)})
    with pytest.raises(nf.StateError, match=rf"kept a traced value in `{name}`"):
        fit(module)
    assert getattr(module, name) == before


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda self, x: setattr(self, "_last", x), "_last"),
        (lambda self, x: setattr(self.blocks[0], "_last", {"x": (x,)}), r"blocks\.0\._last"),
        (lambda self, x: setattr(self.box, "value", x), r"box\.value"),
        (lambda self, x: setattr(self.box, "other", [x]), r"box\.other"),
    ],
)
def test_a_traced_value_is_found_under_private_names_and_in_objects(write, name):
    box = Box()
    with pytest.raises(nf.StateError, match=rf"kept a traced value in `{name}`"):
        fit(hiding(write, box=box))
    assert vars(box) == {"value": "before"}


def test_a_private_counter_and_a_deleted_attribute_are_warned_of():
    module = hiding(lambda self, x: setattr(self, "_calls", self._calls + 1), _calls=0)
    with pytest.warns(StateWarning, match="`_calls`"):
        fit(module)
    with pytest.warns(StateWarning, match="`note`"):
        fit(hiding(lambda self, x: delattr(self, "note"), note="text"))


def test_a_table_made_on_demand_an_objects_own_business_and_a_mode_are_not_warned_of():
    def write(self, x):
        self._table = (1, 2)
        self._new = "made"
        self.box.value = "after"
        self.blocks[0].eval()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(hiding(write, _table=None, box=Box()))


def test_a_layer_made_in_a_step_is_one_error_and_no_warnings():
    module = hiding(lambda self, x: setattr(self, "extra", nnx.Linear(1, 1, rngs=nnx.Rngs(0))))
    with warnings.catch_warnings(), pytest.raises(nf.StateError, match=r"added extra\.bias, extra\.kernel"):
        warnings.simplefilter("error")
        fit(module)


def test_a_step_that_fails_leaves_no_traced_value_behind():
    def write(self, x):
        self.record["a"].append(x)
        self.box.value = x
        raise RuntimeError("in the step")

    module, box = hiding(write, record={"a": []}), Box()
    module.box = nnx.static(box)
    with pytest.raises(RuntimeError, match="in the step"):
        fit(module)
    assert (module.record, vars(box)) == ({"a": []}, {"value": "before"})
