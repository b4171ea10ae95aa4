"""The config that a run left behind, as the start of an evaluation of its checkpoints, or of its own continuation."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from nnx_fit import configs
from nnx_fit.cli import record_files
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


def latest_record(run_dir: Path) -> Path:
    """The config that a run was started with last: its first one, unless it was continued since."""
    later = {
        int(number[1]): folder / "config.yaml"
        for folder in record(run_dir).parent.glob("resumed-*")
        if (number := re.fullmatch(r"resumed-(\d+)", folder.name)) and (folder / "config.yaml").is_file()
    }
    return later[max(later)] if later else record(run_dir)


def hydra_settings(run_dir: Path) -> Any:
    """Hydra's own settings when the run was started last; an empty config where there is no record of them."""
    file = latest_record(run_dir).with_name("hydra.yaml")
    settings = record_files.read_yaml(file) if file.is_file() else OmegaConf.create()
    return OmegaConf.select(settings, "hydra") or OmegaConf.create()


def primary_config(words: Sequence[str]) -> str:
    """Chooses what an evaluation is composed from.

    Args:
        words: The overrides of the command line.

    Returns:
        The name of the primary config: the packaged one, or the run's own (which is registered under that name) when
        `ckpt_path` lies in a run directory and no other experiment is asked for.
    """
    ckpt_path = value_of(words, "ckpt_path")
    run_dir = run_of(Path(ckpt_path)) if ckpt_path else None
    if run_dir is None or "experiment" in {key_of(word) for word in words if not word.startswith("-")}:
        return "config"
    return register(run_dir, words, _FRESH)


def register(run_dir: Path, words: Sequence[str], changes: Mapping[str, Any]) -> str:
    """Makes a run's config one that Hydra composes from, typed as that of the run was.

    Args:
        run_dir: The run.
        words: The overrides of the command line, which may choose another option for a whole group.
        changes: Top-level keys that are not to be as they were.

    Returns:
        The name of the config.
    """
    saved = _load(run_dir)
    groups = [group for group in configs.GROUPS if group != "schema"]
    for group in {key_of(word) for word in words if not word.startswith("-")}.intersection(groups):
        saved.pop(group, None)  # another option replaces the group; merging two would mix their settings
    defaults = ["schema/trainer@trainer", "_self_", *({group: None} for group in groups), *_HYDRA]
    node = OmegaConf.create({**saved, **changes, "defaults": defaults})
    ConfigStore.instance().store(name=NAME, node=node, provider="nnx_fit")
    return NAME


def _load(run_dir: Path) -> dict[str, Any]:
    """The saved config; paths in the run's directory point to the directory that is under way."""
    saved: Any = OmegaConf.to_container(record_files.read_yaml(latest_record(run_dir)))
    runtime = hydra_settings(run_dir).get("runtime") or {}
    _say_where_modules_come_from(runtime.get("cwd"))
    output_dir = runtime.get("output_dir")
    return _replace_prefix(saved, output_dir, "${run_dir:}") if output_dir else saved


def _say_where_modules_come_from(started_in: str | None) -> None:
    """A run may be a stranger's: what it says of where its modules are is for the user to follow, not for us."""
    if started_in is not None and Path(started_in).is_dir() and not Path.cwd().samefile(started_in):
        print(
            f"This run was started in {started_in}; Python modules are imported from {Path.cwd()} and the installed "
            f"packages.\nIf those of the run are meant: cd {started_in}",
            file=sys.stderr,
        )


def _replace_prefix(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return {key: _replace_prefix(value, old, new) for key, value in node.items()}
    if isinstance(node, list):
        return [_replace_prefix(value, old, new) for value in node]
    if isinstance(node, str) and (node == old or node.startswith(f"{old}/")):
        return new + node[len(old) :]
    return node
