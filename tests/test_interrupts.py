"""SIGINT and SIGTERM, really sent: the step is finished, hooks run, and the module is whole."""

import os
import signal
import threading

import numpy as np
import pytest
from flax import nnx
from nets import Scalar, loader, quiet, targets

import nnx_fit as nf
from nnx_fit.callbacks.callback import Callback
from nnx_fit.interrupts import end_with, ends_at_once, watched
from nnx_fit.loggers.logger import Logger
from nnx_fit.loops.progress import Control

SIGNALS = [signal.SIGINT, signal.SIGTERM]
HOOKS = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
ENDS = {signal.SIGINT: (KeyboardInterrupt, None), signal.SIGTERM: (SystemExit, 143)}


def eager(**options):
    return quiet(jit=False, **options)


def send(number):
    os.kill(os.getpid(), number)


class Sends(Callback):
    """Sends a signal in one hook, at its n-th call."""

    def __init__(self, hook, *numbers, call=1):
        self.calls = 0

        def sending(*args):
            self.calls += 1
            if self.calls == call:
                for number in numbers:
                    send(number)

        setattr(self, hook, sending)


class Log(Callback):
    """Notes every hook."""

    phase = "save"

    def __init__(self):
        self.hooks = []
        self.exceptions = []
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, module, *args, hook=hook: self.hooks.append(hook))
        self.on_exception = lambda trainer, module, error: (
            self.hooks.append("on_exception"),
            self.exceptions.append((type(error), trainer.interrupted)),
        )

    def after(self, hook):
        return self.hooks[len(self.hooks) - self.hooks[::-1].index(hook) :]


class Recorder(Logger):
    def __init__(self):
        self.ended = []

    def finalize(self, status):
        self.ended.append(status)


def ended(number):
    return pytest.raises(ENDS[number][0])


def check_end(number, caught):
    if number == signal.SIGTERM:
        assert caught.value.code == 143


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


END = ["on_exception", "on_train_end", "on_fit_end", "teardown"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("hook", "call", "step", "after"),
    [
        ("on_train_batch_start", 2, 2, ["on_train_batch_start", "on_train_batch_end"]),
        ("on_train_batch_end", 2, 2, ["on_train_batch_end"]),
        ("on_train_epoch_end", 1, 3, ["on_train_epoch_end"]),
        ("on_validation_batch_start", 1, 3, ["on_validation_batch_start", "on_validation_batch_end"]),
        ("on_train_start", 1, 1, None),
        ("setup", 1, 1, None),
    ],
)
def test_the_step_is_finished_and_the_end_hooks_run(number, hook, call, step, after):
    log, recorder = Log(), Recorder()
    trainer = eager(max_epochs=3, callbacks=[Sends(hook, number, call=call), log], logger=recorder)
    module = Scalar()
    module.eval()
    with ended(number) as caught:
        trainer.fit(module, targets(2, 2, 2), targets(1, 2))
    check_end(number, caught)
    assert trainer.interrupted and recorder.ended == ["interrupted"]
    assert trainer.global_step == step
    assert float(module.w[...]) == pytest.approx(2 - 0.9**step, rel=1e-6)
    assert not module.training
    assert log.hooks[-4:] == END
    assert log.exceptions == [(ENDS[number][0], True)]
    if after:
        assert log.after(hook) == [*after[1:], *END] and after[0] == hook


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_a_signal_after_the_last_step_still_ends_the_program_once_all_is_done(number, hook):
    log, recorder = Log(), Recorder()
    trainer = eager(max_epochs=1, callbacks=[Sends(hook, number), log], logger=recorder)
    module = Scalar()
    with ended(number) as caught:
        trainer.fit(module, targets(2, 2))
    check_end(number, caught)
    assert trainer.interrupted and len(recorder.ended) == 1
    assert log.hooks[-3:] == ["on_train_end", "on_fit_end", "teardown"]
    assert log.hooks.count("on_train_end") == log.hooks.count("teardown") == 1
    assert float(module.w[...]) == pytest.approx(2 - 0.9**2, rel=1e-6)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluations_end_after_their_step_as_well(number, verb):
    class Evaluated(Scalar):
        def test_step(self, batch):
            pass

        def predict_step(self, batch):
            return batch["target"]

    stage = {"validate": "validation"}.get(verb, verb)
    log = Log()
    module = Evaluated()
    with ended(number) as caught:
        getattr(eager(callbacks=[Sends(f"on_{stage}_batch_start", number), log]), verb)(module, targets(1, 2, 3))
    check_end(number, caught)
    assert log.after(f"on_{stage}_batch_start") == [f"on_{stage}_batch_end", "on_exception", "teardown"]
    assert module.training and float(module.w[...]) == 1.0


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_logged_before_the_signal_is_recorded(number):
    trainer = quiet(max_epochs=1, log_every_n_steps=1, callbacks=Sends("on_train_batch_end", number, call=2))
    with ended(number):
        trainer.fit(Scalar(), targets(1, 2, 3))
    assert [step for step, _ in trainer.history["loss"]] == [1, 2]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_run_continues_bit_for_bit(number, tmp_path):
    path = tmp_path / "cut"

    class Saves(Callback):
        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(path)

    def fit(ckpt_path=None, callbacks=()):
        module = Scalar(start=0.0)
        trainer = quiet(max_epochs=2, log_every_n_steps=1, callbacks=list(callbacks))
        data = nf.ArrayLoader({"target": np.arange(12, dtype=np.float32)}, 4, shuffle=True)
        trainer.fit(module, data, targets(1), ckpt_path=ckpt_path)
        return float(module.w[...]), dict(trainer.history)

    expected = fit()
    with ended(number):
        fit(callbacks=[Sends("on_train_batch_start", number, call=5), Saves()])
    assert fit(path) == expected


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_at_once(first, second):
    log, recorder = Log(), Recorder()
    trainer = eager(max_epochs=1, callbacks=[Sends("on_train_batch_start", first, second), log], logger=recorder)
    module = Scalar()
    with ended(second) as caught:
        trainer.fit(module, targets(2, 2))
    check_end(second, caught)
    assert "on_train_batch_start" not in log.hooks and not {"on_exception", "teardown"} & set(log.hooks)
    assert recorder.ended == ["failed"]
    assert float(module.w[...]) == 1.0 and module.training


