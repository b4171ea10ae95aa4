"""Deterministic kernels: the flag that XLA knows, set in time, and said when it is too late."""

import os
import subprocess
import sys

import pytest

from nnx_fit.determinism import FLAG, request

PROGRAM = """
import os
import nnx_fit as nf
trainer = nf.Trainer(max_epochs=1, deterministic=True, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
print(os.environ["XLA_FLAGS"])
import jax.numpy as jnp
print(float(jnp.ones(3).sum()))
nf.Trainer(max_epochs=1, deterministic=True, logger=False)
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"{FLAG}=true"),
        ("--xla_a=1", f"--xla_a=1 {FLAG}=true"),
        (f"{FLAG}=false --xla_a=1", f"--xla_a=1 {FLAG}=true"),
        (f"{FLAG}=true", f"{FLAG}=true"),
        (FLAG, FLAG),
    ],
)
def test_flag_is_added_to_those_that_are_there(before, after):
    environment = {} if before is None else {"XLA_FLAGS": before}
    assert request(environment, None) is None
    assert environment == {"XLA_FLAGS": after}


def test_too_late_on_a_gpu_is_said_with_the_fix():
    environment = {"XLA_FLAGS": "--xla_a=1"}
    warning = request(environment, "gpu")
    assert warning is not None and "too late" in warning and f'XLA_FLAGS="{FLAG}=true"' in warning
    assert environment == {"XLA_FLAGS": "--xla_a=1"}


@pytest.mark.parametrize(("environment", "platform"), [({"XLA_FLAGS": f"{FLAG}=true"}, "gpu"), ({}, "cpu")])
def test_nothing_is_said_where_nothing_is_missing(environment, platform):
    before = dict(environment)
    assert request(environment, platform) is None
    assert environment == before


def test_a_new_process_gets_a_flag_that_its_xla_knows():
    # XLA ends the process when it does not know a flag.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{FLAG}=true", "3.0"]
    assert "too late" not in done.stderr
