"""The files from which TensorBoard's projector shows an embedding: points, labels, pictures and their list.

The list, `projector_config.pbtxt`, stands in the run's directory; the projector reads nothing else.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.pixels import as_many_pixels, png

CONFIG_FILE = "projector_config.pbtxt"
LARGEST_SPRITE = 8192  # pixels of a side: what the projector can show


def as_points(tag: str, vectors: Any, metadata: Sequence[Any] | None) -> np.ndarray:
    """The vectors of an embedding, float32, shape `(points, dimensions)`.

    Raises:
        ConfigurationError: They are no such array, or do not fit their labels.
    """
    points = np.asarray(vectors)
    if points.ndim != 2 or not points.size:
        raise ConfigurationError(
            f'log_embedding("{tag}", ...): vectors have shape {points.shape}. Fix: pass (points, dimensions).'
        )
    if metadata is not None and len(metadata) != len(points):
        raise ConfigurationError(
            f'log_embedding("{tag}", ...): {len(metadata)} labels in metadata for {len(points)} vectors. Fix: pass one '
            "for each."
        )
    return points.astype(np.float32)


def write_embedding(
    directory: Path, tag: str, vectors: Any, step: int, metadata: Sequence[Any] | None, images: Any
) -> None:
    """Writes an embedding and puts it on the run's list.

    Args:
        directory: The run's directory, which exists.
        tag: Name; the projector shows it with the step.
        vectors: Shape `(points, dimensions)`.
        step: `global_step`.
        metadata: A label for each point, or `None`.
        images: A picture for each point, or `None`.

    Raises:
        ConfigurationError: Shapes do not fit, or the pictures are too many or too large for the projector.
    """
    points = as_points(tag, vectors, metadata)
    pictures = None if images is None else _square(as_many_pixels(tag, images, len(points)))
    picture_file = None if pictures is None else png(tag, _sprite(tag, pictures))
    folder = Path("embeddings", f"{re.sub(r'[^A-Za-z0-9._-]+', '_', tag)}-{step}")
    (directory / folder).mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(repr, row)) for row in points.tolist()]
    entry = [f"  tensor_name: {_quoted(f'{tag} at step {step}')}", f"  tensor_path: {_quoted(folder / 'tensors.tsv')}"]
    (directory / folder / "tensors.tsv").write_text("\n".join(lines) + "\n")
    if metadata is not None:
        # A line for each point: a line break or tab within a label would be read as another one.
        labels = [re.sub(r"\s+", " ", str(label)) for label in metadata]
        (directory / folder / "metadata.tsv").write_text("\n".join(labels) + "\n", encoding="utf-8")
        entry.append(f"  metadata_path: {_quoted(folder / 'metadata.tsv')}")
    if pictures is not None and picture_file is not None:
        (directory / folder / "sprite.png").write_bytes(picture_file)
        side = pictures.shape[1]
        entry += [
            "  sprite {",
            f"    image_path: {_quoted(folder / 'sprite.png')}",
            f"    single_image_dim: {side}",
            f"    single_image_dim: {side}",
            "  }",
        ]
    _list(directory / CONFIG_FILE, "\n".join(["embeddings {", *entry, "}", ""]))


def _list(file: Path, entry: str) -> None:
    """Adds an entry, once; a reader sees the old list or the new one."""
    listed = file.read_text(encoding="utf-8") if file.exists() else ""
    if entry not in listed:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(listed + entry, encoding="utf-8")
        os.replace(temporary, file)


def _quoted(value: Any) -> str:
    """A string of the text format of protocol buffers, which JSON's escapes are a part of."""
    return json.dumps(value if isinstance(value, str) else value.as_posix(), ensure_ascii=False)


def _square(pictures: np.ndarray) -> np.ndarray:
    """Pictures with white around them where they are not square."""
    _, height, width, _ = pictures.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    margins = ((0, 0), (top, side - height - top), (left, side - width - left), (0, 0))
    return np.pad(pictures, margins, constant_values=255)


def _sprite(tag: str, pictures: np.ndarray) -> np.ndarray:
    """All pictures as one square picture, row by row from its top left."""
    count, side, _, channels = pictures.shape
    across = math.ceil(math.sqrt(count))
    if across * side > LARGEST_SPRITE:
        raise ConfigurationError(
            f'log_embedding("{tag}", ...): {count} images of {side} by {side} pixels make a picture of '
            f"{across * side} by {across * side}; TensorBoard shows up to {LARGEST_SPRITE}. Fix: log fewer points, or "
            "smaller images."
        )
    grid = np.zeros((across * across, side, side, channels), np.uint8)
    grid[:count] = pictures
    rows = grid.reshape(across, across, side, side, channels).swapaxes(1, 2)
    return rows.reshape(across * side, across * side, channels)
