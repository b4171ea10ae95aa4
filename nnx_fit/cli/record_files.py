"""The small files that a run keeps about itself in `.hydra/`, read with one clear error.

One that is damaged is named, and never taken for an empty one: a run must not go on with other settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from nnx_fit.errors import ConfigurationError


def read_yaml(file: Path, kind: type = DictConfig) -> Any:
    """The config, or the list, in a file that a run has written.

    Args:
        file: The file.
        kind: `DictConfig` or `ListConfig`.

    Raises:
        ConfigurationError: It is empty, cut off, or no YAML: names the file, and what can be done.
    """
    try:
        text = file.read_text(encoding="utf-8")
        found = OmegaConf.load(file) if text.endswith("\n") else None
        if isinstance(found, kind):
            return found
        wrong = "it holds something else" if found is not None else "it is cut off" if text else "it is empty"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        wrong = "it is no YAML" + (f" from line {mark.line + 1} on" if mark else "")
    except UnicodeDecodeError:
        wrong = "it is no text"
    except OSError as error:  # OmegaConf's, too, for what is neither settings nor a list
        wrong = f"it cannot be read ({error.strerror or error})"
    fix = "bring it back from a copy"
    if file.parent.name.startswith("resumed-"):
        fix += f", or remove the folder {file.parent}: the run then continues with the settings that it had before"
    raise ConfigurationError(f"{file} is damaged: {wrong}.\nThe run's settings are in it. Fix: {fix}.")
