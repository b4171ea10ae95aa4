"""One way out of every verb: whatever is raised where, hooks run, loggers end, and the module is whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.logger import Logger


def eager(**options):
    return quiet(jit=False, **options)


class BoomError(Exception):
    """What the user's own code raises."""


class Log(Logger):
    """Notes every call."""

    def __init__(self):
        self.calls = []

    def log_hyperparams(self, params):
        self.calls.append(("hyperparams", dict(params)))

    def log_text(self, tag, text, step=0):
        self.calls.append(("text", tag))

    def log_metrics(self, metrics, step):
        self.calls.append(("metrics", step))

    def finalize(self, status):
        self.calls.append(("finalize", status))


class Ends(Callback):
    """Notes how a run ends."""

    def __init__(self):
        self.calls = []

    def on_exception(self, trainer, module, exception):
        self.calls.append(("on_exception", exception))

    def teardown(self, trainer, module, stage):
        self.calls.append(("teardown", stage))

    def on_train_end(self, trainer, module):
        self.calls.append("on_train_end")


def raising(*_, **__):
    raise BoomError("mine")


def loader_that_fails_after(count):
    def batches():
        yield from targets(*[2] * count)
        raise BoomError("mine")

    return batches


def step_that_fails_on_small_batches(self, batch):
    if batch["target"].shape[0] == 1:
        raise BoomError("mine")
    return 0.5 * jnp.mean((self.w[...] - batch["target"]) ** 2)


RAGGED = [*targets(2, 2), *targets(2, size=1)]
HOOKS_OF_FIT = {
    "setup": 0,
    "on_fit_start": 0,
    "on_train_start": 0,
    "on_train_epoch_start": 0,
    "on_train_batch_start": 0,
    "on_train_batch_end": 1,
    "on_validation_start": 3,
    "on_validation_epoch_start": 3,
    "on_validation_batch_start": 3,
    "on_validation_batch_end": 3,
    "on_validation_epoch_end": 3,
    "on_validation_end": 3,
    "on_train_epoch_end": 3,
    "on_train_end": 3,
    "on_fit_end": 3,
}


def check_failed_fit(module, train, steps, callbacks=(), jit=False, val=None):
    ends, log = Ends(), Log()
    module.eval()
    trainer = quiet(jit=jit, max_epochs=1, callbacks=[*callbacks, ends], logger=log)
    with pytest.raises(BoomError, match="mine") as caught:
        trainer.fit(module, train, targets(1) if val is None else val)
    assert float(module.w[...]) == pytest.approx(2 - 0.9**steps, rel=1e-6)
    assert module.training is False
    assert trainer.global_step == steps and not trainer.interrupted
    assert [call for call in ends.calls if call != "on_train_end"] == [
        ("on_exception", caught.value),
        ("teardown", "fit"),
    ]
    assert log.calls[-1] == ("finalize", "failed") and [c[0] for c in log.calls].count("finalize") == 1
    assert trainer.stage is None
    # The module can be trained again.
    if type(module) is Scalar:
        before = float(module.w[...])
        eager(max_epochs=1).fit(module, targets(2))
        assert float(module.w[...]) == pytest.approx(2 - 0.9 * (2 - before), rel=1e-6)


@pytest.mark.parametrize(("hook", "steps"), HOOKS_OF_FIT.items())
@pytest.mark.parametrize("owner", ["callback", "module"])
def test_an_error_in_any_hook_of_a_fit(owner, hook, steps):
    if owner == "callback":
        check_failed_fit(Scalar(), targets(2, 2, 2), steps, [type("Fails", (Callback,), {hook: raising})()])
    else:
        check_failed_fit(type("Fails", (Scalar,), {hook: raising})(), targets(2, 2, 2), steps)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    ("members", "train", "steps"),
    [
        ({"training_step": raising}, targets(2), 0),
        ({"training_step": step_that_fails_on_small_batches}, RAGGED, 2),
        ({"validation_step": raising}, targets(2, 2), 2),
        ({"configure_optimizers": raising}, targets(2), 0),
    ],
)
def test_an_error_in_a_step(jit, members, train, steps):
    check_failed_fit(type("Fails", (Scalar,), members)(), train, steps, jit=jit)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_an_error_in_the_training_loader_comes_after_the_batches_before_it(count):
    check_failed_fit(Scalar(), loader_that_fails_after(count), count)


def test_an_error_in_the_validation_loader():
    check_failed_fit(Scalar(), targets(2, 2), 2, val=loader_that_fails_after(1))


