"""What belongs in a checkpoint, and whether one fits the module and optimizer it comes back to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nnx_fit.checkpoint.contents import module_arrays, optimizer_arrays, restore_module, restore_optimizer
from nnx_fit.errors import CheckpointError
from nnx_fit.state.layout import ROLES, Layout
from nnx_fit.state.live import Live


class Model(nnx.Module):
    def __init__(self, seed=0, features=2):
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(3, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.table = nnx.Variable({"a": jnp.arange(3), "b": [jnp.float32(seed), "text"]})
        self.half = nnx.Param(jnp.full((2,), seed, jnp.bfloat16))


def saved(seed=0, trainable=nnx.Param, **options):
    module = Model(seed, **options)
    layout = Layout.of(module, trainable)
    return layout, module_arrays(layout, Live(module, layout).collect())


def plain(array):
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def test_every_array_has_its_role_and_path_and_a_pytree_one_entry_for_each_of_its_arrays():
    _, groups = saved()
    assert list(groups) == list(ROLES)
    assert set(groups["params"]) == {"half", "linear.kernel", "linear.bias", "norm.scale", "norm.bias"}
    assert set(groups["stats"]) == {"norm.mean", "norm.var", "table[0]", "table[1]"}
    assert set(groups["rngs"]) == {"dropout.rngs.key", "dropout.rngs.count"}


def test_arrays_come_back_in_the_order_of_the_layout_with_their_types():
    layout, groups = saved(seed=3)
    on_host = {role: {n: np.asarray(plain(a)) for n, a in found.items()} for role, found in groups.items()}
    for name, array in on_host["rngs"].items():
        if name.endswith("key"):
            on_host["rngs"][name] = jax.random.wrap_key_data(array)
    restored = restore_module("path", layout, on_host)
    expected = [groups[slot.role] for slot in layout.slots]
    assert len(restored) == layout.size and all(expected)
    flat = {name: array for found in groups.values() for name, array in found.items()}
    again = {name: array for found in module_arrays(layout, restored).values() for name, array in found.items()}
    assert again.keys() == flat.keys()
    for name, array in flat.items():
        assert again[name].dtype == array.dtype and isinstance(again[name], jax.Array), name
        np.testing.assert_array_equal(plain(again[name]), plain(array), err_msg=name)


def test_what_trained_then_may_be_frozen_now():
    layout, _ = saved(trainable=nnx.All(nnx.Param, nnx.PathContains("linear")))
    _, groups = saved(seed=1)
    restored = restore_module("path", layout, groups)
    frozen = module_arrays(layout, restored)["frozen"]
    np.testing.assert_array_equal(frozen["half"], groups["params"]["half"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["params"].pop("half"), "    half: not in the checkpoint"),
        (
            lambda g: g["params"].__setitem__("linear.kernels", g["params"].pop("linear.kernel")),
            r"    linear.kernel: not in the checkpoint \(it has linear.kernels\)\n    linear.kernels: only in the",
        ),
        (lambda g: g["stats"].__setitem__("extra", np.zeros(2)), "    extra: only in the checkpoint"),
        (
            lambda g: g["params"].__setitem__("half", np.zeros(2, np.float32)),
            r"    half: float32\(2,\) in the checkpoint, bfloat16\(2,\) here",
        ),
        (
            lambda g: g["params"].__setitem__("linear.bias", np.zeros(5, np.float32)),
            r"    linear.bias: float32\(5,\) in the checkpoint, float32\(2,\) here",
        ),
        (
            lambda g: g["rngs"].__setitem__("dropout.rngs.key", np.zeros(2, np.uint32)),
            r"    dropout.rngs.key: uint32\(2,\) in the checkpoint, key<fry>\(\) here",
        ),
    ],
)
def test_every_difference_is_named_by_path(change, message):
    layout, groups = saved()
    change(groups)
    with pytest.raises(CheckpointError, match=f"(?s)The checkpoint run/last is of another module:\n{message}.*Fix: "):
        restore_module("run/last", layout, groups)


def test_a_long_list_of_differences_is_cut():
    layout, groups = saved()
    groups["stats"].update({f"extra{i}": np.zeros(1) for i in range(30)})
    with pytest.raises(CheckpointError, match="and 10 more") as caught:
        restore_module("path", layout, groups)
    assert str(caught.value).count("only in the checkpoint") == 20


def test_an_optimizers_state_comes_back_with_its_structure_and_types():
    params = {"w": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1)))
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    arrays = {name: np.asarray(array) for name, array in optimizer_arrays(state).items()}
    restored = restore_optimizer("path", tx.init(params), arrays)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_another_optimizer_is_refused_with_the_parts_that_differ():
    params = {"w": jnp.ones(3)}
    arrays = optimizer_arrays(optax.adam(0.1).init(params))
    with pytest.raises(CheckpointError, match=r"(?s)of another optimizer:.*trace.*not in the checkpoint.*nu.*only in"):
        restore_optimizer("path", optax.sgd(0.1, momentum=0.9).init(params), arrays)


def test_an_optimizer_without_state_has_nothing_to_save():
    assert optimizer_arrays(optax.sgd(0.1).init({"w": jnp.ones(3)})) == {}
    assert restore_optimizer("path", optax.sgd(0.1).init({}), {}) == optax.sgd(0.1).init({})
