"""The tour of state: each program runs, and what it claims is so."""

from __future__ import annotations

import re

import numpy as np
import pytest
from programs import REPOSITORY, program

import nnx_fit as nf


def test_the_tour_names_every_file_once():
    folder = REPOSITORY / "examples" / "state"
    named = re.findall(r"^\| \d \| \[`(\w+\.py)`\]\(\1\)", (folder / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in folder.glob("*.py"))


def test_two_params_are_both_learned_unless_one_is_frozen(capsys):
    models = program("examples/state/two_params.py").main()
    np.testing.assert_allclose(models["both"].affine.scale[...], [3, -2], rtol=1e-4)
    np.testing.assert_allclose(models["both"].affine.shift[...], [-1, 5], rtol=1e-4)
    np.testing.assert_array_equal(models["frozen"].affine.shift[...], [0, 0])
    assert np.all(np.asarray(models["frozen"].affine.scale[...]) != 1)
    roles = {row.path: row.role for row in nf.partition(models["frozen"]).rows}
    assert roles == {"affine.scale": "params", "affine.shift": "frozen"}
    assert "affine.shift  frozen" in capsys.readouterr().out


def test_a_hand_written_batch_norm_learns_its_statistics_in_training_only():
    found = program("examples/state/batch_norm_by_hand.py").main()
    mean, var = found["learned"]
    np.testing.assert_allclose(mean, [5, 5, 5], atol=0.5)
    np.testing.assert_allclose(var, [4, 4, 4], atol=1)
    np.testing.assert_array_equal(found["kept"], found["learned"])
    assert found["val_loss"] < 0.5


def test_random_streams_stay_apart_and_validation_leaves_them():
    assert program("examples/state/random_streams.py").main() == {
        "same": True,
        "counts": {"dropout": 24, "noise": 24},
        "start": True,
        "ends_elsewhere": True,
    }


def test_training_changes_all_three_kinds_and_validation_none():
    found = program("examples/state/three_kinds.py").main()
    assert {role: count for role, (count, _, _) in found["totals"].items()} == {
        "params": 5,
        "frozen": 0,
        "stats": 2,
        "rngs": 2,
    }
    assert found["accuracy"] > 0.9
    assert found["by_training"] == {"params", "stats", "rngs"}
    assert found["by_validation"] == set()


def test_state_goes_out_and_in_again():
    found = program("examples/state/extract_update_save.py").main()
    best, now = found.pop("best")
    assert now == pytest.approx(best, rel=1e-5)
    assert found == {"moved": True, "continued": True, "loaded": True}


EXPECTED = {
    "the flag is forgotten": r"training moved the mean: True, validation moved it: False",
    "evaluation changes the model": r"StateError: validation_step changed 1 running statistic:\n    norm\.mean\n"
    r"(.|\n)*Fix: ",
    "a parameter is written by hand": r"StateError: training_step wrote 1 trained parameter by hand:\n"
    r"    linear\.kernel\n(.|\n)*Fix: (.|\n)*self\.freeze\(\"linear\.kernel\"\)",
    "the same in a hook": r"the largest weight is 0\.1",
    "a Variable is made in a step": r"StateError: (.|\n)*added activation\n(.|\n)*Fix: create Variables in `__init__`",
    "a value is kept in a plain attribute": r"StateError: training_step kept a traced value in `last_loss`"
    r"(.|\n)*Fix: return it",
    "an object is saved instead of state": r"CheckpointError: (.|\n)*DIRECTORY/mine(.|\n)*Linear(.|\n)*Fix: ",
    "a model is pickled in the middle of training": r"StateError: `linear\.kernel` was read while the training program"
    r" has its value(.|\n)*Fix: ",
}


@pytest.mark.parametrize("mistake", EXPECTED)
def test_a_mistake_gives_an_error_that_names_it(mistake):
    mistakes = program("examples/state/mistakes.py").MISTAKES
    assert list(mistakes) == list(EXPECTED)
    assert re.search(EXPECTED[mistake], mistakes[mistake]())
