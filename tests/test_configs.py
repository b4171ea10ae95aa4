"""The schemas say what the constructors say."""

import dataclasses
import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import MISSING

import nnx_fit
from nnx_fit import configs

CONF = Path(__file__).parents[1] / "conf"


def arguments(target: type) -> dict[str, object]:
    parameters = list(inspect.signature(target.__init__).parameters.values())[1:]
    # A clock is given in tests alone.
    named = [each for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD and each.name != "clock"]
    return {parameter.name: parameter.default for parameter in named}


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


def test_every_callback_has_a_schema_and_a_file_of_its_name() -> None:
    # Those that cannot be written in YAML: functions, and a class to be derived from.
    not_configurable = {"Callback", "LambdaCallback", "BasePredictionWriter"}
    callbacks = {
        name
        for name in nnx_fit.__all__
        if isinstance(kind := getattr(nnx_fit, name), type) and issubclass(kind, nnx_fit.Callback)
    }
    schemas = {
        str(getattr(schema, "_target_", "")).rpartition(".")[2]: name for name, schema in configs.SCHEMAS.items()
    }
    files = {path.stem: path.read_text() for path in (CONF / "callbacks").glob("*.yaml")}
    for callback in callbacks - not_configurable:
        name = schemas[callback]
        assert f"/schema/{name}@{name}" in files[name], callback


def test_loggers_are_chosen_several_at_once_and_find_the_run_they_belong_to() -> None:
    configs.register()
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base=None):
        cfg = compose("config", ["logger=[tensorboard,csv,wandb,mlflow]", "logger.wandb.tags=[a]"])
    assert list(cfg.logger) == ["tensorboard", "csv", "wandb", "mlflow"]
    assert cfg.logger.wandb.tags == ["a"]
    # Outside of a run the directory is a placeholder.
    assert {cfg.logger[name].save_dir for name in ("tensorboard", "csv", "wandb")} == {"<run directory>"}
    assert cfg.logger.mlflow.run_name == cfg.logger.wandb.name == "<run directory>"
