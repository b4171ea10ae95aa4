"""Objects from configs."""

import functools
import json
from typing import Any

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from nnx_fit.instantiation import instantiate


def test_partial_is_a_plain_functools_partial_at_every_depth() -> None:
    inner = {"_target_": "math.pow", "_partial_": True, "_args_": [2]}
    outer = instantiate({"_target_": "builtins.dict", "parts": [inner], "by": {"name": inner}})
    for part in (outer["parts"][0], outer["by"]["name"]):
        assert type(part) is functools.partial
        assert part(3) == 8


def test_containers_arrive_as_plain_ones_with_interpolations_resolved() -> None:
    config = OmegaConf.create({"n": 3, "node": {"_target_": "builtins.dict", "a": [1, "${n}"], "b": {"c": "${n}"}}})
    built = instantiate(config.node)
    assert json.dumps(built) == '{"a": [1, 3], "b": {"c": 3}}'


def test_arguments_of_the_call_keep_their_identity_and_win() -> None:
    value: list[Any] = []
    assert instantiate({"_target_": "builtins.dict", "a": 1}, a=value)["a"] is value


def test_none_is_none_and_a_mapping_without_target_is_built_inside() -> None:
    assert instantiate(None) is None
    assert instantiate({"a": {"_target_": "builtins.int", "_args_": ["3"]}}) == {"a": 3}
    assert instantiate([{"_target_": "builtins.int", "_args_": ["3"]}, 4]) == [3, 4]


def test_recursion_can_be_switched_off() -> None:
    node = {"_target_": "nowhere.Nothing"}
    assert instantiate({"_target_": "builtins.dict", "_recursive_": False, "a": node})["a"] == node


def test_exception_of_the_target_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        instantiate({"_target_": "operator.truediv", "_args_": [1, 0]})


def test_target_that_does_not_exist_is_hydras_error() -> None:
    with pytest.raises(InstantiationException, match="nowhere"):
        instantiate({"_target_": "nowhere.Nothing"})


def test_missing_values_of_a_partial_come_with_the_call() -> None:
    built = instantiate({"_target_": "builtins.dict", "_partial_": True, "a": "???", "b": 2})
    assert built(a=1) == {"a": 1, "b": 2}


def test_public_name_is_the_function() -> None:
    import nnx_fit

    assert nnx_fit.instantiate is instantiate
