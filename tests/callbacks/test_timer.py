"""Timer: what it measures and when it stops training, by a clock that moves as the test says."""

import datetime

import nets
import pytest

import nnx_fit as nf
from nnx_fit.callbacks.timer import Timer


class Clock:
    """Stands still until it is moved."""

    def __init__(self, now=100.0):
        self.now = now

    def __call__(self):
        return self.now


class Takes(nf.Callback):
    """Makes each hook that is named take some seconds."""

    reads_module = False

    def __init__(self, clock, **spans):
        self.clock = clock
        for hook, span in spans.items():
            setattr(self, hook, self.move(span))

    def move(self, span):
        def hook(*_):
            self.clock.now += span

        return hook


STEP_TAKES_10 = {"on_train_batch_start": 10.0}


def timed_fit(duration=None, *, spans=STEP_TAKES_10, steps=4, timer=None, **options):
    """Four steps an epoch unless told otherwise; returns the timer, the Trainer and the module."""
    clock = timer._clock if timer else Clock()
    timer = timer or Timer(duration, **options.pop("timer_options", {}), clock=clock)
    ckpt_path = options.pop("ckpt_path", None)
    val = options.pop("val", None)
    trainer = nets.quiet(**{"max_epochs": 3, "jit": False, **options}, callbacks=[Takes(clock, **spans), timer])
    module = nets.Scalar()
    trainer.fit(module, nets.targets(*[0.5] * steps), val, ckpt_path=ckpt_path)
    return timer, trainer, module


@pytest.mark.parametrize(
    ("interval", "steps", "epochs", "elapsed"),
    # Steps end at 10, 20, ... 60 seconds: the sixth is the first after 55. The second epoch ends at 80.
    [("step", 6, 1, 60.0), ("epoch", 8, 2, 80.0)],
)
@pytest.mark.parametrize("spans", [{"on_train_batch_start": 10.0}, {"on_train_batch_end": 10.0}])
def test_training_stops_after_the_step_or_epoch_that_ends_the_duration(capsys, interval, steps, epochs, elapsed, spans):
    timer, trainer, _ = timed_fit("00:00:00:55", timer_options={"interval": interval}, spans=spans)
    assert (trainer.global_step, trainer.current_epoch) == (steps, epochs)
    assert timer.time_elapsed() == elapsed and timer.time_remaining() == 55 - elapsed
    reason = f"0:01:{elapsed - 60:02.0f} of training reached the duration of 0:00:55"
    assert trainer.stop_reason == f"Timer: {reason}"
    assert capsys.readouterr().out == f"Timer: training stops, {reason}.\n"


def test_duration_that_is_reached_exactly_is_over():
    assert timed_fit({"seconds": 20}, timer_options={"verbose": False})[1].global_step == 2


def test_quiet_timer_says_nothing(capsys):
    trainer = timed_fit({"seconds": 20}, timer_options={"verbose": False})[1]
    assert trainer.stop_reason is not None and capsys.readouterr().out == ""


def test_without_a_duration_it_only_measures():
    timer, trainer, _ = timed_fit()
    assert (trainer.global_step, trainer.stop_reason) == (12, None)
    assert (timer.time_elapsed(), timer.time_remaining()) == (120.0, None)


@pytest.mark.parametrize("options", [{"min_steps": 7}, {"min_epochs": 2}])
def test_minimum_of_the_trainer_outranks_the_duration(capsys, options):
    trainer = timed_fit({"seconds": 20}, **options)[1]
    assert trainer.global_step == {"min_steps": 7, "min_epochs": 8}[next(iter(options))]
    assert capsys.readouterr().out.count("training stops") == 1


def test_window_of_accumulation_that_is_under_way_ends_in_an_update():
    trainer = timed_fit({"seconds": 30}, accumulate_grad_batches=2)[1]
    assert trainer.global_step == 2  # the third batch ends at 30 seconds, in mid-window


