"""Every mistake that a user can make with data, module or arguments: one clear error, nothing changed, no file left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Scalar, targets

import nnx_fit as nf


def with_members(**members):
    return type("Mine", (Scalar,), members)()


def loss_of(function):
    """A module whose training step returns what the function makes of (self, batch)."""
    return with_members(training_step=function)


def logs(*calls, hook="training_step"):
    def step(self, batch):
        for name, value, options in calls:
            self.log(name, value, **options)
        return 0.5 * jnp.mean((self.w[...] - jax.tree.leaves(batch)[0]) ** 2)

    return with_members(**{hook: step})


class Plain(nnx.Module):
    """A module that is no FitModule."""

    def __init__(self):
        self.w = nnx.Param(jnp.float32(1.0))


class Stepless(nf.FitModule):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(1.0))

    def configure_optimizers(self):
        return optax.sgd(0.1)


DISAGREEING = [{"target": np.ones(2, np.float32), "extra": np.ones((3, 1))}]
EPOCH = {"on_epoch": True}

BAD = {
    "a loss of several numbers": (
        lambda: loss_of(lambda self, batch: (self.w[...] - batch["target"]) ** 2),
        targets(2),
        r"Mine.training_step returned a loss of shape \(2,\).*Fix: .*\.mean\(\)",
    ),
    "a loss of whole numbers": (
        lambda: loss_of(lambda self, batch: jnp.argmax(self.w[...] * batch["target"])),
        targets(2),
        "Mine.training_step returned a loss of dtype int32.*Fix",
    ),
    "a loss that is a constant": (
        lambda: loss_of(lambda self, batch: batch["target"].mean()),
        targets(2),
        "Mine.training_step.*does not depend on any trained parameter.*Fix",
    ),
    "a loss that was cut off": (
        lambda: loss_of(lambda self, batch: jax.lax.stop_gradient(self.w[...]) + 1.0),
        targets(2),
        "Mine.training_step.*does not depend on any trained parameter.*Fix",
    ),
    "a loss that is a plain number": (
        lambda: loss_of(lambda self, batch: 1.0),
        targets(2),
        "Mine.training_step.*does not depend on any trained parameter.*Fix",
    ),
    "a loss that is a string": (
        lambda: loss_of(lambda self, batch: "low"),
        targets(2),
        "Mine.training_step returned a str as loss.*Fix",
    ),
    "a loss that is a tuple": (
        lambda: loss_of(lambda self, batch: (self.w[...], 1)),
        targets(2),
        "Mine.training_step returned a tuple as loss.*Fix",
    ),
    "no loss": (
        lambda: loss_of(lambda self, batch: None),
        targets(2),
        "Mine.training_step returned nothing.*Fix: .*return loss",
    ),
    "a dict without a loss": (
        lambda: loss_of(lambda self, batch: {"los": self.w[...]}),
        targets(2),
        "Mine.training_step.*without \"loss\".*'los'.*Fix",
    ),
    "a step that takes too much": (
        lambda: with_members(training_step=lambda self, batch, batch_idx, state, other: None),
        targets(2),
        "state, other.*no step hook.*batch_idx",
    ),
    "no optimizer": (
        lambda: with_members(configure_optimizers=nf.FitModule.configure_optimizers),
        targets(2),
        "no optimizer: Mine has no configure_optimizers.*Fix: define",
    ),
    "an optimizer that is none": (
        lambda: with_members(configure_optimizers=lambda self: 0.1),
        targets(2),
        "Mine.configure_optimizers gave a float",
    ),
    "nothing to train": (
        lambda: with_members(trainable=nnx.BatchStat),
        targets(2),
        "Nothing to train: `trainable`.*BatchStat.*Mine.*Fix",
    ),
    "a whole number to train": (
        lambda: with_members(setup=lambda self, stage: setattr(self, "count", nnx.Param(jnp.int32(0)))),
        targets(2),
        "`count` is trained but has dtype int32.*Fix: freeze it",
    ),
    "an empty list": (Scalar, [], "train_dataloaders.*yielded no batch.*Fix"),
    "a loader that yields nothing": (Scalar, lambda: iter([]), "training loader yielded no batch.*Fix"),
    "a loader that drops its only batch": (
        Scalar,
        nf.ArrayLoader({"target": np.ones(3, np.float32)}, 4, drop_last=True),
        "train_dataloaders.*yielded no batch.*Fix: .*drop_last",
    ),
    "a generator": (Scalar, (batch for batch in targets(2)), "generator.*only once.*Fix"),
    "arrays and no loader": (Scalar, {"target": np.ones(3)}, "dict is not a loader.*Fix: .*ArrayLoader"),
    "no data": (Scalar, None, "Trainer.fit has no training data.*Fix"),
    "leaves of different length where the size is needed": (
        lambda: logs(("x", 1.0, EPOCH)),
        DISAGREEING,
        r"(?s)batch\['extra'\]: length 3.*batch\['target'\]: length 2.*batch_size=",
    ),
    "scalars where the size is needed": (
        lambda: logs(("x", 1.0, EPOCH)),
        [{"target": np.float32(2)}],
        r"(?s)size of a batch is needed.*batch\['target'\]: a scalar.*batch_size=",
    ),
    "a batch without a number": (Scalar, [{"target": "two"}], "batch needs at least one numeric array.*Fix"),
    "a batch without leaves": (Scalar, [{}], "batch needs at least one numeric array.*Fix"),
    "text where a number is needed": (
        Scalar,
        [{"target": np.array(["two"]), "other": np.ones(1)}],
        r"batch\['target'\] is not numeric.*Fix",
    ),
    "a metric of several numbers": (
        lambda: logs(("x", jnp.ones(3), {})),
        targets(2),
        r"'x'.*shape \(3,\); a metric is one number. Fix",
    ),
    "a metric that is no number": (lambda: logs(("x", "high", {})), targets(2), "'x'.*str.*not a number. Fix"),
    "a metric with two sets of options": (
        lambda: logs(("x", 1.0, {}), ("x", 2.0, {"prog_bar": True})),
        targets(2),
        "'x'.*twice.*prog_bar=False and prog_bar=True.*Fix",
    ),
    "a metric that is recorded nowhere": (
        lambda: logs(("x", 1.0, {"on_step": False})),
        targets(2),
        "'x'.*would record nothing. Fix",
    ),
    "a metric without a name": (lambda: logs(("", 1.0, {})), targets(2), "needs a name"),
    "an unknown reduction": (
        lambda: logs(("x", 1.0, {"reduce": "median"})),
        targets(2),
        "'x', reduce='median'.*'mean', 'sum', 'min', 'max'",
    ),
    "a metric outside of a step": (
        lambda: with_members(on_fit_start=lambda self: self.log("x", 1.0)),
        targets(2),
        "'x'.*in on_fit_start.*Fix",
    ),
    "a module that is none": (Plain, targets(2), "Trainer.fit got a Plain, which is no FitModule.*Fix"),
    "a class": (lambda: Scalar, targets(2), "Trainer.fit got the class Scalar, which is no FitModule.*Fix"),
    "nothing as a module": (lambda: None, targets(2), "got a NoneType, which is no FitModule"),
    "a module without a training step": (Stepless, targets(2), "Stepless has no training_step.*Fix: define"),
}


def values(module):
    if not isinstance(module, nnx.Module):
        return {}
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module))}


def check_refused(caught, module, before, root):
    message = str(caught.value)
    assert len(message) < 900, "one clear error"
    after = values(module)
    for path, value in before.items():
        assert after[path] is value or np.array_equal(after[path], value), path
    assert not isinstance(module, nf.FitModule) or module.training
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == []


def everything_on(root, **options):
    """A Trainer with all that writes files."""
    return nf.Trainer(
        max_epochs=1, default_root_dir=root, enable_progress_bar=False, enable_model_summary=False, **options
    )


@pytest.mark.parametrize("case", BAD)
def test_fitting_refuses(case, tmp_path):
    make, data, message = BAD[case]
    module = make()
    before = values(module)
    trainer = everything_on(tmp_path / "run")
    with pytest.raises(nf.ConfigurationError, match=f"(?s){message}") as caught:
        trainer.fit(module, data)
    check_refused(caught, module, before, tmp_path)


@pytest.mark.parametrize(
    ("callback", "name"),
    [
        (nf.EarlyStopping("val/los"), "EarlyStopping"),
        (nf.ModelCheckpoint(monitor="val/los"), "ModelCheckpoint"),
    ],
)
def test_a_metric_that_is_watched_but_never_logged_lists_those_that_are(callback, name, tmp_path):
    class Validates(Scalar):
        def validation_step(self, batch):
            self.log("val/loss", batch["target"].mean())

    trainer = everything_on(tmp_path / "run", callbacks=callback)
    with pytest.raises(nf.ConfigurationError, match=rf"(?s){name}\(monitor='val/los'\).*Did you mean 'val/loss'.*Fix"):
        trainer.fit(Validates(), targets(1), targets(2))
    assert trainer.global_step <= 1 and not any(tmp_path.rglob("events.*")) and not any(tmp_path.rglob("last*"))


def test_a_metric_that_a_host_hook_logs_later_may_be_watched(tmp_path):
    class LogsLater(Scalar):
        def on_train_epoch_end(self):
            self.log("later", 1.0)

    trainer = everything_on(tmp_path, callbacks=nf.ModelCheckpoint(monitor="later"), logger=False)
    trainer.fit(LogsLater(), targets(1, 2))
    assert trainer.checkpoint_callback is not None and trainer.checkpoint_callback.best_model_score == 1.0


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("validate", "Stepless has no validation_step, which Trainer.validate needs.*Fix"),
        ("test", "Stepless has no test_step, which Trainer.test needs.*Fix"),
    ],
)
def test_evaluating_without_the_step_is_refused(verb, message, tmp_path):
    module = Stepless()
    with pytest.raises(nf.ConfigurationError, match=f"(?s){message}") as caught:
        getattr(everything_on(tmp_path / "run"), verb)(module, targets(1))
    check_refused(caught, module, values(module), tmp_path)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("data", "message"), [(None, "has no data. Fix"), ([], "yielded no batch"), ({"x": np.ones(2)}, "not a loader")]
)
def test_evaluating_without_data_is_refused(verb, data, message, tmp_path):
    module = with_members(test_step=Scalar.validation_step, predict_step=lambda self, batch: batch)
    with pytest.raises(nf.ConfigurationError, match=message) as caught:
        getattr(everything_on(tmp_path / "run"), verb)(module, data)
    check_refused(caught, module, values(module), tmp_path)


def test_validation_data_without_a_validation_step_is_refused(tmp_path):
    module = Scalar()

    class NoValidation(nf.FitModule):
        __init__ = Scalar.__init__
        training_step = Scalar.training_step
        configure_optimizers = Scalar.configure_optimizers

    module = NoValidation()
    with pytest.raises(nf.ConfigurationError, match="NoValidation has no validation_step") as caught:
        everything_on(tmp_path / "run").fit(module, targets(1), targets(2))
    check_refused(caught, module, values(module), tmp_path)


def test_loaders_and_a_data_module_together_are_refused(tmp_path):
    module = Scalar()
    with pytest.raises(nf.ConfigurationError, match="train_dataloaders= and datamodule=") as caught:
        everything_on(tmp_path / "run").fit(module, targets(1), datamodule=nf.DataModule())
    check_refused(caught, module, values(module), tmp_path)


@pytest.mark.parametrize("options", [{"logger": False}, {"enable_checkpointing": False}, {}], ids=str)
def test_a_run_directory_that_cannot_be_written_is_refused_before_training(options, tmp_path):
    (tmp_path / "file").write_text("in the way")
    module = Scalar()
    with pytest.raises(nf.NnxFitError, match=r"(?s)file.*Fix") as caught:
        everything_on(tmp_path / "file" / "run", **options).fit(module, targets(1))
    assert float(module.w[...]) == 1.0 and "Fix" in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_a_mistake_in_validation_shows_before_the_first_training_step(tmp_path):
    module = logs(("x", jnp.ones(3), {}), hook="validation_step")
    with pytest.raises(nf.ConfigurationError, match=r"'x'.*shape \(3,\)"):
        everything_on(tmp_path, logger=False).fit(module, targets(1), targets(2))
    assert float(module.w[...]) == 1.0


def test_a_prediction_that_logs_is_refused(tmp_path):
    module = logs(("x", 1.0, {}), hook="predict_step")
    with pytest.raises(nf.ConfigurationError, match=r"'x'.*predict_step.*Fix: return the value") as caught:
        everything_on(tmp_path / "run").predict(module, targets(1))
    check_refused(caught, module, values(module), tmp_path)


def test_an_uncompiled_step_makes_the_same_mistakes_clear(tmp_path):
    for case in ("a loss of several numbers", "a loss that is a constant", "no loss", "a metric of several numbers"):
        make, data, message = BAD[case]
        with pytest.raises(nf.ConfigurationError, match=f"(?s){message}"):
            everything_on(tmp_path, logger=False, enable_checkpointing=False, jit=False).fit(make(), data)


def test_a_metric_that_a_callback_logs_later_may_be_watched(tmp_path):
    watch = nf.ModelCheckpoint(monitor="throughput/steps_per_second", mode="max")
    trainer = everything_on(tmp_path, callbacks=[nf.ThroughputMonitor(), watch], logger=False, log_every_n_steps=1)
    trainer.fit(Scalar(), targets(1, 2, 3, 4))
    assert watch.best_model_score is not None and watch.best_model_score > 0