def test_an_error_in_a_logger_is_reported_and_ends_nothing(caplog):
    class Fails(Log):
        def log_metrics(self, metrics, step):
            raise BoomError("mine")

    log = Fails()
    module = Scalar()
    eager(max_epochs=1, log_every_n_steps=1, logger=log).fit(module, targets(2, 2))
    assert log.calls[-1] == ("finalize", "success") and float(module.w[...]) == pytest.approx(2 - 0.9**2)
    assert caplog.text.count("Fails failed in log_metrics at step 1: BoomError: mine") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_is_cleaned_up_after_as_well(error):
    def stops(self, *args):
        raise error

    ends, log = Ends(), Log()
    module = Scalar()
    fails = type("Fails", (Callback,), {"on_train_batch_end": stops})()
    with pytest.raises(error):
        eager(max_epochs=1, callbacks=[fails, ends], logger=log).fit(module, targets(2, 2))
    assert [name for name, _ in ends.calls] == ["on_exception", "teardown"]
    assert log.calls[-1] == ("finalize", "failed") and float(module.w[...]) == pytest.approx(1.1)


def test_errors_while_an_error_is_handled_are_notes_on_it_and_stop_nothing():
    class Worse(Callback):
        def on_exception(self, trainer, module, exception):
            raise ValueError("in on_exception")

        def teardown(self, trainer, module, stage):
            raise ValueError("in teardown")

    class Data(nf.DataModule):
        torn_down = False

        def train_dataloader(self):
            return targets(2)

        def teardown(self, stage):
            self.torn_down = True

    fails = type("Fails", (Callback,), {"on_train_batch_end": raising})()
    data, log, module = Data(), Log(), Scalar()
    with pytest.raises(BoomError, match="mine") as caught:
        eager(max_epochs=1, callbacks=[fails, Worse()], logger=log).fit(module, datamodule=data)
    notes = "\n".join(caught.value.__notes__)
    assert "ValueError: in on_exception" in notes and "ValueError: in teardown" in notes
    assert data.torn_down and log.calls[-1] == ("finalize", "failed")
    assert float(module.w[...]) == pytest.approx(1.1)


def test_an_error_in_the_clean_up_of_a_good_run_is_an_error():
    fails = type("Fails", (Callback,), {"teardown": raising})()
    log = Log()
    with pytest.raises(BoomError, match="mine"):
        eager(max_epochs=1, callbacks=fails, logger=log).fit(Scalar(), targets(2))
    assert [call for call, _ in log.calls].count("finalize") == 1


def test_every_logger_is_ended_although_one_cannot():
    class Fails(Log):
        def finalize(self, status):
            raise BoomError("mine")

    log = Log()
    eager(max_epochs=1, logger=[Fails(), log]).fit(Scalar(), targets(2))
    assert log.calls[-1][0] == "finalize"


def test_an_error_on_the_device_is_what_comes_out():
    def fails(x):
        if float(x) > 1.05:
            raise BoomError("on the device")
        return np.float32(0)

    class OnDevice(Scalar):
        def training_step(self, batch):
            extra = jax.pure_callback(fails, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(self.w[...]))
            self.log("extra", extra)
            return super().training_step(batch)

    ends, log = Ends(), Log()
    module = OnDevice()
    with pytest.raises(Exception, match="on the device"):
        quiet(max_epochs=1, callbacks=ends, logger=log).fit(module, targets(*[2] * 10))
    assert ("teardown", "fit") in ends.calls and log.calls[-1] == ("finalize", "failed")
    assert module.training


class Calls(nf.DataModule):
    """A data module that notes what it is asked."""

    def __init__(self):
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {stage}")

    def teardown(self, stage):
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self):
        self.calls.append("train")
        return targets(2, 2)

    def val_dataloader(self):
        self.calls.append("val")
        return targets(3)

    def test_dataloader(self):
        self.calls.append("test")
        return [targets(1), targets(2)]

    def predict_dataloader(self):
        self.calls.append("predict")
        return targets(1)


class Evaluated(Scalar):
    def test_step(self, batch):
        self.log("t", batch["target"].mean())

    def predict_step(self, batch):
        return batch["target"]


@pytest.mark.parametrize(
    ("verb", "loaders"),
    [("fit", ["train", "val"]), ("validate", ["val"]), ("test", ["test"]), ("predict", ["predict"])],
)
@pytest.mark.parametrize("positional", [True, False])
def test_a_data_module_is_prepared_set_up_asked_and_torn_down(verb, loaders, positional):
    data, trainer = Calls(), eager(max_epochs=1)
    if positional:
        result = getattr(trainer, verb)(Evaluated(), data)
    else:
        result = getattr(trainer, verb)(Evaluated(), datamodule=data)
    assert data.calls == ["prepare_data", f"setup {verb}", *loaders, f"teardown {verb}"]
    assert trainer.datamodule is data and len(result) == {"test": 2}.get(verb, len(result))


def test_a_data_module_is_torn_down_after_an_error_in_it():
    class Fails(Calls):
        def setup(self, stage):
            raise BoomError("mine")

    data, ends = Fails(), Ends()
    with pytest.raises(BoomError):
        eager(max_epochs=1, callbacks=ends).fit(Scalar(), datamodule=data)
    assert data.calls == ["prepare_data", "teardown fit"] and ends.calls[-1] == ("teardown", "fit")