def test_reason_of_whoever_stopped_first_is_kept():
    class Stops(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop, trainer.stop_reason = True, "enough"

    clock = Clock()
    trainer = nets.quiet(
        max_epochs=1, jit=False, callbacks=[Takes(clock, **STEP_TAKES_10), Stops(), Timer({"seconds": 5}, clock=clock)]
    )
    trainer.fit(nets.Scalar(), nets.targets(0.5, 0.5))
    assert trainer.stop_reason == "enough"


def test_each_stage_has_the_time_of_its_latest_loop():
    class Everything(nets.Scalar):
        def test_step(self, batch):
            self.log("test/target", batch["target"].mean())

        def predict_step(self, batch):
            return batch["target"]

    clock = Clock()
    spans = {"on_validation_batch_end": 3.0, "on_test_batch_end": 4.0, "on_predict_batch_end": 5.0}
    timer = Timer(clock=clock)
    trainer = nets.quiet(
        max_epochs=2, jit=False, num_sanity_val_steps=2, callbacks=[Takes(clock, **STEP_TAKES_10, **spans), timer]
    )
    batches = nets.targets(0.5, 0.5)
    trainer.fit(Everything(), batches, batches)
    # The sanity check took 6 seconds before training began: its start is at 106, its end 2 * (20 + 6) later.
    assert (timer.start_time(), timer.end_time(), timer.time_elapsed()) == (106.0, 158.0, 52.0)
    assert (timer.start_time("validate"), timer.end_time("validate")) == (152.0, 158.0)
    trainer.test(trainer.module, batches)
    trainer.predict(trainer.module, [*batches, *batches])
    trainer.validate(trainer.module, batches[:1])
    clock.now += 1000
    elapsed = {stage: timer.time_elapsed(stage) for stage in ("train", "validate", "test", "predict")}
    assert elapsed == {"train": 52.0, "validate": 3.0, "test": 8.0, "predict": 20.0}


def test_time_runs_on_while_a_stage_is_under_way():
    clock = Clock()
    timer, seen = Timer(clock=clock), []

    class Asks(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((timer.time_elapsed(), timer.end_time(), timer.start_time("validate")))

    callbacks = [Takes(clock, **STEP_TAKES_10), timer, Asks()]
    batches = nets.targets(0.5, 0.5)
    nets.quiet(max_epochs=1, jit=False, num_sanity_val_steps=1, callbacks=callbacks).fit(
        nets.Scalar(), batches, batches
    )
    # The sanity check is no validation.
    assert seen == [(10.0, None, None), (20.0, None, None)]


@pytest.mark.parametrize("in_mid_epoch", [True, False])
def test_elapsed_time_goes_on_after_a_resume(tmp_path, in_mid_epoch):
    first = timed_fit({"seconds": 60}, max_epochs=-1, max_steps=3 if in_mid_epoch else 4)
    assert first[0].time_elapsed() == (30.0 if in_mid_epoch else 40.0)
    first[1].save_checkpoint(tmp_path / "cut")
    timer, trainer, _ = timed_fit({"seconds": 60}, ckpt_path=tmp_path / "cut")
    assert (trainer.global_step, timer.time_elapsed()) == (6, 60.0)


def test_run_whose_time_was_over_makes_no_step_when_resumed(tmp_path):
    trainer = timed_fit({"seconds": 30})[1]
    trainer.save_checkpoint(tmp_path / "over")
    again = timed_fit({"seconds": 30}, ckpt_path=tmp_path / "over")[1]
    assert again.global_step == trainer.global_step == 3
    assert again.stop_reason == "Timer: 0:00:30 of training reached the duration of 0:00:30"
    longer = timed_fit({"seconds": 50}, ckpt_path=tmp_path / "over")[1]
    assert longer.global_step == 5


def test_another_fit_starts_over(tmp_path):
    timed_fit(max_epochs=1)[1].save_checkpoint(tmp_path / "cut")
    timer, trainer, _ = timed_fit({"seconds": 60}, ckpt_path=tmp_path / "cut")
    assert (trainer.global_step, timer.time_elapsed()) == (6, 60.0)
    again = timed_fit(timer=timer)[1]
    assert (again.global_step, timer.time_elapsed()) == (6, 60.0)


def test_time_of_a_run_that_failed_stands_still():
    class Fails(nets.Scalar):
        def on_train_epoch_end(self):
            raise RuntimeError("no")

    clock = Clock()
    timer = Timer(clock=clock)
    trainer = nets.quiet(max_epochs=1, jit=False, callbacks=[Takes(clock, **STEP_TAKES_10), timer])
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(Fails(), nets.targets(0.5, 0.5))
    clock.now += 1000
    assert (timer.time_elapsed(), timer.end_time(), timer.end_time("test")) == (20.0, 120.0, None)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (None, None),
        ("01:02:03:04", 93784.0),
        (datetime.timedelta(minutes=1, seconds=0.5), 60.5),
        ({"hours": 1, "minutes": 1}, 3660.0),
        (datetime.timedelta(0), 0.0),
    ],
)
def test_forms_of_a_duration(duration, expected):
    assert Timer(duration).duration == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"duration": "12:00"}, r"Timer\(duration='12:00'\)(.|\n)*Fix: write"),
        ({"duration": 60}, r"Timer\(duration=60\)"),
        ({"duration": {"hour": 1}}, r"Timer\(duration={'hour': 1}\)"),
        ({"duration": datetime.timedelta(seconds=-1)}, "expected a time span"),
        ({"duration": {"days": 10**10}}, "expected a time span"),
        ({"interval": "batch"}, r"Timer\(interval='batch'\)(.|\n)*Fix: pass"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        Timer(**arguments)


def test_unknown_stage_is_named():
    with pytest.raises(nf.ConfigurationError, match=r"stage 'fit'(.|\n)*'validate'"):
        Timer().time_elapsed("fit")
