"""What a run says about itself: where it is, how it ended, what it predicted."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnx_fit.cli.run_directory import shown_path

log = logging.getLogger("nnx_fit.cli")
_record = logging.getLogger("nnx_fit.record")


def announce(run_dir: Path, trainer: Any) -> None:
    """Says where the run is, in lines that can be copied."""
    log.info("Run directory: %s", shown_path(run_dir))
    if any(type(logger).__name__ == "TensorBoardLogger" for logger in trainer.loggers):
        log.info("Dashboards:    tensorboard --logdir %s", shown_path(run_dir))


def nothing_left(run_dir: Path, reason: str, step: int) -> None:
    """Says that a run was at its end already, and how it could go on."""
    shown = shown_path(run_dir)
    log.info("%s is finished: %s, at step %d.", shown, reason, step)
    bound = reason.partition("=")[0] if reason.startswith("trainer.") else None
    how = f"raise it: nnx-fit resume {shown} {bound}=..." if bound else f"change that: nnx-fit resume {shown} key=value"
    log.info("To train on, %s", how)


def final_metrics(metrics: Mapping[str, float]) -> None:
    """Shows the metrics that a run ended with: a table on a terminal, plain lines elsewhere."""
    if not metrics:
        return
    width = max(map(len, metrics))
    lines = [f"{name:<{width}}  {value:.6g}" for name, value in sorted(metrics.items())]
    if not sys.stdout.isatty():
        log.info("Final metrics\n%s", "\n".join(f"  {line}" for line in lines))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Final metrics", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.6g}")
    Console().print(table)
    _record.info("Final metrics\n%s", "\n".join(lines))


def best_checkpoint(callback: Any) -> None:
    """Says which checkpoint is the best, or the last where nothing is monitored."""
    best, last = getattr(callback, "best_model_path", None), getattr(callback, "last_model_path", None)
    if best and getattr(callback, "monitor", None):
        log.info("Best checkpoint (%s=%.6g):\n%s", callback.monitor, callback.best_model_score, shown_path(Path(best)))
    elif last or best:
        log.info("Last checkpoint:\n%s", shown_path(Path(str(last or best))))


def save_predictions(predictions: Sequence[Sequence[Any]], directory: Path) -> list[Path]:
    """Writes predictions as one `.npz` file for each loader.

    Args:
        predictions: For each loader a list of batches (host pytrees).
        directory: Where to write; it is created.

    Returns:
        The files. Each holds one array per leaf of the pytree, named by its path, batches joined along the first axis.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for index, batches in enumerate(predictions):
        file = directory / f"loader_{index}.npz"
        _write(file, batches)
        files.append(file)
    return files


def _write(file: Path, batches: Sequence[Any]) -> None:
    import jax
    import numpy as np

    columns: dict[str, list[Any]] = {}
    for batch in batches:
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "prediction"
            columns.setdefault(name, []).append(np.atleast_1d(np.asarray(leaf)))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    np.savez(file, allow_pickle=False, **arrays)
