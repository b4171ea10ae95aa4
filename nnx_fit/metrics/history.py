"""`History`: every logged value of a run with its step, as `fit` returns it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]


class History(Mapping[str, list[tuple[int, float]]]):
    """Every logged value with its step: `history["val/accuracy"]` is a list of `(step, value)` pairs.

    The step is `global_step` after the update the value belongs to.
    """

    def __init__(self) -> None:
        self._records: dict[str, list[tuple[int, float]]] = {}

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values logged at one step."""
        for name, value in values.items():
            self._records.setdefault(name, []).append((step, value))

    def __getitem__(self, name: str) -> list[tuple[int, float]]:
        try:
            return self._records[name]
        except KeyError:
            raise KeyError(f"{name!r} was not logged; logged were: {', '.join(self._records) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        last = ", ".join(f"{name}={records[-1][1]:.4g}" for name, records in self._records.items())
        return f"History({last})"

    def state_dict(self) -> dict[str, Any]:
        """All records as plain lists."""
        return {name: [[step, value] for step, value in records] for name, records in self._records.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._records = {name: [(int(s), float(v)) for s, v in records] for name, records in state.items()}

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each step and one column for each name; a name not logged at a step is NaN there.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("History.to_pandas needs pandas. Fix: pip install pandas") from error
        series = {name: pandas.Series(dict(records)) for name, records in self._records.items()}
        frame = pandas.DataFrame(series).sort_index()
        frame.index.name = "step"
        return frame
