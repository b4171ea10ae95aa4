"""The main job's model and data."""

import jax
import numpy as np
import pytest
from flax import nnx

from nnx_fit.demo.digits import DigitsCNN, DigitsData, random_shift
from nnx_fit.errors import ConfigurationError


def parts(**settings: int) -> dict[str, np.ndarray]:
    data = DigitsData(batch_size=1, **settings)  # smaller last batches are left out of training, and here there is none
    data.setup("fit")
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    return {name: np.concatenate([batch["image"] for batch in loader]) for name, loader in loaders.items()}


def test_split_uses_every_image_once() -> None:
    images = parts()
    rows = np.concatenate(list(images.values())).reshape(-1, 64)
    assert len(rows) == 1797
    from sklearn.datasets import load_digits

    expected = load_digits().data.astype(np.float32) / 16
    assert np.array_equal(np.array(sorted(map(tuple, rows))), np.array(sorted(map(tuple, expected))))


def test_split_is_the_same_for_every_seed_and_the_order_is_not() -> None:
    one, two = parts(seed=1), parts(seed=2)
    for name in ("val", "test"):
        assert np.array_equal(one[name], two[name])
    assert not np.array_equal(one["train"], two["train"])
    assert np.array_equal(np.sort(one["train"], axis=0), np.sort(two["train"], axis=0))


def test_digits_are_as_frequent_in_each_part() -> None:
    data = DigitsData()
    data.setup("test")
    labels = np.concatenate([batch["label"] for batch in data.test_dataloader()])
    assert labels.dtype == np.int32
    assert max(np.bincount(labels)) - min(np.bincount(labels)) <= 3


def test_batches_have_the_documented_form() -> None:
    data = DigitsData(batch_size=7)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (7, 8, 8, 1)
    assert batch["image"].dtype == np.float32
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1


def test_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_val=900, num_test=900"):
        DigitsData(num_val=900, num_test=900)


def test_model_has_batch_norm_and_dropout_and_one_score_per_digit() -> None:
    model = DigitsCNN(width=4, rngs=nnx.Rngs(0))
    assert model(np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 10)
    assert len(jax.tree.leaves(nnx.state(model, nnx.BatchStat))) == 4
    assert model.dropout.rate == 0.25


def test_width_sets_the_channels() -> None:
    model = DigitsCNN(width=5, rngs=nnx.Rngs(0))
    assert model.conv1.kernel[...].shape == (3, 3, 1, 5)
    assert model.conv2.kernel[...].shape == (3, 3, 5, 10)


def test_shift_moves_each_image_by_whole_pixels_and_fills_with_black() -> None:
    images = np.zeros((64, 8, 8, 1), np.float32)
    images[:, 4, 4] = 1
    shifted = np.asarray(random_shift(jax.random.key(0), images, 1))
    assert shifted.shape == images.shape
    assert np.array_equal(shifted.sum((1, 2, 3)), np.ones(64))
    rows, columns = np.nonzero(shifted[..., 0].sum(0))
    assert set(rows) == set(columns) == {3, 4, 5}
    corner = np.ones((1, 8, 8, 1), np.float32)
    sums = {float(random_shift(jax.random.key(k), corner, 1).sum()) for k in range(20)}
    assert sums <= {64.0, 56.0, 49.0}
    assert len(sums) > 1


def test_no_shift_leaves_the_images_alone() -> None:
    images = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    assert np.array_equal(random_shift(jax.random.key(0), images, 0), images)
