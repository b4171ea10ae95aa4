"""The main job: handwritten digits, and a small convolutional network that reads them.

The data ships with scikit-learn, so the whole job needs no network; 1,797 images of 8x8 pixels are enough to tell a
right training loop from a wrong one in under a minute on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nnx_fit.data.array_loader import ArrayLoader
from nnx_fit.data.datamodule import DataModule
from nnx_fit.errors import ConfigurationError
from nnx_fit.module import FitModule

Batch = Mapping[str, Any]

_NUM_IMAGES = 1797
_SPLIT_SEED = 0


class DigitsData(DataModule):
    """scikit-learn's 1,797 handwritten digits, in a split that is the same for every seed.

    Batches are `{"image": (batch, 8, 8, 1) float32 in 0..1, "label": (batch,) int32}`.

    Args:
        batch_size: Images in a batch.
        num_val: Images held out for validation.
        num_test: Images held out for testing.
        seed: Fixes the order of the training images.
    """

    def __init__(self, batch_size: int = 32, num_val: int = 256, num_test: int = 352, seed: int = 0) -> None:
        if min(num_val, num_test) < 10 or num_val + num_test > _NUM_IMAGES - 10:
            raise ConfigurationError(
                f"DigitsData(num_val={num_val}, num_test={num_test}): of the {_NUM_IMAGES} images each part, and what "
                "is left to train on, needs at least 10, one of each digit."
            )
        self.batch_size = batch_size
        self.num_val = num_val
        self.num_test = num_test
        self.seed = seed
        self._parts: dict[str, dict[str, np.ndarray]] = {}

    def setup(self, stage: str) -> None:
        """Loads and splits the images, stratified by digit."""
        del stage
        if self._parts:
            return
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ConfigurationError(
                'DigitsData needs scikit-learn, which is not installed. Fix: pip install "nnx-fit[demo]"'
            ) from error
        digits: Any = load_digits()
        images = (digits.images[..., None] / 16.0).astype(np.float32)
        labels = digits.target.astype(np.int32)
        rest, test = train_test_split(
            np.arange(len(labels)), test_size=self.num_test, stratify=labels, random_state=_SPLIT_SEED
        )
        train, val = train_test_split(rest, test_size=self.num_val, stratify=labels[rest], random_state=_SPLIT_SEED)
        for name, rows in (("train", train), ("val", val), ("test", test)):
            self._parts[name] = {"image": images[rows], "label": labels[rows]}

    def train_dataloader(self) -> ArrayLoader:
        """The training images, shuffled anew in each epoch; a last, smaller batch is left out of it."""
        return ArrayLoader(self._parts["train"], self.batch_size, shuffle=True, drop_last=True, seed=self.seed)

    def val_dataloader(self) -> ArrayLoader:
        """The validation images."""
        return ArrayLoader(self._parts["val"], self.batch_size)

    def test_dataloader(self) -> ArrayLoader:
        """The test images."""
        return ArrayLoader(self._parts["test"], self.batch_size)

    def predict_dataloader(self) -> ArrayLoader:
        """The test images again, in the same order."""
        return self.test_dataloader()


class DigitsCNN(FitModule):
    """Two convolutions with batch normalization, a dropout and a linear layer.

    Args:
        width: Channels of the first convolution; the second has twice as many.
        dropout: Share of the features dropped in training.
        max_shift: Largest shift of a training image, in pixels each way.
        rngs: Source of the parameters, the dropout and the shifts.
    """

    def __init__(self, width: int = 32, dropout: float = 0.25, max_shift: int = 1, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(2 * width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(2 * width * 4 * 4, 10, rngs=rngs)
        self.max_shift = max_shift
        self.shift_stream = rngs["shift"].fork()

    def __call__(self, image: jax.Array) -> jax.Array:
        """Scores of the ten digits.

        Args:
            image: `(batch, 8, 8, 1)`.

        Returns:
            Logits, `(batch, 10)`.
        """
        x = nnx.relu(self.norm1(self.conv1(image)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.head(self.dropout(x.reshape(x.shape[0], -1)))

    def training_step(self, batch: Batch) -> jax.Array:
        """The loss on images that are shifted at random."""
        image = random_shift(self.shift_stream(), batch["image"], self.max_shift)
        return self._loss("train", image, batch["label"])

    def validation_step(self, batch: Batch) -> None:
        """Logs loss and accuracy."""
        self._loss("val", batch["image"], batch["label"])

    def test_step(self, batch: Batch) -> None:
        """Logs loss and accuracy."""
        self._loss("test", batch["image"], batch["label"])

    def predict_step(self, batch: Batch) -> dict[str, jax.Array]:
        """The most likely digit and the probabilities of all ten."""
        probabilities = nnx.softmax(self(batch["image"]))
        return {"digit": probabilities.argmax(-1), "probabilities": probabilities}

    def _loss(self, stage: str, image: jax.Array, label: jax.Array) -> jax.Array:
        logits = self(image)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/accuracy", (logits.argmax(-1) == label).mean(), prog_bar=stage != "train")
        return loss


def random_shift(key: jax.Array, images: jax.Array, max_shift: int) -> jax.Array:
    """Moves each image by its own random number of pixels; what comes in from outside is black.

    Args:
        key: Random key.
        images: `(batch, height, width, channels)`.
        max_shift: Largest shift in each direction, in pixels.

    Returns:
        Images of the same shape.
    """
    padding = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    padded = jnp.pad(images, padding)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * max_shift + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)
