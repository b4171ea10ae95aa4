"""What TensorBoard's plugins read, as protocol buffers: pure functions from values to `Summary` messages.

Generated code has no types, and importing it loads tensorboardX; hence `Any`, and imports on use.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nnx_fit.loggers.curves import THRESHOLDS, PRCurve
from nnx_fit.loggers.logger import Histogram
from nnx_fit.loggers.pixels import png

SESSION_START = "_hparams_/session_start_info"
SESSION_END = "_hparams_/session_end_info"
_STAGED = re.compile(r"(train|val)/(.+?)(?:_step|_epoch)?(/[^/]+)?")


def proto(name: str) -> Any:
    """A module of protocol buffers."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")


def scalars(metrics: Mapping[str, float]) -> Any:
    """Numbers by tag."""
    summary = proto("summary").Summary
    return summary(value=[summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()])


def histograms(binned: Mapping[str, Histogram]) -> Any:
    """Histograms by tag: one message for all, which costs far less than one for each."""
    content = proto("summary").Summary()
    for tag, (counts, edges, moments) in binned.items():
        histogram = content.value.add(tag=tag).histo
        for key in ("num", "min", "max", "sum", "sum_squares"):
            setattr(histogram, key, moments[key])
        # A bucket holds what is at most its limit, so the first edge needs a bucket of its own, an empty one.
        histogram.bucket_limit.extend(np.asarray(edges, np.float64).tolist())
        histogram.bucket.extend([0.0, *np.asarray(counts, np.float64).tolist()])
    return content


def image(tag: str, pixels: np.ndarray) -> Any:
    """An image, from uint8 of shape `(height, width, channels)`."""
    summary = proto("summary").Summary
    height, width, channels = pixels.shape
    encoded = summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png(tag, pixels))
    return summary(value=[summary.Value(tag=tag, image=encoded)])


def text(tag: str, markdown: str) -> Any:
    """Markdown text."""
    from tensorboardX import summary

    return summary.text(tag, markdown)


def pr_curve(tag: str, curve: PRCurve) -> Any:
    """A precision-recall curve."""
    from tensorboardX import summary

    return summary.pr_curve_raw(tag, *curve[1:], num_thresholds=THRESHOLDS)


def session_start(settings: Mapping[str, Any]) -> Any:
    """The settings of a run for the hparams tab, from plain values."""
    start = proto("plugin_hparams").SessionStartInfo(start_time_secs=time.time())
    for name, value in settings.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float) and np.isfinite(value):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    return _hparams(SESSION_START, session_start_info=start)


def session_end(*, success: bool) -> Any:
    """How a run ended, for the hparams tab."""
    status = proto("api").Status.Value("STATUS_SUCCESS" if success else "STATUS_FAILURE")
    end = proto("plugin_hparams").SessionEndInfo(status=status, end_time_secs=time.time())
    return _hparams(SESSION_END, session_end_info=end)


def _hparams(tag: str, **info: Any) -> Any:
    # `_hparams_/experiment` is never written: without it TensorBoard shows the union of all runs' columns.
    content = proto("plugin_hparams").HParamsPluginData(version=0, **info).SerializeToString()
    summary = proto("summary")
    plugin = summary.SummaryMetadata.PluginData(plugin_name="hparams", content=content)
    metadata = summary.SummaryMetadata(plugin_data=plugin)
    return summary.Summary(value=[summary.Summary.Value(tag=tag, metadata=metadata)])


def paired_charts(names: Iterable[str]) -> dict[str, str]:
    """One chart for each metric that both `train/` and `val/` have, as the regular expression of its tags.

    The expression depends on the metric alone wherever it can, so that TensorBoard sees that the charts of several
    runs are one. With several validation loaders, whose names end in `/<loader>`, the chart has a curve for each.
    """
    own: dict[str, set[str]] = {"train": set(), "val": set()}
    of_loaders: set[str] = set()
    for match in filter(None, map(_STAGED.fullmatch, names)):
        stage, metric, last = match[1], match[2], match[3] or ""
        own[stage].add(re.sub(r"(_step|_epoch)$", "", metric + last))
        if stage == "val" and last:
            of_loaders.add(metric)
    charts = {metric: rf"(train|val)/{re.escape(metric)}(_step|_epoch)?$" for metric in own["train"] & own["val"]}
    for metric in (own["train"] & of_loaders) - own["val"]:
        charts[metric] = rf"(train/{re.escape(metric)}(_step|_epoch)?|val/{re.escape(metric)}(_step|_epoch)?/[^/]+)$"
    return dict(sorted(charts.items()))


def layout(charts: Mapping[str, str]) -> Any:
    """The custom-scalar tab's page with one chart for each title, of the tags that an expression matches."""
    from tensorboardX import summary

    return summary.custom_scalars({"train and val": {title: ["Multiline", [tags]] for title, tags in charts.items()}})
