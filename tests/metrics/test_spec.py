"""The options of a `self.log` call, and its value as a number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.spec import MetricSpec, make_spec, scalar, weight_of

STEP, EPOCH = (True, False), (False, True)


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
        (1 + 2j, r"'loss'.*complex64.*not a real number.*\n.*abs.*real.*imag"),
        (np.complex128(1), "'loss'.*complex64"),
        (jnp.ones(1, jnp.complex64), "'loss'.*complex64"),
        (jax.random.key(0), "'loss'.*key<fry>"),
        (10**400, "'loss'.*int"),
        ("0.5", "'loss'.*str"),
        (None, "'loss'.*NoneType"),
        ({"a": 1}, "'loss'.*dict.*log_dict"),
        (object(), "'loss'.*object"),
    ],
)
def test_what_is_no_single_number_is_refused_by_name_and_shape(value, message):
    with pytest.raises(ConfigurationError, match=message):
        scalar("loss", value)


def test_whole_numbers_beyond_the_range_of_an_array_are_rounded_and_not_refused():
    assert float(scalar("tokens", 2**40)) == 2.0**40


@pytest.mark.parametrize("size", [-1, True, "4", None, np.zeros(2), math.nan])
def test_a_batch_size_that_is_none_is_refused_by_name(size):
    with pytest.raises(ConfigurationError, match=r"'x', \.\.\., batch_size=.*number of examples"):
        weight_of("x", size)
