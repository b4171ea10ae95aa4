"""The curve: smoothing against its formula, suggestions against a known function, files read back."""

from __future__ import annotations

import csv
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from nnx_fit import ConfigurationError
from nnx_fit.callbacks.learning_rate_curve import LearningRateCurve, rates_between


def curve_of(losses, rates=None, mode="exponential") -> LearningRateCurve:
    curve = LearningRateCurve(mode)
    for lr, loss in zip(rates_between(1e-4, 1.0, len(losses), mode) if rates is None else rates, losses, strict=True):
        curve.add(lr, loss)
    return curve


def with_loss(losses) -> LearningRateCurve:
    """A curve whose smoothed losses are given."""
    curve = curve_of(losses)
    curve.loss = list(losses)
    return curve


@given(st.floats(-1e6, 1e6), st.integers(1, 300))
def test_a_constant_loss_is_that_constant_to_the_last_bit(loss, steps):
    assert curve_of([loss] * steps).loss == [loss] * steps


def test_losses_are_the_moving_average_freed_of_its_bias():
    losses = np.random.default_rng(0).normal(size=50)
    expected = [
        (1 - 0.98) * sum(0.98 ** (n - i) * losses[i] for i in range(n + 1)) / (1 - 0.98 ** (n + 1)) for n in range(50)
    ]
    np.testing.assert_allclose(curve_of(losses).loss, expected, rtol=1e-12)


def test_rates_go_from_the_first_to_the_last_by_equal_ratios_or_differences():
    np.testing.assert_allclose(rates_between(1e-3, 1.0, 4, "exponential"), [1e-3, 1e-2, 1e-1, 1.0])
    np.testing.assert_allclose(rates_between(1.0, 4.0, 4, "linear"), [1.0, 2.0, 3.0, 4.0])


def test_the_suggestion_is_where_the_loss_falls_fastest():
    steps = np.arange(100)
    curve = with_loss(1 / (1 + np.exp((steps - 60) / 4)))  # steepest at 60
    assert curve.suggestion() == curve.lr[60]


def test_steps_that_are_skipped_do_not_count():
    losses = [5.0, 1.0, 0.9, 0.7, 0.6, -9.0]
    curve = with_loss(losses)
    assert curve.suggestion(skip_begin=0, skip_end=0) == curve.lr[5]
    assert curve.suggestion(skip_begin=1, skip_end=1) == curve.lr[np.gradient(losses[1:5]).argmin() + 1]


def test_losses_that_are_not_finite_are_left_out_at_their_places():
    curve = with_loss([4.0, 3.9, math.nan, 3.7, 2.0, 1.9])
    # Without the third, slopes per step: -0.1, then -0.1 and -0.1 weighted, -0.966..., -0.9, -0.1: steepest at 3.7.
    assert (
        curve.suggestion(skip_begin=0, skip_end=0)
        == curve.lr[[0, 1, 3, 4, 5][int(np.gradient([4.0, 3.9, 3.7, 2.0, 1.9], [0, 1, 3, 4, 5]).argmin())]]
    )


@pytest.mark.parametrize("losses", [[2.0] * 50, list(range(50)), [3.0, 2.0, 1.0], [math.nan] * 50, []])
def test_nothing_is_suggested_where_the_loss_falls_nowhere_or_there_are_too_few_steps(losses):
    assert with_loss(losses).suggestion() is None


@pytest.mark.parametrize(
    ("losses", "diverges"),
    [([1.0, 3.9], False), ([1.0, 4.1], True), ([-1.0, 1.9], False), ([-1.0, 2.1], True), ([1.0, math.nan], True)],
)
def test_a_loss_diverges_by_its_distance_from_the_smallest(losses, diverges):
    assert with_loss(losses).diverges(4.0) is diverges


def test_without_a_threshold_only_a_loss_that_is_not_finite_ends_the_search():
    assert not with_loss([1.0, 1e30]).diverges(None)
    assert with_loss([1.0, math.inf]).diverges(None)


def test_the_numbers_come_back_from_their_file(tmp_path):
    curve = curve_of([3.0, 2.0, 1.5])
    curve.write_csv(tmp_path / "lr_find.csv")
    with (tmp_path / "lr_find.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert [float(row["lr"]) for row in rows] == curve.lr
    assert [float(row["raw_loss"]) for row in rows] == [3.0, 2.0, 1.5]
    assert [float(row["loss"]) for row in rows] == curve.loss


def test_a_state_in_json_gives_the_same_curve():
    curve = curve_of([3.0, 2.0, math.nan], mode="linear")
    again = LearningRateCurve.of_state(json.loads(json.dumps(curve.state_dict())))
    assert (again.mode, again.lr) == ("linear", curve.lr)
    np.testing.assert_array_equal(again.loss, curve.loss)


def test_the_plot_shows_the_curve_and_the_suggestion(tmp_path):
    curve = with_loss(1 / (1 + np.exp((np.arange(60) - 30) / 4)))
    figure = curve.plot(suggest=True)
    (axes,) = figure.axes
    raw, smoothed, suggestion = axes.lines
    assert list(raw.get_xdata()) == list(smoothed.get_xdata()) == curve.lr
    assert list(smoothed.get_ydata()) == curve.loss
    assert (suggestion.get_xdata()[0], axes.get_xscale()) == (curve.lr[30], "log")
    figure.savefig(tmp_path / "lr_find.png")
    assert imread(tmp_path / "lr_find.png").std() > 0.05  # not an empty picture


def test_the_plot_can_be_drawn_on_axes_of_the_users_own():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    curve = curve_of([3.0, 2.0, math.nan, 1.0], mode="linear")
    assert curve.plot(ax=axes) is figure
    assert (len(axes.lines), axes.get_xscale()) == (2, "linear")


def test_without_matplotlib_the_plot_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nnx-fit\[plots\]'"):
        curve_of([1.0, 2.0]).plot()
