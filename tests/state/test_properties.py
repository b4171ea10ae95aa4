"""Over random module trees: roles partition the leaves, evaluation changes nothing, and training is a plain loop's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nets import quiet

import nnx_fit as nf

WIDTH = 3
MOMENTUM = optax.sgd(0.05, momentum=0.9)


class Tally(nnx.Variable):
    """A kind of Variable that nobody has heard of."""


class Centered(nnx.Module):
    """Takes off a running mean that it keeps in plain Variables, behind a flag that has no default."""

    def __init__(self):
        self.mean = nnx.Variable(jnp.zeros(WIDTH))
        self.calls = Tally(jnp.zeros((), jnp.int32))

    def __call__(self, x, *, train):
        if train:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(x).mean(0)
            self.calls[...] += 1
        return x - self.mean[...]


class Noisy(nnx.Module):
    """Draws from a stream of its own, behind a positional flag with a default that is wrong for training."""

    def __init__(self, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.full(WIDTH, 0.1))
        self.rngs = rngs.fork()

    def __call__(self, x, deterministic=True):
        if deterministic:
            return x
        return x + self.scale * jax.random.normal(self.rngs.noise(), x.shape)


class Doubling(nnx.Module):
    """Has the mode as an attribute of its own, and a bare array."""

    def __init__(self):
        self.training = True
        self.factor = jnp.full(WIDTH, 2.0)

    def __call__(self, x):
        return x * self.factor if self.training else x


class Chain(nnx.Module):
    """Its parts one after the other, in a List."""

    def __init__(self, parts: list[nnx.Module]):
        self.parts = nnx.List(parts)

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Sum(nnx.Module):
    """Its parts side by side, in a Dict."""

    def __init__(self, parts: list[nnx.Module]):
        self.parts = nnx.Dict({f"part{i}": part for i, part in enumerate(parts)})

    def __call__(self, x):
        return sum(part(x) for part in self.parts.values()) / len(self.parts)


class Tied(nnx.Module):
    """One part in two places."""

    def __init__(self, part: nnx.Module):
        self.first = part
        self.second = part

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


LEAVES = {
    "linear": lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
    "low_rank": lambda rngs: nnx.LoRALinear(WIDTH, WIDTH, lora_rank=1, rngs=rngs),
    "batch_norm": lambda rngs: nnx.BatchNorm(WIDTH, rngs=rngs),
    "layer_norm": lambda rngs: nnx.LayerNorm(WIDTH, rngs=rngs),
    "dropout": lambda rngs: nnx.Dropout(0.3, rngs=rngs),
    "centered": lambda rngs: Centered(),
    "noisy": Noisy,
    "doubling": lambda rngs: Doubling(),
}
BRANCHES = {"chain": Chain, "sum": Sum, "sequential": lambda parts: nnx.Sequential(*parts)}

# A tree is the name of a leaf, or a pair of a branch's name and its parts.
TREES = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(BRANCHES)), st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.tuples(st.just("tied"), st.tuples(inner)),
    ),
    max_leaves=4,
)


def grow(tree: Any, rngs: nnx.Rngs) -> nnx.Module:
    if isinstance(tree, str):
        return LEAVES[tree](rngs)
    name, parts = tree
    grown = [grow(part, rngs) for part in parts]
    return Tied(grown[0]) if name == "tied" else BRANCHES[name](grown)


class Grown(nf.FitModule):
    """A tree between two layers; nothing in it ever passes a flag on."""

    def __init__(self, tree: Any, frozen: bool = False, *, rngs: nnx.Rngs):
        self.stem = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.net = grow(tree, rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)
        if frozen:
            self.freeze("stem")

    def __call__(self, x):
        return self.head(self.net(jnp.tanh(self.stem(x))))

    def training_step(self, batch):
        return ((self(batch["x"]) - batch["y"]) ** 2).mean()

    def validation_step(self, batch):
        self.log("val/loss", ((self(batch["x"]) - batch["y"]) ** 2).mean())

    def configure_optimizers(self):
        return MOMENTUM


def grown(tree: Any, frozen: bool = False) -> Grown:
    return Grown(tree, frozen, rngs=nnx.Rngs(params=0, dropout=1, noise=2))


def batches(seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 4, WIDTH)).astype(np.float32)
    return [{"x": part, "y": part.sum(1, keepdims=True)} for part in x]


def trainer(epochs: int = 1) -> nf.Trainer:
    # Eagerly: the operations are the same few for every tree, so that nothing is compiled anew for each.
    return quiet(max_epochs=epochs, jit=False)


def leaves(module: nnx.Module) -> dict[str, np.ndarray]:
    """Every array of a module by path, PRNG keys as their data."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        value = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
        typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        found[".".join(map(str, path))] = np.asarray(jax.random.key_data(value) if typed else value)
    return found


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def examples(count: int) -> settings:
    phases = [phase for phase in Phase if phase is not Phase.explain]
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=phases)


