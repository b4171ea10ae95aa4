"""`History`: a mapping from names to (step, value) pairs."""

import importlib.util
import json
import math
from collections.abc import Mapping

import pytest

from nnx_fit.metrics.history import History


def example():
    history = History()
    history.append(1, {"loss": 2.0})
    history.append(2, {"loss": 1.0, "val/accuracy": 0.5})
    return history


def test_it_is_a_mapping_of_names_to_pairs_in_the_order_they_came():
    history = example()
    assert isinstance(history, Mapping)
    assert list(history) == ["loss", "val/accuracy"] and len(history) == 2
    assert history["loss"] == [(1, 2.0), (2, 1.0)]
    assert dict(history)["val/accuracy"] == [(2, 0.5)]
    assert "loss" in history and "lost" not in history and history.get("lost") is None


def test_an_unknown_name_lists_those_that_were_logged():
    with pytest.raises(KeyError, match=r"'los' was not logged.*loss, val/accuracy"):
        example()["los"]
    with pytest.raises(KeyError, match="none"):
        History()["loss"]


def test_its_text_shows_the_last_values():
    assert repr(example()) == "History(loss=1, val/accuracy=0.5)"
    assert repr(History()) == "History()"


def test_a_saved_history_comes_back_through_json_with_values_that_are_not_finite():
    history = example()
    history.append(3, {"loss": math.inf, "grad": math.nan})
    loaded = History()
    loaded.append(9, {"other": 1.0})
    loaded.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert loaded["loss"] == history["loss"] and "other" not in loaded
    assert loaded["grad"][0][0] == 3 and math.isnan(loaded["grad"][0][1])
    assert all(isinstance(step, int) and isinstance(value, float) for pairs in loaded.values() for step, value in pairs)


def test_later_records_do_not_change_a_saved_history():
    history = example()
    saved = history.state_dict()
    history.append(3, {"loss": 0.0})
    assert saved["loss"] == [[1, 2.0], [2, 1.0]]


@pytest.mark.skipif(importlib.util.find_spec("pandas") is not None, reason="pandas is installed")
def test_without_pandas_its_table_is_an_error_with_the_command_that_helps():
    with pytest.raises(ImportError, match="pip install pandas"):
        example().to_pandas()
