"""`FitModule.load_from_checkpoint`: a module built from a checkpoint alone, as a whole or in parts.

The constructor is traced, not run: it says which Variables there are and computes none of them, and the saved arrays
take their places. A constructor that cannot be traced is run, and what it made is replaced.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.core
from flax import nnx

from nnx_fit.checkpoint import contents
from nnx_fit.checkpoint.construction import Construction
from nnx_fit.checkpoint.directories import META_FILE, check_files, damaged, load_meta
from nnx_fit.checkpoint.store import load_arrays
from nnx_fit.checkpoint.tracers import holds_tracer
from nnx_fit.errors import CheckpointError, ConfigurationError
from nnx_fit.hparams import hparams_of, set_hparams
from nnx_fit.module import FitModule
from nnx_fit.programs.precision import PRECISIONS, Precision
from nnx_fit.state import graph
from nnx_fit.state.layout import ROLES, Layout
from nnx_fit.state.live import Live

logger = logging.getLogger("nnx_fit")


def load_module(
    cls: type, path: str | Path, *, strict: bool, rename: Mapping[str, str] | None, overrides: Mapping[str, Any]
) -> Any:
    """A module with the arguments and the values of a checkpoint; see `FitModule.load_from_checkpoint`."""
    if cls is FitModule:
        raise ConfigurationError(
            f"{cls.__name__}.load_from_checkpoint: checkpoints hold values and no code, so the class of the module has "
            "to be there.\nFix: call it on your own class, `MyModule.load_from_checkpoint(path)`."
        )
    path = Path(os.path.abspath(path))
    check_files(path)
    meta = load_meta(path)
    _check_describes_module(path, meta)
    construction = Construction.of(cls, path, meta, overrides, strict=strict)
    precision = PRECISIONS[meta.get("precision", "32")]
    saved = _renamed(path, contents.by_name(load_arrays(path, ROLES, checked=True)), rename or {})
    made = _traced(construction) or construction.run()
    layout = made.layout if isinstance(made, _Traced) else Layout.of(made, made.trainable)
    shapes = contents.kept(precision, layout, saved)
    expected = dict(zip(contents.all_names(layout), shapes, strict=True))
    problems = contents.differences(saved, expected)
    fits = {name for name, like in expected.items() if name in saved and contents.alike(saved[name], like)}
    if problems and strict:
        raise contents.mismatch(path, f"module than {cls.__name__}", problems, _HINT)
    if not fits:
        raise CheckpointError(
            f"The checkpoint {path} and {cls.__name__} have nothing in common, so nothing would be loaded.\n"
            f"It holds {_some(list(saved))}; the module has {_some(list(expected))}.\n"
            'Fix: pass rename={"name in the checkpoint": "name in the module"}.'
        )
    values = contents.on_device(layout, saved, fits)
    if isinstance(made, _Traced):
        whole = len(fits) == len(expected)
        module = made.filled(values) if whole else _overwritten(construction.run(), precision, values)
    else:
        module = _overwritten(made, precision, values)
    _report(path, cls, len(fits), len(expected), problems)
    return module


def _check_describes_module(path: Path, meta: Mapping[str, Any]) -> None:
    odd = "hparams is missing" if "hparams" not in meta else ""
    if (precision := meta.get("precision", "32")) not in PRECISIONS:
        odd = f"precision is {precision!r}"
    if odd:
        raise damaged(path, [f"{META_FILE.as_posix()} is not what was written (meta.{odd})"])


_HINT = (
    "pass the arguments it was saved with, rename={...} for what has another path now, or strict=False to load what "
    "is the same and leave the rest as the constructor makes it"
)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A module whose constructor was traced.

    Attributes:
        layout: Its layout.
        graphdef: All of it but its arrays.
        hparams: The arguments of each module in it.
    """

    layout: Layout
    graphdef: nnx.GraphDef
    hparams: Sequence[Any]

    def filled(self, values: Mapping[int, jax.Array]) -> Any:
        module = self.layout.merge(self.graphdef, [values[i] for i in range(self.layout.size)])
        for (_, part), hparams in zip(graph.modules(module), self.hparams, strict=True):
            if hparams is not None:
                set_hparams(part, hparams)
        return module


def _traced(construction: Construction) -> _Traced | None:
    found: list[_Traced] = []

    def build() -> None:
        module = construction.run()
        parts = [part for _, part in graph.modules(module)]
        if any(holds_tracer(graph.static_attributes(part)) or _hides_array(part) for part in parts):
            return  # it keeps an array where none can be put in
        layout, (graphdef, _) = Layout.of(module, module.trainable), graph.flatten(module)
        found.append(_Traced(layout, graphdef, [_hparams(part) for part in parts]))

    try:
        jax.eval_shape(build)
    except Exception:  # a constructor that looks at values; if it is another mistake, running it says so
        return None
    return found[0] if found else None


def _hparams(part: Any) -> Any:
    return hparams_of(part) if isinstance(part, FitModule) else None


def _hides_array(part: Any) -> bool:
    """Whether a bare array is an attribute, which Flax does not take for data where it is traced."""
    own = {name for name, data in part._pytree__nodes.items() if data}
    return any(isinstance(value, jax.core.Tracer) for name, value in vars(part).items() if name not in own)


def _overwritten(module: Any, precision: Precision, values: Mapping[int, jax.Array]) -> Any:
    precision.convert(module, module.trainable)
    live = Live(module, Layout.of(module, module.trainable))
    live.replace([values.get(i, fresh) for i, fresh in enumerate(live.collect())])
    return module


def _renamed(path: Path, saved: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    """The arrays under the names that prefixes of their paths are given; the longest prefix that matches counts."""
    unused, found = set(rename), {}
    for name, array in saved.items():
        matching = [old for old in rename if _below(name, old)]
        if matching:
            old = max(matching, key=len)
            unused.discard(old)
            name = ".".join(part for part in (rename[old], name[len(old) :].removeprefix(".")) if part)
        if name in found:
            raise CheckpointError(f"rename={dict(rename)} gives two arrays of {path} the name {name}.")
        found[name] = array
    if unused:
        raise CheckpointError(
            f"rename: {', '.join(sorted(unused))} is no path, and no beginning of one, in {path}, which holds "
            f"{_some(list(saved))}.\nNothing was loaded. Fix: give whole parts of dotted paths, as in "
            '{"encoder.blocks": "net.blocks"}.'
        )
    return found


def _below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith((f"{prefix}.", f"{prefix}["))


def _report(path: Path, cls: type, loaded: int, wanted: int, problems: Sequence[str]) -> None:
    if not problems:
        logger.info("%s: all %d arrays loaded from %s.", cls.__name__, loaded, path)
        return
    logger.warning(
        "%s: %d of %d arrays loaded from %s. Not loaded:\n%s",
        cls.__name__,
        loaded,
        wanted,
        path,
        contents.listed(problems),
    )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" or "no arrays"
