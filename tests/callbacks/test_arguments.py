"""Checks of arguments."""

import datetime

import pytest

from nnx_fit.callbacks.arguments import seconds, whole_number
from nnx_fit.errors import ConfigurationError


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (1.5, 1.5), (60, 60.0), (datetime.timedelta(minutes=2), 120.0), ({"minutes": 30}, 1800.0)],
)
def test_spans_of_time(value, expected):
    assert seconds("Owner", "interval", value) == expected


@pytest.mark.parametrize("value", [0, -1, True, "1h", {"fortnights": 1}, datetime.timedelta(0)])
def test_what_is_no_span_is_named(value):
    with pytest.raises(ConfigurationError, match=r"Owner\(interval="):
        seconds("Owner", "interval", value)


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "3"])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(ConfigurationError, match=r"Owner\(count=.*0 or more"):
        whole_number("Owner", "count", value)
