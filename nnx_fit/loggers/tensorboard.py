"""`TensorBoardLogger`: writes one run's event file for TensorBoard.

Records go from here to the operating system within the call that logs them: nothing waits in a queue of this process,
so nothing is lost when the process is killed. How TensorBoard reads the files is its own affair; which values are
logged, and when, is the Trainer's. What the records look like stands in `tensorboard_events.py`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnx_fit.loggers import tensorboard_events as events
from nnx_fit.loggers.ahead import Ahead
from nnx_fit.loggers.curves import pr_curve
from nnx_fit.loggers.event_file import EventFile, drop_ending
from nnx_fit.loggers.failures import guarded
from nnx_fit.loggers.hyperparams import flatten
from nnx_fit.loggers.logger import Histogram, Logger, Status
from nnx_fit.loggers.pixels import as_pixels
from nnx_fit.loggers.projector import write_embedding
from nnx_fit.loggers.run_directory import cannot_write, choose_run_directory, report_if_taken
from nnx_fit.loggers.summary_writer import summary_writer

EVENT_FILES = "events.out.tfevents.*"


class TensorBoardLogger(Logger):
    """Writes what a run logs for TensorBoard: scalars, hyperparameters, text, histograms, images, embeddings, curves.

    No file exists before the first record. Every record has reached the operating system when the call returns. A
    write that fails (a full disk) takes nothing away from what is there.

    Args:
        save_dir: The run's own directory, or the one under which runs are kept when `name` or `version` is given.
        name: Sub-directory of the experiment.
        version: Sub-directory of this run; an integer `n` means `version_n`. Default with a `name`: the first
            `version_n` that is not there yet.

    Example:
        >>> import tempfile
        >>> from nnx_fit.loggers.tensorboard import TensorBoardLogger
        >>> logger = TensorBoardLogger(tempfile.mkdtemp(), name="mnist", version=0)
        >>> logger.log_metrics({"train/loss": 0.5}, step=1)
        >>> logger.finalize("success")
        >>> logger.log_dir.name, len(list(logger.log_dir.glob("events.out.tfevents.*")))
        ('version_0', 1)
    """

    def __init__(self, save_dir: str | Path, *, name: str | None = None, version: str | int | None = None):
        self.name = name
        self.save_dir = Path(save_dir)
        self._requested_version = version
        self._directory: Path | None = None
        self._file: EventFile | None = None
        self._lock = threading.Lock()
        self._continued_at: int | None = None
        self._ahead = Ahead()
        self._saved: Mapping[str, Any] = {}
        self._opened_before = False
        self._settings: dict[str, Any] | None = None
        self._session_open = False
        self._names: set[str] = set()
        self._charts: dict[str, str] = {}
        self._writer: Any = None

    @property
    def log_dir(self) -> Path:
        """Directory of the event file; it is created with the first record."""
        if self._directory is None:
            self._directory, self.version = choose_run_directory(self.save_dir, self.name, self._requested_version)
        return self._directory

    @property
    def experiment(self) -> Any:
        """A `tensorboardX.SummaryWriter` for what has no method here, such as `add_video`, `add_audio` and `add_mesh`.

        It writes to this logger's own event file, so that its `flush` and `close` have nothing to do. Its `add_graph`
        is for PyTorch.
        """
        if self._writer is None:
            self._writer = summary_writer(self.log_dir, self._write_event)
        return self._writer

    def state_dict(self) -> dict[str, Any]:
        """Where the event files end."""
        with self._lock:
            return self._ahead.state_dict(self._file)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes where they ended, for `continue_from`."""
        self._saved = state

    def continue_from(self, step: int) -> None:
        """Says that this run continues an earlier one in the same directory, before anything is logged.

        TensorBoard then drops what the earlier process had logged after the step, and shows how this run ends. What is
        logged again at the step itself, though the earlier process had got to that, is not recorded twice.

        Args:
            step: `global_step` of the checkpoint that the run continues from.
        """
        self._continued_at = step
        self._ahead.find(sorted(self.log_dir.glob(EVENT_FILES)), step, self._saved)
        self._saved = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        if not metrics:
            return
        self._write(events.scalars(metrics), step)
        if not self._names.issuperset(metrics):
            self._names.update(metrics)
            charts = events.paired_charts(self._names)
            if charts != self._charts:
                self._write(events.layout(charts), step)
                self._charts = charts

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings, and that it has begun."""
        values = {name: value for name, value in flatten(params).items() if value is not None}
        if values != self._settings:
            self._write(events.session_start(values), 0)
            self._settings = values
        self._session_open = True
        self._forget_end()

    def log_text(self, tag: str, text: str, step: int = 0) -> None:
        """Records Markdown text."""
        self._write(events.text(tag, text), step)

    def log_histogram(
        self, tag: str, counts: np.ndarray, edges: np.ndarray, step: int, moments: Mapping[str, float]
    ) -> None:
        """Records a histogram that was binned elsewhere."""
        self.log_histograms({tag: Histogram(counts, edges, moments)}, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Records the histograms of one step, by tag, in one event."""
        if histograms:
            self._write(events.histograms(histograms), step)

    def log_image(self, tag: str, image: Any, step: int) -> None:
        """Records an image; see `Logger.log_image`."""
        self._write(events.image(tag, as_pixels(tag, image)), step)

    def log_embedding(
        self, tag: str, vectors: Any, step: int, metadata: Sequence[Any] | None = None, images: Any = None
    ) -> None:
        """Writes points for the projector; see `Logger.log_embedding`.

        TensorBoard looks for new ones when it starts. Images that are not square get margins.
        """
        with self._lock:
            self._require_file()  # TensorBoard looks for the projector's files where event files are
        write_embedding(self.log_dir, tag, vectors, step, metadata, images)

    def log_pr_curve(self, tag: str, labels: Any, probabilities: Any, step: int) -> None:
        """Records a precision-recall curve at 127 thresholds; see `Logger.log_pr_curve`."""
        self._write(events.pr_curve(tag, pr_curve(tag, labels, probabilities)), step)

    def flush(self) -> None:
        """Waits until everything has reached the disk itself."""
        with self._lock:
            if self._file is not None:
                self._file.sync()

    def finalize(self, status: Status) -> None:
        """Ends the record and closes the file."""
        try:
            # An interrupted run gets no end: its status stays open until the run that continues it ends.
            if self._session_open and status != "interrupted":
                self._write(events.session_end(success=status == "success"), 0)
            self._session_open = False
            self.flush()
        finally:
            self._close()

    def _write(self, summary: Any, step: int) -> None:
        if (summary := self._ahead.without(summary, step)) is None:
            return
        self._write_event(events.proto("event").Event(wall_time=time.time(), step=step, summary=summary))

    @guarded
    def _write_event(self, event: Any) -> None:
        with self._lock:
            try:
                self._require_file().write(event.SerializeToString())
            except FileNotFoundError:  # the directory was removed: the next record begins it anew
                if self._file is not None:
                    self._file.close()
                    self._file = None
                raise

    def _require_file(self) -> EventFile:
        if self._file is None:
            self._file = self._open()
        return self._file

    def _close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self) -> EventFile:
        if not self._opened_before and self._continued_at is None:
            report_if_taken(self.log_dir, EVENT_FILES, type(self).__name__)
        # Names sort by time, and two files never share one, whatever is opened in the same second.
        now = time.time_ns()
        path = self.log_dir / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}.{os.getpid()}"
        event = events.proto("event")
        head = [event.Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self._continued_at is not None:
            head.append(event.Event(wall_time=time.time(), step=self._continued_at + 1))
            head[-1].session_log.status = event.SessionLog.START
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            file = EventFile(path, [record.SerializeToString() for record in head])
        except OSError as error:
            if self._opened_before:
                raise
            raise cannot_write(path, type(self).__name__, error) from error
        self._continued_at = None
        self._opened_before = True
        return file

    def _forget_end(self) -> None:
        """Takes back how an earlier fit in this directory ended: TensorBoard believes the first end that it reads."""
        current = None if self._file is None else self._file.path
        for path in self.log_dir.glob(EVENT_FILES):
            if path != current:
                drop_ending(path, events.SESSION_END.encode())
