"""Data: loaders, data modules, and the way of a batch from the loader to the device.

Nothing is imported here, so that a part which needs no JAX (`datamodule`) loads none.
"""
