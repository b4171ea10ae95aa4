"""Composing the config beside the run itself, to find out which names it has."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nnx_fit.cli import project
from nnx_fit.cli.overrides import key_of


def with_missing_arguments(config_name: str, words: Sequence[str]) -> list[str]:
    """Lets an override set an argument that the config files do not mention: any argument of any object.

    Whether the object takes it is found out when its class is known, before it is built. Objects with a schema have all
    their arguments in the config already.

    Args:
        config_name: The primary config.
        words: Flags and overrides.

    Returns:
        The words; with a `+` where Hydra would refuse a key below a `_target_` only because it is new.
    """
    candidates = [word for word in words if "=" in word and word[0] not in "-+~" and "." in key_of(word)]
    if not candidates:
        return list(words)
    cfg = _composed(config_name, [word for word in words if word not in candidates])
    return [f"+{word}" if word in candidates and _is_new_argument(cfg, key_of(word)) else word for word in words]


def _is_new_argument(cfg: DictConfig | None, key: str) -> bool:
    owner, _, name = key.rpartition(".")
    node = None if cfg is None else OmegaConf.select(cfg, owner, throw_on_missing=False)
    return (
        isinstance(node, DictConfig)
        and "_target_" in node
        and name not in node
        and OmegaConf.get_type(node) is dict
        and not owner.startswith("hydra.")
    )


def known_keys(config_name: str, words: Sequence[str], *, without: str) -> list[str]:
    """Full keys of the config as it is without one bad override.

    Args:
        config_name: The primary config.
        words: The overrides of the command line.
        without: Key of the bad override.

    Returns:
        The keys; of the config without any override where the others are bad, too.
    """
    for overrides in ([word for word in words if key_of(word) != without], []):
        cfg = _composed(config_name, overrides)
        if cfg is not None:
            return _keys(cfg)
    return []


def _composed(config_name: str, words: Sequence[str]) -> DictConfig | None:
    """The config, or `None` where it cannot be composed, for which Hydra's own attempt will say the reason."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(project.packaged_conf())):
        try:
            return compose(config_name, overrides=[word for word in words if "=" in word or word.startswith("~")])
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError):
            return None


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in map(str, node):
        keys.append(f"{prefix}{name}")
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        if isinstance(child, DictConfig) and not OmegaConf.is_interpolation(node, name) and not child._is_none():
            keys.extend(_keys(child, f"{prefix}{name}."))
    return keys
