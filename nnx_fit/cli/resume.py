"""`nnx-fit resume RUN_DIR`: which directory is meant, and what its continuation is composed from.

A run continues where it was started: its relative paths, its module and its `conf/` are those of the working directory
of then. Nothing here loads JAX; whether a checkpoint is there is found out when the run is built.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nnx_fit.cli import saved_run
from nnx_fit.cli.overrides import key_of
from nnx_fit.cli.suggestions import did_you_mean
from nnx_fit.errors import ConfigurationError

_FEW = 4

# What a continuation cannot change, and what the user probably wants instead.
_FIXED = {
    "name": "the run stays in its directory",
    "hydra.run.dir": "the run stays in its directory",
    "resume": "the command says so already",
    "ckpt_path": "a run continues from its newest checkpoint. A new run starts from any: nnx-fit ckpt_path=...",
    "experiment": "the run keeps its config, of which single settings can be changed",
}


def find_run(word: str | None) -> Path:
    """The run directory that the command line names.

    Args:
        word: What follows `resume`; a relative path is one from the working directory.

    Returns:
        Its absolute path.

    Raises:
        ConfigurationError: There is none, or it is no run's.
    """
    if word is None:
        raise ConfigurationError("resume needs the directory of a run: nnx-fit resume outputs/...")
    run_dir = Path(os.path.abspath(word))
    if saved_run.record(run_dir).is_file():
        return run_dir
    if not run_dir.exists():
        siblings = [path.name for path in run_dir.parent.iterdir()] if run_dir.parent.is_dir() else []
        raise ConfigurationError(f"resume {word}: there is no such directory.{did_you_mean(run_dir.name, siblings)}")
    whole = saved_run.run_of(run_dir)
    if whole is not None:
        raise ConfigurationError(
            f"resume {word}: this lies in a run's directory. Write nnx-fit resume {os.path.relpath(whole)}"
        )
    runs = sorted(str(Path(word, path.name)) for path in run_dir.glob("*") if saved_run.record(path).is_file())
    if runs:
        few = ", ".join(runs[:_FEW]) + (", ..." if len(runs) > _FEW else "")
        raise ConfigurationError(f"resume {word}: this holds several runs. Resume one of them: {few}")
    raise ConfigurationError(
        f"resume {word}: this is no run's directory, or its run ended before it began: there is no .hydra/config.yaml."
    )


def working_directory(run_dir: Path) -> Path:
    """Where a run is continued: where it was started.

    Python modules are imported from there, and the record of where that was may be a stranger's. So it counts only if
    it is the present working directory, or a folder that the run lies in, as a run of a project does; that is said.

    Args:
        run_dir: The run.

    Returns:
        The directory; the present one, and a warning, where that of then is gone, or the whole project was copied.

    Raises:
        ConfigurationError: It was started elsewhere.
    """
    runtime = saved_run.hydra_settings(run_dir).get("runtime") or {}
    here, started = Path.cwd(), Path(runtime.get("cwd") or Path.cwd())
    if not started.is_dir():
        _say(f"The folder {started}, where this run was started, is gone: relative paths are taken from {here}.")
        return here
    if here.samefile(started):
        return here
    if _copied(run_dir, started, runtime.get("output_dir"), here):
        _say(f"This run was started in {started}, and is continued in {here}, where a copy of it is.")
        return here
    if started in run_dir.parents or started.resolve() in run_dir.resolve().parents:
        _say(f"Continued in {started}, where this run was started: Python modules are imported from there.")
        return started
    command = f"{shlex.join(['cd', str(started)])} && {shlex.join(['nnx-fit', 'resume', str(run_dir)])}"
    raise ConfigurationError(
        f"resume {os.path.relpath(run_dir)}: this run was started in {started}, which it does not lie in. "
        "To continue it, Python modules would be imported from there.\n"
        f"If that is what you want: {command}"
    )


def _copied(run_dir: Path, started: Path, output_dir: str | None, here: Path) -> bool:
    """Whether a run lies in the present folder as it lay in the one that it was started in."""
    if output_dir is None or not Path(output_dir).is_relative_to(started):
        return False
    return here / Path(output_dir).relative_to(started) == run_dir


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def primary_config(run_dir: Path, words: Sequence[str]) -> str:
    """Registers the run's config, with its own directory as that of the run that is about to start.

    Args:
        run_dir: The run.
        words: Flags and overrides.

    Returns:
        The name of the primary config.

    Raises:
        ConfigurationError: An override contradicts what it is to continue a run.
    """
    for word in words:
        if word in ("-m", "--multirun"):
            raise ConfigurationError(f"resume {word}: a run is continued by itself, and not in several ways at once.")
        if not word.startswith("-") and (reason := _FIXED.get(key_of(word))):
            raise ConfigurationError(f"{word}: not with resume, since {reason}.")
    job = saved_run.hydra_settings(run_dir).get("job") or {}
    kept: Any = OmegaConf.to_container(OmegaConf.create({n: job[n] for n in ("chdir", "env_set") if n in job}))
    hydra = {"output_subdir": None, "run": {"dir": str(run_dir)}, "job": kept}
    return saved_run.register(run_dir, words, {"hydra": hydra})
