"""A module's Variables as one safetensors file, by path, and back into a module of the same structure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from nnx_fit.checkpoint.contents import Arrays, by_name, module_arrays, restore_module
from nnx_fit.checkpoint.store import load_arrays
from nnx_fit.errors import CheckpointError, ConfigurationError
from nnx_fit.export.files import PROGRAM, Entry, read, write
from nnx_fit.state import graph
from nnx_fit.state.filters import PathPrefix, matches
from nnx_fit.state.layout import ROLES, Layout
from nnx_fit.state.live import Live

Rename = Mapping[str, str] | Callable[[str], str | None]


class LoadedWeights(NamedTuple):
    """What `load_weights` did, in paths of the module.

    Attributes:
        loaded: Those that were taken from the file.
        missing: Those that are not in the file and stay as they were; random streams left out on purpose included.
        unexpected: Those in the file that the module does not have.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def save_weights(source: Any, path: str | Path, *, only: Any = None, rngs: bool = False) -> None:
    """Writes the arrays of a module's Variables, by dotted path, into one safetensors file.

    Params, running statistics, every other Variable and bare arrays are saved in the dtypes they have; a Variable with
    several arrays has one entry for each (`stack[0]`, `stack[1]`), a tied one is saved once. Any reader of safetensors
    sees them; the file's metadata has the role of each.

    Args:
        source: The module, or a part of one; or the directory of a checkpoint, whose class is not needed.
        path: The file, which is replaced as a whole. Usually ends in `.safetensors`.
        only: A path prefix, an NNX filter, or a list of those: what to save. Default: everything. Of a checkpoint,
            path prefixes only.
        rngs: Whether to save the random streams, too: to go on drawing where the module is, not only to compute.

    Raises:
        CheckpointError: The file cannot be written, or the checkpoint cannot be read.
        StateError: A step of a run has the values: this was called in none of its hooks.
        ConfigurationError: Nothing matches `only`, or safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> import nnx_fit as nf
        >>> file = tempfile.mkdtemp() + "/norm.safetensors"
        >>> nf.export.save_weights(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), file, only=nnx.Param)
        >>> nf.export.load_weights(nnx.BatchNorm(2, rngs=nnx.Rngs(1)), file, strict=False).loaded
        ('bias', 'scale')
    """
    groups = _of_checkpoint(source, only) if isinstance(source, str | Path) else _of_module(source, only)
    wanted = [role for role in ROLES if rngs or role != "rngs"]
    entries = {name: Entry.of(value, role) for role in wanted for name, value in groups.get(role, {}).items()}
    if not entries:
        raise ConfigurationError(
            f"save_weights(only={only!r}, rngs={rngs}): nothing is left to save.\nFix: pass a prefix or a filter that "
            "matches; `nnx_fit.partition(module).table()` shows all paths."
        )
    write(path, "weights", entries, {})


def load_weights(
    module: nnx.Module, path: str | Path, *, strict: bool = True, rename: Rename | None = None
) -> LoadedWeights:
    """Puts the arrays of a safetensors file into a module, by path.

    Everything is checked before anything is written. Random streams that were not saved stay as they are. The file may
    also be one of `save_program`, or come from another library.

    Args:
        module: A module of the structure that was saved.
        path: The file.
        strict: Whether the file must have all paths of the module and no others. `False` takes those that both have,
            which must agree in shape and dtype all the same.
        rename: What the file's paths are called in the module: a dict from path prefix to path prefix (of several that
            match the longest counts), or a function of the path, which may return `None` to leave an array out.

    Returns:
        What was loaded, what was missing and what was unexpected.

    Raises:
        CheckpointError: The file is damaged or of another module; the module is as it was.
        ConfigurationError: `rename` names what the file does not have, or makes two paths one.
    """
    file = read(path, ("weights", "program", None))
    saved = {name: entry.value for name, entry in file.entries.items() if name != PROGRAM}
    found = _renamed(saved, rename)
    layout, arrays = _collected(module)
    mine = module_arrays(layout, arrays)
    expected = by_name(mine)
    unexpected = tuple(name for name in found if name not in expected)
    missing = tuple(name for name in expected if name not in found)
    if not strict:
        found = {name: value for name, value in found.items() if name in expected}
        if not found:
            raise _nothing_in_common(file.path, unexpected, missing)
    kept = missing if not strict else [name for name in missing if name in mine["rngs"]]
    restored = _restored(file.path, layout, found | {name: expected[name] for name in kept})
    Live(module, layout).replace(restored)
    return LoadedWeights(tuple(name for name in found if name in expected), missing, unexpected)


