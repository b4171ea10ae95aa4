"""Weights go into a safetensors file by path and come back whole, or not at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import nets
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import nnx_fit as nf
from nnx_fit.export import load_weights, save_weights


class Odd(nnx.Module):
    """Whatever a module may hold."""

    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.shared = nnx.Param(jax.random.normal(rngs(), (2, 3)))
        self.tied = self.shared
        self.half = nnx.Param(jax.random.normal(rngs(), (3,), jnp.bfloat16))
        self.pair = nnx.Variable({"a": jax.random.normal(rngs(), ()), "b": jnp.full((0, 2), seed, jnp.int32), "n": "x"})
        self.key = nnx.Variable(jax.random.key(seed))
        self.small = nnx.Variable(jnp.arange(3) + seed)
        self.tiny = nnx.Variable(jnp.ones(4, ml_dtypes.float8_e4m3fn) * seed)
        self.complex = nnx.Variable(jnp.ones((2, 1), jnp.complex64) * seed)
        self.bare = nnx.data(jnp.arange(3.0) * seed)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))


def leaves(module):
    """Every array by path; keys as their data."""
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(module)))
        if hasattr(leaf, "dtype")
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.safetensors"


def test_everything_but_random_streams_comes_back(file):
    saved, module = Odd(3), Odd(4)
    streams = leaves(module.dropout)
    save_weights(saved, file)
    done = load_weights(module, file)
    assert_same(leaves(module.dropout), streams)
    module.dropout = saved.dropout
    assert_same(leaves(module), leaves(saved))
    assert module.tied is module.shared
    assert module.pair.get_raw_value()["n"] == "x"
    assert done.missing == ("dropout.rngs.count", "dropout.rngs.key")
    assert done.unexpected == ()
    assert set(done.loaded) == {"shared", "half", "pair[0]", "pair[1]", "key", "small", "tiny", "complex", "bare"}


def test_random_streams_are_saved_on_request(file):
    saved, module = Odd(3), Odd(4)
    save_weights(saved, file, rngs=True)
    assert load_weights(module, file).missing == ()
    assert_same(leaves(module), leaves(saved))


def test_other_readers_of_safetensors_see_the_arrays_by_path(file):
    module = nets.Regressor(rngs=nnx.Rngs(0))
    module.freeze("head.bias")
    save_weights(module, file)
    arrays = load_file(file)
    assert set(arrays) == {
        *("head.kernel", "head.bias"),
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("linear.kernel", "norm.scale", "norm.bias", "norm.mean")),
        *(f"blocks.{i}.norm.var" for i in (0, 1)),
    }
    np.testing.assert_array_equal(arrays["head.kernel"], module.head.kernel[...])
    with safe_open(file, framework="np") as opened:
        text = opened.metadata()["nnx_fit"]
    assert '"head.bias": {"role": "frozen"' in text and '"head.kernel": {"role": "params"' in text
    assert '"blocks.0.norm.mean": {"role": "stats"' in text and f'"nnx_fit": "{nf.__version__}"' in text


def test_bfloat16_is_bfloat16_for_other_readers(file):
    save_weights(Odd(0), file)
    with safe_open(file, framework="np") as opened:
        assert opened.get_slice("half").get_dtype() == "BF16"


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("head", {"head.bias", "head.kernel"}),
        (["head.bias", "blocks.0.norm.mean"], {"head.bias", "blocks.0.norm.mean"}),
        (nnx.BatchStat, {f"blocks.{i}.norm.{name}" for i in (0, 1) for name in ("mean", "var")}),
        (["head.bias", nnx.All(nnx.PathContains("norm"), nnx.BatchStat, nnx.PathContains(1))],
         {"head.bias", "blocks.1.norm.mean", "blocks.1.norm.var"}),
    ],
)  # fmt: skip
def test_only_a_part_is_saved(only, names, file):
    save_weights(nets.Regressor(rngs=nnx.Rngs(0)), file, only=only)
    assert set(load_file(file)) == names


def test_a_part_goes_into_a_part(file):
    saved, module = (nets.Regressor(rngs=nnx.Rngs(seed)) for seed in (0, 1))
    save_weights(saved.blocks[0], file)
    load_weights(module.blocks[1], file)
    np.testing.assert_array_equal(module.blocks[1].linear.kernel[...], saved.blocks[0].linear.kernel[...])


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("haed", "nothing at the path 'haed'. Did you mean 'head'"),
        (["head", "blocks.7"], "nothing at the path 'blocks.7'"),
        (nnx.LoRAParam, "nothing is left to save"),
        (nnx.RngState, r"rngs=False\): nothing is left to save"),
    ],
)
def test_a_part_that_is_not_there_is_an_error(only, message, file):
    with pytest.raises(nf.ConfigurationError, match=message):
        save_weights(nets.Regressor(rngs=nnx.Rngs(0)), file, only=only)
    assert not file.exists()


def test_another_module_is_refused_by_path_shape_and_dtype_and_nothing_is_loaded(file):
    class Other(nf.FitModule):
        def __init__(self):
            self.same = nnx.Param(jnp.zeros(2))
            self.wide = nnx.Param(jnp.zeros((3, 4)))
            self.short = nnx.Param(jnp.zeros(2, jnp.bfloat16))
            self.renamed = nnx.Param(jnp.zeros(1))

    save_file(
        {
            "same": np.ones(2, np.float32),
            "wide": np.ones((4, 3), np.float32),
            "short": np.ones(2, np.float32),
            "renamd": np.ones(1, np.float32),
        },
        file,
    )
    module = Other()
    with pytest.raises(nf.CheckpointError) as caught:
        load_weights(module, file)
    for part in (str(file), "float32(4, 3)", "float32(3, 4)", "float32(2,)", "bfloat16(2,)", "it has renamd"):
        assert part in str(caught.value)
    assert "same" not in str(caught.value).replace("the same", "")
    with pytest.raises(nf.CheckpointError, match=r"float32\(4, 3\)"):
        load_weights(module, file, strict=False)
    assert not any(leaf.any() for leaf in leaves(module).values())


def test_not_strict_takes_what_both_have(file):
    saved, module = nets.Regressor(depth=2, rngs=nnx.Rngs(0)), nets.Regressor(depth=1, rngs=nnx.Rngs(1))
    save_weights(saved, file, only=["blocks", "head.bias"])
    kernel = np.asarray(module.head.kernel[...])
    with pytest.raises(nf.CheckpointError, match=r"blocks\.1\.(?s:.)*strict=False"):
        load_weights(module, file)
    done = load_weights(module, file, strict=False)
    assert set(done.unexpected) == {name for name in load_file(file) if name.startswith("blocks.1.")}
    assert [name for name in done.missing if "rngs" not in name] == ["head.kernel"]
    np.testing.assert_array_equal(module.blocks[0].linear.kernel[...], saved.blocks[0].linear.kernel[...])
    np.testing.assert_array_equal(module.head.kernel[...], kernel)


def test_nothing_in_common_is_an_error_even_then(file):
    save_weights(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), file)
    with pytest.raises(nf.CheckpointError, match="no path in common"):
        load_weights(nets.Regressor(rngs=nnx.Rngs(0)), file, strict=False)


def test_paths_are_renamed_by_prefix_and_the_longest_counts(file):
    saved, module = (nets.Regressor(rngs=nnx.Rngs(seed)) for seed in (0, 1))
    arrays = {name.replace("blocks.", "layers."): array for name, array in _arrays(saved).items()}
    arrays["layers.0.kernel"] = arrays.pop("layers.0.linear.kernel")
    save_file(arrays, file)
    load_weights(module, file, rename={"layers": "blocks", "layers.0.kernel": "blocks.0.linear.kernel"})
    assert_same(_arrays(module), _arrays(saved))


def test_a_function_renames_and_leaves_out(file):
    saved, module = (nets.Regressor(rngs=nnx.Rngs(seed)) for seed in (0, 1))
    save_file({f"model.{name}": array for name, array in _arrays(saved).items()} | {"step": np.zeros(1)}, file)
    load_weights(module, file, rename=lambda name: name.removeprefix("model.") if name != "step" else None)
    assert_same(_arrays(module), _arrays(saved))


def _arrays(module):
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    }


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"layer": "blocks"}, "nothing at the path 'layer'"),
        ({"blocks.0": "blocks.1"}, r"both 'blocks\.0\..*' and 'blocks\.1\..*' into 'blocks\.1\."),
    ],
)
def test_a_renaming_that_cannot_be_meant_is_an_error(rename, message, file):
    module = nets.Regressor(rngs=nnx.Rngs(0))
    save_weights(module, file)
    with pytest.raises(nf.ConfigurationError, match=message):
        load_weights(module, file, rename=rename)


@pytest.mark.slow
def test_a_checkpoint_becomes_weights_without_its_class(tmp_path, file):
    module = nets.Regressor(rngs=nnx.Rngs(0))
    trainer = nets.quiet(max_epochs=1)
    trainer.fit(module, nets.loader())
    trainer.save_checkpoint(tmp_path / "checkpoint")
    save_weights(tmp_path / "checkpoint", file, rngs=True)
    other = nets.Regressor(rngs=nnx.Rngs(1))
    load_weights(other, file)
    assert_same(leaves(other), leaves(module))
    save_weights(str(tmp_path / "checkpoint"), file, only="head")
    assert set(load_file(file)) == {"head.bias", "head.kernel"}
    with pytest.raises(nf.ConfigurationError, match="knows paths and no types"):
        save_weights(tmp_path / "checkpoint", file, only=nnx.Param)
    with pytest.raises(nf.CheckpointError, match="no checkpoint at"):
        save_weights(tmp_path / "nothing", file)


def test_a_hook_may_save_and_load_while_a_fit_goes_on(file):
    class Swapping(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                save_weights(module, file)
            if trainer.global_step == 4:
                load_weights(module, file)

    finals = []
    for callbacks, steps in (([Swapping()], 4), ([], 2)):
        module = nets.Regressor(rngs=nnx.Rngs(0))
        nets.quiet(max_steps=steps, callbacks=callbacks).fit(module, nets.loader())
        finals.append(_arrays(module))
    assert_same(*finals)


def test_values_in_a_programs_hands_are_not_taken_for_none(file):
    module = nets.Regressor(rngs=nnx.Rngs(0))
    complete = _arrays(module).keys()
    outcomes = []

    class Looking:
        def __iter__(self):
            for _ in range(8):
                try:
                    save_weights(module, file)
                    outcomes.append(load_file(file).keys() == complete)
                except nf.StateError as error:
                    outcomes.append("was read while the training program has its value" in str(error))
                    file.unlink(missing_ok=True)
                yield nets.arrays(4)

    nets.quiet(max_steps=8).fit(module, Looking())
    assert outcomes == [True] * 8
    assert not file.exists()  # the first ones are pulled before the program has the values
