"""A checkpoint that does not fit is refused before anything is loaded from it."""

import copy

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import CheckpointError


class Pair(nf.FitModule):
    """Two layers, each with an optimizer of its own."""

    optimizer = staticmethod(optax.adam)

    def __init__(self, features: int = 2, *, rngs: nnx.Rngs):
        self.a = nnx.Linear(2, features, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(features, 1, use_bias=False, rngs=rngs)

    def training_step(self, batch):
        return ((self.b(self.a(batch["x"])) - 1) ** 2).mean()

    def configure_optimizers(self):
        return {
            "first": nf.OptimizerSpec(optax.sgd(0.1, momentum=0.9), trainable="a"),
            "second": nf.OptimizerSpec(self.optimizer(0.1), trainable="b"),
        }


class Manual(Pair):
    automatic_optimization = False

    def training_step(self, batch):
        for name in ("first", "second"):
            loss, grads = self.value_and_grad(lambda: Pair.training_step(self, batch), optimizer=name)
            self.optimizers(name).update(grads)
        return loss


class Keeps(nf.Callback):
    """Has a state, and notes what is done to it."""

    def __init__(self):
        self.state = {"count": [0]}
        self.loaded = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.state["count"][0] += 1

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.loaded.append(copy.deepcopy(dict(state)))
        self.state = copy.deepcopy(dict(state))


class Looks(Keeps):
    """Might change the module before it is built, and does not."""

    def on_fit_start(self, trainer, module):
        self.seen = trainer.global_step


class Data(nf.DataModule):
    def __init__(self):
        self.version, self.loads = 1, 0

    def train_dataloader(self):
        return batches()

    def state_dict(self):
        return {"version": self.version}

    def load_state_dict(self, state):
        self.version, self.loads = state["version"], self.loads + 1


def batches():
    return [{"x": np.full((2, 2), value, np.float32)} for value in (1, 2, 3)]


def saved(path, module, callback=Keeps, **options):
    data = Data()
    data.version = 7
    trainer = quiet(max_epochs=1, jit=False, callbacks=[callback()], **options)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(path)
    return path


def refused(path, module, callback, **options):
    """The message of a fit that must not continue from a checkpoint, and must leave everything as it was."""
    before = {p: leaf[...] for p, leaf in nnx.to_flat_state(nnx.state(module))}
    trainer, data = quiet(max_epochs=9, jit=False, callbacks=[callback], **options), Data()
    with pytest.raises(CheckpointError) as caught:
        trainer.fit(module, datamodule=data, ckpt_path=path)
    assert all(leaf[...] is before[p] for p, leaf in nnx.to_flat_state(nnx.state(module)))
    assert callback.state == {"count": [0]} and data.version == 1
    assert (trainer.global_step, trainer.current_epoch, dict(trainer.history)) == (0, 0, {})
    return str(caught.value), data


@pytest.mark.parametrize("callback", [Keeps, Looks])
@pytest.mark.parametrize("kind", [Pair, Manual])
def test_another_module_is_refused_and_every_path_named(kind, callback, tmp_path):
    path, mine = saved(tmp_path / "c", kind(rngs=nnx.Rngs(0)), callback), callback()
    message, _ = refused(path, kind(3, rngs=nnx.Rngs(1)), mine)
    assert "a.kernel: float32(2, 2) in the checkpoint, float32(2, 3) here" in message
    assert "b.kernel: float32(2, 1) in the checkpoint, float32(3, 1) here" in message
    # Where no hook can come between, nothing was even tried.
    assert (mine.loaded == []) == (callback is Keeps)


@pytest.mark.parametrize("callback", [Keeps, Looks])
@pytest.mark.parametrize("kind", [Pair, Manual])
def test_one_of_several_optimizers_that_is_another_one_is_refused_by_name(kind, callback, tmp_path):
    path, mine = saved(tmp_path / "c", kind(rngs=nnx.Rngs(0)), callback), callback()
    other = type("Other", (kind,), {"optimizer": staticmethod(optax.sgd)})
    message, data = refused(path, other(rngs=nnx.Rngs(1)), mine)
    assert "is of another optimizer" in message
    lines = [line for line in message.splitlines() if "only in the checkpoint" in line]
    assert len(lines) == 3 and all(line.startswith("    ['second']") for line in lines)  # count, mu, nu
    assert "['first']" not in message and "not in the checkpoint" not in message
    assert (mine.loaded == []) == (callback is Keeps)
    assert data.loads == 2  # given the checkpoint's state, and its own again


@pytest.mark.parametrize("kind", [Pair, Manual])
def test_several_optimizers_and_manual_optimization_fit_where_they_are_the_same(kind, tmp_path):
    path = saved(tmp_path / "c", kind(rngs=nnx.Rngs(0)))
    whole, continued, mine = kind(rngs=nnx.Rngs(0)), kind(rngs=nnx.Rngs(1)), Keeps()
    quiet(max_epochs=2, jit=False).fit(whole, datamodule=Data())
    trainer = quiet(max_epochs=2, jit=False, callbacks=[mine])
    trainer.fit(continued, datamodule=Data(), ckpt_path=path)
    np.testing.assert_array_equal(continued.a.kernel[...], whole.a.kernel[...])
    assert mine.loaded == [{"count": [3]}] and mine.state == {"count": [6]} and trainer.global_step == 6


@pytest.mark.parametrize(
    ("then", "now", "dtypes"),
    [("32", "bf16-true", ("float32", "bfloat16")), ("bf16-true", "32", ("bfloat16", "float32"))],
)
def test_parameters_kept_in_another_precision_are_refused_before_any_is_converted(then, now, dtypes, tmp_path):
    path = saved(tmp_path / "c", Pair(rngs=nnx.Rngs(0)), precision=then)
    message, _ = refused(path, Pair(rngs=nnx.Rngs(1)), Keeps(), precision=now)
    assert f"a.kernel: {dtypes[0]}(2, 2) in the checkpoint, {dtypes[1]}(2, 2) here" in message
    assert "the Trainer's `precision` of that time" in message


def test_a_run_that_keeps_its_parameters_short_continues(tmp_path):
    path = saved(tmp_path / "c", Pair(rngs=nnx.Rngs(0)), precision="bf16-true")
    module = Pair(rngs=nnx.Rngs(1))
    quiet(max_epochs=2, jit=False, precision="bf16-true").fit(module, datamodule=Data(), ckpt_path=path)
    assert module.a.kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluations_refuse_before_any_parameter_is_converted(verb, tmp_path):
    path = saved(tmp_path / "c", Pair(rngs=nnx.Rngs(0)))

    class Other(Scalar):
        test_step = Scalar.validation_step

    module = Other()
    with pytest.raises(CheckpointError, match="w: not in the checkpoint"):
        getattr(quiet(precision="bf16-true"), verb)(module, targets(1), ckpt_path=path)
    assert module.w.dtype == jnp.float32


def test_a_hook_may_make_the_module_what_was_saved(tmp_path):
    class Grows(Pair):
        def __init__(self, features=2, *, rngs):
            super().__init__(features, rngs=rngs)

        def on_load_checkpoint(self, checkpoint):
            fresh = Pair(3, rngs=nnx.Rngs(9))
            self.a, self.b = fresh.a, fresh.b

    path = saved(tmp_path / "c", Pair(3, rngs=nnx.Rngs(0)))
    module = Grows(rngs=nnx.Rngs(1))
    quiet(max_epochs=2, jit=False).fit(module, datamodule=Data(), ckpt_path=path)
    assert module.a.kernel.shape == (2, 3)


def test_a_callback_that_decides_what_trains_does_so_before_optimizers_are_compared(tmp_path):
    class Net(Pair):
        def configure_optimizers(self):
            return optax.adam(0.1)

    def fit(module, epochs, ckpt_path=None):
        trainer = quiet(max_epochs=epochs, jit=False, callbacks=[nf.BackboneFinetuning(1, "a")])
        trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path)
        return trainer

    fit(Net(rngs=nnx.Rngs(0)), 1).save_checkpoint(tmp_path / "c")
    whole, continued = Net(rngs=nnx.Rngs(0)), Net(rngs=nnx.Rngs(1))
    fit(whole, 2)
    fit(continued, 2, ckpt_path=tmp_path / "c")
    np.testing.assert_array_equal(continued.a.kernel[...], whole.a.kernel[...])
