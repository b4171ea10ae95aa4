"""Embeddings, read back with the parser and the rules of TensorBoard's projector."""

import numpy as np
import pytest
from PIL import Image

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.projector import write_embedding

pytest.importorskip("tensorboard")


def listed(directory):
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = text_format.Parse((directory / "projector_config.pbtxt").read_text(), ProjectorConfig())
    return list(config.embeddings)


def test_points_labels_and_pictures_come_back(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    images = np.stack([np.full((4, 4, 3), 40 * i, np.uint8) for i in range(5)])
    write_embedding(tmp_path, 'digits/"odd" {x}', vectors, 7, ["a", "b\tc", "d\ne", 4, "é"], images)
    (entry,) = listed(tmp_path)
    assert entry.tensor_name == 'digits/"odd" {x} at step 7'
    np.testing.assert_array_equal(np.loadtxt(tmp_path / entry.tensor_path, dtype=np.float32), vectors)
    assert (tmp_path / entry.metadata_path).read_text("utf-8").splitlines() == ["a", "b c", "d e", "4", "é"]
    assert list(entry.sprite.single_image_dim) == [4, 4]
    # The projector takes the picture of point i from the square's row and column, counted from the top left.
    sprite = np.asarray(Image.open(tmp_path / entry.sprite.image_path))
    assert sprite.shape == (12, 12, 3)
    for point in range(5):
        row, column = divmod(point, 3)
        assert (sprite[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] == 40 * point).all()


def test_pictures_that_are_not_square_get_margins(tmp_path):
    write_embedding(tmp_path, "x", np.eye(1), 0, None, np.zeros((1, 2, 4)))
    sprite = np.asarray(Image.open(tmp_path / listed(tmp_path)[0].sprite.image_path))
    assert sprite.tolist() == [[255] * 4, [0] * 4, [0] * 4, [255] * 4]


def test_every_embedding_is_listed_once(tmp_path):
    for step in (1, 2, 2):
        write_embedding(tmp_path, "x", np.full((2, 2), step), step, None, None)
    entries = listed(tmp_path)
    assert [entry.tensor_name for entry in entries] == ["x at step 1", "x at step 2"]
    assert np.loadtxt(tmp_path / entries[1].tensor_path)[0, 0] == 2.0


@pytest.mark.parametrize(
    ("vectors", "metadata", "images", "message"),
    [
        (np.zeros(3), None, None, r"vectors have shape \(3,\)"),
        (np.zeros((3, 2)), ["a"], None, "1 labels in metadata for 3 vectors"),
        (np.zeros((3, 2)), None, np.zeros((2, 4, 4)), "picture for each point"),
        (np.zeros((100, 2)), None, np.zeros((100, 1000, 4), np.uint8), "10000 by 10000.*8192"),
    ],
)
def test_what_the_projector_cannot_show_is_refused_before_anything_is_written(
    tmp_path, vectors, metadata, images, message
):
    with pytest.raises(ConfigurationError, match=message):
        write_embedding(tmp_path, "x", vectors, 0, metadata, images)
    assert list(tmp_path.iterdir()) == []
