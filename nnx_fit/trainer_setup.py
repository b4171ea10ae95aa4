"""What a Trainer's arguments mean when they are left out or given in one of several forms."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnx_fit import option_checks
from nnx_fit.callbacks.profiler import ProfilerCallback
from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.logger import Logger
from nnx_fit.loggers.tensorboard import TensorBoardLogger
from nnx_fit.options import Options
from nnx_fit.profiling import AdvancedProfile, Profile, SimpleProfile

PROFILES: dict[str, type[Profile]] = {"simple": SimpleProfile, "advanced": AdvancedProfile, "jax": Profile}


def run_directory(setting: Any) -> Path:
    """The directory of `Trainer(default_root_dir=...)`; by default one that no two runs share.

    Raises:
        ConfigurationError: It is no path.
    """
    if setting is not None:
        return option_checks.directory(setting)
    now = datetime.datetime.now()
    return Path("outputs", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}-{secrets.token_hex(3)}")


def make_loggers(setting: Any, root: Path, options: Options) -> list[Logger]:
    """The loggers that `Trainer(logger=...)` asks for; a trial run and a barebones one have none.

    Args:
        setting: The argument.
        root: The run's directory.
        options: The Trainer's options.

    Raises:
        ConfigurationError: Something is no logger, or a logger was given to a barebones Trainer.
    """
    if options.barebones and not (setting is None or isinstance(setting, bool)):
        raise _not_bare("logger", setting, "logs nothing")
    if setting is None or setting is False or options.barebones or options.fast_dev_run:
        return []
    if setting is True:
        return [TensorBoardLogger(root)]
    loggers = list(setting) if isinstance(setting, Iterable) else [setting]
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise ConfigurationError(
                f"Trainer(logger=...) got a {type(logger).__name__}, which is no logger.\n"
                "Fix: pass True, False, an nnx_fit logger such as CSVLogger(...), or a list of them."
            )
    return loggers


def make_profilers(setting: Any, options: Options) -> tuple[Profile, ProfilerCallback | None]:
    """What `Trainer(profiler=...)` asks for: a profile of the host, or a callback that traces the device.

    Args:
        setting: The argument.
        options: The Trainer's options.

    Raises:
        ConfigurationError: It is no profiler, or was given to a barebones Trainer.
    """
    if setting is not None and options.barebones:
        raise _not_bare("profiler", setting, "measures nothing")
    if setting is None or isinstance(setting, ProfilerCallback):
        return Profile(), setting
    if not isinstance(setting, str) or setting not in PROFILES:
        known = ", ".join(map(repr, PROFILES))
        fix = f"pass one of {known}, or a ProfilerCallback"
        raise option_checks.invalid("profiler", setting, "there is no such profiler", fix)
    return PROFILES[setting](), ProfilerCallback() if setting == "jax" else None


def _not_bare(name: str, value: Any, what: str) -> ConfigurationError:
    shown = repr(value) if isinstance(value, str) else type(value).__name__
    return ConfigurationError(
        f"Trainer(barebones=True, {name}={shown}): a barebones Trainer {what}. Fix: drop one of them."
    )
