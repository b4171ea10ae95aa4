"""The train program: equal to a loop written by hand, gradients for *params* alone, counters right in every step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, Scalar, arrays, loader, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError, NonFiniteError


@nnx.jit
def hand_written_step(module: Regressor, optimizer: nnx.Optimizer, batch: Any) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda module: module.loss(batch))(module)
    optimizer.update(module, grads)
    return loss


def by_hand(batches: Any, epochs: int) -> tuple[Regressor, nnx.Optimizer, list[float]]:
    """The same training as a plain NNX loop."""
    module = Regressor(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, module.configure_optimizers(), wrt=nnx.Param)
    module.train()
    losses = [float(hand_written_step(module, optimizer, batch)) for _ in range(epochs) for batch in batches]
    return module, optimizer, losses


def leaves_by_path(tree: Any) -> dict[str, np.ndarray]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.as_pure(tree)):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        found[jax.tree_util.keystr(path)] = np.asarray(data)
    return found


def assert_same_leaves(mine: Any, theirs: Any, *, exact: bool = False) -> None:
    left, right = leaves_by_path(mine), leaves_by_path(theirs)
    assert left.keys() == right.keys()
    assert left
    for path, value in left.items():
        assert value.dtype == right[path].dtype, path
        if exact or value.dtype.kind in "iu":
            np.testing.assert_array_equal(value, right[path], err_msg=path)
        else:
            np.testing.assert_allclose(value, right[path], rtol=1e-5, atol=1e-7, err_msg=path)


def optimizer_state(trainer: nf.Trainer) -> Any:
    assert trainer._run is not None
    assert trainer._run.train_program is not None
    return trainer._run.train_program.optimizer_state


@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 2, "val_check_interval": 2}])
def test_fit_equals_a_hand_written_loop_leaf_by_leaf(options):
    batches = list(loader(56, 16))  # the last batch is ragged
    expected, optimizer, losses = by_hand(batches, epochs=3)
    module = Regressor(rngs=nnx.Rngs(0))
    trainer = quiet(max_epochs=3, log_every_n_steps=1, **options)
    history = trainer.fit(module, batches, loader(32) if options else None)
    assert trainer.global_step == 12
    for kind in (nnx.Param, nnx.BatchStat, nnx.RngState):
        assert_same_leaves(nnx.state(module, kind), nnx.state(expected, kind))
    theirs = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    mine = jax.tree.leaves(optimizer_state(trainer))
    assert len(mine) == len(theirs) == 2 * 8 + 1
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)
    assert [step for step, _ in history["train/loss"]] == list(range(1, 13))
    np.testing.assert_allclose([loss for _, loss in history["train/loss"]], losses, rtol=1e-5)


def test_an_eager_fit_equals_a_compiled_one():
    batches = list(loader(32, 16))
    modules = []
    for compiled in (True, False):
        module = Regressor(depth=1, rngs=nnx.Rngs(0))
        trainer = quiet(max_epochs=1, jit=compiled)
        trainer.fit(module, batches)
        modules.append((nnx.state(module), optimizer_state(trainer)))
        assert trainer.compilations == (["first call"] if compiled else [])
    assert_same_leaves(modules[0][0], modules[1][0])
    assert_same_leaves(modules[0][1], modules[1][1])


def test_one_parameter_under_sgd_follows_its_closed_form():
    module = Scalar(start=1.0, learning_rate=0.1)
    history = quiet(max_steps=3, log_every_n_steps=1).fit(module, targets(0.0, 2.0, 4.0))
    w, losses = 1.0, []
    for target in (0.0, 2.0, 4.0):
        losses.append(0.5 * (w - target) ** 2)
        w -= 0.1 * (w - target)
    np.testing.assert_allclose(module.w[...], w, rtol=1e-6)
    np.testing.assert_allclose([loss for _, loss in history["loss"]], losses, rtol=1e-6)


# --- what is differentiated -------------------------------------------------------------------------------------------


class Mixed(nf.FitModule):
    """A loss that depends on every kind of Variable."""

    def __init__(self):
        self.weight, self.other = nnx.Param(jnp.full(2, 2.0)), nnx.Param(jnp.full(2, 3.0))
        self.stat, self.count = nnx.BatchStat(jnp.full(2, 5.0)), nnx.Variable(jnp.zeros((), jnp.int32))
        self.bare = jnp.full(2, 7.0)

    def training_step(self, batch):
        self.count[...] = self.count[...] + 1
        self.stat[...] = self.stat[...] + 1.0
        product = self.weight[...] * self.other[...] * self.stat[...] * self.bare * batch["x"]
        return product.sum()

    def configure_optimizers(self):
        return optax.sgd(0.001)


def ones(count: int = 1) -> list[dict[str, np.ndarray]]:
    return [{"x": np.ones(2, np.float32)}] * count


class Views(nf.Callback):
    """Keeps the structure of what `step_metrics` sees, and logs the sum of the gradients."""

    def __init__(self):
        self.paths: dict[str, list[str]] = {}

    def step_metrics(self, view):
        for name in ("params", "grads", "updates", "new_params"):
            leaves = jax.tree_util.tree_leaves_with_path(getattr(view, name))
            self.paths[name] = [jax.tree_util.keystr(path) for path, _ in leaves]
        return {"grad_sum": sum(leaf.sum() for leaf in jax.tree.leaves(view.grads)), "step": view.step}


def test_gradients_exist_for_the_trained_params_alone():
    module, views = Mixed(), Views()
    module.freeze("other")
    history = quiet(max_steps=1, log_every_n_steps=1, callbacks=views).fit(module, ones())
    assert {tuple(paths) for paths in views.paths.values()} == {("['weight']",)}
    np.testing.assert_allclose(history["grad_sum"], [(1, 2 * 3.0 * 6.0 * 7.0)], rtol=1e-6)
    np.testing.assert_allclose(module.weight[...], 2.0 - 0.001 * 3 * 6 * 7, rtol=1e-6)
    np.testing.assert_array_equal(module.other[...], [3, 3])
    np.testing.assert_array_equal(module.stat[...], [6, 6])
    assert module.count[...] == 1


def test_statistics_written_in_the_step_are_kept_and_carried():
    module = Mixed()
    quiet(max_steps=4).fit(module, ones(4))
    assert (int(module.count[...]), module.count.dtype) == (4, jnp.int32)
    np.testing.assert_array_equal(module.stat[...], [9, 9])
    np.testing.assert_array_equal(module.bare, [7, 7])


def test_tied_weights_get_one_update_of_both_gradients():
    class Tied(nf.FitModule):
        def __init__(self):
            self.a = nnx.Param(jnp.ones(()))
            self.b = self.a

        def training_step(self, batch):
            return (2 * self.a[...] + 3 * self.b[...]) * batch["x"].mean()

        def configure_optimizers(self):
            return optax.sgd(0.1)

    module, views = Tied(), Views()
    quiet(max_steps=1, callbacks=views).fit(module, ones())
    assert module.a is module.b
    assert len(views.paths["grads"]) == 1
    np.testing.assert_allclose(module.a[...], 1 - 0.1 * 5, rtol=1e-6)


def test_an_optimizer_that_needs_the_parameters_gets_them():
    class Decayed(Scalar):
        def configure_optimizers(self):
            return optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))

    module = Decayed()
    quiet(max_steps=1).fit(module, targets(1.0))
    np.testing.assert_allclose(module.w[...], 1 - 0.1 * 0.5, rtol=1e-6)


def test_parameters_keep_their_dtype_under_an_optimizer_of_another():
    class Half(Scalar):
        def __init__(self):
            super().__init__()
            self.w = nnx.Param(jnp.ones((), jnp.bfloat16))

        def configure_optimizers(self):
            return optax.adam(optax.linear_schedule(0.1, 0.0, 10), mu_dtype=jnp.float32)

    module, trainer = Half(), quiet(max_steps=3)
    trainer.fit(module, targets(0.0, 0.0, 0.0))
    assert module.w.dtype == jnp.bfloat16
    assert trainer.compilations == ["first call"]


def test_nothing_to_train_is_an_error():
    module = Mixed()
    module.freeze()
    with pytest.raises(ConfigurationError, match="Nothing to train"):
        quiet(max_steps=1).fit(module, ones())


def test_a_trained_variable_that_cannot_be_differentiated_is_named():
    module = Mixed()
    module.index = nnx.Param(jnp.zeros(3, jnp.int32))
    with pytest.raises(ConfigurationError, match=r'`index` is trained but has dtype int32.*\n.*freeze\("index"\)'):
        quiet(max_steps=1).fit(module, ones())
    module.freeze("index")
    quiet(max_steps=1).fit(module, ones())
    np.testing.assert_array_equal(module.index[...], np.zeros(3))


# --- counters ---------------------------------------------------------------------------------------------------------


class Counting(Scalar):
    """Logs and traces everything that a step may ask."""

    def training_step(self, batch, batch_idx):
        for value in (self.global_step, self.current_epoch, batch_idx):
            assert isinstance(value, jax.core.Tracer)
            assert (value.shape, value.dtype) == ((), jnp.int32)
        assert self.training
        self.log("step", self.global_step)
        self.log("epoch", self.current_epoch)
        self.log("batch", batch_idx)
        return super().training_step(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx):
        assert not self.training
        self.log("val/step", self.global_step, reduce="max")
        self.log("val/epoch", self.current_epoch, reduce="max")
        self.log("val/batches", batch_idx, reduce="max")
        self.log("val/loader", dataloader_idx, reduce="max")


def test_counters_are_traced_and_right_in_every_step_without_recompiling():
    trainer = quiet(max_epochs=3, log_every_n_steps=1, num_sanity_val_steps=1)
    history = trainer.fit(Counting(), targets(0.0, 1.0), [targets(0.0, 0.0, 0.0), targets(0.0)])
    assert history["step"] == [(i + 1, float(i)) for i in range(6)]
    assert history["epoch"] == [(i + 1, float(i // 2)) for i in range(6)]
    assert history["batch"] == [(i + 1, float(i % 2)) for i in range(6)]
    for index, batches in enumerate([3, 1]):
        assert [v for _, v in history[f"val/step/dataloader_idx_{index}"]] == [2, 4, 6]
        assert [v for _, v in history[f"val/epoch/dataloader_idx_{index}"]] == [0, 1, 2]
        assert [v for _, v in history[f"val/batches/dataloader_idx_{index}"]] == [batches - 1] * 3
        assert [v for _, v in history[f"val/loader/dataloader_idx_{index}"]] == [index] * 3
    assert trainer.compilations == ["first call"]


def test_the_view_of_a_step_counts_updates_from_zero():
    history = quiet(max_steps=3, log_every_n_steps=1, callbacks=Views()).fit(Scalar(), targets(0.0, 0.0, 0.0))
    assert history["step"] == [(1, 0.0), (2, 1.0), (3, 2.0)]


# --- compilations -----------------------------------------------------------------------------------------------------


class Busy(Regressor):
    """Hooks that read and write the state between steps."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.head.bias[...] = self.head.bias[...] * np.float32(0.5)

    def on_validation_epoch_end(self):
        self.blocks[0].norm.mean[...] = np.zeros(8, np.float32)

    def on_train_epoch_start(self):
        nnx.update(self, jax.tree.map(lambda leaf: leaf, nnx.state(self, nnx.Param)))


