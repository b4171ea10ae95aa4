"""What TensorBoard's plugins are given."""

import re

import pytest

from nnx_fit.loggers.tensorboard_events import paired_charts


def curves(names):
    """The tags that each chart shows, as the custom-scalar plugin matches them."""
    charts = paired_charts(names)
    return {title: sorted(name for name in names if re.match(tags, name)) for title, tags in charts.items()}


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["train/loss", "val/loss", "lr"], {"loss": ["train/loss", "val/loss"]}),
        (
            ["train/loss_step", "train/loss_epoch", "val/loss"],
            {"loss": ["train/loss_epoch", "train/loss_step", "val/loss"]},
        ),
        (["train/loss", "val/accuracy"], {}),
        (["train/head/loss", "val/head/loss"], {"head/loss": ["train/head/loss", "val/head/loss"]}),
        (
            ["train/loss", "val/loss/clean", "val/loss/noisy"],
            {"loss": ["train/loss", "val/loss/clean", "val/loss/noisy"]},
        ),
        (
            ["train/loss_step", "val/loss_step/0", "val/loss_epoch/0"],
            {"loss": ["train/loss_step", "val/loss_epoch/0", "val/loss_step/0"]},
        ),
        (["train/loss", "train/loss2", "val/loss2"], {"loss2": ["train/loss2", "val/loss2"]}),
        (["train/top (5)", "val/top (5)"], {"top (5)": ["train/top (5)", "val/top (5)"]}),
    ],
)
def test_a_chart_shows_the_curves_of_one_metric(names, shown):
    assert curves(names) == shown


def test_charts_do_not_depend_on_which_names_a_run_has_seen_so_far():
    early = paired_charts(["train/loss_step", "val/loss"])
    assert early == paired_charts(["train/loss_step", "train/loss_epoch", "val/loss"])
