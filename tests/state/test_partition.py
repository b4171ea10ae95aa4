"""The partition: every leaf in exactly one role, as `trainable` says, and the flat list that programs take."""

from __future__ import annotations

from collections import Counter as Count
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, quiet

import nnx_fit as nf
from nnx_fit.errors import StateError
from nnx_fit.state import graph
from nnx_fit.state.layout import ROLES, Layout


class Tally(nnx.Variable):
    """A Variable type that nobody has heard of."""


class Zoo(nf.FitModule):
    """One of everything that a module may hold."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.weight_norm = nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs)
        self.pair = nnx.data((jnp.ones(2), {"a": jnp.zeros(3)}))
        self.tally = Tally({"seen": jnp.ones(2), "label": "text", "number": 3, "nothing": None})
        self.seq = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.relu, nnx.Dropout(0.1, rngs=rngs))
        self.names = nnx.Dict({"x": nnx.BatchNorm(3, rngs=rngs)})
        self.tied = self.seq.layers[0]
        self.lora = nnx.LoRALinear(3, 3, lora_rank=2, rngs=rngs)
        self.stack = stacked(rngs)
        self.rngs = rngs


@nnx.split_rngs(splits=4)
@nnx.vmap(in_axes=0, out_axes=0)
def stacked(rngs: nnx.Rngs):
    return nnx.Linear(3, 3, rngs=rngs)


def roles(module: Any) -> dict[str, str]:
    return {row.path: row.role for row in nf.partition(module).rows}


def of_role(module: Any, role: str) -> set[str]:
    return {path for path, found in roles(module).items() if found == role}


EXPECTED = {
    "params": {
        "lora.bias",
        "lora.kernel",
        "lora.lora.lora_a",
        "lora.lora.lora_b",
        "names.x.bias",
        "names.x.scale",
        "seq.layers.0.bias",
        "seq.layers.0.kernel",
        "stack.bias",
        "stack.kernel",
        "weight_norm.layer_instance.bias",
        "weight_norm.layer_instance.kernel",
    },
    "frozen": set(),
    "stats": {"names.x.mean", "names.x.var", "pair.0", "pair.1.a", "tally"},
    "rngs": {
        "rngs.default.count",
        "rngs.default.key",
        "rngs.dropout.count",
        "rngs.dropout.key",
        "seq.layers.2.rngs.count",
        "seq.layers.2.rngs.key",
    },
}

# A bare array in Flax 0.12.8, a Param in later versions.
_scale = nnx.WeightNorm(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)).scales[("kernel",)]
EXPECTED["params" if isinstance(_scale, nnx.Param) else "stats"].add("weight_norm.scales.('kernel',)")


def test_every_leaf_has_exactly_one_role():
    zoo = Zoo(rngs=nnx.Rngs(0, dropout=1))
    assert {role: of_role(zoo, role) for role in ROLES} == EXPECTED
    parts = nf.partition(zoo)
    paths = Count(path for role in ROLES for path, _ in nnx.to_flat_state(getattr(parts, role)))
    assert set(paths.values()) == {1}
    assert {graph.path_name(path) for path in paths} == set.union(*EXPECTED.values())


def test_the_partition_holds_the_modules_own_variables():
    module = Regressor(rngs=nnx.Rngs(0))
    parts = nf.partition(module)
    assert parts.params["head"]["kernel"] is module.head.kernel
    parts.stats["blocks"][0]["norm"]["mean"][...] = jnp.full(8, 7.0)
    np.testing.assert_array_equal(module.blocks[0].norm.mean[...], np.full(8, 7.0))


def test_the_roles_of_a_plain_module_are_those_of_nnx_filters():
    module = Regressor(rngs=nnx.Rngs(0))
    params, stats, rngs = nnx.state(module, nnx.Param, nnx.BatchStat, nnx.RngState)
    parts = nf.partition(module)
    assert jax.tree.structure(parts.params) == jax.tree.structure(params)
    assert jax.tree.structure(parts.stats) == jax.tree.structure(stats)
    assert jax.tree.structure(parts.rngs) == jax.tree.structure(rngs)


def test_partition_takes_a_module_that_is_no_fit_module():
    assert roles(nnx.BatchNorm(2, rngs=nnx.Rngs(0))) == {
        "bias": "params",
        "mean": "stats",
        "scale": "params",
        "var": "stats",
    }


def test_shared_rngs_are_one_pair_of_leaves():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.rngs = Holder(rngs), Holder(rngs), rngs

    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

    assert list(roles(Shared(nnx.Rngs(0))).values()) == ["rngs", "rngs"]


class Embedder(nf.FitModule):
    """A tied embedding, a cache, an intermediate, and layers that a scan made."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)
        self.table = self.embed.embedding
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=True)
        self.attention.init_cache((1, 3, 4))
        self.hidden = nnx.Intermediate(jnp.zeros(2))
        self.layers = scanned(jnp.arange(3))


