"""The live values: what was seen stays valid, what was written is trained on, and nothing stale is ever read."""

from __future__ import annotations

import operator
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, Scalar, loader, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import StateError
from nnx_fit.state.layout import Layout
from nnx_fit.state.live import Live


class Each(nf.Callback):
    """Calls a function after every training batch."""

    def __init__(self, function: Any, *, reads_module: bool = True):
        self.function, self.reads_module = function, reads_module

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.function(module, batch_idx)


class Cell(nf.FitModule):
    """One weight and one of each thing that a host hook may write."""

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros(2))
        self.target = nnx.Variable(jnp.zeros(2))
        self.table = nnx.Variable({"scale": jnp.ones(()), "label": "text"})
        self.bare = jnp.ones(2)
        self.pair = nnx.data((jnp.ones(2), [jnp.ones(2)]))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])

    def training_step(self, batch):
        self.log("target", self.target[...].sum())
        self.log("scale", self.table["scale"])
        self.log("bare", self.bare.sum())
        self.log("pair", self.pair[0].sum() + 10 * self.pair[1][0].sum())
        return ((self.weight[...] - self.target[...] - batch["x"]) ** 2).sum() / 2

    def configure_optimizers(self):
        return optax.sgd(0.5)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.zeros(2, np.float32)}] * count


def pause_in_loader(module: Any, look: Any, after: int = 12) -> Any:
    """A loader that looks at the module in the middle of training, where no hook is."""

    def stream():
        for index in range(20):
            if index == after:
                look(module)
            yield {"x": np.zeros(2, np.float32)}

    class Loader:
        def __iter__(self):
            return stream()

    return Loader()


# --- what was seen stays valid ----------------------------------------------------------------------------------------


def test_arrays_taken_before_fit_stay_valid():
    module = Regressor(rngs=nnx.Rngs(0))
    raw = {path: variable.get_raw_value() for path, variable in nnx.to_flat_state(nnx.state(module))}
    copies = {path: np.asarray(jax.random.key_data(v) if is_key(v) else v) for path, v in raw.items()}
    quiet(max_epochs=1).fit(module, loader())
    for path, value in raw.items():
        assert not value.is_deleted()
        np.testing.assert_array_equal(jax.random.key_data(value) if is_key(value) else value, copies[path])


def is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def test_arrays_taken_in_a_hook_stay_what_they_were():
    taken: list[tuple[jax.Array, nnx.State, np.ndarray]] = []

    def take(module, _):
        taken.append((module.w[...], nnx.state(module), np.asarray(module.w[...])))

    module = Scalar()
    quiet(max_steps=6, callbacks=Each(take)).fit(module, targets(*[0.0] * 6))
    expected = [0.9 ** (i + 1) for i in range(6)]
    np.testing.assert_allclose([array for array, _, _ in taken], expected, rtol=1e-6)
    np.testing.assert_allclose([state["w"][...] for _, state, _ in taken][-1], expected[-1], rtol=1e-6)
    np.testing.assert_allclose([copy for _, _, copy in taken], expected, rtol=1e-6)
    assert not any(array.is_deleted() for array, _, _ in taken)


def test_a_snapshot_of_the_state_taken_in_a_hook_keeps_its_values():
    taken: list[nnx.State] = []
    module = Scalar()
    snapshot = Each(lambda module, _: taken.append(jax.tree.map(lambda leaf: leaf, nnx.state(module))))
    quiet(max_steps=3, callbacks=snapshot).fit(module, targets(0.0, 0.0, 0.0))
    np.testing.assert_allclose([state["w"][...] for state in taken], [0.9, 0.81, 0.729], rtol=1e-6)