@examples(25)
@given(TREES, st.booleans())
def test_roles_partition_the_leaves_exactly(tree, frozen):
    module = grown(tree, frozen)
    parts = nf.partition(module)
    by_role = {
        role: {id(leaf) for leaf in jax.tree.leaves(getattr(parts, role), is_leaf=_is_variable)}
        for role in ("params", "frozen", "stats", "rngs")
    }
    everything = {id(leaf) for leaf in jax.tree.leaves(nnx.state(module), is_leaf=_is_variable)}
    assert set.union(*by_role.values()) == everything
    assert sum(len(ids) for ids in by_role.values()) == len(everything) == len(parts.rows)
    for role, ids in by_role.items():
        for leaf in jax.tree.leaves(getattr(parts, role), is_leaf=_is_variable):
            assert id(leaf) in ids
            assert (role == "rngs") == isinstance(leaf, nnx.RngState)
            assert (role in ("params", "frozen")) == isinstance(leaf, nnx.Param)
    frozen_paths = {row.path for row in parts.rows if row.role == "frozen"}
    assert frozen_paths == ({"stem.kernel", "stem.bias"} if frozen else set())


@examples(10)
@given(TREES)
def test_train_eval_train_equals_train_train(tree):
    found = []
    for evaluates in (True, False):
        module = grown(tree)
        trainer(epochs=2).fit(module, batches(), batches(1) if evaluates else None)
        found.append(leaves(module))
    assert_same(*found)


@examples(10)
@given(TREES)
def test_evaluation_is_idempotent_and_leaves_every_leaf(tree):
    module = grown(tree)
    trainer().fit(module, batches())
    before = leaves(module)
    first = trainer().validate(module, batches(1))
    assert trainer().validate(module, batches(1)) == first
    assert_same(before, leaves(module))


@examples(10)
@given(TREES, st.booleans())
def test_the_optimizers_state_has_exactly_the_params_structure(tree, frozen):
    module, seen = grown(tree, frozen), []

    class Look(nf.Callback):
        def step_metrics(self, view):
            seen.append(jax.tree.structure(view.params))
            return {}

    fitted = quiet(max_steps=1, max_epochs=1, jit=False, callbacks=[Look()])
    fitted.fit(module, batches())
    state = fitted._run.train_program.optimizer_state
    trained = nnx.state(module, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("stem"))) if frozen else nnx.Param)
    assert seen == [jax.tree.structure(state[0].trace)] == [jax.tree.structure(nnx.as_pure(trained))]
    for momentum, variable in zip(jax.tree.leaves(state), jax.tree.leaves(nnx.as_pure(trained)), strict=True):
        assert (momentum.shape, momentum.dtype) == (variable.shape, variable.dtype)


@examples(10)
@given(TREES, st.booleans())
def test_training_equals_a_loop_written_by_hand(tree, frozen):
    module, plain = grown(tree, frozen), grown(tree, frozen)
    trainer().fit(module, batches())
    loop(plain, frozen, batches())
    expected = leaves(plain)
    for name, value in leaves(module).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def loop(module: Grown, frozen: bool, data: list[dict[str, np.ndarray]]) -> None:
    """Trains as an expert would by hand: split, differentiate, update; flags passed, mode set by Flax itself."""
    nnx.Module.train(module)
    trained = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("stem"))) if frozen else nnx.Param
    graphdef, params, rest = nnx.split(module, trained, ...)
    opt_state = MOMENTUM.init(params)

    def loss(params, rest, batch):
        merged = nnx.merge(graphdef, params, rest, copy=True)
        out = merged.head(forward(merged.net, jnp.tanh(merged.stem(batch["x"]))))
        return ((out - batch["y"]) ** 2).mean(), nnx.split(merged, trained, ...)[2]

    for batch in data:
        (_, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, batch)
        updates, opt_state = MOMENTUM.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    nnx.update(module, params, rest)


def forward(node: nnx.Module, x: jax.Array) -> jax.Array:
    """The tree's output in training, with every flag passed by hand."""
    match node:
        case Centered():
            return node(x, train=True)
        case Noisy():
            return node(x, deterministic=False)
        case Tied():
            return forward(node.second, jnp.tanh(forward(node.first, x)))
        case Sum():
            return sum(forward(part, x) for part in node.parts.values()) / len(node.parts)
        case Chain() | nnx.Sequential():
            for part in node.parts if isinstance(node, Chain) else node.layers:
                x = forward(part, x)
            return x
    return node(x)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)
