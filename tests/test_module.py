"""`FitModule`: a plain NNX module, with its constructor's arguments on record and a mode of its own."""

from __future__ import annotations

import collections
import copy
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
from nnx_fit.errors import ConfigurationError

Pair = collections.namedtuple("Pair", "left right")


# --- hyperparameters --------------------------------------------------------------------------------------------------


class Configured(nf.FitModule):
    def __init__(
        self,
        width: int,
        name: str = "net",
        *,
        sizes: Any = (1, 2),
        nested: Any = None,
        thing: Any = None,
        rngs: Any = None,
        **options: Any,
    ):
        self.seen_in_init = dict(self.hparams) if width != 3 else None
        self.weight = nnx.Param(jnp.ones(()))


def test_hparams_are_the_arguments_by_name_with_defaults():
    module = Configured(4, sizes=[1, 2], extra=1.5)
    assert module.hparams == {
        "width": 4,
        "name": "net",
        "sizes": [1, 2],
        "nested": None,
        "thing": None,
        "rngs": None,
        "extra": 1.5,
    }
    assert Configured(width=4, name="other").hparams["name"] == "other"
    assert module.hparams.width == 4


@pytest.mark.parametrize(
    "value",
    [1, 1.5, True, "text", None, [1, [2, "a"]], {"a": {"b": [1]}}, (1, (2,)), [], {}],
)
def test_plain_values_are_recorded_as_they_are(value):
    recorded = Configured(3, nested=value).hparams["nested"]
    assert recorded == value
    assert type(recorded) is type(value)


@pytest.mark.parametrize(
    "value", [jnp.ones(2), np.ones(2), nnx.Rngs(0), object(), jnp.tanh, [1, object()], {1: 2}, {"a": jnp.ones(1)}]
)
def test_other_values_are_left_out(value):
    assert "nested" not in Configured(3, nested=value).hparams


def test_numpy_scalars_and_named_tuples_become_plain():
    module = Configured(3, nested=np.float32(0.5), sizes=Pair(1, np.int64(2)))
    assert type(module.hparams["nested"]) is float
    assert tuple(module.hparams["sizes"]) == (1, 2)


def test_a_record_does_not_follow_a_list_that_the_caller_changes():
    sizes = [1, 2]
    module = Configured(3, sizes=sizes)
    sizes.append(3)
    assert module.hparams["sizes"] == [1, 2]


def test_hparams_are_readable_in_the_constructor():
    module = Configured(4, extra="x")
    assert module.seen_in_init["width"] == 4
    assert module.seen_in_init["extra"] == "x"


def test_a_module_without_arguments_has_no_hparams():
    class Nothing(nf.FitModule):
        pass

    assert Nothing().hparams == {}
    with pytest.raises(AttributeError, match="no hyperparameter 'width'; there are: none"):
        Nothing().hparams.width  # noqa: B018


def test_the_outermost_constructor_is_the_one_on_record():
    class Sub(Configured):
        def __init__(self, depth: int = 7):
            super().__init__(3, extra=1)

    assert Sub().hparams == {"depth": 7}


def test_two_instances_have_records_of_their_own():
    first, second = Configured(1), Configured(2)
    assert (first.hparams.width, second.hparams.width) == (1, 2)


def test_a_wrong_call_raises_pythons_own_error():
    with pytest.raises(TypeError, match="width"):
        Configured()  # type: ignore[call-arg]


def test_a_list_among_the_hparams_leaves_the_graphdef_hashable():
    hash(nnx.graphdef(Configured(3, sizes=[1, [2]], nested={"a": [1]})))


class Scaled(nf.FitModule):
    """A child that reads its own hyperparameters in the step."""

    def __init__(self, scale: float):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return x * self.weight[...] * self.hparams.scale


class Family(nf.FitModule):
    def __init__(self, scale: float, how: str = "plain"):
        self.first, self.second = Scaled(10.0), Scaled(scale=100.0)

    def training_step(self, batch):
        if self.hparams.how == "remat":
            first = nnx.remat(lambda child, x: child(x))(self.first, batch["target"])
        else:
            first = self.first(batch["target"])
        self.log("sum", (first + self.second(batch["target"])).mean() + self.hparams.scale)
        return first.mean()

    def configure_optimizers(self):
        return optax.sgd(0.0)


def test_hparams_in_a_step_are_those_of_the_very_module():
    history = quiet(max_steps=1, log_every_n_steps=1).fit(Family(1.0), targets(1.0))
    assert history["sum"] == [(1, 111.0)]


def test_hparams_reach_a_transform_inside_the_step():
    history = quiet(max_steps=1, log_every_n_steps=1).fit(Family(1.0, "remat"), targets(1.0))
    assert history["sum"] == [(1, 111.0)]


# --- a plain NNX module -----------------------------------------------------------------------------------------------


def outputs(module: Any) -> np.ndarray:
    module.eval()
    return np.asarray(module(jnp.ones((2, 8))))


def test_split_merge_clone_copy_and_pickle_keep_the_module():
    module = Regressor(rngs=nnx.Rngs(0))
    quiet(max_steps=2).fit(module, loader())
    module.freeze("head")
    expected = outputs(module)
    for other in (
        nnx.merge(*nnx.split(module)),
        nnx.clone(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
    ):
        np.testing.assert_array_equal(outputs(other), expected)
        assert nf.partition(other).rows == nf.partition(module).rows
        assert type(other) is Regressor


def test_a_pickled_module_keeps_its_hparams_and_trains():
    module = pickle.loads(pickle.dumps(Regressor(depth=1, learning_rate=0.5, rngs=nnx.Rngs(0))))
    assert module.hparams == {"features": 8, "depth": 1, "learning_rate": 0.5}
    quiet(max_steps=1).fit(module, loader())


def test_nnx_transforms_take_a_fit_module():
    module = Regressor(rngs=nnx.Rngs(0))
    expected = outputs(module)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(module, jnp.ones((2, 8))), expected, rtol=1e-6)
    grads = nnx.grad(lambda m: m(jnp.ones((2, 8))).sum())(module)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(module, nnx.Param))
    abstract = nnx.eval_shape(lambda: Regressor(rngs=nnx.Rngs(0)))
    assert abstract.head.kernel.shape == (8, 1)
    assert nnx.graphdef(abstract) != nnx.graphdef(Scalar())


