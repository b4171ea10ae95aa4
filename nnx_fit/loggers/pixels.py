"""Pictures as pixels: whatever an image is given as becomes one uint8 array that every logger can encode."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np

from nnx_fit.errors import ConfigurationError


def as_pixels(tag: str, image: Any) -> np.ndarray:
    """An image as uint8, shape `(height, width, channels)`.

    Args:
        tag: Its name, for messages.
        image: Shape `(height, width)` or `(height, width, channels)` with 1, 3 or 4 channels; uint8, or float or bool
            in 0..1, where what is outside is clipped and NaN is black.

    Raises:
        ConfigurationError: It is no such array.
    """
    pixels = _numeric(f'The image "{tag}"', image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or not pixels.size:
        raise ConfigurationError(
            f'The image "{tag}" has shape {np.shape(image)}. Fix: pass (height, width) or (height, width, channels) '
            "with 1, 3 or 4 channels."
        )
    return _as_bytes(f'The image "{tag}"', pixels)


def as_many_pixels(tag: str, images: Any, count: int) -> np.ndarray:
    """Several images as uint8, shape `(count, height, width, channels)`; otherwise as `as_pixels`."""
    pixels = _numeric(f'Of "{tag}", images', images)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3, 4) or len(pixels) != count or not pixels.size:
        raise ConfigurationError(
            f'Of "{tag}", images has shape {np.shape(images)}. Fix: pass ({count}, height, width) or '
            f"({count}, height, width, channels), a picture for each point."
        )
    return _as_bytes(f'Of "{tag}", images', pixels)


def drawn(tag: str, figure: Any, *, close: bool) -> np.ndarray:
    """The pixels of a matplotlib figure, shape `(height, width, 4)`.

    Raises:
        ConfigurationError: It is no figure.
    """
    if not hasattr(figure, "savefig"):
        raise ConfigurationError(
            f'log_figure("{tag}", ...) got a {type(figure).__name__}. Fix: pass a matplotlib figure; an array of '
            "pixels goes to log_image."
        )
    from matplotlib.image import imread

    # As a file, which leaves the window that the figure may be shown in alone.
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    file.seek(0)
    pixels = imread(file)
    if close and "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)
    return pixels


def png(tag: str, pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 pixels, shape `(height, width, channels)`.

    Raises:
        ConfigurationError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigurationError(
            f'Pillow, which encodes the image "{tag}", is not installed. Fix: pip install pillow'
        ) from error
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()


def _numeric(what: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{what}: {error}. Fix: pass an array of numbers.") from error
    if array.dtype == np.uint8 or array.dtype == np.bool_:
        return array
    if array.dtype.kind in "iu":
        raise ConfigurationError(f"{what} has dtype {array.dtype}. Fix: .astype(np.uint8), or pass float in 0..1.")
    try:
        return array.astype(np.float32)  # bfloat16 and other types of JAX included
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{what} has dtype {array.dtype}. Fix: pass an array of numbers.") from error


def _as_bytes(what: str, pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    return (np.clip(np.nan_to_num(pixels.astype(np.float32)), 0.0, 1.0) * 255.0).round().astype(np.uint8)
