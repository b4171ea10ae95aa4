"""What every test needs."""

import os

# Two CPU devices would change what a test of one device sees; the accelerator of a machine must not matter either.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
