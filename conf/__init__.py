"""The packaged configuration files, importable as `nnx_fit.conf` so that they ship inside the wheel."""
