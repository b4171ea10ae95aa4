"""`seed_everything`: the same numbers again, everywhere, and nothing but a seed accepted."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest
from flax import nnx

import nnx_fit as nf


def drawn(seed):
    rngs = nf.seed_everything(seed)
    return random.random(), np.random.rand(), float(jax.random.uniform(rngs.params())), int(rngs.dropout.count[...])


def test_the_same_seed_gives_the_same_numbers_and_another_gives_others():
    first, again, other = drawn(3), drawn(3), drawn(4)
    assert first == again
    assert all(mine != theirs for mine, theirs in zip(first[:3], other[:3], strict=True))


def test_the_streams_are_those_of_nnx_rngs():
    rngs, expected = nf.seed_everything(5), nnx.Rngs(5)
    assert jax.random.uniform(rngs.anything()) == jax.random.uniform(expected.anything())


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(7), np.uint32(7)])
def test_whole_numbers_in_range_are_seeds(seed):
    assert isinstance(nf.seed_everything(seed), nnx.Rngs)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None, True, np.float32(1)])
def test_anything_else_is_refused_by_value(seed):
    with pytest.raises(nf.ConfigurationError, match=r"seed_everything\(.*whole number from 0 to 2\*\*32 - 1"):
        nf.seed_everything(seed)
