"""The exceptions of nnx_fit: one class per kind of mistake.

Every message says what happened, where (the path of a Variable, a configuration key, a file), why it matters
and what to do about it. The classes carry no behaviour, so that `except` clauses stay readable.
"""


class NnxFitError(Exception):
    """Base of every error that nnx_fit raises on purpose."""


class ConfigurationError(NnxFitError, ValueError):
    """An argument, a setting, a batch or a hook does not fit the others. Raised before anything is lost."""


class StateError(NnxFitError):
    """A Variable was read, written, added or removed where that would silently give wrong results."""


class CheckpointError(NnxFitError):
    """A checkpoint cannot be written, found, read, or does not belong to this module."""


class NotWrittenError(CheckpointError):
    """A checkpoint could not be written for a reason that may pass: the disk is full, a directory is gone.

    Args:
        message: The whole of it.
        reason: The same in a few words, by which one failure is known from another.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


class NonFiniteError(NnxFitError):
    """A loss, metric, gradient or Variable became NaN or infinite while `detect_nonfinite` was on."""