@nnx.scan(in_axes=0, out_axes=0)
def scanned(seed: jax.Array):
    return nnx.BatchNorm(4, rngs=nnx.Rngs(jax.random.key(seed)))


def test_caches_intermediates_ties_and_scanned_layers_have_one_role_each():
    module = Embedder(rngs=nnx.Rngs(0))
    rows = {row.path: row for row in nf.partition(module).rows}
    kinds = {path: (row.role, row.type) for path, row in rows.items() if not path.startswith(("attention.", "head."))}
    assert kinds == {
        "embed.embedding": ("params", "Param"),
        "hidden": ("stats", "Intermediate"),
        "layers.bias": ("params", "Param"),
        "layers.mean": ("stats", "BatchStat"),
        "layers.scale": ("params", "Param"),
        "layers.var": ("stats", "BatchStat"),
    }
    caches = {path: row.role for path, row in rows.items() if row.type == "Cache"}
    assert caches == {f"attention.{name}": "stats" for name in ("cache_index", "cached_key", "cached_value")}
    assert rows["layers.mean"].shape == "(3, 4)"
    module.freeze("table")
    assert {row.path for row in nf.partition(module).rows if row.role == "frozen"} == {"embed.embedding"}


# --- trainable -------------------------------------------------------------------------------------------------------


def test_a_trainable_path_trains_the_params_below_it_only():
    module = Regressor(rngs=nnx.Rngs(0))
    module.trainable = nnx.PathContains("blocks")
    assert of_role(module, "frozen") == {"head.bias", "head.kernel"}
    assert all(path.split(".")[2] in ("linear", "norm") for path in of_role(module, "params"))
    assert of_role(module, "stats") == {f"blocks.{i}.norm.{name}" for i in range(2) for name in ("mean", "var")}


def test_a_class_attribute_and_a_list_work_as_filters():
    class Adapted(Zoo):
        trainable: ClassVar = [nnx.LoRAParam, nnx.PathContains("stack")]

    assert of_role(Adapted(rngs=nnx.Rngs(0)), "params") == {
        "lora.lora.lora_a",
        "lora.lora.lora_b",
        "stack.bias",
        "stack.kernel",
    }


def test_lora_trains_the_adapters_only():
    zoo = Zoo(rngs=nnx.Rngs(0))
    zoo.trainable = nnx.LoRAParam
    assert of_role(zoo, "params") == {"lora.lora.lora_a", "lora.lora.lora_b"}
    assert of_role(zoo, "frozen") == EXPECTED["params"] - {"lora.lora.lora_a", "lora.lora.lora_b"}