def test_it_can_be_printed(capsys):
    nnx.display(Scalar())
    assert "Scalar" in capsys.readouterr().out
    assert "Param" in repr(Scalar())


def test_equal_constructions_have_equal_graphdefs_before_and_after_a_fit():
    first, second = Regressor(rngs=nnx.Rngs(0)), Regressor(rngs=nnx.Rngs(1))
    graphdef = nnx.graphdef(first)
    assert graphdef == nnx.graphdef(second)
    assert hash(graphdef) == hash(nnx.graphdef(second))
    quiet(max_steps=1, num_sanity_val_steps=1).fit(first, loader(), loader(16))
    assert nnx.graphdef(first) == graphdef


def test_filters_on_the_instance_leave_the_graphdef_hashable():
    module = Regressor(rngs=nnx.Rngs(0))
    module.trainable = [nnx.Param, nnx.BatchStat]
    module.eval_mutable = [nnx.Cache, "tag"]
    module.eval_modules = ["blocks.0"]
    hash(nnx.graphdef(module))
    module.freeze("head", nnx.PathContains("norm"))
    hash(nnx.graphdef(module))
    assert module.eval_modules == ("blocks.0",)
    module.eval_modules = "blocks.1"
    assert module.eval_modules == ("blocks.1",)


# --- mode -------------------------------------------------------------------------------------------------------------


def test_train_and_eval_set_the_mode_of_everything_below():
    class Nested(nf.FitModule):
        def __init__(self):
            self.inner, self.block = Scalar(), Regressor(rngs=nnx.Rngs(0))

    module = Nested()
    assert module.training and module.inner.training
    module.eval()
    assert not module.training
    assert not module.inner.training
    assert not module.block.training
    assert module.block.blocks[0].dropout.deterministic
    module.train()
    assert module.inner.training
    assert not module.block.blocks[0].norm.use_running_average


def test_eval_modules_stay_in_eval_mode_under_train():
    module = Regressor(rngs=nnx.Rngs(0))
    module.eval_modules = "blocks.0"
    module.train()
    assert module.blocks[0].dropout.deterministic
    assert not module.blocks[1].dropout.deterministic


def test_train_and_eval_take_further_attributes():
    module = Regressor(rngs=nnx.Rngs(0))
    module.eval(learning_rate=0.25)
    assert module.learning_rate == 0.25
    module.train(learning_rate=0.5)
    assert module.learning_rate == 0.5


# --- what can be read, and where --------------------------------------------------------------------------------------


class Reading(Scalar):
    def note(self, where):
        seen[where] = (self.global_step, self.current_epoch, self.training, self.trainer)

    def setup(self, stage):
        self.note("setup")

    def on_train_epoch_start(self):
        self.note("epoch start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.note("batch end")

    def on_train_epoch_end(self):
        self.note("epoch end")

    def on_fit_end(self):
        self.note("fit end")

    def on_validation_end(self):
        self.note("validation end")


seen: dict[str, Any] = {}


def test_counters_mode_and_trainer_are_readable_in_every_hook():
    module = Reading()
    assert (module.global_step, module.current_epoch, module.training) == (0, 0, True)
    trainer = quiet(max_epochs=2)
    trainer.fit(module, targets(0.0, 0.0, 0.0), targets(0.0))
    assert {where: note[:3] for where, note in seen.items()} == {
        "setup": (0, 0, True),
        "epoch start": (3, 1, True),
        "batch end": (6, 1, True),
        "validation end": (6, 1, False),
        "epoch end": (6, 1, True),
        "fit end": (6, 2, True),
    }
    assert all(note[3] is trainer for note in seen.values())
    assert (module.global_step, module.current_epoch, module.trainer) == (6, 2, trainer)


def test_a_module_that_was_never_run_has_no_trainer():
    with pytest.raises(ConfigurationError, match=r"Scalar\.trainer: no Trainer has run this module yet"):
        Scalar().trainer  # noqa: B018


def test_logging_outside_of_a_run_is_an_error():
    with pytest.raises(ConfigurationError, match=r"self\.log\('loss', \.\.\.\) was called outside of a run"):
        Scalar().log("loss", 1.0)


# --- missing hooks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["training_step", "validation_step", "test_step"])
def test_a_missing_step_names_the_class_the_hook_and_the_fix(hook):
    with pytest.raises(ConfigurationError, match=rf"FitModule has no {hook}, .*\n?.*define `def {hook}"):
        getattr(nf.FitModule(), hook)({})


def test_predict_step_calls_the_module():
    class Calling(nf.FitModule):
        def __call__(self, x):
            return x * 2

    np.testing.assert_array_equal(Calling().predict_step(np.ones(2)), [2, 2])


def test_log_dict_logs_each_with_the_same_options():
    class Many(Scalar):
        def training_step(self, batch):
            self.log_dict({"a": 1.0, "b": self.w[...]}, on_step=False, on_epoch=True)
            return super().training_step(batch)

    history = quiet(max_epochs=1).fit(Many(), targets(0.0, 0.0))
    assert history["a"] == [(2, 1.0)]
    np.testing.assert_allclose(history["b"], [(2, 0.95)], rtol=1e-6)
