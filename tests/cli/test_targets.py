"""The classes that a config names, checked before any of them is built."""

import sys
from pathlib import Path
from typing import Any

import pytest

from nnx_fit.cli.targets import accepts, check_arguments, check_targets, find_target
from nnx_fit.errors import ConfigurationError


class Base:
    def __init__(self, depth: int, *, rngs: Any = None) -> None: ...


class Forwarding(Base):
    def __init__(self, width: int = 3, rate: float | None = None, **kwargs: Any) -> None: ...


class Closed:
    def __init__(self, width: int) -> None: ...


def function(a: int, b: str = "x") -> None: ...


def test_keyword_arguments_are_followed_up_the_base_classes() -> None:
    assert accepts(Forwarding, "rngs")
    assert accepts(Base, "depth")
    assert not accepts(Closed, "rngs")
    assert not accepts(function, "rngs")


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (Closed, {"widht": 1}, "m.widht: Closed takes no such argument. Did you mean m.width?"),
        (Closed, {"zzz": 1, "width": 2}, "It takes width."),
        (Closed, {}, "m: Closed needs width. Write m.width=..."),
        (Closed, {"width": "wide"}, "m.width=wide: expected int, got str."),
        (Closed, {"width": 1.5}, "m.width=1.5: expected int, got float."),
        (Forwarding, {"depth": 1, "rate": "fast"}, "m.rate=fast: expected float or null, got str."),
        (Forwarding, {"depth": "deep"}, "m.depth=deep: expected int, got str."),
        (Forwarding, {}, "m: Forwarding needs depth."),
        (function, {"a": True}, "m.a=true: expected int, got bool."),
    ],
)
def test_wrong_argument_is_named(target: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        check_arguments(target, settings, "m")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        (Closed, {"width": 1}),
        (Forwarding, {"depth": 1, "rate": 1, "width": 2}),
        (Forwarding, {"depth": 1, "rate": None}),
        (Closed, {"_partial_": True}),
        (Closed, {"_args_": [1]}),
        (dict, {"anything": 1}),
    ],
)
def test_right_arguments_pass(target: Any, settings: dict[str, Any]) -> None:
    check_arguments(target, settings, "m")


def test_what_the_run_supplies_is_not_missing() -> None:
    check_arguments(Closed, {}, "m", supplied={"width": None})


def test_nested_targets_are_checked_with_their_full_key() -> None:
    nested = {"_target_": "nnx_fit.cli.suggestions.nearest", "name": "a", "candidate": []}
    with pytest.raises(
        ConfigurationError, match=r"data\.parts\[0\]\.candidate: .* Did you mean data\.parts\[0\]\.candidates\?"
    ):
        check_targets({"_target_": "builtins.dict", "parts": [nested]}, "data")
    check_targets({"_target_": "builtins.dict", "_recursive_": False, "parts": [nested]}, "data")


def test_missing_module_and_missing_name_are_told_apart(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    (folder / "mynets.py").write_text("class Classifier: ...\n")
    with pytest.raises(ConfigurationError, match=r"there is no module mynet\. Did you mean mynets\?"):
        find_target("mynet.Classifier", "model")
    with pytest.raises(ConfigurationError, match=r"mynets has no Clasifier\. Did you mean Classifier\?"):
        find_target("mynets.Clasifier", "model")
    assert find_target("mynets.Classifier", "model").__name__ == "Classifier"


def test_exception_of_a_module_itself_is_raised_as_it_is(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    (folder / "halfway.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        find_target("halfway.Net", "model")