def test_a_named_variable_type_may_train_though_it_is_no_param():
    class Theta(nnx.Variable):
        pass

    class Free(nf.FitModule):
        trainable = Theta

        def __init__(self):
            self.theta, self.weight, self.tally = Theta(jnp.ones(2)), nnx.Param(jnp.ones(2)), Tally(jnp.ones(2))

    assert roles(Free()) == {"tally": "stats", "theta": "params", "weight": "frozen"}
    both = Free()
    both.trainable = [nnx.Param, Theta]
    assert roles(both) == {"tally": "stats", "theta": "params", "weight": "params"}
    both.freeze("theta")
    assert roles(both) == {"tally": "stats", "theta": "stats", "weight": "params"}
    both.unfreeze("theta")
    assert roles(both)["theta"] == "params"


# --- freeze and unfreeze ---------------------------------------------------------------------------------------------


def test_freeze_and_unfreeze_take_path_prefixes_and_filters():
    module = Regressor(rngs=nnx.Rngs(0))
    params = of_role(module, "params")
    module.freeze("blocks")
    assert of_role(module, "params") == {"head.bias", "head.kernel"}
    module.unfreeze("blocks.1")
    assert of_role(module, "frozen") == {path for path in params if path.startswith("blocks.0.")}
    module.freeze(nnx.PathContains("scale"), "head.bias")
    assert of_role(module, "params") == {"blocks.1.linear.kernel", "blocks.1.norm.bias", "head.kernel"}
    module.unfreeze()
    assert of_role(module, "params") == params


@pytest.mark.parametrize("selector", [(), ("blocks",), (nnx.PathContains("norm"),), (...,), ("blocks", "head")])
def test_unfreezing_never_trains_what_is_no_param(selector):
    module = Regressor(rngs=nnx.Rngs(0))
    before = {role: of_role(module, role) for role in ("stats", "rngs")}
    module.freeze()
    assert of_role(module, "params") == set()
    module.unfreeze(*selector)
    assert {role: of_role(module, role) for role in ("stats", "rngs")} == before
    assert of_role(module, "params")


def test_a_filter_that_mixes_a_type_with_a_path_does_not_train_statistics():
    module = Regressor(rngs=nnx.Rngs(0))
    module.trainable = nnx.Any(nnx.LoRAParam, nnx.PathContains("norm"))
    assert of_role(module, "params") == {f"blocks.{i}.norm.{name}" for i in range(2) for name in ("bias", "scale")}
    module.trainable = nnx.Any(Tally, nnx.PathContains("norm"))
    assert of_role(module, "params") == {f"blocks.{i}.norm.{name}" for i in range(2) for name in ("bias", "scale")}


@pytest.mark.parametrize("alias", ["seq.layers.0", "tied"])
def test_a_tied_layer_is_frozen_through_any_of_its_paths(alias):
    zoo = Zoo(rngs=nnx.Rngs(0))
    zoo.freeze(alias)
    assert of_role(zoo, "frozen") == {"seq.layers.0.bias", "seq.layers.0.kernel"}
    zoo.unfreeze("tied" if alias != "tied" else "seq")
    assert of_role(zoo, "frozen") == set()


def test_freezing_edits_nothing_but_the_filter_and_survives_split_and_clone():
    module = Regressor(rngs=nnx.Rngs(0))
    state = nnx.state(module)
    module.freeze("blocks")
    assert jax.tree.structure(nnx.state(module)) == jax.tree.structure(state)
    hash(nnx.graphdef(module))
    for copy in (nnx.clone(module), nnx.merge(*nnx.split(module))):
        assert of_role(copy, "params") == {"head.bias", "head.kernel"}
    assert of_role(Regressor(rngs=nnx.Rngs(0)), "frozen") == set()


# --- what is differentiated, and what Optax sees ----------------------------------------------------------------------