def test_any_object_with_the_methods_and_the_module_itself_may_give_the_loaders():
    class Duck:
        def train_dataloader(self):
            return targets(2)

    class Own(Scalar):
        def train_dataloader(self):
            return targets(3, 3)

        def val_dataloader(self):
            return targets(5)

    trainer = eager(max_epochs=1)
    trainer.fit(Scalar(), datamodule=Duck())
    assert trainer.global_step == 1
    history = trainer.fit(Own())
    assert trainer.global_step == 2 and history["val/target"] == [(2, 5.0)]
    assert trainer.validate(Own()) == [{"val/target": 5.0}]


def test_layers_made_in_setup_are_trained():
    from flax import nnx

    class Late(nf.FitModule):
        def setup(self, stage):
            if not hasattr(self, "w"):
                self.w = nnx.Param(jnp.float32(1.0))

        training_step = Scalar.training_step

        def configure_optimizers(self):
            return optax.sgd(0.1)

    module = Late()
    eager(max_epochs=1).fit(module, targets(2))
    assert float(module.w[...]) == pytest.approx(1.1)


def test_loggers_get_settings_then_metrics_then_the_end():
    log = Log()
    eager(max_epochs=1, log_every_n_steps=1, logger=log).fit(Scalar(start=1.5), targets(2, 2))
    assert log.calls == [
        ("hyperparams", {"start": 1.5, "learning_rate": 0.1}),
        ("text", "partition"),
        ("text", "config"),
        ("text", "environment"),
        ("metrics", 1),
        ("metrics", 2),
        ("finalize", "success"),
    ]


def sgd(learning_rate):
    return optax.sgd(learning_rate)


def configured(optimizer):
    """A module class whose `configure_optimizers` returns this."""
    return type("Configured", (Scalar,), {"configure_optimizers": lambda self: optimizer})


class NoOptimizer(Scalar):
    configure_optimizers = nf.FitModule.configure_optimizers


@pytest.mark.parametrize(
    "setting",
    [
        optax.sgd(0.1),
        lambda steps: optax.sgd(0.1 if steps == 6 else 9.0),
        nf.OptimizerSpec(sgd, schedule=0.1),
        lambda steps: nf.OptimizerSpec(sgd, schedule=optax.constant_schedule(0.1)),
        [optax.sgd(0.1)],
        {"only": nf.OptimizerSpec(optax.sgd(0.1))},
    ],
)
def test_the_trainers_optimizer_in_every_form_trains_a_module_without_one(setting):
    module = NoOptimizer()
    eager(max_epochs=2, optimizer=setting).fit(module, targets(2, 2, 2))
    assert float(module.w[...]) == pytest.approx(2 - 0.9**6, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "data", "steps"),
    [
        ({"max_epochs": 3}, targets(1, 2), 6),
        ({"max_epochs": 3, "max_steps": 4}, targets(1, 2), 4),
        ({"max_epochs": 3, "limit_train_batches": 1}, targets(1, 2), 3),
        ({"max_steps": 4}, lambda: iter(targets(1)), 4),
        ({"max_epochs": 1}, lambda: iter(targets(1)), float("inf")),
        ({"max_epochs": -1, "limit_train_batches": 0}, targets(1), 0),
        ({"max_epochs": 0}, lambda: iter(targets(1)), 0),
    ],
)
def test_the_number_of_steps_is_estimated_for_schedules(options, data, steps):
    given = []

    def make(estimated_steps):
        given.append(estimated_steps)
        return optax.sgd(0.1)

    trainer = eager(optimizer=make, **options)
    trainer.fit(NoOptimizer(), data)
    assert given == [steps] == [trainer.estimated_steps]


@pytest.mark.parametrize(
    ("module", "setting", "message"),
    [
        (NoOptimizer, None, "NoOptimizer has no configure_optimizers.*optimizer="),
        (Scalar, optax.sgd(0.1), "Scalar.configure_optimizers and Trainer.optimizer=.*both"),
        (NoOptimizer, lambda steps: None, "Trainer.optimizer=.* returned None"),
        (NoOptimizer, lambda steps: 0.1, "Trainer.optimizer=.* gave a float"),
        (NoOptimizer, lambda steps: [optax.sgd(0.1)] * 2, "optimizers .0. and .1. would both train w"),
        (
            type("N", (Scalar,), {"configure_optimizers": lambda self: None}),
            None,
            "N.configure_optimizers returned None",
        ),
        (configured("sgd"), None, "Configured.configure_optimizers gave a str"),
    ],
)
def test_without_one_optimizer_for_each_parameter_nothing_starts(module, setting, message):
    module = module()
    with pytest.raises(ConfigurationError, match=message):
        eager(max_epochs=1, optimizer=setting).fit(module, targets(2))
    assert float(module.w[...]) == 1.0
