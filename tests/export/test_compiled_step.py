"""What a compiled step is given is what its results depend on, and nothing else of a user's is run a second time."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nnx_fit as nf
from nnx_fit.data.batches import to_arrays
from nnx_fit.export.compiled_step import compiled_step
from nnx_fit.export.predict_step import PredictStep
from nnx_fit.programs.precision import PRECISIONS


class Parts(nf.FitModule):
    """Uses the first of three parameters for its result, the second only for its shape, the third not at all."""

    def __init__(self):
        self.first, self.second, self.third = (nnx.Param(jnp.full(3, i + 1.0)) for i in range(3))

    def predict_step(self, batch):
        unused = batch["b"] * 2 + self.third[...]
        del unused
        return batch["a"] * self.first[...] + self.second.shape[0]


def compiled(batch_size):
    batch = to_arrays({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}).numeric
    step = PredictStep(Parts(), batch, PRECISIONS["32"], "error")
    return step, compiled_step(step, step.shapes(batch_size), batch_size, ("cpu",))


def test_it_takes_the_weights_and_the_leaves_that_its_results_depend_on():
    for batch_size in ("dynamic", 2):
        step, found = compiled(batch_size)
        assert [step.weight_names[i] for i in found.weights] == ["first"]
        assert found.leaves == [0]
        exported = jax.export.deserialize(bytearray(found.program))
        outputs, (counters,) = exported.call([jnp.full(3, 5.0)], step.start, [jnp.full((2, 3), 2.0)])
        np.testing.assert_array_equal(outputs[0], np.full((2, 3), 13.0))
        assert counters.tolist() == [0, 0, 1]


def test_the_step_is_traced_once():
    count = [0]

    class Counted(Parts):
        def predict_step(self, batch):
            count[0] += 1
            return super().predict_step(batch)

    batch = to_arrays({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}).numeric
    step = PredictStep(Counted(), batch, PRECISIONS["32"], "error")
    compiled_step(step, step.shapes("dynamic"), "dynamic", ("cpu", "cuda", "tpu"))
    assert count == [1]
