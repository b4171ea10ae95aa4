"""Names of checkpoints: from a template such as `"{epoch}-{step}"`, safe as file names, never one that is taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from nnx_fit.errors import ConfigurationError

DEFAULT = "{epoch}-{step}"
LAST = "last"
_UNSAFE = re.compile(r"[^-.+\w]")
_FIELD = re.compile(r"\{([^{}:]+)(:[^{}]*)?\}")


def check_template(template: str) -> None:
    """Refuses a template that cannot name a checkpoint.

    Raises:
        ConfigurationError: Naming the template and the fix.
    """
    if not isinstance(template, str) or not template or "/" in _FIELD.sub("", template):
        raise _invalid(template, "expected a file name, not a path", "put directories into dirpath")
    if template.startswith(LAST):
        raise _invalid(template, f"names that start with {LAST!r} are for the state a run ended in", "use another name")
    try:
        name = format_name(template, {"epoch": 0, "step": 0} | dict.fromkeys(metric_fields(template), 0.5))
    except ValueError as error:
        raise _invalid(template, str(error), 'write fields like "{val/loss:.3f}"') from error
    if "{" in name or "}" in name:
        raise _invalid(template, "a brace is not closed or a field has no name", 'write fields like "{val/loss:.3f}"')


def metric_fields(template: str) -> list[str]:
    """The metrics that a template names."""
    return [name for name, _ in _FIELD.findall(template) if name not in ("epoch", "step")]


def format_name(template: str, values: Mapping[str, float], *, insert_names: bool = True) -> str:
    """Fills a template: `"{epoch}-{val/loss:.2f}"` -> `epoch=2-val_loss=0.31`. A value that is missing is `nan`.

    Args:
        template: The template; each field becomes `name=value`.
        values: `epoch`, `step` and metrics.
        insert_names: Whether it does; otherwise it becomes the value alone.
    """

    def fill(match: re.Match[str]) -> str:
        name, spec = match[1], (match[2] or ":")[1:]
        value = format(values.get(name, float("nan")), spec)
        return f"{_UNSAFE.sub('_', name)}={value}" if insert_names else value

    return _FIELD.sub(fill, template)


def free_path(path: Path, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """The path, or with the first of `-v1`, `-v2`, ... that is not taken."""
    candidate, version = path, 0
    while taken(candidate):
        version += 1
        candidate = path.with_name(f"{path.name}-v{version}")
    return candidate


def _invalid(template: object, why: str, fix: str) -> ConfigurationError:
    return ConfigurationError(f"ModelCheckpoint(filename={template!r}): {why}. Fix: {fix}.")
