"""The recompilation sentinel: every compilation is counted, and a second one says what changed."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flax import nnx
from nets import Regressor, loader, quiet

from nnx_fit.programs.sentinel import Sentinel


def batch(*shape: int, dtype: type = np.float32, **others: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": np.zeros(shape, dtype), **others}


def test_the_first_compilation_says_nothing(caplog):
    sentinel = Sentinel("The train step")
    with caplog.at_level(logging.DEBUG, "nnx_fit"):
        sentinel.traced(batch(64, 8), [])
    assert sentinel.causes == ["first call"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("second", "cause"),
    [
        (batch(5, 8, 8), "batch['image']: (64, 8, 8) -> (5, 8, 8)"),
        (batch(64, 9, 9), "batch['image']: (64, 8, 8) -> (64, 9, 9)"),
        (batch(64, 8, 8, dtype=np.float16), "batch['image']: float32 -> float16"),
        (batch(64, 8, 8, mask=np.zeros(2)), "batch['mask']: new"),
        ({"picture": np.zeros((64, 8, 8))}, "batch['image']: gone; batch['picture']: new"),
    ],
)
def test_a_second_compilation_names_the_leaf_and_both_sides(second, cause, caplog):
    sentinel = Sentinel("The train step")
    sentinel.traced(batch(64, 8, 8), [np.zeros(3)])
    with caplog.at_level(logging.INFO, "nnx_fit"):
        sentinel.traced(second, [np.zeros(3)])
    assert sentinel.causes[1] == cause
    (record,) = caplog.records
    assert record.getMessage().startswith(f"The train step is compiled again (2 times now): {cause}.")


def test_the_change_is_told_against_the_nearest_shape_seen():
    sentinel = Sentinel("The train step")
    sentinel.traced(batch(64, 8, mask=np.zeros((64, 2))), [])
    sentinel.traced(batch(5, 8, mask=np.zeros((5, 2))), [])
    sentinel.traced(batch(5, 9, mask=np.zeros((5, 2))), [])
    assert sentinel.causes[2] == "batch['image']: (5, 8) -> (5, 9)"


def levels(caplog, *shapes: tuple[int, ...]) -> list[int]:
    sentinel = Sentinel("The train step")
    with caplog.at_level(logging.INFO, "nnx_fit"):
        for shape in shapes:
            sentinel.traced(batch(*shape), [])
    return [record.levelno for record in caplog.records]


def test_one_ragged_last_batch_is_no_warning(caplog):
    assert levels(caplog, (64, 8), (5, 8)) == [logging.INFO]


def test_ever_new_shapes_are_a_warning_with_the_fix(caplog):
    assert levels(caplog, (64, 8), (5, 8), (6, 8), (7, 8))[-1] == logging.WARNING
    assert "pad them" in caplog.records[-1].getMessage()


def test_another_inner_shape_is_a_warning_at_once(caplog):
    assert levels(caplog, (64, 8), (64, 9)) == [logging.WARNING]


def test_the_same_shapes_again_blame_a_static_value(caplog):
    assert levels(caplog, (64, 8), (64, 8)) == [logging.WARNING]
    assert "static value" in caplog.records[-1].getMessage()


def test_a_real_run_tells_its_ragged_batch(caplog):
    trainer = quiet(max_epochs=2)
    with caplog.at_level(logging.INFO, "nnx_fit"):
        trainer.fit(Regressor(depth=1, rngs=nnx.Rngs(0)), loader(40, 16))
    assert trainer.compilations == ["first call", "batch['x']: (16, 8) -> (8, 8); batch['y']: (16, 1) -> (8, 1)"]
    (message,) = [record.getMessage() for record in caplog.records if "compiled again" in record.getMessage()]
    assert "batch['x']: (16, 8) -> (8, 8)" in message
