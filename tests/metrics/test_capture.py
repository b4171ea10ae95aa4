"""What one step logs: the options of a call, the value, several values of one name, and the places in the vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.capture import Capture, MetricSpec, MetricTable, TooManyMetrics, make_spec, scalar

STEP, EPOCH = (True, False), (False, True)


def capture(defaults=EPOCH, size=4):
    return Capture("validation_step", defaults, lambda: size)


@pytest.mark.parametrize("defaults", [STEP, EPOCH])
def test_options_left_open_are_those_of_the_hook(defaults):
    spec = make_spec("loss", defaults)
    assert (spec.on_step, spec.on_epoch) == defaults
    assert (spec.prog_bar, spec.logger, spec.reduce) == (False, True, "mean")


def test_one_option_overrides_one_default():
    assert make_spec("loss", STEP, on_epoch=True) == MetricSpec("loss", True, True)
    assert make_spec("loss", STEP, on_step=False, on_epoch=True) == MetricSpec("loss", False, True)


def test_records_are_told_apart_only_where_there_are_two():
    both = make_spec("a/b", STEP, on_epoch=True)
    assert (both.step_name, both.epoch_name) == ("a/b_step", "a/b_epoch")
    assert make_spec("a/b", STEP).step_name == "a/b"
    assert make_spec("a/b", EPOCH).epoch_name == "a/b"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"name": 3}, "needs a name"),
        ({"name": None}, "needs a name"),
        ({"reduce": "median"}, r"'loss', reduce='median'.*'mean', 'sum', 'min', 'max'"),
        ({"reduce": None}, "reduce=None"),
        ({"on_step": False}, "would record nothing.*True"),
    ],
)
def test_an_invalid_call_names_the_metric_and_the_choice(options, message):
    arguments = {"name": "loss", "defaults": STEP} | options
    with pytest.raises(ConfigurationError, match=message):
        make_spec(arguments.pop("name"), arguments.pop("defaults"), **arguments)


@pytest.mark.parametrize(
    "value", [2, 2.0, True + 1, np.float64(2), np.int8(2), np.array([2]), jnp.array([[2.0]]), jnp.bfloat16(2)]
)
def test_any_single_number_becomes_a_float32_scalar(value):
    got = scalar("loss", value)
    assert got.shape == () and got.dtype == jnp.float32 and float(got) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (jnp.zeros(3), r"'loss'.*shape \(3,\).*\.mean\(\)"),
        (np.zeros((0,)), r"shape \(0,\)"),
        ("0.5", "'loss'.*str"),
        (None, "'loss'.*NoneType"),
        ({"a": 1}, "'loss'.*dict"),
        (object(), "'loss'.*object"),
    ],
)
def test_what_is_no_single_number_is_refused_by_name_and_shape(value, message):
    with pytest.raises(ConfigurationError, match=message):
        scalar("loss", value)


def test_several_values_of_one_name_are_reduced_with_each_other():
    for reduce, expected in (("mean", (1 * 1 + 2 * 2 + 6 * 3) / 6), ("sum", 9), ("min", 1), ("max", 6)):
        taken = capture()
        for value, size in ((1.0, 1), (2.0, 2), (6.0, 3)):
            taken.log("x", value, reduce=reduce, batch_size=size)
        value, weight = taken.values()["x"]
        assert float(value) == pytest.approx(expected, rel=1e-6), reduce
        assert float(weight) == (6 if reduce == "mean" else 1)


def test_the_batch_size_is_asked_for_only_where_a_mean_over_the_epoch_needs_it():
    def unknown():
        raise AssertionError("asked")

    taken = Capture("training_step", STEP, unknown)
    taken.log("step", 1.0)
    taken.log("total", 1.0, on_epoch=True, reduce="sum")
    taken.log("given", 1.0, on_epoch=True, batch_size=7)
    assert float(taken.values()["given"][1]) == 7
    with pytest.raises(AssertionError, match="asked"):
        taken.log("mean", 1.0, on_epoch=True)


def test_one_name_with_different_options_is_refused_naming_the_option():
    taken = capture()
    taken.log("x", 1.0)
    with pytest.raises(ConfigurationError, match=r"'x'.*twice.*prog_bar=False and prog_bar=True"):
        taken.log("x", 1.0, prog_bar=True)
    table = MetricTable()
    table.place(make_spec("x", EPOCH))
    with pytest.raises(ConfigurationError, match=r"'x'.*on_step=False and on_step=True; on_epoch=True and on_epoch=Fa"):
        table.place(make_spec("x", STEP))


def test_a_hook_without_metrics_refuses_and_names_itself():
    with pytest.raises(ConfigurationError, match=r"'x'.*predict_step.*return the value"):
        Capture("predict_step", None, lambda: 1).log("x", 1.0)


def test_names_keep_their_places_whichever_step_logs_them():
    table = MetricTable()
    specs = {name: make_spec(name, EPOCH) for name in "abc"}
    one = jnp.float32(1)
    first = table.pack({"a": (one, one), "b": (one * 2, one * 4)}, {n: specs[n] for n in "ab"})
    second = table.pack({"c": (one * 3, one), "b": (one * 5, one)}, {n: specs[n] for n in "cb"})
    assert first.shape == second.shape == (3, table.capacity)
    np.testing.assert_array_equal(first[:, :3], [[1, 2, 0], [1, 4, 0], [1, 1, 0]])
    np.testing.assert_array_equal(second[:, :3], [[0, 5, 3], [0, 1, 1], [0, 1, 1]])
    assert not np.asarray(second[:, 3:]).any()


def test_a_step_without_metrics_packs_nothing():
    assert not np.asarray(MetricTable().pack({}, {})).any()


def test_a_full_table_asks_to_be_grown_and_keeps_its_places():
    table = MetricTable(capacity=2)
    for name in "ab":
        table.place(make_spec(name, EPOCH))
    with pytest.raises(TooManyMetrics):
        table.place(make_spec("c", EPOCH))
    table.grow()
    assert [table.place(make_spec(name, EPOCH)) for name in "cab"] == [2, 0, 1]
    assert table.capacity == 4
