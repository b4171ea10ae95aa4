"""What a Trainer's arguments mean when they are left out or given in one of several forms."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.logger import Logger
from nnx_fit.loggers.tensorboard import TensorBoardLogger


def own_directory() -> Path:
    """A directory that no two runs share: `outputs/<date>/<time>-<id>`."""
    now = datetime.datetime.now()
    return Path("outputs", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}-{secrets.token_hex(3)}")


def make_loggers(setting: Any, root: Path) -> list[Logger]:
    """The loggers that `Trainer(logger=...)` asks for.

    Args:
        setting: The argument.
        root: The run's directory.

    Raises:
        ConfigurationError: Something is no logger.
    """
    if setting is None or setting is False:
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
