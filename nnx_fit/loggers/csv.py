"""`CSVLogger`: keeps a run's metrics as one table, `metrics.csv`, and its settings as `hparams.yaml`.

Only scalars and settings fit a table; text, histograms and images are left to other loggers.
"""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nnx_fit.loggers.hyperparams import plain
from nnx_fit.loggers.logger import Logger, Status
from nnx_fit.loggers.run_directory import cannot_write, choose_run_directory, create_run_directory, report_if_taken

METRICS_FILE = "metrics.csv"
HPARAMS_FILE = "hparams.yaml"


class CSVLogger(Logger):
    """Writes `metrics.csv`: the column `step` and one column for every name ever logged.

    Values of one step that arrive in consecutive calls share a row; a name that was not logged at a step is empty
    there. A new name rewrites the file with the wider header, atomically. Every row has reached the operating system
    when the call returns.

    Args:
        save_dir: The run's own directory, or the one under which runs are kept when `name` or `version` is given.
        name: Sub-directory of the experiment.
        version: Sub-directory of this run; an integer `n` means `version_n`. Default with a `name`: the first
            `version_n` that is not there yet.

    Example:
        >>> import tempfile
        >>> from nnx_fit.loggers.csv import CSVLogger
        >>> logger = CSVLogger(tempfile.mkdtemp())
        >>> logger.log_metrics({"train/loss": 0.5}, step=1)
        >>> logger.log_metrics({"val/loss": 0.25}, step=1)
        >>> logger.finalize("success")
        >>> print((logger.log_dir / "metrics.csv").read_text().strip())
        step,train/loss,val/loss
        1,0.5,0.25
    """

    def __init__(self, save_dir: str | Path, *, name: str | None = None, version: str | int | None = None):
        self.name = name
        self.save_dir = Path(save_dir)
        self._requested_version = version
        self._directory: Path | None = None
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._opened_before = False
        self._columns: list[str] = []
        self._row: dict[str, float] = {}
        self._row_step: int | None = None
        self._row_start = 0

    @property
    def log_dir(self) -> Path:
        """Directory of the files; it is created with the first record."""
        if self._directory is None:
            self._directory, self.version = choose_run_directory(self.save_dir, self.name, self._requested_version)
        return self._directory

    @property
    def metrics_file(self) -> Path:
        """Path of `metrics.csv`."""
        return self.log_dir / METRICS_FILE

    def continue_from(self, step: int) -> None:
        """Says that this run continues an earlier one in the same directory, before anything is logged.

        Rows that the earlier process had written for later steps are dropped.

        Args:
            step: `global_step` of the checkpoint that the run continues from.
        """
        self._opened_before = True
        if self.metrics_file.exists():
            columns, rows = self._read()
            self._columns = columns
            self._replace([row for row in rows if row and int(row[0]) <= step])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        if not metrics:
            return
        with self._lock:
            if self._file is None:
                self._open()
            if step != self._row_step:
                self._row, self._row_step = {}, step
                self._row_start = self._open_file.seek(0, os.SEEK_END)
            self._row.update((name, float(value)) for name, value in metrics.items())
            new = [name for name in metrics if name not in self._columns]
            if new:
                self._widen(new)
                return
            # Written over the row's earlier, partial form in one go: a kill leaves one or the other.
            self._open_file.seek(self._row_start)
            self._open_file.write(_line(self._current_row()))
            self._open_file.truncate()
            self._open_file.flush()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings."""
        import yaml

        create_run_directory(self.log_dir, type(self).__name__)
        file = self.log_dir / HPARAMS_FILE
        text = yaml.safe_dump(plain(params), sort_keys=False, allow_unicode=True)
        try:
            _write_atomically(file, text.encode())
        except OSError as error:
            raise cannot_write(file, type(self).__name__, error) from error

    def flush(self) -> None:
        """Waits until everything has reached the disk itself."""
        with self._lock:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def finalize(self, status: Status) -> None:
        """Ends the record and closes the file."""
        self.flush()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
                self._row_step = None

    @property
    def _open_file(self) -> BinaryIO:
        assert self._file is not None
        return self._file

    def _open(self) -> None:
        create_run_directory(self.log_dir, type(self).__name__)
        if not self._opened_before:
            report_if_taken(self.log_dir, METRICS_FILE, type(self).__name__)
        self._opened_before = True
        try:
            if self.metrics_file.exists():
                self._columns = self._read()[0]
            else:
                self.metrics_file.write_bytes(_line(["step"]))
            self._file = self.metrics_file.open("r+b")
        except OSError as error:
            raise cannot_write(self.metrics_file, type(self).__name__, error) from error

    def _current_row(self) -> list[Any]:
        return [self._row_step, *(self._row.get(name, "") for name in self._columns)]

    def _widen(self, new: list[str]) -> None:
        """Rewrites the file with more columns, the current row included."""
        self._open_file.close()
        self._file = None
        _, rows = self._read(self._row_start)
        self._columns.extend(new)
        current = self._current_row()
        self._replace([*rows, current])
        self._file = self.metrics_file.open("r+b")
        self._row_start = self._file.seek(0, os.SEEK_END) - len(_line(current))

    def _read(self, end: int | None = None) -> tuple[list[str], list[list[str]]]:
        """The names in the header and the rows, of the first `end` bytes."""
        content = self.metrics_file.read_bytes()[:end]
        header, *rows = list(csv.reader(io.StringIO(content.decode(), newline=""))) or [["step"]]
        return header[1:], rows

    def _replace(self, rows: list[list[Any]]) -> None:
        width = len(self._columns) + 1
        lines = [["step", *self._columns], *(row + [""] * (width - len(row)) for row in rows)]
        _write_atomically(self.metrics_file, b"".join(map(_line, lines)))


def _line(cells: list[Any]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _write_atomically(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, file)
