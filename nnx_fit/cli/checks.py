"""What a composed config must satisfy before anything is built, and the sentences that say what is wrong with it.

Hydra's own checks end where a key is added with `+` or comes from a file without a schema; these do not.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nnx_fit import configs
from nnx_fit.cli.suggestions import did_you_mean, listing, nearest
from nnx_fit.errors import ConfigurationError

_RUN_KEYS = tuple(field.name for field in fields(configs.RunConfig))
_FEW = 12
_PLAIN = {int: "int", float: "float", bool: "bool", str: "str", type(None): "null"}


def plain_types(annotation: Any) -> tuple[type, ...] | None:
    """The plain types an annotation is made of, or `None` where it is made of anything else."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    return tuple(members) if all(member in _PLAIN for member in members) else None


def expected_type(schema: Any, name: str) -> str | None:
    """What a field of a schema takes, in words: `"int or null"`."""
    members = plain_types(typing.get_type_hints(schema).get(name)) if isinstance(schema, type) else None
    return describe(members) if members else None


def describe(members: Iterable[type]) -> str:
    """Plain types in words."""
    return " or ".join(_PLAIN[member] for member in members)


def shown(value: Any) -> str:
    """A value as one would type it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def unknown_key(key: str, candidates: Iterable[str], *, closed: bool = False) -> str:
    """The sentence for a key that does not exist.

    Args:
        key: The full key.
        candidates: Full keys that exist.
        closed: Whether a new key cannot be added with `+`.
    """
    group, _, name = key.rpartition(".")
    if group == "trainer" and name in configs.OWN_GROUP:
        return f"{key}: not a plain value of the trainer. It is set by {configs.OWN_GROUP[name]}."
    known = sorted(candidate for candidate in set(candidates) if "._" not in candidate)
    siblings = {candidate.rpartition(".")[2]: candidate for candidate in known if _parent(candidate) == group}
    match = nearest(name, siblings)
    elsewhere = next((candidate for candidate in known if candidate.rpartition(".")[2] == name), None)
    suggestion = siblings[match] if match else elsewhere
    if suggestion:
        return f"{key}: no such setting. Did you mean {suggestion}?"
    if not siblings and group in configs.GROUPS:
        return f"{key}: no such setting, since {group} is null. Choose an option first: {group}=..."
    few = f"{group or 'The config'} has {listing(siblings)}."
    many = "nnx-fit --cfg job" + (f" -p {group}" if group else "") + " shows those that there are."
    addition = "" if closed else f"\nTo add a new one write +{key}=..."
    return f"{key}: no such setting. {few if 0 < len(siblings) <= _FEW else many}{addition}"


def wrong_type(key: str, value: Any, expected: str | None) -> str:
    """The sentence for a value of the wrong type."""
    return f"{key}={shown(value)}: expected {expected or 'another type'}, got {type(value).__name__}."


def not_a_choice(key: str, value: Any, choices: Iterable[str]) -> str:
    """The sentence for a value that is none of a fixed set."""
    choices = tuple(choices)
    return f"{key}={shown(value)}: expected one of {', '.join(choices)}.{did_you_mean(str(value), choices)}"


def check_config(cfg: DictConfig, command: str) -> None:
    """Refuses a config that cannot be run.

    Args:
        cfg: The composed config, without Hydra's own part.
        command: `"fit"`, `"validate"`, `"test"` or `"predict"`.

    Raises:
        ConfigurationError: Naming the key, the value, what was expected and the nearest valid name.
    """
    known = {*_RUN_KEYS, *configs.GROUPS}
    for key in map(str, cfg):
        if key not in known and nearest(key, known, cutoff=0.8):
            raise ConfigurationError(unknown_key(key, known))
    check_node({key: cfg[key] for key in _RUN_KEYS if key in cfg}, configs.RunConfig, prefix="")
    _check_run(cfg, command)
    trainer = cfg.get("trainer")
    if not isinstance(trainer, DictConfig):
        raise ConfigurationError(
            f"trainer={shown(trainer)}: expected the Trainer's arguments, for example trainer=default."
        )
    check_node(trainer, configs.TrainerConfig, prefix="trainer.")
    for group in ("callbacks", "logger"):
        _check_entries(cfg, group)
    for group, example in (("model", "digits_cnn"), ("data", "digits")):
        _check_chosen(cfg, group, example)


def check_node(node: Mapping[Any, Any], schema: type, prefix: str) -> None:
    """Holds the names and values of a mapping against a dataclass."""
    known = {field.name: field for field in fields(schema)}
    typed = OmegaConf.structured(schema)
    for name, value in node.items():
        if name not in known:
            raise ConfigurationError(
                unknown_key(f"{prefix}{name}", [f"{prefix}{other}" for other in known], closed=True)
            )
        try:
            typed[name] = value
        except OmegaConfBaseException:
            raise ConfigurationError(wrong_type(f"{prefix}{name}", value, expected_type(schema, name))) from None
        choices = known[name].metadata.get("choices")
        if choices and typed[name] is not None and typed[name] not in choices:
            raise ConfigurationError(not_a_choice(f"{prefix}{name}", value, choices))


def _check_run(cfg: DictConfig, command: str) -> None:
    seed = cfg.get("seed", 0)
    if not 0 <= int(seed) < 2**32:
        raise ConfigurationError(f"seed={seed}: expected a number from 0 to 2**32 - 1.")
    if cfg.get("resume") is not None and cfg.get("name") is None:
        raise ConfigurationError(f"resume={cfg.resume} needs name=NAME: only a named run can be found again.")
    ckpt_path = cfg.get("ckpt_path")
    if command != "fit" and ckpt_path in (None, "last", "best"):
        what = "needs ckpt_path=PATH" if ckpt_path is None else f"cannot take ckpt_path={ckpt_path}"
        raise ConfigurationError(
            f"{command} {what}: the path of a checkpoint, for example outputs/.../checkpoints/epoch=2-step=15."
        )


def _check_entries(cfg: DictConfig, group: str) -> None:
    entries = cfg.get(group)
    if entries is None:
        return
    if not isinstance(entries, DictConfig):
        raise ConfigurationError(f"{group}={shown(entries)}: expected a dict of named entries, each with a _target_.")
    if "_target_" in entries:
        raise ConfigurationError(f"{group}: expected a dict of named entries; put this one below {group}.NAME.")
    for name, entry in entries.items():
        if entry is None:
            continue
        if not isinstance(entry, DictConfig) or "_target_" not in entry:
            complete = [
                str(other) for other, node in entries.items() if isinstance(node, DictConfig) and "_target_" in node
            ]
            raise ConfigurationError(f"{group}.{name} has no _target_.{did_you_mean(str(name), complete)}")
        schema = configs.schema_of_target(entry["_target_"])
        if schema is not None:
            check_node(entry, schema, prefix=f"{group}.{name}.")


def _check_chosen(cfg: DictConfig, group: str, example: str) -> None:
    node = cfg.get(group)
    if isinstance(node, DictConfig) and "_target_" in node:
        return
    if isinstance(node, DictConfig) and len(node):
        raise ConfigurationError(f"{group} has no _target_: which class do its settings belong to?")
    raise ConfigurationError(
        f"{group}={shown(None) if node is None or isinstance(node, DictConfig) else shown(node)}: nothing is chosen. "
        f"Expected {group}={example}, an experiment that sets it, or {group}._target_ in your own conf/."
    )


def _parent(key: str) -> str:
    return key.rpartition(".")[0]
