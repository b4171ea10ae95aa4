"""`DataModule`: which loaders there are, and what is said when one is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nnx_fit.data.datamodule import DataModule, LoaderKind, has_loader
from nnx_fit.errors import ConfigurationError

KINDS: dict[LoaderKind, str] = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}


class OnlyTrain(DataModule):
    def train_dataloader(self):
        return [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_loader_is_an_error_that_names_method_and_verb(kind):
    method = f"{kind}_dataloader"
    with pytest.raises(ConfigurationError, match=rf"(?s)DataModule has no {method}\(\), and `{KINDS[kind]}` needs one"):
        getattr(DataModule(), method)()


def test_provides_tells_what_is_overridden_without_building_it():
    data = OnlyTrain()
    assert [data.provides(kind) for kind in KINDS] == [True, False, False, False]
    data.val_dataloader = lambda: [3]
    assert data.provides("val")


def test_any_object_with_the_methods_is_asked_alike():
    class Foreign:
        def test_dataloader(self):
            return [1]

    assert [has_loader(Foreign(), kind) for kind in KINDS] == [False, False, True, False]


def test_hooks_default_to_nothing():
    data = OnlyTrain()
    data.prepare_data()
    data.setup("fit")
    assert data.state_dict() == {}
    data.load_state_dict({})
    data.teardown("fit")


def test_naming_a_datamodule_loads_no_jax():
    code = "import sys, nnx_fit.data.datamodule; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
