"""The Trainer's plain arguments: what is refused, with which fix, and what follows from what."""

import dataclasses
import datetime
import logging
import math

import numpy as np
import pytest

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError
from nnx_fit.options import NOT_YET, Options, batches_within, make_options, seconds

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def options(**given):
    return make_options(**{**DEFAULTS, "fast_dev_run": False, "max_epochs": 1, **given})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", -2),
        ("max_epochs", 1.5),
        ("max_epochs", "3"),
        ("max_epochs", True),
        ("max_steps", -2),
        ("max_steps", None),
        ("max_steps", 1e3),
        ("min_epochs", -1),
        ("min_steps", -1),
        ("min_steps", 2.0),
        ("max_time", "12:00"),
        ("max_time", "00:00:00"),
        ("max_time", 60),
        ("max_time", {"hour": 1}),
        ("limit_train_batches", -1),
        ("limit_train_batches", 1.5),
        ("limit_train_batches", -0.1),
        ("limit_train_batches", math.nan),
        ("limit_train_batches", True),
        ("limit_train_batches", None),
        ("limit_val_batches", "all"),
        ("limit_test_batches", 2.0),
        ("limit_predict_batches", math.inf),
        ("overfit_batches", -1),
        ("overfit_batches", 1.1),
        ("overfit_batches", math.nan),
        ("fast_dev_run", -1),
        ("fast_dev_run", 0.5),
        ("fast_dev_run", None),
        ("num_sanity_val_steps", -2),
        ("num_sanity_val_steps", 0.5),
        ("log_every_n_steps", -1),
        ("log_every_n_steps", 0.5),
        ("check_val_every_n_epoch", 0),
        ("check_val_every_n_epoch", 0.5),
        ("val_check_interval", 0),
        ("val_check_interval", -3),
        ("val_check_interval", 0.0),
        ("val_check_interval", 1.5),
        ("val_check_interval", math.nan),
        ("val_check_interval", True),
        ("val_check_interval", None),
        ("enable_checkpointing", None),
        ("enable_progress_bar", 1),
        ("enable_model_summary", "yes"),
        ("detect_nonfinite", 0),
        ("barebones", "no"),
        ("jit", None),
        ("deterministic", "warn"),
        ("deterministic", 1),
        ("profiler", "simpel"),
        ("profiler", 3),
        ("reload_dataloaders_every_n_epochs", -1),
        ("reload_dataloaders_every_n_epochs", True),
        ("default_root_dir", 3),
        ("default_root_dir", ""),
    ],
)
def test_a_bad_value_names_the_argument_the_value_and_the_fix(name, value):
    with pytest.raises(ConfigurationError) as caught:
        nf.Trainer(**{"max_epochs": 1, name: value})
    message = str(caught.value)
    assert f"Trainer({name}={value!r})" in message and "Fix:" in message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_epochs": 3, "max_epochs": 2}, "min_epochs=3, max_epochs=2"),
        ({"min_steps": 3, "max_steps": 2}, "min_steps=3, max_steps=2"),
        ({"fast_dev_run": 2, "overfit_batches": 3}, "fast_dev_run=2, overfit_batches=3"),
        ({"check_val_every_n_epoch": None}, "check_val_every_n_epoch=None, val_check_interval=1.0"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "val_check_interval=0.5"),
        ({"enable_checkpointing": False, "callbacks": nf.ModelCheckpoint()}, "enable_checkpointing=False.*Checkpoint"),
        ({"barebones": True, "callbacks": nf.ModelCheckpoint()}, "barebones=True.*ModelCheckpoint"),
        ({"barebones": True, "callbacks": nf.RichProgressBar()}, "barebones=True.*RichProgressBar"),
        ({"barebones": True, "logger": nf.CSVLogger("logs")}, "barebones=True, logger=CSVLogger"),
        ({"barebones": True, "logger": [nf.CSVLogger("logs")]}, "barebones=True, logger=list"),
        ({"barebones": True, "profiler": "simple"}, "barebones=True, profiler='simple'"),
        ({"barebones": True, "profiler": nf.ProfilerCallback()}, "barebones=True, profiler=ProfilerCallback"),
        ({"barebones": True, "fast_dev_run": 2}, "barebones=True, fast_dev_run=2"),
        ({"barebones": True, "detect_nonfinite": True}, "barebones=True, detect_nonfinite=True"),
        ({"logger": 3}, "logger=.*int"),
        ({"logger": ["csv"]}, "logger=.*str"),
        ({"callbacks": [3]}, "callbacks=.*int"),
        ({"callbacks": nf.EarlyStopping}, "callbacks=.*class"),
        ({"optimizer": 0.1}, "optimizer=.*float"),
    ],
)
def test_arguments_that_contradict_each_other_are_both_named(given, message):
    with pytest.raises((ConfigurationError, TypeError), match=message.replace("(", r"\(")) as caught:
        nf.Trainer(**{"max_epochs": 1, **given})
    assert isinstance(caught.value, ConfigurationError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps_per_call", 4),
        ("strategy", "fsdp"),
        ("devices", 2),
    ],
)
def test_what_later_versions_take_is_refused_as_not_yet_supported(name, value):
    with pytest.raises(ConfigurationError, match=rf"{name}={value!r}.*not yet.*{NOT_YET[name][0]!r}"):
        nf.Trainer(max_epochs=1, **{name: value})


