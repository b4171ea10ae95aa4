"""The health check: the first value that is not finite, by kind and name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.errors import NonFiniteError
from nnx_fit.programs.health import Health

FINE = jnp.ones(2)


def check(**groups):
    health = Health()
    return health, health.check({kind: (list(named), list(named.values())) for kind, named in groups.items()})


def test_finite_values_pass():
    health, flags = check(loss={"loss": FINE}, gradient={"a": FINE, "b": FINE})
    np.testing.assert_array_equal(flags, [True] * 3)
    health.raise_if_ill(flags, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_element_is_named_with_its_step_and_kind(bad):
    health, flags = check(metric={"acc": FINE}, gradient={"net.kernel": FINE.at[1].set(bad)})
    with pytest.raises(NonFiniteError, match=r"Step 12: .* is the gradient `net\.kernel`\."):
        health.raise_if_ill(flags, 12)


def test_the_first_one_leads_and_the_others_are_counted():
    health, flags = check(Variable={name: jnp.array(np.nan) for name in "abcdef"})
    with pytest.raises(NonFiniteError, match=r"Variable `a` and 5 more \(Variable `b`, .*`c`, .*`d`, \.\.\.\)"):
        health.raise_if_ill(flags, 1)


def test_integers_and_keys_are_never_ill():
    health, flags = check(loss={"loss": FINE}, Variable={"count": jnp.ones(2, jnp.int32), "key": jax.random.key(0)})
    assert flags.shape == (1,)
    health.raise_if_ill(flags, 1)
