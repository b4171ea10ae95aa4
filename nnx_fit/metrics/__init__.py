"""`self.log`: captured in the trace, reduced on the device, fetched late, handed to History and loggers.

`ConfusionMatrix` and `ClassMetrics` are `nnx.Metric`s to be logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnx_fit.metrics.classwise import ClassMetrics, ConfusionMatrix

__all__ = ["ClassMetrics", "ConfusionMatrix"]


def __getattr__(name: str) -> Any:
    # Loaded on use: they need JAX.
    if name in __all__:
        from nnx_fit.metrics import classwise

        return getattr(classwise, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
