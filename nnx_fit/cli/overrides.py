"""The words of the command line before Hydra sees them.

Separates the command (`fit`, `test`, `resume RUN_DIR`, ...) from the overrides, and writes two things the way Hydra's
grammar wants them: `group=null`, and values that hold characters of the grammar (`ckpt_path=outputs/epoch=2-step=15`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nnx_fit.cli.suggestions import nearest
from nnx_fit.configs import GROUPS, TrainerConfig
from nnx_fit.errors import ConfigurationError

COMMANDS = ("fit", "validate", "test", "predict", "resume")
_OTHER_NAMES = {
    "train": "fit",
    "run": "fit",
    "continue": "resume",
    "eval": "validate",
    "evaluate": "validate",
    "infer": "predict",
}

# Hydra's own flags. Those with a value take the next word, which is then no command.
_FLAGS = {"--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"}
_FLAGS |= {"--shell-completion", "-sc"}
_FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
_FLAGS_WITH_VALUE |= {"--config-dir", "-cd", "--experimental-rerun", "--info", "-i"}

_OVERRIDE = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[\w$][\w$\-./@:]*)=(?P<value>.*)", re.DOTALL)
_STRUCTURED = re.compile(r"[\[{'\"].*|[A-Za-z_]\w*\(.*\)", re.DOTALL)


class CommandLine(NamedTuple):
    """The words of a command line, told apart.

    Attributes:
        command: One of `COMMANDS`.
        overrides: Flags and overrides, in order.
        run_dir: What follows `resume`.
    """

    command: str
    overrides: list[str]
    run_dir: str | None = None


def split_command(words: Sequence[str]) -> CommandLine:
    """Takes the command out of the words, and the directory that belongs to it.

    Args:
        words: What follows `nnx-fit` on the command line; without a command it is `"fit"`.

    Raises:
        ConfigurationError: A word is neither a command, a flag of Hydra nor an override.
    """
    command: str | None = None
    run_dir: str | None = None
    rest: list[str] = []
    previous = ""
    for word in words:
        value_of_flag = previous in _FLAGS_WITH_VALUE
        previous = word
        if word.startswith("-") and not value_of_flag:
            _check_flag(word)
        elif not value_of_flag and command == "resume" and run_dir is None and _may_be_directory(word):
            run_dir = word
            continue
        elif not value_of_flag and "=" not in word and not word.startswith("~"):
            if command is not None or word not in COMMANDS:
                raise _unknown_word(word, first=command is None)
            command = word
            continue
        rest.append(word)
    return CommandLine(command or "fit", rest, run_dir)


def _may_be_directory(word: str) -> bool:
    return "=" not in word or Path(word).is_dir()


def _check_flag(word: str) -> None:
    name = word.split("=", 1)[0]
    known = _FLAGS | _FLAGS_WITH_VALUE
    if name not in known:
        key = name.lstrip("-").replace("-", "_")
        key = f"trainer.{key}" if key in {field.name for field in fields(TrainerConfig)} else key
        match = nearest(name, known, cutoff=0.8)
        hint = f"Did you mean {match}?" if match else f"Settings are given as key=value: {key}=..."
        raise ConfigurationError(f"unknown option {word}. {hint}")


def _unknown_word(word: str, *, first: bool) -> ConfigurationError:
    if not first or "." in word:
        return ConfigurationError(f"{word} is not an override: write {word}=VALUE, or ~{word} to remove it.")
    match = nearest(word, [*COMMANDS, *_OTHER_NAMES])
    hint = f" Did you mean {_OTHER_NAMES.get(match, match)}?" if match else ""
    return ConfigurationError(f"unknown command {word}; there are {', '.join(COMMANDS)}.{hint}")


def rewrite(words: Sequence[str], groups: Mapping[str, Set[str]]) -> list[str]:
    """Writes overrides as Hydra's grammar wants them.

    Args:
        words: Flags and overrides.
        groups: The config groups and the options of each.

    Returns:
        The words; `group=null` as `group=none` or `~group`, values with reserved characters in quotes.
    """
    return [_rewrite_word(word, groups) for word in words]


def _rewrite_word(word: str, groups: Mapping[str, Set[str]]) -> str:
    match = _OVERRIDE.fullmatch(word)
    if match is None:
        return word
    prefix, key, value = match["prefix"] or "", match["key"], match["value"]
    if prefix == "+" and key in GROUPS:
        prefix = ""  # each is in the defaults list already, where Hydra takes no second one
    if key in groups and "null" in value.split(","):
        if "none" in groups[key]:
            value = ",".join("none" if part == "null" else part for part in value.split(","))
        elif value == "null" and prefix != "~":
            return f"~{key}"
    if key in groups and value.isdigit():
        value = f"'{value}'"  # the name of an option, which Hydra would take for a number
    if _parses(f"{prefix}{key}={value}") or _STRUCTURED.fullmatch(value):
        return f"{prefix}{key}={value}"
    # Commas separate the values of a sweep, so each value is quoted by itself.
    return f"{prefix}{key}=" + ",".join(_quote(part) for part in value.split(","))


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _quote(value: str) -> str:
    if _parses(f"key={value}"):
        return value
    # A backslash escapes only in front of a quote, and at the end, where the closing quote follows.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{escaped}'"


def key_of(word: str) -> str:
    """The key of an override: `optimizer.learning_rate` of `++optimizer.learning_rate=1e-3`."""
    return word.lstrip("+~").split("=", 1)[0].split("@", 1)[0]


def value_of(words: Sequence[str], key: str) -> str | None:
    """The value that the last override of `key` gives it, or `None`."""
    found = None
    for word in words:
        if "=" in word and not word.startswith(("-", "~")) and key_of(word) == key:
            parsed = OverridesParser.create().parse_override(word)
            found = None if parsed.is_sweep_override() else parsed.value()
    return None if found is None else str(found)