@pytest.mark.parametrize("module", [Regressor, Busy])
def test_one_compilation_for_each_batch_shape_and_none_after_the_first_epoch(module, caplog):
    compiled_after_first_epoch: list[str] = []

    class Watch(nf.Callback):
        reads_module = False

        def on_train_epoch_start(self, trainer, module):
            caplog.clear()

        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch > 0:
                compiled_after_first_epoch.extend(
                    record.getMessage() for record in caplog.records if "ompil" in record.getMessage()
                )

    trainer = quiet(max_epochs=4, val_check_interval=2, num_sanity_val_steps=1, callbacks=Watch(), log_every_n_steps=1)
    with jax.log_compiles():
        trainer.fit(module(rngs=nnx.Rngs(0)), loader(56, 16), loader(24, 16))
    assert len(trainer.compilations) == 2  # whole batches and the ragged one
    assert compiled_after_first_epoch == []


def test_more_metrics_than_there_are_places_cost_one_trace_and_lose_nothing():
    class Chatty(Scalar):
        def training_step(self, batch):
            for index in range(100):
                self.log(f"m{index}", self.w[...] * index, on_epoch=True)
            return super().training_step(batch)

    trainer = quiet(max_epochs=1, log_every_n_steps=1)
    history = trainer.fit(Chatty(), targets(0.0, 0.0))
    np.testing.assert_allclose([v for _, v in history["m99_step"]], [99.0, 99 * 0.9], rtol=1e-6)
    np.testing.assert_allclose(history["m50_epoch"], [(2, 50 * 0.95)], rtol=1e-6)
    assert trainer.compilations == ["first call"]


