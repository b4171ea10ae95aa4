"""Scopes: which step is being traced in this thread, and which run and live module a module belongs to."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
from flax import nnx
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit import scope
from nnx_fit.state import graph


def step(module: Any = None, origin: Any = None) -> scope.StepScope:
    return scope.StepScope("training_step", "train", module, origin, 1, 2, 3, None)  # type: ignore[arg-type]


class Parent(nf.FitModule):
    def __init__(self):
        self.child = Scalar()
        self.other = Scalar()


class Record:
    trainer, training, global_step, current_epoch = "the trainer", True, 7, 3

    def log(self, name, value, **options):
        raise AssertionError


def test_steps_nest_and_end_with_their_block_even_by_an_exception():
    outer, inner = step(), step()
    assert scope.current_step() is None
    with pytest.raises(RuntimeError), scope.entered(outer):
        with scope.entered(inner):
            assert scope.current_step() is inner
        assert scope.current_step() is outer
        raise RuntimeError
    assert scope.current_step() is None


def test_a_step_is_seen_by_its_own_thread_alone():
    found: list[Any] = []
    with scope.entered(step()):
        thread = threading.Thread(target=lambda: found.append(scope.current_step()))
        thread.start()
        thread.join()
    assert found == [None]


def test_a_run_is_that_of_the_module_and_of_all_below_it():
    parent, stranger, run = Parent(), Scalar(), Record()
    scope.attach(parent, run)
    assert scope.run_of(parent) is run
    assert scope.run_of(parent.child) is run
    assert scope.run_of(stranger) is None
    parent.late = Scalar()
    assert scope.run_of(parent.late) is run
    assert (parent.child.global_step, parent.child.current_epoch, parent.child.trainer) == (7, 3, "the trainer")


def test_a_later_run_takes_the_place_of_an_earlier_one():
    module, first, second = Scalar(), Record(), Record()
    scope.attach(module, first)
    scope.attach(module, second)
    assert scope.run_of(module) is second


def test_in_a_step_a_traced_copy_belongs_to_the_run_of_its_origin():
    parent, run = Parent(), Record()
    scope.attach(parent, run)
    copy = nnx.clone(parent)
    assert scope.run_of(copy) is None
    with scope.entered(step(copy, parent)):
        assert scope.run_of(copy) is run
        assert scope.run_of(copy.child) is run


def test_in_a_step_each_part_of_a_copy_has_its_own_origin():
    parent = Parent()
    copy = nnx.clone(parent)
    assert scope.origin_of(copy) is copy
    with scope.entered(step(copy, parent)):
        assert scope.origin_of(copy) is parent
        assert scope.origin_of(copy.child) is parent.child
        assert scope.origin_of(copy.other) is parent.other
        assert scope.origin_of(nnx.clone(copy)) is parent


def test_neither_a_run_nor_a_module_is_kept_alive():
    module = Scalar()
    trainer = quiet(max_steps=1)
    trainer.fit(module, targets(0.0))
    gone = weakref.ref(module)
    del module, trainer
    gc.collect()
    assert gone() is None


def test_nothing_of_a_run_is_in_the_graph():
    module = Scalar()
    graphdef, attributes = nnx.graphdef(module), set(vars(module))
    trainer = quiet(max_steps=1)
    trainer.fit(module, targets(0.0))
    assert module.trainer is trainer
    assert nnx.graphdef(module) == graphdef
    assert set(vars(module)) == attributes
    assert [path for path, _ in graph.flatten(module)[1]] == [("w",)]
