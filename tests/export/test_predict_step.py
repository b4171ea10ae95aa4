"""The predict step as a function of flat lists: what it is given, what it returns, and which sizes it leaves open."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.data.batches import to_arrays
from nnx_fit.export.predict_step import PredictStep
from nnx_fit.programs.precision import PRECISIONS


def step_of(module, batch):
    return PredictStep(module, to_arrays(batch).numeric, PRECISIONS["32"], "error")


def test_weights_and_state_together_are_the_module_each_array_once():
    step = step_of(nets.Regressor(depth=1, rngs=nnx.Rngs(0)), nets.arrays(4))
    assert step.state_names == ["blocks.0.dropout.rngs.count", "blocks.0.dropout.rngs.key"]
    assert len(step.start) == len(step.state_names) + 1
    assert sorted([*step.weight_names, *step.state_names]) == sorted(step.entries())


def test_it_computes_what_the_module_computes_in_eval_mode():
    module, batch = nets.Regressor(depth=1, rngs=nnx.Rngs(0)), nets.arrays(4)
    step = step_of(module, batch)
    entries = step.entries()
    outputs, state = step([entries[name].array for name in step.weight_names], step.start, [batch["x"], batch["y"]])
    module.eval()
    np.testing.assert_array_equal(outputs[0], module(batch["x"]))
    assert np.asarray(state[-1]).tolist() == [0, 0, 1]
    for before, after in zip(step.start[:-1], state[:-1], strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_leading_axes_of_the_batchs_size_are_left_open():
    batch = {"x": np.ones((4, 4)), "scale": np.float32(1), "y": np.ones(4, np.int32)}
    step = step_of(nets.Regressor(rngs=nnx.Rngs(0)), batch)
    shown = [str(shape.shape) for shape in step.shapes("dynamic")]
    assert shown == ["()", "(batch, 4)", "(batch,)"]
    assert [shape.shape for shape in step.shapes(7)] == [(), (7, 4), (7,)]
    assert [shape.shape for shape in step.shapes(None)] == [(), (4, 4), (4,)]
    assert [each["shape"] for each in step.inputs(step.shapes("dynamic"))] == [[], [None, 4], [None]]


def test_a_batch_whose_axes_disagree_needs_the_modules_word():
    class Tabled(nf.FitModule):
        def predict_step(self, batch):
            return batch["x"] @ batch["table"]

    class Sized(Tabled):
        def batch_size(self, batch):
            return len(batch["x"])

    batch = {"x": np.ones((4, 3), np.float32), "table": np.ones((3, 2), np.float32)}
    with pytest.raises(nf.ConfigurationError, match="batches of other sizes"):
        step_of(Tabled(), batch).shapes("dynamic")
    assert [str(shape.shape) for shape in step_of(Sized(), batch).shapes("dynamic")] == ["(3, 2)", "(batch, 3)"]


def test_metrics_start_over_and_are_carried():
    class Averaging(nf.FitModule):
        def __init__(self):
            self.mean = nnx.metrics.Average("x")

        def predict_step(self, batch):
            self.mean.update(x=batch)
            return self.mean.compute()

    module = Averaging()
    module.mean.update(x=jnp.full(3, 100.0))
    step = step_of(module, np.full(2, 1.0, np.float32))
    assert step.weight_names == []
    assert [entry.array.tolist() for entry in step.entries().values()] == [0, 0]
    jitted = jax.jit(step)
    _, state = jitted([], step.start, [np.full(2, 1.0, np.float32)])
    outputs, _ = jitted([], state, [np.full(2, 3.0, np.float32)])
    assert float(outputs[0]) == 2.0