def test_what_works_of_the_later_arguments_is_accepted():
    for name, works in NOT_YET.items():
        for value in works:
            nf.Trainer(max_epochs=1, logger=False, **{name: value})


@pytest.mark.parametrize(
    "max_time", ["01:02:03:04", datetime.timedelta(days=1, hours=2, minutes=3, seconds=4), {"days": 1, "seconds": 7384}]
)
def test_max_time_in_every_form_is_in_seconds(max_time):
    assert seconds(max_time) == 93784
    assert seconds(None) is None


@pytest.mark.parametrize(
    ("limit", "length", "expected"),
    [
        (1.0, 10, 10),
        (0.0, 10, 0),
        (0, 10, 0),
        (1, 10, 1),
        (20, 10, 10),
        (0.25, 10, 2),
        (0.1, 10, 1),
        (0.99, 10, 9),
        (1.0, math.inf, math.inf),
        (7, math.inf, 7),
        (0.0, math.inf, 0),
    ],
)
def test_a_limit_is_a_count_or_a_fraction_rounded_down(limit, length, expected):
    assert batches_within(limit, length, "limit_train_batches") == expected


def test_a_fraction_that_leaves_nothing_or_of_an_unknown_length_is_refused():
    with pytest.raises(ConfigurationError, match=r"limit_val_batches=0.05.*none of 10.*0.1"):
        batches_within(0.05, 10, "limit_val_batches")
    with pytest.raises(ConfigurationError, match=r"limit_val_batches=0.5.*no length.*whole number"):
        batches_within(0.5, math.inf, "limit_val_batches")


def test_without_a_bound_there_are_1000_epochs_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "nnx_fit"):
        assert options(max_epochs=None).max_epochs == 1000
    assert "no bound" in caplog.text and "1000" in caplog.text


@pytest.mark.parametrize(
    "given",
    [{"max_epochs": -1}, {"max_epochs": None, "max_steps": 5}, {"max_epochs": None, "max_time": "00:01:00:00"}],
)
def test_with_any_other_bound_epochs_are_unlimited_and_nobody_warns(given, caplog):
    with caplog.at_level(logging.WARNING, "nnx_fit"):
        assert options(**given).epoch_limit == math.inf
    assert caplog.text == ""


def test_the_limits_of_steps():
    assert options().step_limit == math.inf
    assert options(max_steps=3).step_limit == 3 and options(max_steps=0).step_limit == 0


@pytest.mark.parametrize(("given", "count"), [(True, 1), (1, 1), (3, 3)])
def test_a_fast_dev_run_bounds_everything(given, count):
    made = options(
        fast_dev_run=given, max_epochs=9, min_epochs=2, min_steps=99, val_check_interval=7, check_val_every_n_epoch=3
    )
    for kind in ("train", "val", "test", "predict"):
        assert getattr(made, f"limit_{kind}_batches") == count
    assert (made.max_epochs, made.max_steps, made.min_epochs, made.min_steps) == (1, count, None, None)
    assert (made.num_sanity_val_steps, made.val_check_interval, made.check_val_every_n_epoch) == (0, 1.0, 1)


@pytest.mark.parametrize("given", [False, 0])
def test_no_fast_dev_run_changes_nothing(given):
    assert options(fast_dev_run=given) == dataclasses.replace(Options(), max_epochs=1)


def test_barebones_switches_off_all_but_training():
    made = options(barebones=True, log_every_n_steps=5)
    off = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    assert not any(getattr(made, name) for name in off)
    assert (made.num_sanity_val_steps, made.log_every_n_steps) == (0, 0)


@pytest.mark.parametrize("count", [3, 0.5])
def test_overfitting_limits_training_and_validation_alike(count):
    made = options(overfit_batches=count, limit_train_batches=7)
    assert (made.limit_train_batches, made.limit_val_batches) == (count, count)
    assert made.limit_test_batches == 1.0


def test_options_never_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        options().max_epochs = 3


def test_a_numpy_number_is_the_number_that_it_is():
    given = {
        "max_epochs": np.int64(3),
        "max_steps": np.int32(7),
        "limit_train_batches": np.float32(0.5),
        "val_check_interval": np.float64(0.25),
        "gradient_clip_val": np.float16(2),
        "jit": np.bool_(False),
        "fast_dev_run": np.bool_(False),
        "reload_dataloaders_every_n_epochs": np.uint8(1),
    }
    assert options(**given) == options(**{name: value.item() for name, value in given.items()})
    assert type(options(**given).max_epochs) is int
    with pytest.raises(ConfigurationError, match=r"max_epochs=3\.0"):
        options(max_epochs=np.float64(3))
