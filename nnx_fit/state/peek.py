"""`Peek`: a look at live arrays that costs the run nothing."""

from __future__ import annotations

from typing import Any

from nnx_fit.state.filters import matches
from nnx_fit.state.layout import Slot
from nnx_fit.state.live import Live


class Peek:
    """Finds the arrays that a filter matches; who asks at every step, asks for the same, and is found at once."""

    def __init__(self) -> None:
        self._last: tuple[Live | None, Any, list[tuple[str, Slot]]] = (None, None, [])

    def __call__(self, live: Live, selector: Any) -> dict[str, Any]:
        """The arrays by dotted path, in the program's hands: the next step donates them.

        Args:
            live: The module's values.
            selector: An NNX filter.
        """
        arrays = live.collect()
        if self._last[0] is not live or self._last[1] is not selector:
            pairs = zip(live.layout.slots, live.leaves, strict=True)
            slots = [slot for slot, leaf in pairs if matches(selector, slot.aliases, leaf)]
            self._last = (live, selector, [(slot.name, slot) for slot in slots])
        found: dict[str, Any] = {}
        for name, slot in self._last[2]:
            if slot.single:
                found[name] = arrays[slot.start]
                continue
            values = slot.typed(arrays[slot.start : slot.stop])
            several = len(values) > 1
            found |= {f"{name}[{i}]" if several else name: value for i, value in enumerate(values)}
        return found
