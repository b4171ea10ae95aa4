"""`ModelSummary`: shows, before training, which Variable plays which role, so that nothing is frozen by accident."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.terminal import live_console, record, say

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.state.partition import Row
    from nnx_fit.trainer import Trainer

ROLES = ("params", "frozen", "stats", "rngs")
_COLUMNS = ("path", "role", "type", "shape", "dtype", "values", "bytes")
_NUMBERS = ("values", "bytes")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the summary: a Variable, or all Variables of one role under a path."""

    path: str
    role: str
    type: str
    shape: str
    dtype: str
    count: int
    nbytes: int

    def cells(self) -> tuple[str, ...]:
        """The line as text, one cell for each column."""
        return (self.path, self.role, self.type, self.shape, self.dtype, f"{self.count:,}", readable_bytes(self.nbytes))


class ModelSummary(Callback):
    """Prints the partition of the module's Variables by role, with totals.

    Args:
        max_depth: Join Variables whose paths agree in this many components into one line for each role; -1 joins
            none unless there are more than `max_rows`, 0 prints nothing.
        max_rows: Number of lines above which a summary with `max_depth=-1` is joined at the greatest depth that fits.
    """

    reads_module = False
    logs = False

    def __init__(self, max_depth: int = -1, *, max_rows: int = 40):
        self.max_depth = whole_number("ModelSummary", "max_depth", max_depth, least=-1)
        self.max_rows = whole_number("ModelSummary", "max_rows", max_rows, least=1)

    def on_fit_start(self, trainer: Trainer, module: FitModule) -> None:
        """Prints the summary."""
        if self.max_depth == 0:
            return
        rows = trainer.partition.rows
        lines = summarize(rows, self.max_depth, self.max_rows)
        title = f"{type(module).__name__}: {len(rows):,} Variables"
        text = "\n".join([title, *as_text(lines), *totals(rows)])
        console = live_console()
        if console is None:
            say(text)
            return
        record(text)
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for column in _COLUMNS:
            table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
        for line in lines:
            table.add_row(*line.cells(), style=None if line.role == "params" else "dim")
        console.print(table)
        console.print("\n".join(totals(rows)), highlight=False)


def summarize(rows: Sequence[Row], max_depth: int, max_rows: int) -> list[Line]:
    """The lines of the summary.

    Args:
        rows: One row for each Variable.
        max_depth: See `ModelSummary`.
        max_rows: See `ModelSummary`.
    """
    if max_depth > 0:
        return _join(rows, max_depth)
    deepest = max((len(row.path.split(".")) for row in rows), default=0)
    depth = deepest
    lines = _join(rows, depth)
    while len(lines) > max_rows and depth > 1:
        depth -= 1
        lines = _join(rows, depth)
    if len(lines) > max_rows:
        shown, rest = lines[: max_rows - 1], lines[max_rows - 1 :]
        count, nbytes = sum(line.count for line in rest), sum(line.nbytes for line in rest)
        lines = [*shown, Line(f"... and {len(rest)} more", "", "", "", "", count, nbytes)]
    return lines


def totals(rows: Sequence[Row]) -> list[str]:
    """One line for each role: how many Variables, values and bytes."""
    lines = []
    for role in ROLES:
        mine = [row for row in rows if row.role == role]
        values, size = sum(row.count for row in mine), readable_bytes(sum(row.nbytes for row in mine))
        lines.append(f"{role:<6}  {len(mine):>5,} Variables  {values:>14,} values  {size:>10}")
    return lines


def as_text(lines: Sequence[Line]) -> list[str]:
    """The lines as a plain table."""
    cells = [_COLUMNS, *(line.cells() for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    aligned = [str.rjust if column in _NUMBERS else str.ljust for column in _COLUMNS]
    text = [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def readable_bytes(size: float) -> str:
    """A size with its unit: `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _join(rows: Sequence[Row], depth: int) -> list[Line]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((".".join(row.path.split(".")[:depth]), row.role), []).append(row)
    return [_line(path, role, members) for (path, role), members in groups.items()]


def _line(path: str, role: str, rows: Sequence[Row]) -> Line:
    count, nbytes = sum(row.count for row in rows), sum(row.nbytes for row in rows)
    if len(rows) == 1:
        (row,) = rows
        return Line(row.path, role, row.type, row.shape, row.dtype, count, nbytes)
    kinds, dtypes = (sorted({getattr(row, name) for row in rows}) for name in ("type", "dtype"))
    return Line(f"{path}.*", role, ", ".join(kinds), f"{len(rows)} Variables", ", ".join(dtypes), count, nbytes)
