"""The user's project: a folder with a Python module and, if they like, a `conf/`.

Its module is importable and its config files win over the packaged ones of the same name.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

_shell: ContextVar[Path | None] = ContextVar("shell", default=None)


def packaged_conf() -> Path:
    """The directory of the packaged config files: `nnx_fit.conf` where installed, else the checkout's `conf/`."""
    spec = importlib.util.find_spec("nnx_fit.conf")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(__file__).resolve().parents[2] / "conf"


def project_conf(directory: Path) -> Path | None:
    """The `conf/` of a project, or `None` without one (or where it is the packaged one)."""
    conf = directory / "conf"
    return conf.resolve() if conf.is_dir() and conf.resolve() != packaged_conf() else None


class ProjectSearchPath(SearchPathPlugin):
    """Puts the project's `conf/` in front: Hydra's own means append, and would leave its files in the shadow."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds `conf/` of the working directory, where there is one."""
        conf = project_conf(Path.cwd())
        if conf is not None:
            search_path.prepend(provider="project", path=f"file://{conf}")


def enter(directory: Path) -> None:
    """Makes a project's modules importable and its config files findable. May be called again."""
    importable(directory)
    Plugins.instance().register(ProjectSearchPath)


@contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """Works in a directory while the block runs; the one before stays what paths are shown from."""
    before = Path.cwd()
    token = _shell.set(shell_directory())
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
        _shell.reset(token)


def shell_directory() -> Path:
    """The directory that the command was given in."""
    return _shell.get() or Path.cwd()


def importable(directory: Path) -> None:
    """Puts a directory on `sys.path`, where a console script has no working directory."""
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def config_groups(*roots: Path | None) -> dict[str, set[str]]:
    """The config groups under some directories and the options of each.

    Args:
        *roots: Directories with config files; `None` is skipped.

    Returns:
        For each group (`"optimizer"`, `"hydra/output"`) the names of its options.
    """
    groups: dict[str, set[str]] = {}
    for root in filter(None, roots):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != ".":
                groups.setdefault(group, set()).add(file.stem)
    return groups