def test_a_second_signal_while_the_end_hooks_run_ends_at_once():
    log = Log()
    senders = [Sends("on_train_batch_end", signal.SIGTERM), Sends("on_train_end", signal.SIGINT)]
    module = Scalar()
    with ended(signal.SIGINT):
        eager(max_epochs=1, callbacks=[*senders, log]).fit(module, targets(2, 2))
    assert log.after("on_train_batch_end") == ["on_exception"]
    assert float(module.w[...]) == pytest.approx(2 - 0.9, rel=1e-6)


def test_an_ordinary_error_after_a_signal_is_reported_and_cleaned_up():
    class Raises(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            raise RuntimeError("after the signal")

    log = Log()
    with pytest.raises(RuntimeError, match="after the signal"):
        eager(max_epochs=1, callbacks=[Sends("on_train_batch_start", signal.SIGINT), Raises(), log]).fit(
            Scalar(), targets(1, 2)
        )
    assert log.hooks[-2:] == ["on_exception", "teardown"]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_handler_that_was_there_is_called_and_comes_back(number):
    received = []

    def mine(number, frame):
        received.append(number)

    before = signal.signal(number, mine)
    try:
        with ended(number):
            eager(max_epochs=1, callbacks=Sends("on_train_batch_end", number)).fit(Scalar(), targets(1, 2))
        assert received == [number] and signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("how", ["success", "error"])
def test_handlers_come_back_after_every_run(how):
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            inside.append([signal.getsignal(number) for number in SIGNALS])
            if how == "error":
                raise RuntimeError

    try:
        eager(max_epochs=1, callbacks=Looks()).fit(Scalar(), targets(1))
    except RuntimeError:
        assert how == "error"
    assert inside[0] != before and [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_of_the_main_thread_nothing_is_installed():
    before = [signal.getsignal(number) for number in SIGNALS]
    inside, errors = [], []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            inside.append([signal.getsignal(number) for number in SIGNALS])

    module = Scalar()

    def fit():
        try:
            eager(max_epochs=1, callbacks=Looks()).fit(module, targets(2, 2))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert errors == [] and inside == [before] * 2
    assert float(module.w[...]) == pytest.approx(2 - 0.9**2, rel=1e-6)


def test_the_next_fit_is_not_interrupted():
    trainer = eager(max_epochs=1, callbacks=Sends("on_train_batch_end", signal.SIGINT))
    module = Scalar()
    with ended(signal.SIGINT):
        trainer.fit(module, targets(1, 2))
    trainer.fit(module, targets(1, 2))
    assert trainer.global_step == 2 and not trainer.interrupted


def test_the_watch_notes_the_first_signal_and_raises_at_the_second():
    control = Control()
    with watched(control):
        send(signal.SIGTERM)
        assert control.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_signal_ends_the_program_the_way_it_is_expected_to():
    with pytest.raises(KeyboardInterrupt):
        end_with(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        end_with(signal.SIGTERM)
    assert caught.value.code == 143


def test_all_state_of_a_real_net_is_there_after_a_signal():
    from nets import Regressor

    module = Regressor(depth=1, rngs=nnx.Rngs(0))
    with ended(signal.SIGINT):
        quiet(max_epochs=1, callbacks=Sends("on_train_batch_start", signal.SIGINT, call=2)).fit(module, loader(64, 16))
    reference = Regressor(depth=1, rngs=nnx.Rngs(0))
    quiet(max_steps=2).fit(reference, loader(64, 16))
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngKey))),
        nnx.to_flat_state(nnx.state(reference, nnx.Not(nnx.RngKey))),
        strict=True,
    ):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))


def test_a_second_signal_is_told_apart_from_the_first():
    def ended(*numbers):
        with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
            eager(max_steps=20, callbacks=Sends("on_train_batch_end", *numbers)).fit(Scalar(), targets(0.0))
        return ends_at_once(caught.value)

    assert [ended(signal.SIGINT), ended(signal.SIGINT, signal.SIGINT)] == [False, True]
    assert [ended(signal.SIGTERM), ended(signal.SIGINT, signal.SIGTERM)] == [False, True]
    assert not ends_at_once(KeyboardInterrupt())
