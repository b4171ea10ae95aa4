"""The schemas say what the constructors say."""

import dataclasses
import inspect

import pytest
from omegaconf import MISSING

import nnx_fit
from nnx_fit import configs


def arguments(target: type) -> dict[str, object]:
    parameters = list(inspect.signature(target.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def test_trainer_schema_has_every_plain_argument_with_its_default() -> None:
    schema = {field.name: field.default for field in dataclasses.fields(configs.TrainerConfig)}
    expected = {name: default for name, default in arguments(nnx_fit.Trainer).items() if name not in configs.OWN_GROUP}
    assert schema == expected


def test_everything_else_of_the_trainer_has_a_group_of_its_own() -> None:
    assert set(configs.OWN_GROUP) <= set(arguments(nnx_fit.Trainer))


@pytest.mark.parametrize("name", [name for name in configs.SCHEMAS if name != "trainer"])
def test_schemas_of_callbacks_and_loggers_match_their_constructors(name: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(configs.SCHEMAS[name])}
    target = getattr(nnx_fit, str(fields.pop("_target_")).rpartition(".")[2])
    expected = arguments(target)
    assert set(fields) == set(expected)
    for key, default in fields.items():
        assert default in (MISSING, expected[key]), key
