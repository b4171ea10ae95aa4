"""`TopK`: which checkpoints are worth keeping, by their score."""

from __future__ import annotations

import math

from nnx_fit.callbacks.monitor import Mode, better, worst


class TopK:
    """The best `k` entries by score; without scores, the newest.

    Args:
        k: Number of entries; -1 keeps all, 0 none.
        mode: Which score is better.

    Attributes:
        scores: The kept entries with their scores, oldest first; `None` where nothing is monitored.
    """

    def __init__(self, k: int, mode: Mode):
        self.k = k
        self.mode: Mode = mode
        self.scores: dict[str, float | None] = {}

    def accepts(self, score: float | None) -> bool:
        """Whether an entry with this score would be kept. A tie does not displace what is there."""
        if self.k == 0:
            return False
        if self.k == -1 or score is None or len(self.scores) < self.k:
            return True
        return better(self.mode, self.rank(score), self.rank(self.scores[self._worst()]))

    def replaces(self, entry: str, score: float | None) -> bool:
        """Whether what has a name may be replaced by what has this score: not by anything worse. Then forgets it."""
        held = self.scores.get(entry)
        if held is not None and score is not None and better(self.mode, held, self.rank(score)):
            return False
        self.scores.pop(entry, None)
        return True

    def add(self, entry: str, score: float | None) -> list[str]:
        """Keeps an entry that `accepts` said yes to; returns those that are no longer kept."""
        displaced = []
        while 0 < self.k <= len(self.scores):
            displaced.append(self._worst())
            del self.scores[displaced[-1]]
        self.scores[entry] = None if score is None else self.rank(score)
        return displaced

    def best(self) -> tuple[str, float | None] | None:
        """The best entry and its score, the newest one where nothing is monitored; `None` if there is none."""
        chosen = None
        for entry, score in self.scores.items():
            if chosen is None or score is None or better(self.mode, score, self.rank(chosen[1])):
                chosen = (entry, score)
        return chosen

    def rank(self, score: float | None) -> float:
        """The score for comparisons: NaN is worse than any number."""
        return worst(self.mode) if score is None or math.isnan(score) else score

    def _worst(self) -> str:
        entries = iter(self.scores.items())
        entry, lowest = next(entries)
        for other, score in entries:
            if lowest is not None and better(self.mode, self.rank(lowest), self.rank(score)):
                entry, lowest = other, score
        return entry
