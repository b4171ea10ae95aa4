"""LambdaCallback: its functions are called where a subclass's hooks are, with the same arguments."""

import inspect

import nets
import numpy as np
import pytest

import nnx_fit as nf
from nnx_fit.callbacks.lambda_callback import HOOKS, LambdaCallback

ARGUMENTS = {name: list(inspect.signature(getattr(nf.Callback, name)).parameters)[3:] for name in HOOKS}


def noted(events, hook):
    return lambda trainer, module, *rest: events.append((hook, type(trainer), type(module), len(rest)))


class Everything(nets.Scalar):
    def test_step(self, batch):
        self.log("test/target", batch["target"].mean())

    def predict_step(self, batch):
        return batch["target"]


def run_everything(callback, tmp_path):
    """Calls every hook there is, `on_exception` included."""
    trainer = nets.quiet(max_epochs=1, jit=False, num_sanity_val_steps=1, callbacks=callback)
    batches = nets.targets(1.0, 2.0)
    trainer.fit(Everything(), batches, batches)
    trainer.save_checkpoint(tmp_path / "saved")
    trainer.fit(Everything(), batches, ckpt_path=tmp_path / "saved")
    trainer.test(trainer.module, batches)
    trainer.predict(trainer.module, batches)
    with pytest.raises(nf.ConfigurationError):
        trainer.validate(trainer.module, [])


def test_every_hook_is_called_as_a_subclasss(tmp_path):
    events, expected = [], []
    body = {hook: staticmethod(noted(expected, hook)) for hook in HOOKS}
    run_everything(type("Subclass", (nf.Callback,), body)(), tmp_path)
    run_everything(LambdaCallback(**{hook: noted(events, hook) for hook in HOOKS}), tmp_path)
    assert events == expected
    assert {hook for hook, *_ in events} == set(HOOKS)
    assert all(count == len(ARGUMENTS[hook]) for hook, _, _, count in events)


def test_hooks_are_those_of_the_host():
    assert {"setup", "teardown", "on_exception", "on_save_checkpoint", "on_train_batch_end"} <= set(HOOKS)
    assert not {"state_dict", "load_state_dict", "step_metrics"} & set(HOOKS)
    assert {name for name in vars(nf.Callback) if name.startswith("on_")} <= set(HOOKS)


def test_function_reads_and_writes_the_live_module():
    seen = []

    def add_one(trainer, module, outputs, batch, batch_idx):
        seen.append((float(outputs["loss"]), batch["target"].tolist()))
        module.w[...] = module.w[...] + 1

    trainer = nets.quiet(max_epochs=1, callbacks=LambdaCallback(on_train_batch_end=add_one))
    module = nets.Scalar(start=1.0, learning_rate=0.5)
    trainer.fit(module, nets.targets(0.0, 0.0))
    # 1 -> 0.5 -> 1.5 -> 0.75 -> 1.75: each step halves the weight, each hook adds one.
    assert seen == [(0.5, [0.0, 0.0]), (1.125, [0.0, 0.0])]
    np.testing.assert_allclose(module.w[...], 1.75)


def test_function_may_log():
    callback = LambdaCallback(on_train_epoch_end=lambda trainer, module: module.log("epoch", trainer.current_epoch))
    history = nets.quiet(max_epochs=2, jit=False, callbacks=callback).fit(nets.Scalar(), nets.targets(0.5))
    assert history["epoch"] == [(1, 0.0), (2, 1.0)]


def test_none_leaves_a_hook_out():
    callback = LambdaCallback(on_fit_start=None)
    assert vars(callback) == {}
    nets.quiet(max_epochs=1, jit=False, callbacks=callback).fit(nets.Scalar(), nets.targets(0.5))


@pytest.mark.parametrize(
    ("name", "near"),
    [("on_train_batch_ends", "on_train_batch_end"), ("on_val_end", "on_validation_end"), ("set_up", "setup")],
)
def test_unknown_hook_names_the_nearest(name, near):
    with pytest.raises(nf.ConfigurationError) as error:
        LambdaCallback(**{name: print})
    hint = f"LambdaCallback({name}=...): there is no hook of that name. Did you mean {near!r}?\nFix: use one of setup, "
    assert str(error.value).startswith(hint)


@pytest.mark.parametrize("name", ["step_metrics", "state_dict", "", "_private"])
def test_what_is_no_hook_of_the_host_is_refused(name):
    with pytest.raises(nf.ConfigurationError, match="there is no hook of that name"):
        LambdaCallback(**{name: print})


@pytest.mark.parametrize(
    ("hook", "function", "message"),
    [
        ("on_fit_start", 3, r"on_fit_start=3\): that is no function(.|\n)*a function of \(trainer, module\)"),
        ("on_fit_start", lambda trainer: None, r"arguments \(trainer\)(.|\n)*too many(.|\n)*\(trainer, module\)"),
        ("on_train_batch_start", lambda trainer, module: None, r"of \(trainer, module, batch, batch_idx\)"),
        ("on_fit_end", lambda trainer, module, more: None, "missing a required argument: 'more'"),
    ],
)
def test_wrong_functions_are_named(hook, function, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        LambdaCallback(**{hook: function})


def test_any_callable_will_do():
    LambdaCallback(on_fit_start=print, on_fit_end=max, on_test_batch_end=lambda *args: None)
