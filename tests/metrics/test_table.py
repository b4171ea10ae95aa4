"""The places of metrics in the vectors of a stage."""

import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.spec import make_spec
from nnx_fit.metrics.table import MetricTable, TooManyMetrics

STEP, EPOCH = (True, False), (False, True)


def test_two_names_that_would_have_one_record_are_refused():
    table = MetricTable()
    table.place(make_spec("x", STEP, on_epoch=True))
    with pytest.raises(ConfigurationError, match=r"'x_step'.* and self.log\('x', ...\) would both be recorded as"):
        table.place(make_spec("x_step", STEP))
    assert table.place(make_spec("x_mean", STEP)) == 1


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
