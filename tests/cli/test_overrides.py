"""The words of the command line before Hydra sees them."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from nnx_fit.cli.overrides import key_of, rewrite, split_command, value_of
from nnx_fit.errors import ConfigurationError

GROUPS = {"logger": {"none", "csv"}, "model": {"digits_cnn"}, "optimizer": {"sgd"}}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("fit", [])),
        (["seed=1"], ("fit", ["seed=1"])),
        (["test", "seed=1"], ("test", ["seed=1"])),
        (["-m", "fit", "seed=1,2"], ("fit", ["-m", "seed=1,2"])),
        (["--cfg", "job", "-p", "test"], ("fit", ["--cfg", "job", "-p", "test"])),
        (["~logger", "--info"], ("fit", ["~logger", "--info"])),
    ],
)
def test_command_is_told_from_overrides_and_flags(words: list[str], expected: tuple[str, list[str]]) -> None:
    assert split_command(words) == (*expected, None)


@pytest.mark.parametrize(
    "words",
    [["resume", "runs/3", "seed=1"], ["seed=1", "resume", "runs/3"], ["resume", "--cfg", "job", "runs/3", "seed=1"]],
)
def test_directory_follows_resume(words: list[str]) -> None:
    found = split_command(words)
    assert (found.command, found.run_dir) == ("resume", "runs/3")
    assert found.overrides == [word for word in words if word not in ("resume", "runs/3")]


def test_directory_may_look_like_an_override(tmp_path: Path) -> None:
    run = tmp_path / "rate=3"
    assert split_command(["resume", str(run)]).run_dir is None
    run.mkdir()
    assert split_command(["resume", str(run)]).run_dir == str(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command trian; there are fit, validate, test, predict, resume. Did you mean fit?"),
        (["tune"], "unknown command tune"),
        (["eval"], "Did you mean validate?"),
        (["continue", "outputs/x"], "Did you mean resume?"),
        (["resume", "outputs/x", "outputs/y"], "outputs/y is not an override"),
        (["fit", "digits"], "digits is not an override"),
        (["trainer.max_epochs"], "write trainer.max_epochs=VALUE"),
        (["--max-epochs", "3"], "trainer.max_epochs=..."),
        (["--multirum"], "Did you mean --multirun?"),
    ],
)
def test_other_words_are_refused_with_the_fix(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        split_command(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("logger=null", "logger=none"),
        ("logger=null,csv", "logger=none,csv"),
        ("model=null", "~model"),
        ("model.width=null", "model.width=null"),
        ("+optimizer=sgd", "optimizer=sgd"),
        ("optimizer=5", "optimizer='5'"),
        ("optimizer.learning_rate=1e-3,3e-3", "optimizer.learning_rate=1e-3,3e-3"),
        ("x=[1,2]", "x=[1,2]"),
        ("x={a: 1}", "x={a: 1}"),
        ("x='a=b'", "x='a=b'"),
        ("x=interval(0,1)", "x=interval(0,1)"),
        ("x=${seed}", "x=${seed}"),
        ("~logger", "~logger"),
        ("--multirun", "--multirun"),
    ],
)
def test_only_what_hydra_would_refuse_is_rewritten(word: str, expected: str) -> None:
    assert rewrite([word], GROUPS) == [expected]


@pytest.mark.parametrize("value", ["a/epoch=2-step=15", "run(1)/x", "x[1]/y", "it's=1", "#3=", "~/data", "C:\\x=\\"])
def test_value_with_reserved_characters_arrives_as_it_was_typed(value: str) -> None:
    (word,) = rewrite([f"ckpt_path={value}"], {})
    assert OverridesParser.create().parse_override(word).value() == value
    assert value_of([word], "ckpt_path") == value


@given(st.text("ab/=.-_()[]#'\\ ~", min_size=1).filter(lambda v: v[0] in "ab/" and "\\" not in v and v == v.strip()))
def test_any_path_survives_the_grammar(path: str) -> None:
    if path.split("(")[0].isalpha() and "(" in path:
        return  # the form of a function call, which is Hydra's own syntax
    (word,) = rewrite([f"ckpt_path={path}"], {})
    assert str(OverridesParser.create().parse_override(word).value()) == path


def test_each_value_of_a_sweep_is_quoted_by_itself() -> None:
    (word,) = rewrite(["ckpt_path=a/epoch=1,a/epoch=2"], {})
    override = OverridesParser.create().parse_override(word)
    assert override.is_sweep_override()
    assert [str(value) for value in override.sweep_string_iterator()] == ["'a/epoch=1'", "'a/epoch=2'"]


def test_key_and_value_of_an_override() -> None:
    assert key_of("++optimizer.learning_rate=1e-3") == "optimizer.learning_rate"
    assert key_of("~logger") == "logger"
    assert value_of(["name=a", "name=b"], "name") == "b"
    assert value_of(["names=a"], "name") is None
