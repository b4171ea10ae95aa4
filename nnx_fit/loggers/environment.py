"""What a run ran on and with: versions, platform, devices, source revision. Read once, when the settings are logged."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = (
    "nnx-fit", "flax", "jax", "jaxlib", "optax", "orbax-checkpoint", "numpy", "grain", "hydra-core", "tensorboardX",
    "torch", "metrax",
)  # fmt: skip


def environment_text() -> str:
    """The environment as a Markdown table."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in environment().items()]
    return "\n".join(["| what | value |", "|---|---|", *rows])


def environment() -> dict[str, str]:
    """What the process runs on and with, by name; what cannot be found out is left out."""
    found = {
        "command": shlex.join(sys.orig_argv),
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": str(os.cpu_count()),
        "devices": _devices(),
        "processes": str(jax.process_count()),
        **_revision(Path.cwd()),
        **_versions(),
    }
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")}
    return {name: value for name, value in (found | flags).items() if value}


def _devices() -> str:
    kinds = [f"{device.platform} ({device.device_kind})" for device in jax.devices()]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _revision(directory: Path) -> dict[str, str]:
    """The source's revision, and whether tracked files differ from it; nothing outside a git repository."""
    revision = _git(directory, "rev-parse", "HEAD")
    if revision is None:
        return {}
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    branch = _git(directory, "symbolic-ref", "--short", "-q", "HEAD")
    dirty = {} if not changed else {"git changes": f"{len(changed.splitlines())} tracked files differ"}
    return {"git revision": revision, "git branch": branch or "", **dirty}


def _git(directory: Path, *arguments: str) -> str | None:
    # Without optional locks: a run must not write to the repository that it merely describes.
    settings = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, env=settings, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