@pytest.mark.parametrize("selector", [nnx.Param, nnx.PathContains("head"), nnx.PathContains("norm")])
def test_optax_state_is_that_of_the_trained_params_alone(selector):
    module = Regressor(rngs=nnx.Rngs(0))
    module.trainable = selector
    trained = nnx.state(module, nnx.All(nnx.Param, selector))
    expected = optax.adam(1e-2).init(nnx.as_pure(trained))
    trainer = quiet(max_steps=1, max_epochs=1)
    frozen = {row.path: row for row in nf.partition(module).rows if row.role == "frozen"}
    before = {path: np.asarray(value) for path, value in flat(module).items()}
    trainer.fit(module, [{"x": np.ones((4, 8), np.float32), "y": np.ones((4, 1), np.float32)}])
    state = trainer._run.train_program.optimizer_state
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    after = flat(module)
    for path in frozen:
        np.testing.assert_array_equal(after[path], before[path])


def flat(module: Any) -> dict[str, jax.Array]:
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {graph.path_name(path): variable[...] for path, variable in params}


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_tell_shape_dtype_count_and_bytes():
    rows = {row.path: row for row in nf.partition(Zoo(rngs=nnx.Rngs(0, dropout=1))).rows}
    kernel = rows["stack.kernel"]
    assert (kernel.type, kernel.shape, kernel.dtype, kernel.count, kernel.nbytes) == (
        "Param",
        "(4, 3, 3)",
        "float32",
        36,
        144,
    )
    tally = rows["tally"]
    assert (tally.type, tally.shape, tally.dtype, tally.count, tally.nbytes) == (
        "Tally",
        "(), (2,)" if tally.shape.startswith("()") else "(2,), ()",
        tally.dtype,
        3,
        12,
    )
    assert rows["pair.0"].type == "array"
    key = rows["rngs.dropout.key"]
    assert key.nbytes == jax.random.key_data(jax.random.key(0)).nbytes


def test_the_table_has_every_variable_and_the_totals():
    module = Regressor(rngs=nnx.Rngs(0))
    module.freeze("head")
    parts = nf.partition(module)
    lines = parts.table().splitlines()
    assert lines[0].split() == ["path", "role", "type", "shape", "dtype", "bytes"]
    cells = {line.split()[0]: line for line in lines[2 : 2 + len(parts.rows)]}
    assert set(cells) == set(roles(module))
    assert "frozen" in cells["head.kernel"]
    assert "(8, 1)" in cells["head.kernel"]
    params = nnx.state(module, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("head"))))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert parts.totals()["params"] == (len(sizes), sum(sizes), 4 * sum(sizes))
    assert parts.totals()["frozen"] == (2, 9, 36)
    totals = {line.split()[0]: line for line in lines[-4:]}
    assert list(totals) == list(ROLES)
    assert f"{sum(sizes):,} values" in totals["params"]


# --- the layout -------------------------------------------------------------------------------------------------------


def arrays_in(module: Any, layout: Layout) -> list[Any]:
    return layout.arrays_of(module, step="test")


def test_merging_a_layouts_arrays_gives_the_module_back():
    zoo = Zoo(rngs=nnx.Rngs(0, dropout=1))
    layout = Layout.of(zoo)
    arrays = arrays_in(zoo, layout)
    assert len(arrays) == layout.size
    copy = layout.merge(nnx.graphdef(zoo), arrays)
    assert copy.tied is copy.seq.layers[0]
    label, number = copy.tally["label"], copy.tally["number"]
    assert (label, int(number), copy.tally["nothing"]) == ("text", 3, None)
    for mine, theirs in zip(arrays_in(copy, layout), arrays, strict=True):
        assert mine is theirs


def test_a_role_goes_into_a_pure_state_and_back():
    zoo = Zoo(rngs=nnx.Rngs(0, dropout=1))
    layout = Layout.of(zoo)
    arrays = arrays_in(zoo, layout)
    seen = 0
    for role in ROLES:
        state = layout.state(role, arrays)
        leaves = jax.tree.leaves(state)
        seen += len(leaves)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        assert len(layout.names(role)) == len(leaves) == len(layout.positions(role))
        assert set(layout.names(role)) == (EXPECTED[role] if leaves else set())
        for mine, theirs in zip(layout.put(role, [None] * layout.size, state), arrays, strict=True):
            assert mine is None or mine is theirs
    assert seen == layout.size


