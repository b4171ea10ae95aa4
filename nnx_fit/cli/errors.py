"""How the command ends when something is wrong.

A mistake in the settings is one to three lines; an exception in the user's own code is shown with the user's frames
and none of the machinery's. `NNX_FIT_TRACEBACK=1` shows everything.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from nnx_fit import configs
from nnx_fit.cli import project
from nnx_fit.cli.checks import expected_type, not_a_choice, unknown_key
from nnx_fit.cli.composition import known_keys
from nnx_fit.cli.overrides import key_of
from nnx_fit.errors import NnxFitError

SHOW_ALL = "NNX_FIT_TRACEBACK"


def report(error: Exception, words: Sequence[str], config_name: str = "config") -> None:
    """Writes to standard error what went wrong.

    Args:
        error: What was raised.
        words: The overrides of the command line.
        config_name: The primary config they were applied to.
    """
    if os.environ.get(SHOW_ALL) == "1":
        traceback.print_exception(error)
    else:
        print(explain(error, words, config_name), file=sys.stderr)


class WithoutJobLine:
    """Standard error without the line with which Hydra announces an exception that is about to be explained."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what is not that line."""
        if text.startswith("Error executing job with overrides"):
            return len(text)
        return self._stream.write(text)

    def close(self) -> None:
        """Leaves the stream open, which belongs to the process: a logging handler may have kept this one."""


def explain(error: Exception, words: Sequence[str], config_name: str = "config") -> str:
    """What went wrong, in as few lines as it takes."""
    if isinstance(error, InterpolationResolutionError) and isinstance(error.__cause__, NnxFitError):
        error = error.__cause__
    if isinstance(error, NnxFitError):
        place = _last_user_line(error.__traceback__)
        return f"{type(error).__name__}: {error}" + (f"\n({place})" if place else "")
    sentence = _composition_mistake(error, words, config_name)
    if sentence is not None:
        return f"ConfigurationError: {sentence}"
    root = error
    while isinstance(root, InstantiationException) and isinstance(root.__cause__, Exception):
        root = root.__cause__
    return _with_user_frames(root)


def _composition_mistake(error: Exception, words: Sequence[str], config_name: str) -> str | None:
    """The sentence for what Hydra and OmegaConf refuse, or `None` for any other exception."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    if isinstance(error, yaml.YAMLError):
        return _bad_yaml(error)
    if isinstance(error, OverrideParseException):
        reason = next(line for line in str(error).splitlines() if not line.startswith("Error parsing override"))
        return f"{error.override}: not an override that can be read: {reason.rstrip('.')}."
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        where = str(error).partition(":")[0] if str(error).startswith("In '") else ""
        sentence = _omegaconf_mistake(cause, words, config_name)
        return f"{sentence} ({where[0].lower()}{where[1:]})" if where else sentence
    if isinstance(error, ConfigCompositionException) and isinstance(cause, yaml.YAMLError):
        return _bad_yaml(cause)
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf_mistake(error, words, config_name)
    if isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
    origin = _innermost_module(error)
    if isinstance(error, (ValueError, RecursionError)) and origin.startswith(("hydra.", "omegaconf.")):
        return str(error).splitlines()[0]
    if (
        isinstance(error, OSError)
        and origin in ("pathlib", "pathlib._local", "os")
        and not _last_user_line(error.__traceback__)
    ):
        return (
            f"cannot write to {error.filename}: {error.strerror}.\n"
            "Fix: run in a folder you may write to, or choose another one with hydra.run.dir=DIRECTORY."
        )
    return None


def _missing_file(error: MissingConfigException) -> str:
    file, options = str(error.missing_cfg_file or ""), list(error.options or ())
    group, _, name = file.rpartition("/")
    if not group or not options:
        return str(error).splitlines()[0]
    return not_a_choice(group, name, [option for option in options if option]).replace("'", "")


def _bad_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{mark.name}, line {mark.line + 1}: {problem}." if mark else f"a config file is not valid YAML: {problem}."


def _omegaconf_mistake(error: OmegaConfBaseException, words: Sequence[str], config_name: str) -> str:
    key = str(error.full_key or error.key or "")
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value. Write {key}=..."
    override = next((word for word in words if key_of(word) == key), None)
    if isinstance(error, ValidationError) and key:
        text = override.split("=", 1)[1] if override and "=" in override else None
        name = key.rpartition(".")[2]
        expected = expected_type(error.object_type, name)
        if text is not None:
            return f"{key}={text}: expected {expected or 'another type'}."
        return f"{key}: {_first_line(error)}" + (f" Expected {expected}." if expected else "")
    if override or isinstance(error, ConfigKeyError):
        return unknown_key(key, [*known_keys(config_name, words, without=key), *configs.GROUPS])
    return f"{key}: {_first_line(error)}" if key else _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") + "."


def _innermost_module(error: BaseException) -> str:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def _with_user_frames(error: BaseException) -> str:
    """The exception with the frames of the user's files alone; with all of them where there is none."""
    frames = _user_frames(error.__traceback__)
    last = "".join(traceback.format_exception_only(error)).rstrip()
    if not frames and not isinstance(error, SyntaxError):
        return "".join(traceback.format_exception(error)).rstrip()
    shown = "".join(traceback.format_list(frames))
    return f"In your code ({SHOW_ALL}=1 shows every frame):\n{shown}{last}"


def _last_user_line(tb: TracebackType | None) -> str:
    frames = _user_frames(tb)
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}" if frames else ""


def _user_frames(tb: TracebackType | None) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(tb) if _is_users(frame.filename)]


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename).absolute()
    package = Path(project.__file__).absolute().parents[1]
    libraries = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib")}
    scripts = Path(sysconfig.get_path("scripts"))
    return not any(path.is_relative_to(folder) for folder in (package, scripts, *libraries))
