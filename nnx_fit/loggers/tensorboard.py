"""`TensorBoardLogger`: writes one run's event file for TensorBoard.

Events go straight to tensorboardX's record writer and from there to the operating system within the call that logs
them: nothing waits in a queue of this process, so nothing is lost when the process is killed. How TensorBoard reads
the files is its own affair; which values are logged, and when, is the Trainer's.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.hyperparams import flatten
from nnx_fit.loggers.logger import Histogram, Logger, Status
from nnx_fit.loggers.run_directory import cannot_write, choose_run_directory, create_run_directory, report_if_taken

EVENT_FILES = "events.out.tfevents.*"
_PAIRED = re.compile(r"(train|val)/(.+?)(?:_step|_epoch)?")


class TensorBoardLogger(Logger):
    """Writes scalars, hyperparameters, text, histograms and images for TensorBoard.

    No file exists before the first record. Every record has reached the operating system when the call returns.

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
        self._records: Any = None
        self._lock = threading.Lock()
        self._continued_at: int | None = None
        self._opened_before = False
        self._hparams: dict[str, Any] | None = None
        self._names: set[str] = set()
        self._pairs: set[str] = set()

    @property
    def log_dir(self) -> Path:
        """Directory of the event file; it is created with the first record."""
        if self._directory is None:
            self._directory, self.version = choose_run_directory(self.save_dir, self.name, self._requested_version)
        return self._directory

    def continue_from(self, step: int) -> None:
        """Says that this run continues an earlier one in the same directory, before anything is logged.

        TensorBoard then drops what the earlier process had logged after the step.

        Args:
            step: `global_step` of the checkpoint that the run continues from.
        """
        self._continued_at = step

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        if not metrics:
            return
        summary = _proto("summary")
        values = [summary.Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._write(summary.Summary(value=values), step)
        if not self._names.issuperset(metrics):
            self._names.update(metrics)
            self._pair_train_and_val(step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings."""
        values = {name: value for name, value in flatten(params).items() if value is not None}
        if values == self._hparams:
            return
        self._hparams = values
        start = _proto("plugin_hparams").SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float) and np.isfinite(value):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = str(value)
        self._write_hparams(session_start_info=start)

    def log_text(self, tag: str, text: str, step: int = 0) -> None:
        """Records Markdown text."""
        from tensorboardX import summary

        self._write(summary.text(tag, text), step)

    def log_histogram(
        self, tag: str, counts: np.ndarray, edges: np.ndarray, step: int, moments: Mapping[str, float]
    ) -> None:
        """Records a histogram that was binned elsewhere."""
        self.log_histograms({tag: Histogram(counts, edges, moments)}, step)

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Records the histograms of one step, by tag: one event for all, which costs far less than one for each."""
        if not histograms:
            return
        content = _proto("summary").Summary()
        for tag, (counts, edges, moments) in histograms.items():
            histogram = content.value.add(tag=tag).histo
            for key in ("num", "min", "max", "sum", "sum_squares"):
                setattr(histogram, key, moments[key])
            # A bucket holds what is at most its limit, so the first edge needs a bucket of its own, an empty one.
            histogram.bucket_limit.extend(np.asarray(edges, np.float64).tolist())
            histogram.bucket.extend([0.0, *np.asarray(counts, np.float64).tolist()])
        self._write(content, step)

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Records an image of shape `(height, width, channels)`, uint8 or float in 0..1."""
        try:
            import PIL  # noqa: F401  tensorboardX encodes the PNG with it
        except ImportError as error:
            raise ConfigurationError(
                f'TensorBoardLogger needs Pillow to encode the image "{tag}". Fix: pip install pillow'
            ) from error
        from tensorboardX import summary

        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
            raise ConfigurationError(
                f'The image "{tag}" has shape {pixels.shape}. Fix: pass (height, width, channels) with 1, 3 or 4 '
                "channels."
            )
        if pixels.dtype != np.uint8:
            pixels = (np.clip(np.nan_to_num(pixels.astype(np.float32)), 0.0, 1.0) * 255.0).round().astype(np.uint8)
        encoded = summary.image(tag, pixels, dataformats="HWC")
        encoded.value[0].tag = tag
        self._write(encoded, step)

    def flush(self) -> None:
        """Waits until everything has reached the disk itself."""
        with self._lock:
            if self._records is not None:
                self._records.flush()

    def finalize(self, status: Status) -> None:
        """Ends the record and closes the file."""
        # An interrupted run gets no end: its status stays open until the run that continues it ends.
        if self._hparams is not None and status != "interrupted":
            outcome = _proto("api").Status.Value("STATUS_SUCCESS" if status == "success" else "STATUS_FAILURE")
            end = _proto("plugin_hparams").SessionEndInfo(status=outcome, end_time_secs=time.time())
            self._write_hparams(session_end_info=end)
        with self._lock:
            if self._records is not None:
                self._records.flush()
                self._records.close()
                self._records = None

    def _write_hparams(self, **info: Any) -> None:
        # `_hparams_/experiment` is left out on purpose: without it TensorBoard shows the union of all runs' columns.
        (kind,) = info
        content = _proto("plugin_hparams").HParamsPluginData(version=0, **info)
        summary = _proto("summary")
        plugin = summary.SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString())
        metadata = summary.SummaryMetadata(plugin_data=plugin)
        self._write(summary.Summary(value=[summary.Summary.Value(tag=f"_hparams_/{kind}", metadata=metadata)]), 0)

    def _pair_train_and_val(self, step: int) -> None:
        """Writes a custom-scalar layout with one chart for each metric that both `train/` and `val/` have."""
        stages: dict[str, set[str]] = {}
        for match in filter(None, map(_PAIRED.fullmatch, self._names)):
            stages.setdefault(match[2], set()).add(match[1])
        pairs = {metric for metric, found in stages.items() if len(found) == 2}
        if pairs - self._pairs:
            self._pairs = pairs
            from tensorboardX import summary

            charts = {m: ["Multiline", [rf"(train|val)/{re.escape(m)}(_step|_epoch)?$"]] for m in sorted(pairs)}
            self._write(summary.custom_scalars({"train and val": charts}), step)

    def _write(self, content: Any, step: int) -> None:
        event = _proto("event").Event(wall_time=time.time(), step=step, summary=content)
        with self._lock:
            if self._records is None:
                self._records = self._open()
            self._records.write(event.SerializeToString())
            self._records.drain()

    def _open(self) -> Any:
        from tensorboardX.record_writer import RecordWriter

        class Records(RecordWriter):
            _writer: Any

            def drain(self) -> None:
                """Hands the buffer to the operating system: `flush` would also wait for the disk."""
                self._writer.flush()

        create_run_directory(self.log_dir, type(self).__name__)
        if self._continued_at is None and not self._opened_before:
            report_if_taken(self.log_dir, EVENT_FILES, type(self).__name__)
        self._opened_before = True
        # Names sort by time, and two files never share one, whatever is opened in the same second.
        now = time.time_ns()
        file = self.log_dir / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}.{os.getpid()}"
        try:
            records = Records(str(file))
        except OSError as error:
            raise cannot_write(file, type(self).__name__, error) from error
        event = _proto("event")
        records.write(event.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if self._continued_at is not None:
            start = event.Event(wall_time=time.time(), step=self._continued_at + 1)
            start.session_log.status = event.SessionLog.START
            records.write(start.SerializeToString())
            self._continued_at = None
        return records


def _proto(name: str) -> Any:
    """A module of protocol buffers, as generated code untyped; importing it loads tensorboardX."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")
