"""The arguments a module is made with again: those that were recorded, overridden, supplied, or asked for."""

import json
from pathlib import Path

import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.checkpoint.construction import Construction, recorded
from nnx_fit.errors import CheckpointError, ConfigurationError

PATH = Path("run/checkpoints/last")


class Module(nf.FitModule):
    def __init__(self, width, *rest, depth=1, backbone=None, rngs=None, **options):
        self.made = nnx.static({"width": width, "rest": rest, "depth": depth, "options": options, "rngs": rngs})
        self.backbone = nnx.static(backbone)


class Exact(nf.FitModule):
    def __init__(self, width, backbone, *, rngs):
        pass


def again(kind, module, strict=True, **overrides):
    """A module made from what a checkpoint keeps of another one, after a way through JSON."""
    meta = json.loads(json.dumps({"module": type(module).__name__, **recorded(module.hparams)}))
    return Construction.of(kind, PATH, meta, overrides, strict=strict).run()


def test_arguments_of_every_kind_come_back_and_tuples_are_tuples():
    module = Module(3, (1, 2), [(4,), 5], depth={"a": ((1,), [2])}, flag=True, none=None)
    made = dict(again(Module, module).made)
    assert made.pop("rngs") is None
    assert made == {
        "width": 3,
        "rest": ((1, 2), [(4,), 5]),
        "depth": {"a": ((1,), [2])},
        "options": {"flag": True, "none": None},
    }


def test_rngs_are_supplied_where_they_were_given_and_every_call_has_the_same():
    class Draws(nf.FitModule):
        def __init__(self, *, rngs):
            self.value = int(nnx.Linear(1, 1, rngs=rngs).kernel[...].view("int32")[0, 0])

    meta = recorded(Draws(rngs=nnx.Rngs(5)).hparams)
    construction = Construction.of(Draws, PATH, meta, {}, strict=True)
    assert construction.run().value == construction.run().value == Draws(rngs=nnx.Rngs(0)).value
    given = Construction.of(Draws, PATH, meta, {"rngs": nnx.Rngs(5)}, strict=True)
    assert given.run().value == given.run().value == Draws(rngs=nnx.Rngs(5)).value


def test_an_argument_that_is_no_plain_value_is_asked_for_by_name():
    with pytest.raises(ConfigurationError, match=r"what backbone was(.|\n)*load_from_checkpoint\(path, backbone=...\)"):
        again(Exact, Exact(3, object(), rngs=nnx.Rngs(0)))
    backbone = object()
    again(Exact, Exact(3, object(), rngs=nnx.Rngs(0)), backbone=backbone)


def test_one_with_a_default_is_asked_for_where_it_was_given():
    assert again(Module, Module(3)).backbone is None
    with pytest.raises(ConfigurationError, match="what backbone was"):
        again(Module, Module(3, backbone=object()))
    assert again(Module, Module(3, backbone=object()), backbone=None).backbone is None


def test_an_override_that_is_no_argument_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigurationError, match=r"Exact.load_from_checkpoint\(widht=...\).*did you mean 'width'\?"):
        again(Exact, Exact(3, 4, rngs=nnx.Rngs(0)), widht=3)


def test_an_argument_that_the_class_no_longer_takes_is_an_error_unless_parts_are_wanted():
    saved = Module(3, depth=2)
    with pytest.raises(CheckpointError, match=r"depth=2.*Exact.* does not take"):
        again(Exact, saved, backbone=1)
    again(Exact, saved, strict=False, backbone=1)
