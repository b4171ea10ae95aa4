"""The `nnx-fit` command. `main.py` is where it starts."""
