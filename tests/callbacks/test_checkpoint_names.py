"""Names of checkpoints."""

import pytest

from nnx_fit.callbacks.checkpoint_names import check_template, format_name, free_path, metric_fields
from nnx_fit.errors import ConfigurationError


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{epoch}-{step}", "epoch=2-step=15"),
        ("{epoch:02d}-{val/loss:.2f}", "epoch=02-val_loss=0.31"),
        ("best", "best"),
        ("x-{top 5 (raw)}", "x-top_5__raw_=0.5"),
        ("{not logged:.1f}", "not_logged=nan"),
    ],
)
def test_fields_become_name_and_value(template, name):
    check_template(template)
    values = {"epoch": 2, "step": 15, "val/loss": 0.3123, "top 5 (raw)": 0.5}
    assert format_name(template, values) == name


def test_metrics_of_a_template():
    assert metric_fields("{epoch}-{step:06d}-{val/loss:.2f}-{lr}") == ["val/loss", "lr"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a/{epoch}", "not a path"),
        ("", "not a path"),
        ("last-{epoch}", "are for the state a run ended in"),
        ("{epoch", "a brace is not closed"),
        ("{}", "a field has no name"),
        ("{step:.2q}", "format"),
    ],
)
def test_template_that_cannot_work_is_refused(template, message):
    with pytest.raises(ConfigurationError, match=message):
        check_template(template)


def test_taken_names_get_a_version(tmp_path):
    assert free_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-v1").mkdir()
    assert free_path(tmp_path / "a") == tmp_path / "a-v2"
