"""Mode by attribute: set for every stage on every module that has one, and put back exactly."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, loader, quiet

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError
from nnx_fit.state.graph import modules
from nnx_fit.state.modes import set_mode


class Custom(nnx.Module):
    """A layer with a `training` attribute, which Flax's own train() and eval() do not know."""

    def __init__(self):
        self.training = True

    def __call__(self, x):
        return x if self.training else -x


class ByClass(nnx.Module):
    """The attribute is the class's, not the instance's."""

    deterministic: ClassVar[bool] = True

    def __call__(self, x):
        return x if self.deterministic else -x


class Derived(nnx.Module):
    """A mode that cannot be set."""

    def __init__(self):
        self.active = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    @property
    def deterministic(self):
        return self.active.deterministic


class Tail(nf.FitModule):
    """A nested FitModule."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(x, use_running_average=not self.training)


class Everything(Regressor):
    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.custom, self.by_class, self.derived, self.tail = Custom(), ByClass(), Derived(), Tail(rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return super().__call__(self.tail(self.by_class(self.custom(x))))


def attributes(module: Any) -> list[dict[str, Any]]:
    return [dict(vars(node)) for _, node in modules(module)]


def same(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Equal names, and equal values (by identity for what is no plain value)."""
    return len(before) == len(after) and all(
        list(old) == list(new) and all(old[key] is new[key] or old[key] == new[key] for key in old if key != "_raw")
        for old, new in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("training", [True, False])
def test_every_mode_attribute_is_set_and_restored_exactly(training):
    module = Everything(rngs=nnx.Rngs(0))
    module.blocks[0].dropout.deterministic = True
    before, graphdef = attributes(module), nnx.graphdef(module)
    saved = set_mode(module, training)
    assert module.blocks[0].dropout.deterministic is not training
    assert module.blocks[1].norm.use_running_average is not training
    assert module.attention.deterministic is not training
    assert module.by_class.deterministic is not training
    assert module.custom.training is training
    assert module.training is training
    assert module.tail.training is training
    saved.restore()
    assert same(before, attributes(module))
    assert nnx.graphdef(module) == graphdef


def test_eval_modules_stay_in_eval_mode():
    module = Everything(rngs=nnx.Rngs(0))
    set_mode(module, True, ("blocks.0", "tail"))
    assert module.blocks[0].norm.use_running_average
    assert module.blocks[0].dropout.deterministic
    assert not module.blocks[1].norm.use_running_average
    assert module.tail.norm.use_running_average
    assert not module.tail.training
    assert module.training


def test_an_eval_module_that_does_not_exist_is_an_error_with_the_nearest_one():
    module = Regressor(rngs=nnx.Rngs(0))
    module.eval_modules = "block.0"
    with pytest.raises(ConfigurationError, match=r"'block\.0'.*Did you mean 'blocks\.0'"):
        quiet(max_steps=1).fit(module, loader())
    assert not module.blocks[0].dropout.deterministic


class Watching(Everything):
    """Notes its own mode wherever it can look."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        seen.clear()

    def note(self, where):
        seen[where] = (
            self.training,
            self.tail.training,
            self.custom.training,
            not self.by_class.deterministic,
            not self.blocks[0].dropout.deterministic,
        )

    def training_step(self, batch):
        self.note("training_step")
        return self.loss(batch)

    def validation_step(self, batch):
        self.note("validation_step")
        super().validation_step(batch)

    def test_step(self, batch):
        self.note("test_step")
        super().test_step(batch)

    def predict_step(self, batch):
        self.note("predict_step")
        return self(batch["x"])

    def on_train_batch_start(self, batch, batch_idx):
        self.note("on_train_batch_start")

    def on_train_epoch_end(self):
        self.note("on_train_epoch_end")

    def on_validation_start(self):
        self.note("on_validation_start")

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.note("on_validation_batch_end")

    def on_test_start(self):
        self.note("on_test_start")

    def on_predict_start(self):
        self.note("on_predict_start")


seen: dict[str, tuple[bool, ...]] = {}


@pytest.mark.parametrize("compiled", [True, False])
def test_every_stage_runs_in_its_mode_and_leaves_the_module_in_its_own(compiled):
    module = Watching(rngs=nnx.Rngs(0))
    module.eval()
    module.custom.training = True
    before, graphdef = attributes(module), nnx.graphdef(module)
    trainer = quiet(max_steps=1, num_sanity_val_steps=1, jit=compiled)
    trainer.fit(module, loader(16), loader(16))
    if compiled:
        trainer.test(module, loader(16))
        trainer.predict(module, loader(16))
    training = {"training_step", "on_train_batch_start", "on_train_epoch_end"}
    assert {where for where, modes in seen.items() if modes == (True,) * 5} == training
    assert {where for where, modes in seen.items() if modes == (False,) * 5} == set(seen) - training
    assert len(seen) == (10 if compiled else 6)
    assert [list(node) for node in attributes(module)] == [list(node) for node in before]
    assert nnx.graphdef(module) == graphdef


@pytest.mark.parametrize("hook", ["training_step", "validation_step", "on_train_batch_start", "on_validation_start"])
def test_the_mode_is_restored_after_an_exception(hook):
    class Failing(Everything):
        pass

    def fail(self, *args):
        raise RuntimeError("stop here")

    setattr(Failing, hook, fail)
    module = Failing(rngs=nnx.Rngs(0))
    module.blocks[1].eval()
    before, graphdef = attributes(module), nnx.graphdef(module)
    with pytest.raises(RuntimeError, match="stop here"):
        quiet(max_steps=1).fit(module, loader(16), loader(16))
    assert nnx.graphdef(module) == graphdef
    assert same(before, attributes(module))


def test_a_frozen_backbone_keeps_its_statistics_while_the_head_learns():
    class Tuned(Everything):
        eval_modules = ("blocks", "tail")

    module = Tuned(rngs=nnx.Rngs(0))
    module.freeze("blocks")
    stats = {path: value[...] for path, value in nnx.to_flat_state(nnx.state(module, nnx.BatchStat))}
    counts = module.blocks[0].dropout.rngs.count[...]
    kernel = module.head.kernel[...]
    quiet(max_steps=3, max_epochs=1).fit(module, loader())
    for path, value in nnx.to_flat_state(nnx.state(module, nnx.BatchStat)):
        np.testing.assert_array_equal(value[...], stats[path])
    assert module.blocks[0].dropout.rngs.count[...] == counts
    assert not np.array_equal(module.head.kernel[...], kernel)


def test_without_eval_modules_the_same_statistics_move():
    module = Everything(rngs=nnx.Rngs(0))
    before = {path: value[...] for path, value in nnx.to_flat_state(nnx.state(module, nnx.BatchStat))}
    quiet(max_steps=3, max_epochs=1).fit(module, loader())
    for path, value in nnx.to_flat_state(nnx.state(module, nnx.BatchStat)):
        assert not np.array_equal(value[...], before[path])


def test_a_custom_training_attribute_decides_what_is_computed():
    class Sign(nf.FitModule):
        def __init__(self):
            self.weight, self.custom = nnx.Param(jnp.ones(())), Custom()

        def training_step(self, batch):
            self.log("train", self.custom(jnp.ones(())))
            return (self.weight[...] * batch).sum()

        def validation_step(self, batch):
            self.log("val", self.custom(jnp.ones(())))

        def configure_optimizers(self):
            return optax.sgd(0.1)

    history = quiet(max_steps=1, log_every_n_steps=1).fit(Sign(), [np.ones(2, np.float32)], [np.ones(2, np.float32)])
    assert (history["train"], history["val"]) == ([(1, 1.0)], [(1, -1.0)])
