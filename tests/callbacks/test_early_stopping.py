"""EarlyStopping: Lightning's semantics, as a function of the metric's values and in real fits."""

import math

import nets
import pytest
from scripted import scripted_fit

import nnx_fit as nf

NAN, INF = float("nan"), float("inf")


def stops_at(values, **options):
    """The index of the check that stops, or None."""
    stopping = nf.EarlyStopping("m", **options)
    for index, value in enumerate(values):
        if stopping.update(value) is not None:
            return index
    return None


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([5, 4, 3, 2, 1], {}, None),
        ([1, 2, 2, 2, 2], {}, 3),
        ([1, 1, 1, 1, 1], {}, 3),
        ([1, 2, 2, 0, 2, 2, 2], {}, 6),
        ([1, 2, 3], {"patience": 1}, 1),
        ([1, 2, 3], {"patience": 0}, 1),
        ([1, 2, 3, 3, 3, 3], {"mode": "max"}, 5),
        ([1.0, 0.5, 0.0], {"min_delta": 0.5, "patience": 1}, 1),
        ([1.0, 0.4, -0.2], {"min_delta": 0.5, "patience": 1}, None),
        ([1.0, 1.5], {"min_delta": 0.5, "patience": 1, "mode": "max"}, 1),
        ([1, NAN], {}, 1),
        ([1, -INF], {}, 1),
        ([1, NAN, NAN, 0.5, NAN], {"check_finite": False, "patience": 3}, None),
        ([1, 0.5, 0.1], {"stopping_threshold": 0.2}, 2),
        ([1, 0.2], {"stopping_threshold": 0.2}, None),
        ([1, 2, 11], {"divergence_threshold": 10}, 2),
        ([1, 10], {"divergence_threshold": 10}, None),
        ([0.5, 0.05], {"divergence_threshold": 0.1, "mode": "max"}, 1),
    ],
)
def test_check_that_stops(values, options, expected):
    assert stops_at(values, **options) == expected


def test_training_stops_and_says_why(tmp_path, capsys):
    stopping = nf.EarlyStopping("val/target", mode="max", patience=2)
    trainer = scripted_fit([1, 3, 2, 3, 9, 9], nets.quiet(max_epochs=6, callbacks=stopping))
    assert (trainer.current_epoch, trainer.global_step) == (4, 8)
    assert (stopping.stopped_epoch, stopping.wait_count, stopping.best_score) == (3, 2, 3.0)
    assert trainer.stop_reason == "EarlyStopping: val/target did not improve on 3 in the last 2 checks"
    assert "training stops, val/target did not improve on 3" in capsys.readouterr().out


def test_minimum_of_the_trainer_outranks_it():
    stopping = nf.EarlyStopping("val/target", patience=1)
    trainer = scripted_fit([1] * 6, nets.quiet(max_epochs=6, min_epochs=4, callbacks=stopping))
    assert trainer.current_epoch == 4


def test_training_metric_is_checked_without_validation():
    stopping = nf.EarlyStopping("loss", patience=1, min_delta=100.0)
    trainer = nets.quiet(max_epochs=5, callbacks=stopping)
    trainer.fit(nets.Scalar(), nets.targets(0.5, 0.5))
    assert trainer.current_epoch == 2


def test_checks_follow_validations_that_are_not_at_every_epochs_end():
    stopping = nf.EarlyStopping("val/target", patience=2)
    trainer = scripted_fit([1] * 8, nets.quiet(max_epochs=4, val_check_interval=0.5, callbacks=stopping), batches=4)
    assert trainer.global_step == 6
    stopping = nf.EarlyStopping("val/target", patience=1)
    trainer = scripted_fit([1] * 8, nets.quiet(max_epochs=9, check_val_every_n_epoch=2, callbacks=stopping))
    assert trainer.current_epoch == 4


def test_sanity_check_is_no_check():
    stopping = nf.EarlyStopping("val/target", patience=1)
    trainer = nets.quiet(max_epochs=2, num_sanity_val_steps=1, callbacks=stopping)
    scripted_fit([-9, 2, 1], trainer)
    assert trainer.current_epoch == 2 and stopping.best_score == 1.0


def test_missing_metric_lists_those_that_exist():
    with pytest.raises(nf.ConfigurationError) as error:
        scripted_fit([1, 1], nets.quiet(max_epochs=2, callbacks=nf.EarlyStopping("val/traget")))
    assert str(error.value) == (
        "EarlyStopping(monitor='val/traget'): no metric of that name was logged. Did you mean 'val/target'?\n"
        "Logged so far: loss, val/target.\n"
        "Fix: monitor one of these, or log it with self.log('val/traget', ...) in a step."
    )


def test_missing_metric_is_passed_over_when_not_strict():
    trainer = scripted_fit([1, 1], nets.quiet(max_epochs=2, callbacks=nf.EarlyStopping("nothing", strict=False)))
    assert trainer.current_epoch == 2


def test_state_round_trip():
    stopping = nf.EarlyStopping("m")
    for value in (2.0, 3.0):
        stopping.update(value)
    other = nf.EarlyStopping("m", patience=10)
    other.load_state_dict(stopping.state_dict())
    assert (other.wait_count, other.best_score, other.patience) == (1, 2.0, 10)
    assert math.isinf(nf.EarlyStopping("m").state_dict()["best_score"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": None}, "expected the name of a metric"),
        ({"monitor": "m", "mode": "auto"}, "mode='auto'"),
        ({"monitor": "m", "patience": 1.5}, "patience=1.5"),
        ({"monitor": "m", "min_delta": -1}, "min_delta=-1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        nf.EarlyStopping(**arguments)


def test_another_fit_starts_over():
    stopping = nf.EarlyStopping("val/target", patience=2)
    trainer = nets.quiet(max_epochs=3, callbacks=stopping)
    scripted_fit([1, 2, 1.5], trainer)
    assert (stopping.wait_count, stopping.best_score) == (2, 1.0)
    scripted_fit([9, 8, 7], trainer)
    assert (stopping.wait_count, stopping.best_score, trainer.current_epoch) == (0, 7.0, 3)