def _restored(path: Path, layout: Layout, found: Mapping[str, Any]) -> list[Any]:
    """The flat list of a module's arrays from named ones.

    Raises:
        CheckpointError: They are of another module.
    """
    try:
        return restore_module(path, layout, {"params": found})
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n`strict=False` takes the paths that both have; `rename=` says what else a path is called."
        ) from None


def _collected(module: nnx.Module) -> tuple[Layout, list[Any]]:
    layout = Layout.of(module, getattr(module, "trainable", nnx.Param))
    return layout, Live(module, layout).collect()


def _of_module(module: nnx.Module, only: Any) -> Arrays:
    layout, arrays = _collected(module)
    if only is None:
        return module_arrays(layout, arrays)
    _check_prefixes(only, [graph.path_name(path) for slot in layout.slots for path in slot.aliases])
    selector, leaves = _selector(only), graph.flatten(module)[1]
    chosen = [
        slot for slot, (_, leaf) in zip(layout.slots, leaves, strict=True) if matches(selector, slot.aliases, leaf)
    ]
    return module_arrays(Layout(chosen), arrays)


def _of_checkpoint(path: str | Path, only: Any) -> Arrays:
    groups = load_arrays(path, ROLES)
    if only is None:
        return groups
    prefixes = [only] if isinstance(only, str) else list(only) if isinstance(only, list | tuple) else [only]
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise ConfigurationError(
            f"save_weights(only={only!r}): a checkpoint knows paths and no types of Variables.\n"
            "Fix: pass path prefixes, or load the checkpoint into a module and save that."
        )
    _check_prefixes(prefixes, [name for group in groups.values() for name in group])
    return {
        role: {name: value for name, value in group.items() if any(_below(name, prefix) for prefix in prefixes)}
        for role, group in groups.items()
    }


def _selector(only: Any) -> Any:
    if isinstance(only, list | tuple):
        return nnx.Any(*(_selector(each) for each in only))
    return PathPrefix(only) if isinstance(only, str) else only


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith((f"{prefix}.", f"{prefix}["))


def _check_prefixes(given: Any, names: Sequence[str]) -> None:
    for prefix in [given] if isinstance(given, str) else given if isinstance(given, list | tuple | Mapping) else ():
        if isinstance(prefix, str) and not any(_below(name, prefix) for name in names):
            parts = [name.split(".") for name in names]
            known = sorted({".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)})
            near = difflib.get_close_matches(prefix, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known[:10])}."
            raise ConfigurationError(f"There is nothing at the path {prefix!r}. {hint}")


def _renamed(saved: Mapping[str, Any], rename: Rename | None) -> dict[str, Any]:
    if rename is None:
        return dict(saved)
    if isinstance(rename, Mapping):
        _check_prefixes(rename, list(saved))
        rename = _by_prefix(rename)
    names: dict[str, str] = {}
    for old in saved:
        new = rename(old)
        if new in names:
            raise ConfigurationError(f"load_weights(rename=...) makes both {names[new]!r} and {old!r} into {new!r}.")
        if new is not None:
            names[new] = old
    return {new: saved[old] for new, old in names.items()}


def _by_prefix(rename: Mapping[str, str]) -> Callable[[str], str]:
    def renamed(name: str) -> str:
        for old in sorted(rename, key=len, reverse=True):
            if _below(name, old):
                return rename[old] + name[len(old) :]
        return name

    return renamed


def _nothing_in_common(path: Path, unexpected: Sequence[str], missing: Sequence[str]) -> CheckpointError:
    theirs, mine = (", ".join(names[:5]) + (", ..." if len(names) > 5 else "") for names in (unexpected, missing))
    return CheckpointError(
        f"{path} and the module have no path in common, so nothing was loaded.\n    in the file: {theirs}\n"
        f"    in the module: {mine}\nFix: pass `rename=`, or load into the part of the module that was saved."
    )
