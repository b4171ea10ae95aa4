"""Images in every form become the same pixels."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.pixels import as_many_pixels, as_pixels, drawn, png

BYTES = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5


FORMS = [np.asarray, jnp.asarray, lambda b: b / 255.0, lambda b: jnp.asarray(b) / 255.0, lambda b: (b / 255.0).tolist()]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_image_are_one(form):
    np.testing.assert_array_equal(as_pixels("x", form(BYTES)), BYTES)


def test_gray_images_need_no_channel_and_out_of_range_is_clipped():
    pixels = as_pixels("x", jnp.asarray([[-1.0, 0.5], [float("nan"), 2.0]], jnp.bfloat16))
    assert pixels[..., 0].tolist() == [[0, 128], [0, 255]] and pixels.shape == (2, 2, 1)
    assert as_pixels("x", np.array([[True, False]]))[..., 0].tolist() == [[255, 0]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2, 7)), "channels"),
        (np.zeros(3), "channels"),
        (np.zeros((0, 2, 3)), "channels"),
        (np.zeros((2, 2), np.int64), "uint8"),
        ("cat.png", "array of numbers"),
        ([[1.0], [1.0, 2.0]], "array of numbers"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ConfigurationError, match=message):
        as_pixels("x", image)


def test_several_images_are_as_many_as_asked_for():
    assert as_many_pixels("x", np.zeros((3, 4, 5)), 3).shape == (3, 4, 5, 1)
    with pytest.raises(ConfigurationError, match=r"images has shape \(3, 4, 5\).*a picture for each point"):
        as_many_pixels("x", np.zeros((3, 4, 5)), 2)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_keeps_the_pixels(channels):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, channels), np.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(png("x", pixels))))
    np.testing.assert_array_equal(decoded.reshape(pixels.shape), pixels)


def test_a_figure_is_drawn_as_it_is_saved_and_closed_only_on_request():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(2, 1), dpi=50, facecolor=(1.0, 0.0, 0.0))
    pixels = as_pixels("x", drawn("x", figure, close=False))
    assert pixels.shape == (50, 100, 4) and (pixels == (255, 0, 0, 255)).all()
    assert plt.fignum_exists(figure.number)
    drawn("x", figure, close=True)
    assert not plt.fignum_exists(figure.number)
    with pytest.raises(ConfigurationError, match="matplotlib figure"):
        drawn("x", np.zeros((2, 2)), close=True)
