"""A trained model out of the training library: its weights as safetensors, its predictions as a program of their own.

`save_weights` and `load_weights` keep a module's Variables by path in one safetensors file. `save_program` compiles
`predict_step` into one file, which `load_program` runs where nobody has the module's class. Neither holds a pickle.

Names are resolved on first use: where a program is only run, Flax is not even imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "LoadedProgram": "nnx_fit.export.loaded_program",
    "LoadedWeights": "nnx_fit.export.weights",
    "load_program": "nnx_fit.export.loaded_program",
    "load_weights": "nnx_fit.export.weights",
    "save_program": "nnx_fit.export.program",
    "save_weights": "nnx_fit.export.weights",
}

if TYPE_CHECKING:
    from nnx_fit.export.loaded_program import LoadedProgram as LoadedProgram
    from nnx_fit.export.loaded_program import load_program as load_program
    from nnx_fit.export.program import save_program as save_program
    from nnx_fit.export.weights import LoadedWeights as LoadedWeights
    from nnx_fit.export.weights import load_weights as load_weights
    from nnx_fit.export.weights import save_weights as save_weights

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nnx_fit.export' has no attribute {name!r}; it has: {', '.join(sorted(_HOMES))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
