"""The classes and functions that a config names: found, and their arguments checked, before any of them is called."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException

from nnx_fit.cli.checks import describe, plain_types, wrong_type
from nnx_fit.cli.suggestions import did_you_mean, nearest
from nnx_fit.errors import ConfigurationError
from nnx_fit.instantiation import locate

_KEYWORDS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}


def check_targets(node: Any, key: str, supplied: Mapping[str, Any] | None = None) -> None:
    """Checks a part of the config and everything nested in it.

    Args:
        node: A plain mapping with `_target_`, or anything that holds such.
        key: Its full key, for messages.
        supplied: Arguments that the run adds to the outermost target.

    Raises:
        ConfigurationError: A target does not exist, an argument is unknown, missing or of the wrong plain type.
    """
    for place, nested in _targets(node, key):
        check_arguments(find_target(nested["_target_"], place), nested, place, supplied if nested is node else None)


def find_target(target: Any, key: str) -> Callable[..., Any]:
    """The class or function that `key._target_` names.

    Raises:
        ConfigurationError: There is no such module or name. An exception of the module itself is raised as it is.
    """
    try:
        return locate(target)
    except InstantiationException as error:
        root = _root_cause(error)
        if isinstance(root, ModuleNotFoundError) and root.name and f"{target}.".startswith(f"{root.name}."):
            raise ConfigurationError(f"{key}._target_={target}: {_what_is_missing(root.name)}") from error
        if root is error or type(root) in (ImportError, ValueError):
            reason = str(root).splitlines()[0]
            raise ConfigurationError(f"{key}._target_={target}: not a class or function to build. {reason}") from error
        raise root from None


def _what_is_missing(path: str) -> str:
    """The sentence for a dotted path whose last part is neither a module nor a name in one."""
    parent, _, name = path.rpartition(".")
    module = sys.modules.get(parent)
    if module is not None:
        return f"{parent} has no {name}.{did_you_mean(name, dir(module))}"
    modules = [file.stem for file in Path.cwd().glob("*.py")]
    hint = did_you_mean(path, modules) or f" Searched: this folder ({Path.cwd()}) and the installed packages."
    return f"there is no module {path}.{hint}"


def accepts(target: Callable[..., Any], name: str) -> bool:
    """Whether a class or function takes an argument of a name; `**kwargs` are followed up the base classes."""
    for signature in _signatures(target):
        if name in signature.parameters:
            return signature.parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    return False


def check_arguments(
    target: Callable[..., Any], node: Mapping[str, Any], key: str, supplied: Mapping[str, Any] | None = None
) -> None:
    """Holds the settings below `key` against the signature of their target.

    Args:
        target: The class or function.
        node: Its settings.
        key: Their full key, for messages.
        supplied: Arguments that the run adds.
    """
    parameters: dict[str, inspect.Parameter] = {}
    opened = True  # whether the last signature looked at passes further keywords on to one that cannot be seen
    for signature in _signatures(target):
        for name, parameter in signature.parameters.items():
            parameters.setdefault(name, parameter)
        opened = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    settings = {name: value for name, value in node.items() if name not in _KEYWORDS}
    name_of = getattr(target, "__name__", str(target))
    for name, value in settings.items():
        if name not in named and not opened:
            takes = ", ".join(other for other in named if other not in (supplied or {})) or "nothing"
            match = nearest(name, named)
            hint = f" Did you mean {key}.{match}?" if match else f" It takes {takes}."
            raise ConfigurationError(f"{key}.{name}: {name_of} takes no such argument.{hint}")
        if name in named:
            _check_type(named[name], value, f"{key}.{name}", target)
    if node.get("_partial_") or node.get("_args_"):
        return
    given = {*settings, *(supplied or {})}
    missing = [name for name, p in named.items() if p.default is p.empty and name not in given]
    if missing:
        raise ConfigurationError(f"{key}: {name_of} needs {', '.join(missing)}. Write {key}.{missing[0]}=...")


def _check_type(parameter: inspect.Parameter, value: Any, key: str, target: Callable[..., Any]) -> None:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        owner = target.__init__ if isinstance(target, type) else target
        try:
            annotation = typing.get_type_hints(owner).get(parameter.name)
        except (NameError, TypeError):  # names that only a type checker sees
            return
    members = plain_types(annotation)
    if not members or (isinstance(value, str) and value == "???") or (value is None and parameter.default is None):
        return
    fits = type(value) in members or (type(value) is int and float in members)
    if not fits:
        raise ConfigurationError(wrong_type(key, value, describe(members)))


def _signatures(target: Callable[..., Any]) -> Iterator[inspect.Signature]:
    """The signature, and those of the base classes as long as `**kwargs` pass arguments on to them."""
    if not isinstance(target, type):
        try:
            yield inspect.signature(target)
        except ValueError:  # built-ins without one take what they take
            return
        return
    for base in target.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        signature = inspect.signature(vars(base)["__init__"])
        yield signature.replace(parameters=list(signature.parameters.values())[1:])
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
            return


def _targets(node: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        if node.get("_recursive_", True):
            for name, value in node.items():
                yield from _targets(value, f"{key}.{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{key}[{index}]")


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
