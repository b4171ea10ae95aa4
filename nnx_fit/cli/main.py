"""`nnx-fit`: where the command starts.

It puts the words in order, lets Hydra compose the config and run the job (once, or once for each job of a sweep), and
turns what goes wrong into a few lines and an exit status. No JAX is imported before a job runs.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import TextIO, cast

import hydra

import nnx_fit
from nnx_fit import configs
from nnx_fit.cli import composition, errors, project, resume, saved_run
from nnx_fit.cli.job import TASKS
from nnx_fit.cli.overrides import COMMANDS, rewrite, split_command


def main() -> None:
    """The console script."""
    try:
        status = run(sys.argv[1:])
    except SystemExit:
        _ignore_signals()
        raise
    if status == 130:
        _ignore_signals()
    sys.exit(status)


def run(words: Sequence[str]) -> int:
    """Runs one command.

    Args:
        words: What follows `nnx-fit` on the command line.

    Returns:
        The exit status: 0, 1 after a mistake or an exception, 130 after Ctrl-C.
    """
    if "--version" in words:
        print(f"nnx-fit {nnx_fit.__version__}")
        return 0
    overrides: list[str] = []
    config_name = "config"
    try:
        command, overrides, word = split_command(words)
        run_dir = resume.find_run(word) if command == "resume" and not _asks_for_help(overrides) else None
        folder = Path.cwd() if run_dir is None else resume.working_directory(run_dir)
        with project.working_in(folder):
            project.enter(folder)
            configs.register()
            overrides = rewrite(overrides, _groups(overrides))
            if run_dir is not None:
                config_name = resume.primary_config(run_dir, overrides)
            elif command != "fit":
                config_name = saved_run.primary_config(overrides)
            overrides = composition.with_missing_arguments(config_name, overrides)
            _start(command, overrides, config_name)
    except KeyboardInterrupt as interrupt:
        print("Interrupted.", file=sys.stderr)
        _leave_if_at_once(interrupt, 130)
        return 130
    except SystemExit as ending:
        _leave_if_at_once(ending, 143)
        raise
    except Exception as error:
        errors.report(error, overrides, config_name)
        return 1
    return 0


def _asks_for_help(words: Sequence[str]) -> bool:
    return not {"-h", "--help", "--hydra-help"}.isdisjoint(words)


def _ignore_signals() -> None:
    """The run is over: one more Ctrl-C would only break off the interpreter's own end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):  # not in the main thread
            signal.signal(number, signal.SIG_IGN)


def _leave_if_at_once(error: BaseException, status: int) -> None:
    """After a second signal nothing is waited for: writers in the background would report that they were cut off."""
    interrupts = sys.modules.get("nnx_fit.interrupts")
    if interrupts is not None and interrupts.ends_at_once(error):  # without that module no run was under way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _start(command: str, overrides: Sequence[str], config_name: str) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and the errors are ours to explain
    os.environ["NNX_FIT_RUN_ID"] = secrets.token_hex(3)  # in the environment, so that a sweep's workers share it
    if "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = _without_command(os.environ["COMP_LINE"])
    task = hydra.main(version_base="1.3", config_path=str(project.packaged_conf()), config_name=config_name)
    saved = sys.argv
    sys.argv = ["nnx-fit", *overrides]
    sweep = not {"-m", "--multirun"}.isdisjoint(overrides)  # whose lines say which of the jobs it was
    try:
        with nullcontext() if sweep else redirect_stderr(cast(TextIO, errors.WithoutJobLine(sys.stderr))):
            task(TASKS[command])()
    finally:
        sys.argv = saved


def _without_command(line: str) -> str:
    """The line that is being completed, without the command, which Hydra's completion would take for an override."""
    program, _, rest = line.partition(" ")
    first, blank, others = rest.lstrip().partition(" ")
    if first == "resume":
        _, blank, others = others.lstrip().partition(" ")  # nor does it know what to make of the directory
    return f"{program} {others}" if first in COMMANDS and blank else line


def _groups(overrides: Sequence[str]) -> dict[str, set[str]]:
    extra = None
    for flag in ("--config-dir", "-cd"):
        if flag in overrides[:-1]:
            extra = Path(overrides[overrides.index(flag) + 1])
    return project.config_groups(project.packaged_conf(), project.project_conf(Path.cwd()), extra)
