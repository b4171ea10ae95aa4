"""Numbers that finders read and set: attributes, hyperparameters, both; and what is no number."""

from __future__ import annotations

import nets
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.named_number import find_number


class Plain:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_an_attribute_and_the_hyperparameter_of_its_name_are_set_together():
    module = nets.Regressor(learning_rate=0.5, rngs=nnx.Rngs(0))
    number = find_number(module, "module", "learning_rate")
    assert (number.label, number.value) == ("module.learning_rate", 0.5)
    number.set(0.25)
    assert (module.learning_rate, module.hparams.learning_rate) == (0.25, 0.25)


def test_a_hyperparameter_alone_is_enough():
    owner = Plain(hparams={"batch_size": 4})
    number = find_number(owner, "datamodule", "batch_size")
    number.set(8)
    assert (number.value, owner.hparams, hasattr(owner, "batch_size")) == (8, {"batch_size": 8}, False)


def test_a_dotted_path_leads_to_what_is_below():
    owner = Plain(data=Plain(batch_size=4))
    find_number(owner, "datamodule", "data.batch_size").set(2)
    assert owner.data.batch_size == 2
    assert find_number(owner, "datamodule", "dota.batch_size") is None


class WithMethod(nets.Regressor):
    def batch_size(self, batch):
        return len(batch["x"])


@pytest.mark.parametrize("value", [True, "8", None, [8]])
def test_what_is_no_number_is_not_found(value):
    assert find_number(Plain(batch_size=value), "datamodule", "batch_size") is None


def test_a_method_of_the_name_is_not_found():
    assert find_number(WithMethod(rngs=nnx.Rngs(0)), "module", "batch_size") is None


class ReadOnly:
    @property
    def batch_size(self):
        return 4


def test_a_number_that_cannot_be_set_is_named():
    with pytest.raises(nf.ConfigurationError, match=r"datamodule\.batch_size cannot be set"):
        find_number(ReadOnly(), "datamodule", "batch_size").set(8)
