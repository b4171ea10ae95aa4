"""`WandbLogger`: records a run with Weights & Biases, online or into files that `wandb sync` uploads later.

wandb's own background process does what takes time; this file says what W&B is given, and when a run ends.
"""

from __future__ import annotations

import atexit
import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.curves import pr_curve
from nnx_fit.loggers.hyperparams import plain
from nnx_fit.loggers.logger import Histogram, Logger, Status
from nnx_fit.loggers.pixels import as_many_pixels, as_pixels
from nnx_fit.loggers.projector import as_points
from nnx_fit.loggers.run_directory import cannot_write

STEP = "global_step"
RUN_FILE = "nnx_fit_run.json"
# 255 is what wandb itself takes for Ctrl-C.
_EXIT_CODES: dict[Status, int] = {"success": 0, "failed": 1, "interrupted": 255}
# Loggers whose run is open, in this process.
_open: list[WandbLogger] = []


class WandbLogger(Logger):
    """Records scalars, hyperparameters, text, histograms, images, figures, embeddings and curves with W&B.

    The x axis of every chart is `global_step`. The run begins with the first record. A fit that fails or is
    interrupted ends it at once, as failed or killed; after a success it stays open, so that a test is recorded in the
    same run, and it ends with the process, with the next `WandbLogger`, or with `logger.experiment.finish()`. How the
    last verb ended stands in the run's summary, `status`. A run that wandb has open already is used, and left open.

    A fit that continues from a checkpoint continues the last run that was recorded in `save_dir` under the same
    project and name. W&B cannot drop what that run had logged after the checkpoint; offline, wandb writes a second
    directory with the same run id, which `wandb sync --append` adds to the first.

    Args:
        project: Project; default: wandb's own (`WANDB_PROJECT`).
        name: Name of the run; default: one that wandb makes up.
        save_dir: Directory in which wandb has its folder `wandb`.
        id: Id of the run, to continue one or to fix it.
        version: The same as `id`.
        offline: Write files only; nothing touches the network.
        prefix: What the names of metrics begin with.
        entity: User or team that the project belongs to.
        group: Name that groups runs, such as those of a sweep.
        job_type: Kind of run within the group.
        tags: Labels of the run.
        notes: Description of the run.
        **kwargs: Passed to `wandb.init` as well: `settings`, `config`, ...

    Raises:
        ConfigurationError: wandb is not installed, or `id` and `version` differ.

    Example:
        >>> from nnx_fit.loggers.wandb import WandbLogger
        >>> logger = WandbLogger(project="digits", name="wide", offline=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        name: str | None = None,
        save_dir: str | Path = ".",
        id: str | None = None,
        version: str | None = None,
        offline: bool = False,
        prefix: str = "",
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        **kwargs: Any,
    ):
        if find_spec("wandb") is None:
            raise ConfigurationError(
                'WandbLogger needs wandb, which is not installed. Fix: pip install "nnx-fit[wandb]"'
            )
        if id is not None and version is not None and id != version:
            raise ConfigurationError(f"WandbLogger(id={id!r}, version={version!r}): both name the run. Fix: pass one.")
        self.project = project
        self.name = name
        self.save_dir = Path(save_dir)
        self.version = id if id is not None else version
        self.offline = offline
        self.prefix = prefix
        about = {"entity": entity, "group": group, "job_type": job_type, "tags": tags, "notes": notes}
        self._arguments = {name: value for name, value in about.items() if value is not None} | kwargs
        self._run: Any = None
        self._borrowed = False
        self._continues = False
        self._started_before = False
        self._status: Status | None = None

    @property
    def experiment(self) -> Any:
        """The `wandb.Run`; it begins with the first use."""
        if self._run is None:
            self._run = self._start()
        return self._run

    def continue_from(self, step: int) -> None:
        """Says that this run continues an earlier one; see the class."""
        self._continues = step >= 0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        if metrics:
            self._log({f"{self.prefix}{name}": float(value) for name, value in metrics.items()}, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings in the run's config."""
        self.experiment.config.update(plain(params), allow_val_change=True)

    def log_text(self, tag: str, text: str, step: int = 0) -> None:
        """Records text as it is written, without formatting."""
        self._log({tag: _wandb().Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step)

    def log_histogram(
        self, tag: str, counts: np.ndarray, edges: np.ndarray, step: int, moments: Mapping[str, float]
    ) -> None:
        """Records a histogram that was binned elsewhere."""
        self.log_histograms({tag: Histogram(counts, edges, moments)}, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Records the histograms of one step, by tag."""
        histogram = _wandb().Histogram
        content = {
            tag: histogram(np_histogram=(np.asarray(counts).tolist(), np.asarray(edges).tolist()))
            for tag, (counts, edges, _) in histograms.items()
        }
        if content:
            self._log(content, step)

    def log_image(self, tag: str, image: Any, step: int) -> None:
        """Records an image; see `Logger.log_image`."""
        self._log({tag: self._picture(as_pixels(tag, image))}, step)

    def log_embedding(
        self, tag: str, vectors: Any, step: int, metadata: Sequence[Any] | None = None, images: Any = None
    ) -> None:
        """Records a table with a row for each point, which W&B can project; see `Logger.log_embedding`."""
        points = as_points(tag, vectors, metadata)
        columns: dict[str, list[Any]] = {}
        if metadata is not None:
            columns["label"] = [str(label) for label in metadata]
        if images is not None:
            columns["image"] = [self._picture(pixels) for pixels in as_many_pixels(tag, images, len(points))]
        columns |= {f"x{i}": column for i, column in enumerate(points.T.tolist())}
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self._log({tag: _wandb().Table(columns=list(columns), data=rows)}, step)

    def log_pr_curve(self, tag: str, labels: Any, probabilities: Any, step: int) -> None:
        """Records a precision-recall curve at 127 thresholds; see `Logger.log_pr_curve`."""
        curve = pr_curve(tag, labels, probabilities)
        rows = np.stack([curve.thresholds, curve.recall, curve.precision], axis=1).tolist()
        wandb = _wandb()
        table = wandb.Table(columns=["threshold", "recall", "precision"], data=rows)
        self._log({tag: wandb.plot.line(table, "recall", "precision", title=tag)}, step)

    def finalize(self, status: Status) -> None:
        """Says how the run ended, and ends it unless it was a success; see the class."""
        if self._run is None:
            return
        self._status = status
        self._run.summary["status"] = status
        if status != "success":
            self._finish()

    def _log(self, content: dict[str, Any], step: int) -> None:
        self.experiment.log({**content, STEP: step})

    def _picture(self, pixels: np.ndarray) -> Any:
        return _wandb().Image(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def _start(self) -> Any:
        if self.offline:
            # wandb reports its own errors to its maker, also from a run that is not to touch the network.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = _wandb()
        for logger in [logger for logger in _open if logger._status is not None]:
            logger._finish()
        if wandb.run is not None and all(logger._run is not wandb.run for logger in _open):
            run, self._borrowed = wandb.run, True
        else:
            run = self._init(wandb, reinit="create_new" if _open else None)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        self.version, self._status, self._started_before = run.id, None, True
        if not self._borrowed:
            _open.append(self)
            atexit.unregister(_finish_all)
            atexit.register(_finish_all)  # after wandb's own, so that it is called before that
        return run

    def _init(self, wandb: Any, **more: Any) -> Any:
        run_id = self.version or (self._recorded_id() if self._continues else None)
        if run_id is not None and not self._is_offline():
            more["resume"] = "allow"
        if self.offline:
            more["mode"] = "offline"
        given = {"project": self.project, "name": self.name, "id": run_id, **more}
        arguments = {name: value for name, value in given.items() if value is not None}
        try:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            arguments |= {"dir": str(self.save_dir), "settings": _settings(wandb)} | self._arguments
            run = wandb.init(**arguments)
            self._record_id(run)
        except OSError as error:
            if self._started_before:
                raise
            raise cannot_write(self.save_dir, "WandbLogger", error) from error
        except (wandb.errors.Error, TypeError, ValueError) as error:
            if self._started_before:
                raise
            raise ConfigurationError(
                f"WandbLogger cannot start a run: {error}\n"
                "Fix: log in (`wandb login`), pass offline=True, or correct what is passed on to wandb.init."
            ) from error
        return run

    def _is_offline(self) -> bool:
        mode = self._arguments.get("mode") or os.environ.get("WANDB_MODE")
        return self.offline or mode in ("offline", "dryrun", "disabled")

    def _recorded_id(self) -> str | None:
        """The id of the run that was last recorded in this directory, where it is of this project and name."""
        try:
            recorded = json.loads(self._run_file.read_text())
        except (OSError, ValueError):
            return None
        mine = (self.project, self.name)
        return recorded.get("id") if (recorded.get("project"), recorded.get("name")) == mine else None

    def _record_id(self, run: Any) -> None:
        self._run_file.parent.mkdir(parents=True, exist_ok=True)
        self._run_file.write_text(json.dumps({"project": self.project, "name": self.name, "id": run.id}) + "\n")

    @property
    def _run_file(self) -> Path:
        return self.save_dir / "wandb" / RUN_FILE

    def _finish(self) -> None:
        run, self._run = self._run, None
        if self in _open:
            _open.remove(self)
        if run is not None and not self._borrowed:
            run.finish(exit_code=_EXIT_CODES[self._status or "failed"])


def _finish_all() -> None:
    """Ends the runs whose last verb has ended, with its status; wandb would go by the process alone."""
    for logger in [logger for logger in _open if logger._status is not None]:
        logger._finish()


def _settings(wandb: Any) -> Any:
    # wandb would keep up to 15 seconds of records in memory, which a kill then takes.
    interval = "x_transaction_log_flush_interval"
    return wandb.Settings(**{interval: 1.0}) if interval in wandb.Settings.model_fields else wandb.Settings()


def _wandb() -> Any:
    import wandb

    return wandb
