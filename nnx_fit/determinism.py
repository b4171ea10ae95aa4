"""Reproducible kernels: what `Trainer(deterministic=True)` asks of XLA, and whether it can still be asked.

XLA reads its flags once, when JAX starts its backend. Only GPU kernels need any: those of CPUs and TPUs give the same
bits each time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping

logger = logging.getLogger("nnx_fit")

# Leaves out kernels whose threads race (atomic additions), and the autotuning that may choose others in each process.
FLAG = "--xla_gpu_deterministic_ops"


def ask_for_deterministic_kernels() -> None:
    """Sets what XLA needs for reproducible kernels, or warns where JAX runs without it already. May be called again."""
    warning = request(os.environ, _running_platform())
    if warning is not None:
        logger.warning("%s", warning)


def request(environment: MutableMapping[str, str], platform: str | None) -> str | None:
    """Adds the flag to `XLA_FLAGS`.

    Args:
        environment: The environment of the process.
        platform: Platform of the backend that JAX runs on already, such as `"gpu"`; `None` before it has started.

    Returns:
        What to tell the user when it is too late.
    """
    flags = environment.get("XLA_FLAGS", "").split()
    settings = [flag for flag in flags if flag.split("=")[0] == FLAG]
    if settings and settings[-1] in (FLAG, f"{FLAG}=true", f"{FLAG}=True", f"{FLAG}=1"):
        return None
    if platform is None:
        environment["XLA_FLAGS"] = " ".join([*(flag for flag in flags if flag not in settings), f"{FLAG}=true"])
        return None
    if platform != "gpu":
        return None
    return (
        "Trainer(deterministic=True) came too late: JAX runs on the GPU already, and goes on without deterministic "
        "kernels. Fix: make the Trainer before the model and the first array, or set the environment variable "
        f'XLA_FLAGS="{FLAG}=true".'
    )


def _running_platform() -> str | None:
    import jax
    from jax._src import xla_bridge  # there is no public way to ask without starting it

    return jax.default_backend() if xla_bridge.backends_are_initialized() else None