# --- outputs and mistakes ---------------------------------------------------------------------------------------------


def test_what_a_step_returns_reaches_the_batch_hook():
    class Returning(Scalar):
        def training_step(self, batch):
            return {"loss": super().training_step(batch), "twice": self.w[...] * 2, "batch": batch["target"]}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append({name: np.asarray(value) for name, value in outputs.items()})

    seen: list[dict[str, np.ndarray]] = []
    quiet(max_steps=2).fit(Returning(), targets(0.0, 5.0))
    assert [set(outputs) for outputs in seen] == [{"loss", "twice", "batch"}] * 2
    np.testing.assert_allclose([outputs["twice"] for outputs in seen], [2.0, 1.8], rtol=1e-6)
    np.testing.assert_allclose([outputs["loss"] for outputs in seen], [0.5, 0.5 * 4.1**2], rtol=1e-6)
    np.testing.assert_array_equal(seen[1]["batch"], [5, 5])


def test_outputs_are_not_donated_by_the_next_step():
    class Keeping(Scalar):
        def training_step(self, batch):
            return {"loss": super().training_step(batch), "weight": self.w[...]}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            kept.append(outputs["weight"])

    kept: list[jax.Array] = []
    quiet(max_steps=4).fit(Keeping(), targets(*[0.0] * 4))
    np.testing.assert_allclose(kept, [1.0, 0.9, 0.81, 0.729], rtol=1e-6)


def test_the_first_value_that_is_not_finite_ends_the_run_by_name():
    class Exploding(Mixed):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.log("fine", 1.0)
            return loss

    batches = [*ones(2), {"x": np.array([1.0, np.inf], np.float32)}]
    with pytest.raises(NonFiniteError, match=r"Step 3: the first value that is not finite is the loss"):
        quiet(max_epochs=1, detect_nonfinite=True).fit(Exploding(), batches)
    quiet(max_epochs=1).fit(Exploding(), batches)


def test_a_gradient_that_is_not_finite_is_named_by_path():
    class Root(Scalar):
        def training_step(self, batch):
            return jnp.sqrt(self.w[...] * batch["target"].mean())

    with pytest.raises(NonFiniteError, match="gradient of `w`"):
        quiet(max_epochs=1, detect_nonfinite=True).fit(Root(), targets(4.0, 0.0))


def test_the_lowered_program_can_be_analysed():
    trainer = quiet(max_steps=1)
    trainer.fit(Regressor(rngs=nnx.Rngs(0)), loader())
    assert trainer._run is not None
    assert trainer._run.train_program is not None
    cost = trainer._run.train_program.lower(arrays(16)).compile().cost_analysis()
    assert cost["flops"] > 0
