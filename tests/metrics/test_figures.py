"""The pictures of class-wise metrics: what is in them, and that no value or name is too odd to draw."""

import numpy as np
import pytest

from nnx_fit.metrics.figures import draw

NAMES = ("a", "b", "c")


def painted(image):
    """Which pixels have a color of their own, and are no shade of gray."""
    return (image.max(-1).astype(int) - image.min(-1)) > 40


def test_a_bar_is_as_high_as_its_value():
    image = draw("recall", np.array([0.25, 0.5, 1.0]), [NAMES])
    columns = painted(image).sum(0)
    heights = [part.max() for part in np.split(columns, np.flatnonzero(np.diff((columns > 0).astype(int))) + 1)]
    heights = [height for height in heights if height > 5]
    np.testing.assert_allclose(np.array(heights) / heights[-1], [0.25, 0.5, 1.0], atol=0.02)


def test_a_cell_is_as_dark_as_its_value_is_large():
    image = draw("confusion", np.array([[10.0, 0.0], [0.0, 0.0]]), [NAMES[:2], NAMES[:2]])
    dark = (image[..., 2] < 130) & painted(image)
    # The color bar is at the right; the cell at the upper left is the only one that is dark.
    rows, columns = np.nonzero(dark[:, : image.shape[1] // 2])
    assert len(rows) > 500 and rows.max() < 0.6 * image.shape[0] and columns.max() < 0.5 * image.shape[1]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (np.array([np.nan, np.inf, -1.0]), [("$x", "y_$1$", "")]),
        (np.full((3, 3), np.nan), [NAMES, NAMES]),
        (np.zeros((3, 3)), [NAMES, NAMES]),
        (np.where(np.eye(3), np.inf, 1.0), [NAMES, NAMES]),
        (np.arange(300.0), [[str(i) for i in range(300)]]),
        (np.eye(60), [[str(i) for i in range(60)]] * 2),
    ],
    ids=["bars", "nan", "zeros", "inf", "many bars", "many cells"],
)
@pytest.mark.filterwarnings("error")
def test_odd_values_and_names_are_drawn(values, labels):
    image = draw("a $title", values, labels)
    assert image.dtype == np.uint8 and image.shape[-1] == 3 and image.std() > 0
    assert max(image.shape) < 2500


def test_the_axes_are_named_where_they_have_names():
    values = np.eye(2)
    plain, named = (draw("c", values, [NAMES[:2]] * 2, axes) for axes in ((), ("true", "predicted")))
    assert plain.shape == named.shape and (plain != named).any()
