"""Shows the plateaus of optimizers what the metrics they watch have come to, once for each new value."""

from __future__ import annotations

from collections.abc import Sequence

from nnx_fit.callbacks.monitor import missing_metric
from nnx_fit.metrics.ledger import Ledger
from nnx_fit.programs.live_optimizer import LiveOptimizer


def drive(optimizers: Sequence[LiveOptimizer], ledger: Ledger, *, expected: bool) -> None:
    """Hands every optimizer with a monitor the newest value of its metric, if there is one since the last time.

    Args:
        optimizers: The optimizers of a run; those without a monitor cost nothing.
        ledger: What was logged.
        expected: Whether every metric has been logged by now.

    Raises:
        ConfigurationError: A metric is expected, and was never logged.
    """
    for optimizer in optimizers:
        if optimizer.monitor is None:
            continue
        metrics = ledger.callback_metrics  # waits for what was logged
        history = ledger.history
        records = history.get(f"{optimizer.monitor}_epoch") or history.get(optimizer.monitor, [])
        if records:
            optimizer.show(records[-1][1], len(records))
        elif expected:
            raise missing_metric("OptimizerSpec", optimizer.monitor, list(metrics))
