"""The config that a finished run left behind, as the start of an evaluation of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from nnx_fit import configs
from nnx_fit.cli import project
from nnx_fit.cli.overrides import key_of, value_of

NAME = "saved_run"

# What belongs to the run that was, and not to the evaluation.
_FRESH = {"name": None, "resume": None, "ckpt_path": None, "hydra": {"output_subdir": None}}
_HYDRA = [{f"override hydra/{group}": "nnx_fit"} for group in ("job_logging", "output", "help")]


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, or `None` where it lies in none."""
    return next((parent for parent in checkpoint.absolute().parents if record(parent).is_file()), None)


def record(run_dir: Path) -> Path:
    """Where a run keeps its resolved config."""
    return run_dir / ".hydra" / "config.yaml"


def primary_config(words: Sequence[str]) -> str:
    """Chooses what an evaluation is composed from.

    Args:
        words: The overrides of the command line.

    Returns:
        The name of the primary config: the packaged one, or the run's own (which is registered under that name) when
        `ckpt_path` lies in a run directory and no other experiment is asked for.
    """
    ckpt_path = value_of(words, "ckpt_path")
    chosen = {key_of(word) for word in words if not word.startswith("-")}
    run_dir = run_of(Path(ckpt_path)) if ckpt_path else None
    if run_dir is None or "experiment" in chosen:
        return "config"
    saved = _load(run_dir)
    groups = [group for group in configs.GROUPS if group != "schema"]
    for group in chosen.intersection(groups):
        saved.pop(group, None)  # another option replaces the group; merging two would mix their settings
    defaults = ["schema/trainer@trainer", "_self_", *({group: None} for group in groups), *_HYDRA]
    node = OmegaConf.create({"defaults": defaults, **saved, **_FRESH})
    ConfigStore.instance().store(name=NAME, node=node, provider="nnx_fit")
    return NAME


def _load(run_dir: Path) -> dict[str, Any]:
    """The saved config; paths in the run's directory point to the new run's again."""
    saved: Any = OmegaConf.to_container(OmegaConf.load(record(run_dir)))
    hydra = record(run_dir).with_name("hydra.yaml")
    if hydra.is_file():
        settings = OmegaConf.load(hydra)
        project.importable(Path(OmegaConf.select(settings, "hydra.runtime.cwd")), last=True)
        saved = _replace_prefix(saved, OmegaConf.select(settings, "hydra.runtime.output_dir"), "${run_dir:}")
    return saved


def _replace_prefix(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return {key: _replace_prefix(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [_replace_prefix(value, old, new) for value in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node