def test_names_are_in_the_order_of_the_states_leaves():
    module = Regressor(depth=12, rngs=nnx.Rngs(0))
    layout = Layout.of(module)
    state = layout.state("params", arrays_in(module, layout))
    expected = [graph.path_name(path) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    assert sorted(layout.names("params")) == sorted(expected)
    by_name = dict(zip(layout.names("params"), jax.tree.leaves(state), strict=True))
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        assert by_name[graph.path_name(path)] is variable.get_raw_value()


def step_changes(change: Any) -> str:
    class Changing(nf.FitModule):
        def __init__(self):
            self.weight, self.tally = nnx.Param(jnp.ones(2)), Tally({"a": jnp.ones(2)})

        def training_step(self, batch):
            change(self)
            return (self.weight[...] * batch["x"]).sum()

        def configure_optimizers(self):
            return optax.sgd(0.1)

    module = Changing()
    with pytest.raises(StateError) as caught:
        quiet(max_steps=1).fit(module, [{"x": np.ones(2, np.float32)}])
    np.testing.assert_array_equal(module.weight[...], np.ones(2))
    return str(caught.value)


def test_a_variable_that_a_step_adds_is_refused_by_name():
    message = step_changes(lambda self: setattr(self, "new", Tally(jnp.ones(2))))
    assert "training_step" in message
    assert "added new" in message


def test_a_variable_that_a_step_removes_is_refused_by_name():
    assert "removed tally" in step_changes(lambda self: delattr(self, "tally"))


def test_a_shape_that_a_step_changes_is_refused_by_name():
    def grow(self):
        self.tally.set_value({"a": jnp.ones(3)})

    message = step_changes(grow)
    assert "`tally`" in message
    assert "(2,)" in message
    assert "(3,)" in message


def test_a_structure_that_a_step_changes_is_refused_by_name():
    message = step_changes(lambda self: self.tally.set_value({"b": jnp.ones(2)}))
    assert "`tally` (Tally)" in message


def test_a_dtype_that_a_step_drifts_to_is_brought_back():
    class Drifting(nf.FitModule):
        def __init__(self):
            self.weight, self.tally = nnx.Param(jnp.ones(2)), Tally(jnp.zeros(2, jnp.int32))

        def training_step(self, batch):
            self.tally.set_value(self.tally[...] + 1.0)
            return (self.weight[...] * batch["x"]).sum()

        def configure_optimizers(self):
            return optax.sgd(0.1)

    module, trainer = Drifting(), quiet(max_steps=3)
    trainer.fit(module, [{"x": np.ones(2, np.float32)}] * 3)
    assert module.tally.dtype == jnp.int32
    np.testing.assert_array_equal(module.tally[...], [3, 3])
    assert trainer.compilations == ["first call"]


def test_a_variable_with_a_pytree_trains_every_array_of_it():
    class Pair(nf.FitModule):
        def __init__(self):
            self.pair = nnx.Param({"a": jnp.ones(()), "b": (jnp.ones(()), None), "label": "text"})

        def training_step(self, batch):
            value = self.pair.get_value()
            assert value["label"] == "text"
            return (value["a"] * batch["x"].mean() + value["b"][0] * 2.0) * 1.0

        def configure_optimizers(self):
            return optax.sgd(0.5)

    module = Pair()
    quiet(max_steps=2).fit(module, [{"x": np.full(2, 3.0, np.float32)}] * 2)
    value = module.pair.get_value()
    np.testing.assert_allclose([value["a"], value["b"][0]], [1 - 2 * 0.5 * 3, 1 - 2 * 0.5 * 2], rtol=1e-6)
    assert (value["b"][1], value["label"]) == (None, "text")
