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


# PyTorch Lightning 2.6.6 on CPU: a module of one parameter, whose validation_step logs the next value of the sequence
# under "val/target" from a loader of one batch; 2 training batches per epoch (4 with val_check_interval); Trainer(
# max_epochs=len(values), logger=False, num_sanity_val_steps=0, **trainer). Printed after fit: global_step,
# current_epoch, and wait_count, stopped_epoch, best_score of EarlyStopping("val/target", **options). Where a run stops
# in mid-epoch, Lightning counts that epoch in current_epoch; here an epoch counts when it is complete.
@pytest.mark.parametrize(
    ("values", "options", "trainer", "expected"),
    [
        ([1, 2, 2, 2, 2, 2], {"patience": 3}, {}, (8, 4, 3, 3, 1)),
        ([1, 2, 3, 0.5, 0.6, 0.7, 0.8], {"patience": 2}, {}, (6, 3, 2, 2, 1)),
        ([3, 2.5, 2.0, 1.5, 1.0], {"patience": 2, "min_delta": 0.5}, {}, (10, 5, 0, 0, 1)),
        ([3, 2.4, 1.8, 1.2], {"patience": 2, "min_delta": 0.5}, {}, (8, 4, 0, 0, 1.2)),
        ([1, 1.5, 2, 2.6], {"patience": 2, "min_delta": 0.5, "mode": "max"}, {}, (8, 4, 0, 0, 2.6)),
        ([1, 2], {"patience": 0}, {}, (4, 2, 1, 1, 1)),
        ([1, NAN, 0.5], {}, {}, (4, 2, 0, 1, 1)),
        ([1, INF, 0.5], {}, {}, (4, 2, 0, 1, 1)),
        ([1, NAN, NAN, 0.5, 0.4], {"check_finite": False}, {}, (10, 5, 0, 0, 0.4)),
        ([1, NAN, NAN, NAN, 0.4], {"check_finite": False}, {}, (8, 4, 3, 3, 1)),
        ([1, 0.2, 0.1, 0.05], {"stopping_threshold": 0.2}, {}, (6, 3, 0, 2, 0.2)),
        ([1, 10, 11, 3], {"divergence_threshold": 10.0}, {}, (6, 3, 1, 2, 1)),
        ([0.5, 0.1, 0.05, 1], {"divergence_threshold": 0.1, "mode": "max"}, {}, (6, 3, 1, 2, 0.5)),
        ([1] * 8, {"patience": 1}, {"min_epochs": 4}, (8, 4, 3, 3, 1)),
        ([1] * 8, {"patience": 1}, {"min_steps": 7}, (7, 3, 3, 3, 1)),  # Lightning: 4
        ([1, 1, 0.5, 0.4, 0.3, 0.3, 0.3], {"patience": 1}, {"min_epochs": 4}, (8, 4, 0, 1, 0.4)),
        ([1] * 8, {"patience": 2}, {"val_check_interval": 0.5, "max_epochs": 4}, (6, 1, 2, 1, 1)),  # 2
        ([1] * 8, {"patience": 1}, {"check_val_every_n_epoch": 2, "max_epochs": 9}, (8, 4, 1, 3, 1)),
        (
            [1] * 8,
            {"patience": 2, "check_on_train_epoch_end": True},
            {"val_check_interval": 0.5, "max_epochs": 4},
            (12, 3, 2, 2, 1),
        ),
        ([1] * 8, {"patience": 2, "check_on_train_epoch_end": False}, {}, (6, 3, 2, 2, 1)),
    ],
)
def test_a_fit_ends_where_lightnings_does(values, options, trainer, expected):
    stopping = nf.EarlyStopping("val/target", **options)
    batches = 4 if "val_check_interval" in trainer else 2
    done = scripted_fit(
        values,
        nets.quiet(**{"max_epochs": len(values), "jit": False, "callbacks": stopping, **trainer}),
        batches=batches,
    )
    found = (done.global_step, done.current_epoch, stopping.wait_count, stopping.stopped_epoch, stopping.best_score)
    assert found == pytest.approx(expected)


# Keras 3.11's rule, `if epoch < self.start_from_epoch: return`, by hand: epochs before it neither stop nor count.
@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([1, 2, 2, 2, 2, 2], {"start_from_epoch": 2, "patience": 2}, (5, 2, 2.0)),
        ([0, 5, 4, 3, 3, 3], {"start_from_epoch": 1, "patience": 2}, (6, 2, 3.0)),
        ([NAN, 3, 2], {"start_from_epoch": 1}, (3, 0, 2.0)),
        ([0.1, 3, 2], {"start_from_epoch": 1, "stopping_threshold": 0.5}, (3, 0, 2.0)),
        ([1, 1, 1], {"start_from_epoch": 9, "patience": 1}, (3, 0, INF)),
    ],
)
def test_epochs_before_the_first_to_check_neither_stop_nor_count(values, options, expected):
    stopping = nf.EarlyStopping("val/target", **options)
    trainer = scripted_fit(values, nets.quiet(max_epochs=len(values), jit=False, callbacks=stopping))
    assert (trainer.current_epoch, stopping.wait_count, stopping.best_score) == expected


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
        ({"monitor": "m", "start_from_epoch": -1}, "start_from_epoch=-1"),
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


class SavesWhere(nets.SavesIn):
    """Saves after what was decided in the same hook."""

    phase = "save"


@pytest.mark.parametrize(
    ("hook", "trainer"),
    [("on_train_epoch_end", {}), ("on_validation_end", {"val_check_interval": 1})],
)
def test_a_run_that_is_killed_once_it_was_to_stop_stops_where_it_would_have(tmp_path, hook, trainer):
    def fit(*callbacks, patience=2, values=(1, 2, 2, 2, 2, 2), **how):
        stopping = nf.EarlyStopping("val/target", patience=patience)
        run = nets.quiet(max_epochs=4, callbacks=[stopping, *callbacks], **trainer)
        scripted_fit(values, run, **how)
        return run.global_step, run.stop_reason

    path = tmp_path / "cut"
    whole = fit(SavesWhere(path, hook, 3))
    assert whole[0] < 8 and whole[1].startswith("EarlyStopping")
    assert fit(ckpt_path=path) == whole
    assert fit(ckpt_path=path, patience=5)[0] > whole[0], "asked for something else, it trains on"
