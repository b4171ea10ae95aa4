"""A loaded program checks what it is given, can be part of another one, and says what it cannot read."""

from __future__ import annotations

import collections
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import nnx_fit as nf

Pair = collections.namedtuple("Pair", ["image", "scale"])


class Scaled(nf.FitModule):
    """Inputs of several kinds; the scale has no batch axis."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def predict_step(self, batch):
        return self.linear(batch["in"].image) * batch["in"].scale + batch["shift"][0]


def example(size=4):
    image = np.arange(size * 3, dtype=np.float32).reshape(size, 3)
    return {"in": Pair(image, 2.0), "shift": [np.ones((size, 1), np.int32)]}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("program") / "scaled.safetensors"
    nf.export.save_program(Scaled(rngs=nnx.Rngs(0)), file, example())
    return file


@pytest.fixture(scope="module")
def program(file):
    return nf.export.load_program(file)


def expected(batch):
    module = Scaled(rngs=nnx.Rngs(0))
    return module.linear(batch["in"].image) * batch["in"].scale + batch["shift"][0]


def test_it_says_what_it_takes(program):
    assert [str(each) for each in program.inputs] == [
        "batch['in'].image: float32[batch, 3]",
        "batch['in'].scale: float32[]",
        "batch['shift'][0]: int32[batch, 1]",
    ]
    assert (program.platforms, program.batch_size, program.module) == (("cpu", "cuda", "tpu"), None, "Scaled")
    assert "LoadedProgram of Scaled for cpu, cuda, tpu, taking" in repr(program)


@pytest.mark.parametrize("size", [1, 5])
def test_any_class_with_the_same_names_will_do(program, size):
    batch = example(size)
    np.testing.assert_array_equal(program(batch), jax.jit(expected)(batch))
    plain = {"in": {"image": batch["in"].image, "scale": np.float32(2)}, "shift": (batch["shift"][0],)}
    np.testing.assert_array_equal(program(plain | {"label": np.zeros(9), "file": ["a"]}), program(batch))


def test_float64_of_numpy_is_taken_as_jax_takes_it(program):
    batch = example()
    wide = batch | {"in": Pair(batch["in"].image.astype(np.float64), 2.0)}
    np.testing.assert_array_equal(program(wide), program(batch))


def test_it_can_be_part_of_another_program(program):
    found = jax.jit(lambda batch: program(batch).sum())(example())
    np.testing.assert_allclose(found, np.asarray(program(example())).sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"in": Pair(np.ones((4, 5), np.float32), 2.0)},
            r"batch\['in'\].image: float32\[batch, 3\]: got float32\[4, 5\]",
        ),
        ({"in": Pair(np.ones((4, 3), np.int32), 2.0)}, r"float32\[batch, 3\]: got int32\[4, 3\]"),
        ({"shift": [np.ones((4,), np.int32)]}, r"batch\['shift'\]\[0\]: int32\[batch, 1\]: got int32\[4\]"),
        ({"shift": [np.ones((3, 1), np.int32)]}, "batches of one size: got 3, 4"),
        ({"shift": []}, r"batch\['shift'\]\[0\]: .*missing; there is batch\['in'\].image, batch\['in'\].scale"),
    ],
)
def test_another_batch_is_an_error_that_names_each_array(change, message, program):
    with pytest.raises(nf.ConfigurationError, match=f"Scaled was made for(?s:.)*{message}"):
        program(example() | change)


def test_an_empty_batch_is_an_error(program):
    with pytest.raises(nf.ConfigurationError, match="at least one example: got none"):
        program(example(0))


def test_keys_may_be_part_of_a_batch(tmp_path):
    class Sampling(nf.FitModule):
        def predict_step(self, batch):
            return jax.vmap(lambda key: jax.random.normal(key, (2,)))(batch["key"])

    keys = jax.random.split(jax.random.key(0), 3)
    nf.export.save_program(Sampling(), tmp_path / "x", {"key": keys})
    found = nf.export.load_program(tmp_path / "x")({"key": keys[:2]})
    np.testing.assert_array_equal(found, jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys[:2]))


def test_a_file_of_weights_is_no_program(tmp_path):
    nf.export.save_weights(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "x")
    with pytest.raises(nf.CheckpointError, match="is a weights file of nnx_fit; expected one of kind program"):
        nf.export.load_program(tmp_path / "x")


def rewritten(file, target, change):
    """The file with something else in its document or its arrays, and checksums that are right."""
    arrays = load_file(file)
    with safe_open(file, framework="np") as opened:
        document = json.loads(opened.metadata()["nnx_fit"])
    change(document, arrays)
    for name, array in arrays.items():
        document["arrays"][name]["crc32"] = zlib.crc32(array.tobytes())
    text = json.dumps(document)
    save_file(arrays, target, metadata={"nnx_fit": text, "nnx_fit_crc32": str(zlib.crc32(text.encode()))})
    return target


def test_a_program_that_jax_cannot_read_is_an_error_with_both_versions(file, tmp_path):
    def change(document, arrays):
        document["about"]["jax"] = "9.9"
        arrays["<program>"] = arrays["<program>"][:100]

    with pytest.raises(nf.CheckpointError, match=rf"saved with jax 9\.9, and jax {jax.__version__} cannot read it"):
        nf.export.load_program(rewritten(file, tmp_path / "x", change))


def test_a_description_that_lacks_something_is_an_error(file, tmp_path):
    def change(document, arrays):
        del document["about"]["inputs"]

    with pytest.raises(nf.CheckpointError, match="describes no program that this nnx_fit knows"):
        nf.export.load_program(rewritten(file, tmp_path / "x", change))


def test_a_program_of_wide_numbers_says_what_it_needs(tmp_path):
    with jax.enable_x64(True):
        module = Scaled(rngs=nnx.Rngs(0))
        module.linear.kernel.set_value(jnp.ones((3, 2), jnp.float64))
        nf.export.save_program(module, tmp_path / "x", example())
        nf.export.load_program(tmp_path / "x")
    with pytest.raises(nf.CheckpointError, match=r"`linear\.kernel` is float64(?s:.)*jax_enable_x64"):
        nf.export.load_program(tmp_path / "x")
