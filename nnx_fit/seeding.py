"""`seed_everything`: one seed for Python, NumPy and the RNG streams of a module."""

from __future__ import annotations

import random

import numpy as np
from flax import nnx

from nnx_fit.errors import ConfigurationError


def seed_everything(seed: int) -> nnx.Rngs:
    """Seeds Python's `random` and NumPy's legacy generator, and gives the RNG streams for a module.

    Args:
        seed: A whole number from 0 to 2**32 - 1.

    Returns:
        `nnx.Rngs(seed)`; JAX itself has no global generator.

    Raises:
        ConfigurationError: The seed is no such number.

    Example:
        >>> import nnx_fit as nf
        >>> rngs = nf.seed_everything(0)
        >>> rngs.params().shape
        ()
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ConfigurationError(f"seed_everything({seed!r}): expected a whole number from 0 to 2**32 - 1.")
    random.seed(int(seed))
    np.random.seed(int(seed))
    return nnx.Rngs(int(seed))
