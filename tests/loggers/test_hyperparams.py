"""Plain values of settings."""

import dataclasses
import enum

import jax.numpy as jnp
import numpy as np
import optax
import yaml
from omegaconf import OmegaConf

from nnx_fit.loggers.hyperparams import flatten, plain


class Color(enum.Enum):
    RED = 1


class Mode(enum.StrEnum):
    MIN = "min"


@dataclasses.dataclass
class Thing:
    x: int = 1


def test_every_value_becomes_one_that_yaml_keeps():
    config = OmegaConf.create({"lr": 0.1, "double": "${lr}", "nested": {"list": [1, {"a": None}]}})
    value = {
        "config": config,
        "f32": np.float32(0.5),
        "i64": np.int64(3),
        "jax": jnp.float32(2.0),
        "bf16": jnp.bfloat16(1.5),
        "flag": np.bool_(True),
        "color": Color.RED,
        "mode": Mode.MIN,
        "fn": optax.adam,
        "set": {2, 1},
        "thing": Thing(),
        3: (1, 2),
    }
    result = plain(value)
    assert yaml.safe_load(yaml.safe_dump(result)) == result
    assert result["config"] == {"lr": 0.1, "double": 0.1, "nested": {"list": [1, {"a": None}]}}
    assert (result["f32"], result["i64"], result["jax"], result["bf16"], result["flag"]) == (0.5, 3, 2.0, 1.5, True)
    assert (result["color"], result["mode"], result["set"], result["3"]) == ("RED", "MIN", [1, 2], [1, 2])
    assert result["fn"].endswith(".adam")


def test_flatten_joins_names_with_dots():
    assert flatten({"optimizer": {"name": "adam", "betas": [0.9, 0.99]}, "empty": {}, "clip": None}) == {
        "optimizer.name": "adam",
        "optimizer.betas": "[0.9, 0.99]",
        "empty": "{}",
        "clip": None,
    }
    assert flatten({}) == {}
