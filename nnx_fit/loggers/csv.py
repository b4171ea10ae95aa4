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
from typing import Any

from nnx_fit.loggers.event_file import require_on_disk, write_all
from nnx_fit.loggers.hyperparams import plain
from nnx_fit.loggers.logger import Logger, Status
from nnx_fit.loggers.run_directory import cannot_write, choose_run_directory, report_if_taken

METRICS_FILE = "metrics.csv"
HPARAMS_FILE = "hparams.yaml"


class CSVLogger(Logger):
    """Writes `metrics.csv`: the column `step` and one column for every name ever logged.

    Values of one step that arrive in consecutive calls share a row; a name that was not logged at a step is empty
    there. A new name rewrites the file with the wider header, atomically. Every row has reached the operating system
    when the call returns. A write that fails (a full disk) loses no earlier row, and values of the same step are
    written once it works again.

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
        self._file: io.FileIO | None = None
        self._continues = False
        self._continued_at: int | None = None
        self._opened_before = False
        self._columns: list[str] = []
        self._row: dict[str, float | str] = {}
        self._row_step: int | None = None
        self._row_start = 0
        self._written = b""

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

        Rows that the earlier process had written for later steps are dropped; that of the step itself goes on.

        Args:
            step: `global_step` of the checkpoint that the run continues from.

        Raises:
            ConfigurationError: The file cannot be written.
        """
        self._continues, self._continued_at = True, step
        try:
            if self.metrics_file.exists():
                columns, rows = self._read()
                self._replace(columns, [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step])
        except OSError as error:
            raise cannot_write(self.metrics_file, type(self).__name__, error) from error

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        if not metrics:
            return
        with self._lock:
            self._require_file()
            if step != self._row_step:
                self._row, self._row_step = {}, step
                self._row_start, self._written = self._open_file.seek(0, os.SEEK_END), b""
            self._row.update((name, float(value)) for name, value in metrics.items())
            new = [name for name in self._row if name not in self._columns]
            if new:
                self._widen(new)
            else:
                self._write_row()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings."""
        import yaml

        file = self.log_dir / HPARAMS_FILE
        text = yaml.safe_dump(plain(params), sort_keys=False, allow_unicode=True)
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            _write_atomically(file, text.encode())
        except OSError as error:
            if self._opened_before:
                raise
            raise cannot_write(file, type(self).__name__, error) from error

    def flush(self) -> None:
        """Waits until everything has reached the disk itself."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file.fileno())

    def finalize(self, status: Status) -> None:
        """Ends the record and closes the file."""
        try:
            self.flush()
        finally:
            with self._lock:
                self._close()
                self._row_step = None

    @property
    def _open_file(self) -> io.FileIO:
        assert self._file is not None
        return self._file

    def _require_file(self) -> None:
        if self._file is None:
            self._open()
            return
        try:
            require_on_disk(self._file, self.metrics_file)
        except FileNotFoundError:  # the directory was removed: the next record begins it anew
            self._close()
            self._row_step = None
            raise

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        if not (self._opened_before or self._continues):
            report_if_taken(self.log_dir, METRICS_FILE, type(self).__name__)
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if self.metrics_file.exists():
                self._columns, rows = self._read()
                self._continue_row(rows)
            else:
                self._columns = []
                _write_atomically(self.metrics_file, _line(["step"]))
            self._file = _opened(self.metrics_file)
        except OSError as error:
            if self._opened_before:
                raise
            raise cannot_write(self.metrics_file, type(self).__name__, error) from error
        self._opened_before = True

    def _continue_row(self, rows: list[list[str]]) -> None:
        """Makes the row of the step that a run continues from the current one: more may be logged at that step."""
        step, self._continued_at = self._continued_at, None
        if step is None or not rows or rows[-1][0] != str(step):
            return
        cells = zip(self._columns, rows[-1][1:], strict=False)
        self._row, self._row_step = {name: cell for name, cell in cells if cell}, step
        self._written = _line(self._current_row())
        self._row_start = self.metrics_file.stat().st_size - len(self._written)

    def _write_row(self) -> None:
        """Writes the current row over its earlier, partial form; where that fails, the earlier form is put back."""
        line = _line(self._current_row())
        file = self._open_file
        try:
            file.seek(self._row_start)
            write_all(file, line)
        except OSError:
            file.seek(self._row_start)
            write_all(file, self._written)
            file.truncate()
            raise
        file.truncate()
        self._written = line

    def _current_row(self) -> list[Any]:
        return [self._row_step, *(self._row.get(name, "") for name in self._columns)]

    def _widen(self, new: list[str]) -> None:
        """Replaces the file by one with more columns, once that is whole, the current row included."""
        columns = [*self._columns, *new]
        current = [self._row_step, *(self._row.get(name, "") for name in columns)]
        _, rows = self._read(self._row_start)
        self._replace(columns, [*rows, current])
        self._close()
        self._columns = columns
        self._file = _opened(self.metrics_file)
        self._written = _line(current)
        self._row_start = self._file.seek(0, os.SEEK_END) - len(self._written)

    def _read(self, end: int | None = None) -> tuple[list[str], list[list[str]]]:
        """The names in the header and the rows, of the first `end` bytes."""
        content = self.metrics_file.read_bytes()[:end]
        header, *rows = list(csv.reader(io.StringIO(content.decode(), newline=""))) or [["step"]]
        return header[1:], rows

    def _replace(self, columns: list[str], rows: list[list[Any]]) -> None:
        width = len(columns) + 1
        lines = [["step", *columns], *(row + [""] * (width - len(row)) for row in rows)]
        _write_atomically(self.metrics_file, b"".join(map(_line, lines)))


def _line(cells: list[Any]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _opened(file: Path) -> io.FileIO:
    """A file to write to without a buffer, from which a failed write could come out later."""
    return io.FileIO(file, "r+b")


def _write_atomically(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