def test_two_variables_that_share_one_buffer_train_apart():
    class Twins(nf.FitModule):
        def __init__(self):
            value = jnp.ones(2)
            self.first, self.second, self.third = nnx.Param(value), nnx.Param(value), nnx.BatchStat(value)
            self.bare = value

        def training_step(self, batch):
            return (self.first[...] * batch["x"] + 2 * self.second[...] * batch["x"]).sum()

        def configure_optimizers(self):
            return optax.sgd(0.1)

    module = Twins()
    quiet(max_steps=2).fit(module, [{"x": np.ones(2, np.float32)}] * 2)
    np.testing.assert_allclose(module.first[...], [0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(module.second[...], [0.6, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(module.third[...], [1, 1])
    np.testing.assert_array_equal(module.bare, [1, 1])


def test_sharing_a_buffer_in_a_hook_is_no_double_donation():
    def share(module, _):
        module.target.set_value(module.weight.get_value())
        module.bare = module.weight.get_value()

    module = Cell()
    module.weight.set_value(jnp.ones(2))
    quiet(max_steps=4, callbacks=Each(share)).fit(module, batches(4))
    # After the first step target == weight, so the gradient is zero from then on.
    np.testing.assert_allclose(module.weight[...], [0.5, 0.5], rtol=1e-6)


def test_an_optimizer_that_keeps_the_parameters_is_no_double_donation():
    class Keeping(Scalar):
        def configure_optimizers(self):
            keep = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, params))
            return optax.chain(keep, optax.sgd(0.1))

    module = Keeping()
    quiet(max_steps=3).fit(module, targets(0.0, 0.0, 0.0))
    np.testing.assert_allclose(module.w[...], 0.9**3, rtol=1e-6)


# --- what was written is taken over -----------------------------------------------------------------------------------


def written(write: Any, name: str, count: int = 4) -> list[float]:
    """The step values of a metric when every batch hook writes."""
    trainer = quiet(max_steps=count, log_every_n_steps=1, callbacks=Each(write))
    return [value for _, value in trainer.fit(Cell(), batches(count))[name]]


WRITES = {
    "by index": ("target", lambda m, i: m.target.__setitem__(..., jnp.full(2, i + 1.0)), 2),
    "by set_value": ("target", lambda m, i: m.target.set_value(jnp.full(2, i + 1.0)), 2),
    "part of it": ("target", lambda m, i: m.target.__setitem__(0, i + 1.0), 1),
    "from NumPy": ("target", lambda m, i: m.target.set_value(np.full(2, i + 1.0)), 2),
    "another dtype": ("target", lambda m, i: m.target.set_value(jnp.full(2, i + 1, jnp.int32)), 2),
    "by nnx.update": (
        "target",
        lambda m, i: nnx.update(m, nnx.State({"target": nnx.Variable(jnp.full(2, i + 1.0))})),
        2,
    ),
    "a bare array": ("bare", lambda m, i: setattr(m, "bare", jnp.full(2, i + 1.0)), 2),
    "a whole pytree": ("scale", lambda m, i: m.table.set_value({"scale": jnp.asarray(i + 1.0), "label": "text"}), 1),
    "inside a pytree": ("scale", lambda m, i: m.table.__setitem__("scale", jnp.asarray(i + 1.0)), 1),
    "a tuple of arrays": ("pair", lambda m, i: setattr(m, "pair", nnx.data((jnp.full(2, i - 9.0), [jnp.ones(2)]))), 2),
    "a list in a tuple": ("pair", lambda m, i: m.pair[1].__setitem__(0, jnp.full(2, (i - 0.0) / 10)), 2),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_in_a_batch_hook_is_seen_by_the_next_step(how):
    name, write, factor = WRITES[how]
    values = written(write, name)
    first = {"target": 0.0, "bare": 2.0, "scale": 1.0, "pair": 22.0}[name]
    if name == "pair":
        expected = (
            [2 * (i - 9) + 20.0 for i in range(3)] if how == "a tuple of arrays" else [2 + 2.0 * i for i in range(3)]
        )
    else:
        expected = [factor * (i + 1.0) for i in range(3)]
    np.testing.assert_allclose(values, [first, *expected], rtol=1e-6)


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"]
)
def test_a_write_in_any_earlier_hook_is_seen_by_the_first_step(hook):
    class Writing(Cell):
        pass

    setattr(Writing, hook, lambda self, *args: self.target.set_value(jnp.full(2, 3.0)))
    history = quiet(max_steps=1, log_every_n_steps=1).fit(Writing(), batches(1))
    assert history["target"] == [(1, 6.0)]


def test_a_write_in_a_validation_hook_is_trained_on():
    class Writing(Cell):
        def validation_step(self, batch):
            self.log("val/target", self.target[...].sum())

        def on_validation_start(self):
            self.target.set_value(jnp.full(2, 5.0))

    trainer = quiet(max_steps=2, val_check_interval=1, log_every_n_steps=1)
    history = trainer.fit(Writing(), batches(2), batches(1))
    assert history["target"] == [(1, 0.0), (2, 10.0)]
    assert history["val/target"] == [(1, 10.0), (2, 10.0)]


def test_a_written_weight_is_what_the_optimizer_goes_on_from():
    def halve(module, index):
        module.w[...] = module.w[...] / 2

    module = Scalar()
    quiet(max_steps=4, callbacks=Each(halve)).fit(module, targets(*[0.0] * 4))
    np.testing.assert_allclose(module.w[...], (0.9 / 2) ** 4, rtol=1e-6)


def test_writes_never_recompile():
    def write(module, index):
        module.target.set_value(np.full(2, index, np.float64 if index % 2 else np.int32))
        module.bare = np.ones(2)

    trainer = quiet(max_steps=6, callbacks=Each(write))
    trainer.fit(Cell(), batches(6))
    assert trainer.compilations == ["first call"]


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda m, i: m.target.set_value(jnp.ones(3)), r"`target`.*\(3,\).*\(2,\)"),
        (lambda m, i: setattr(m, "bare", jnp.ones(4)), r"`bare`.*\(4,\).*\(2,\)"),
        (lambda m, i: m.table.set_value({"other": jnp.ones(())}), "`table`"),
        (lambda m, i: m.table.set_value({"scale": jnp.ones(()), "label": "changed"}), "`table`"),
        (lambda m, i: m.target.set_value("text"), "`target`"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(write, named):
    module = Cell()
    with pytest.raises(StateError, match=named):
        quiet(max_steps=3, callbacks=Each(write)).fit(module, batches(3))
    np.testing.assert_array_equal(module.weight[...], [0, 0])


def test_replacing_a_variable_or_a_layer_in_a_hook_is_not_ignored():
    for replace in (
        lambda m, i: setattr(m, "target", nnx.Variable(jnp.ones(2))),
        lambda m, i: setattr(m, "norm", nnx.BatchNorm(2, rngs=nnx.Rngs(1))),
        lambda m, i: delattr(m, "norm"),
        lambda m, i: delattr(m, "bare"),
        lambda m, i: setattr(m, "pair", nnx.data((jnp.ones(2), []))),
        lambda m, i: m.layers.__setitem__(0, nnx.Linear(2, 2, rngs=nnx.Rngs(1))),
    ):
        with pytest.raises(StateError, match=r"`(target|norm|bare|pair|layers)[\w.]*` was replaced or removed"):
            quiet(max_steps=3, callbacks=Each(replace)).fit(Cell(), batches(3))


class Contained(Cell):
    """Variables in plain containers."""

    def __init__(self):
        super().__init__()
        self.named = nnx.data({"a": nnx.Variable(jnp.zeros(()))})
        self.nested = nnx.data([{"b": nnx.Variable(jnp.zeros(()))}])


@pytest.mark.parametrize(
    ("replace", "name"),
    [
        (lambda module, new: module.named.update(a=new), r"named\.a"),
        (lambda module, new: setattr(module, "named", nnx.data({"a": new})), r"named\.a"),
        (lambda module, new: module.nested[0].update(b=new), r"nested\.0\.b"),
        (lambda module, new: module.nested.__setitem__(0, {"b": new}), r"nested\.0\.b"),
        (lambda module, new: module.nested.clear(), r"nested\.0\.b"),
    ],
)
def test_replacing_a_variable_in_a_plain_container_is_not_ignored(replace, name):
    hook = Each(lambda module, index: replace(module, nnx.Variable(jnp.ones(()))))
    with pytest.raises(StateError, match=f"`{name}` was replaced or removed"):
        quiet(max_steps=3, callbacks=hook).fit(Contained(), batches(3))


def test_an_attribute_that_a_hook_adds_is_left_alone():
    def add(module, index):
        module.note, module.last, module.extra = index, jnp.ones(3), nnx.Variable(jnp.ones(3))

    module, trainer = Cell(), quiet(max_steps=3, callbacks=Each(add))
    trainer.fit(module, batches(3))
    assert trainer.compilations == ["first call"]
    assert (module.note, module.extra.shape) == (2, (3,))
    assert nnx.state(module)["last"].shape == (3,)


# --- nothing stale is read --------------------------------------------------------------------------------------------


def test_the_module_is_shown_only_to_those_who_look():
    shown: list[bool] = []

    def peek(module, _):
        shown.append(isinstance(module.weight.get_raw_value(), jax.Array))

    quiet(max_steps=3, callbacks=Each(peek, reads_module=False)).fit(Cell(), batches(3))
    assert shown == [False] * 3
    quiet(max_steps=3, callbacks=Each(peek)).fit(Cell(), batches(3))
    assert shown == [False] * 3 + [True] * 3


def test_the_module_is_whole_in_every_epoch_hook_and_after_fit():
    class Looking(Scalar):
        def on_train_epoch_end(self):
            seen.append(float(self.w[...]))

    seen: list[float] = []
    module = Looking()
    quiet(max_epochs=3).fit(module, targets(0.0, 0.0))
    np.testing.assert_allclose(seen, [0.9**2, 0.9**4, 0.9**6], rtol=1e-6)
    np.testing.assert_allclose(module.w[...], 0.9**6, rtol=1e-6)


BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.matmul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.and_,
    operator.or_,
    operator.xor,
    operator.lshift,
    operator.rshift,
    operator.eq,
    operator.ne,
]
ORDER = [operator.lt, operator.le, operator.gt, operator.ge]

USES = {
    **{f"v {op.__name__} x": (lambda m, op=op: op(m.weight, jnp.ones(2))) for op in BINARY},
    **{f"x {op.__name__} v": (lambda m, op=op: op(2.0, m.weight)) for op in BINARY},
    **{f"v {op.__name__} v": (lambda m, op=op: op(m.weight, m.weight)) for op in BINARY},
    **{f"v[...] {op.__name__} x": (lambda m, op=op: op(m.weight[...], 1)) for op in [*BINARY, *ORDER]},
    "v[...]": lambda m: m.weight[...] + 1,
    "v[0]": lambda m: m.weight[0],
    "v[...] = x": lambda m: m.weight.__setitem__(..., jnp.ones(2)),
    "get_value, then +": lambda m: m.weight.get_value() + 1,
    "-v": lambda m: -m.weight,
    "+v": lambda m: +m.weight,
    "abs": lambda m: abs(m.weight),
    "invert": lambda m: ~m.weight,
    "round": lambda m: round(m.weight),
    "divmod": lambda m: divmod(m.weight[...], 2),
    "shape": lambda m: m.weight.shape,
    "dtype": lambda m: m.weight.dtype,
    "sum": lambda m: m.weight.sum(),
    "item": lambda m: m.weight.item(),
    "at": lambda m: m.weight.at[0].set(1.0),
    "len": lambda m: len(m.weight),
    "iter": lambda m: list(m.weight),
    "in": lambda m: 1.0 in m.weight,
    "bool": lambda m: bool(m.weight),
    "float": lambda m: float(m.weight[...]),
    "int": lambda m: int(m.weight[...]),
    "complex": lambda m: complex(m.weight[...]),
    "index": lambda m: [1, 2, 3][m.weight[...]],
    "hash": lambda m: {m.weight[...]: 1},
    "format": lambda m: f"{m.weight[...]:.2f}",
    "jnp": lambda m: jnp.sum(m.weight[...]),
    "jnp on the Variable": lambda m: jnp.sum(m.weight),
    "jax.numpy.asarray": lambda m: jnp.asarray(m.weight[...]),
    "numpy": lambda m: np.asarray(m.weight[...]),
    "numpy on the Variable": lambda m: np.asarray(m.weight),
    "numpy function": lambda m: np.sum(m.weight[...]),
    "jax.device_get": lambda m: jax.device_get(nnx.state(m)),
    "jax.jit": lambda m: jax.jit(lambda x: x * 2)(m.weight[...]),
    "nnx.state": lambda m: nnx.state(m)["weight"] * 2,
    "nnx.state of Params": lambda m: jax.tree.map(jnp.sum, nnx.state(m, nnx.Param)),
    "nnx.jit": lambda m: nnx.jit(lambda m: m.weight[...] * 2)(m),
    "nnx.clone": lambda m: nnx.clone(m).weight[...] * 2,
    "nnx.as_pure": lambda m: jax.tree.map(jnp.sum, nnx.as_pure(nnx.state(m, nnx.Param))),
    "a layer": lambda m: m.norm(jnp.ones((2, 2))),
    "a bare array": lambda m: m.bare + 1,
    "an array in a tuple": lambda m: jnp.sum(m.pair[0]),
    "a pytree": lambda m: m.table["scale"],
    "pickle": lambda m: pickle.dumps(m),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_of_a_withheld_value_is_an_error_that_names_it(use):
    module = Cell()
    live = Live(module, Layout.of(module))
    live.take()
    named = {
        "a layer": r"`norm\.\w+`",
        "a bare array": "`bare`",
        "an array in a tuple": r"`pair\.0`",
        "a pytree": "`table`",
        "pickle": r"`[\w.]+`",
        "nnx.jit": r"`[\w.]+`",
        "jax.device_get": r"`[\w.]+`",
        "nnx.state of Params": r"`[\w.]+`",
        "nnx.as_pure": r"`[\w.]+`",
    }.get(use, "`weight`")
    with pytest.raises(StateError, match=rf"{named} was read while"):
        USES[use](module)
    live.show()
    np.testing.assert_array_equal(module.weight[...], [0, 0])


def test_a_withheld_module_can_still_be_printed():
    module = Cell()
    live = Live(module, Layout.of(module))
    live.take()
    assert "in the training program's hands" in repr(module)
    assert nnx.graphdef(module) is not None


def test_a_loader_that_looks_at_the_module_gets_an_error_and_not_a_stale_value():
    module = Cell()
    with pytest.raises(StateError, match="`weight` was read while"):
        quiet(max_epochs=1).fit(module, pause_in_loader(module, lambda m: m.weight[...] + 1))
    assert isinstance(module.weight.get_raw_value(), jax.Array)
    np.testing.assert_array_equal(module.weight[...], [0, 0])


@pytest.mark.parametrize(
    "write",
    [lambda m: m.weight.set_value(jnp.ones(2)), lambda m: nnx.update(m, nnx.State({"weight": nnx.Param(jnp.ones(2))}))],
)
def test_a_write_where_no_hook_is_does_not_vanish_silently(write):
    module = Cell()
    with pytest.raises(StateError, match="`weight` was written while"):
        quiet(max_epochs=1).fit(module, pause_in_loader(module, write))
    assert isinstance(module.weight.get_raw_value(), jax.Array)


def test_a_step_that_fails_leaves_the_values_in_the_module():
    class Failing(Scalar):
        def training_step(self, batch):
            if batch["target"].shape == (3,):
                raise RuntimeError("stop here")
            return super().training_step(batch)

    module = Failing()
    with pytest.raises(RuntimeError, match="stop here"):
        quiet(max_epochs=1).fit(module, [*targets(0.0, 0.0), *targets(0.0, size=3)])
    np.testing.assert_allclose(module.w[...], 0.81, rtol=1e-6)


def test_values_lost_on_the_device_are_named():
    module = Cell()
    live = Live(module, Layout.of(module))
    live.take()
    live.arrays[live.layout.slots[-1].start].delete()
    with pytest.raises(StateError, match=rf"(?s)Variables \({live.layout.slots[-1].name}.*last checkpoint"):
        live.show()


def test_evaluation_alone_copies_and_withholds_nothing():
    class Judged(Cell):
        def validation_step(self, batch):
            self.log("val", self.weight[...].sum())

    module = Judged()
    raw = module.weight.get_raw_value()
    quiet().validate(module, batches(2))
    assert module.weight.get_raw_value() is raw
