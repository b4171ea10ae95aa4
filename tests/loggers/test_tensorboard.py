"""TensorBoardLogger, read back with TensorBoard's own reader."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from nets import Scalar, quiet, targets

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.logger import Histogram
from nnx_fit.loggers.tensorboard import TensorBoardLogger

pytest.importorskip("tensorboard")


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}
    return EventAccumulator(str(directory), size_guidance=everything).Reload()


def scalars(directory, tag):
    return [(event.step, event.value) for event in read(directory).Scalars(tag)]


def test_scalars_come_back_under_the_names_they_were_logged_with(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "top 5 (raw)": np.float32(2.0), "nan": float("nan")}, step=1)
    logger.log_metrics({"train/loss": 0.25}, step=2)
    logger.finalize("success")
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(tmp_path, "top 5 (raw)") == [(1, 2.0)]
    assert np.isnan(scalars(tmp_path, "nan")[0][1])


def test_all_scalars_of_a_call_are_one_event(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({f"m{i}": float(i) for i in range(20)}, step=7)
    logger.finalize("success")
    (file,) = tmp_path.iterdir()
    events = [event for event in LegacyEventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert [len(event.summary.value) for event in events] == [20]


def test_nothing_is_created_before_the_first_record(tmp_path):
    logger = TensorBoardLogger(tmp_path / "run")
    assert logger.log_dir == tmp_path / "run"
    logger.log_metrics({}, step=1)
    logger.flush()
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


def test_records_survive_a_sigkill_right_after_the_call(tmp_path):
    script = f"""
import os, signal
from nnx_fit.loggers.tensorboard import TensorBoardLogger
logger = TensorBoardLogger({str(tmp_path)!r})
for step in range(1, 6):
    logger.log_metrics({{"loss": float(step)}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert scalars(tmp_path, "loss") == [(step, float(step)) for step in range(1, 6)]


def test_histogram_keeps_counts_edges_and_moments(tmp_path):
    values = np.random.default_rng(0).normal(size=1000)
    counts, edges = np.histogram(values, 64)
    moments = {
        "num": 1000, "min": values.min(), "max": values.max(), "sum": values.sum(), "sum_squares": (values**2).sum(),
    }  # fmt: skip
    logger = TensorBoardLogger(tmp_path)
    logger.log_histogram("state/net.mean", counts, edges, 3, moments)
    logger.finalize("success")
    (event,) = read(tmp_path).Histograms("state/net.mean")
    got = event.histogram_value
    assert event.step == 3
    assert (got.num, got.min, got.max, got.sum, got.sum_squares) == tuple(moments.values())
    assert got.bucket_limit == edges.tolist()
    assert got.bucket == [0, *counts]


def test_histograms_of_one_step_are_one_record(tmp_path):
    edges, moments = np.array([0.0, 1.0, 2.0]), {"num": 3, "min": 0, "max": 2, "sum": 4, "sum_squares": 6}
    logger = TensorBoardLogger(tmp_path)
    logger.log_histograms({}, 1)
    assert not list(tmp_path.iterdir())
    logger.log_histograms({tag: Histogram(np.array([1, 2]), edges, moments) for tag in ("a", "b")}, 2)
    logger.finalize("success")
    events = read(tmp_path)
    for tag in ("a", "b"):
        (event,) = events.Histograms(tag)
        assert (event.step, event.histogram_value.bucket) == (2, [0, 1, 2])


def test_image_is_a_png_of_the_same_pixels(tmp_path):
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 3), np.uint8)
    logger = TensorBoardLogger(tmp_path)
    logger.log_image("samples (first)", pixels, 1)
    logger.log_image("gray", np.linspace(-1, 2, 64).reshape(8, 8, 1), 1)
    logger.finalize("success")
    events = read(tmp_path)
    decoded = Image.open(io.BytesIO(events.Images("samples (first)")[0].encoded_image_string))
    np.testing.assert_array_equal(np.asarray(decoded), pixels)
    gray = np.asarray(Image.open(io.BytesIO(events.Images("gray")[0].encoded_image_string)))
    assert gray.min() == 0 and gray.max() == 255


def test_image_of_a_wrong_shape_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r'"x" has shape \(8, 8, 2\).*channels'):
        TensorBoardLogger(tmp_path).log_image("x", np.zeros((8, 8, 2)), 1)


def test_text_is_shown_by_the_text_plugin(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_text("config", "| a | b |\n|---|---|")
    logger.finalize("success")
    (event,) = read(tmp_path).Tensors("config/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "| a | b |\n|---|---|"


def hparams_backend(directory):
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(directory))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = context.RequestContext()
    metadata = backend.hparams_metadata(request, "")
    experiment = backend.experiment_from_metadata(
        request, "", include_metrics=True, hparams_run_to_tag_to_content=metadata,
        data_provider_hparams=backend.hparams_from_data_provider(request, "", 100),
    )  # fmt: skip
    query = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=[0, 1, 2, 3])
    groups = list_session_groups.Handler(request, backend, "", query).run().session_groups
    return experiment, groups


def test_hparams_tab_shows_the_union_of_runs_with_metrics_and_status(tmp_path):
    for name, settings, status in [
        ("a", {"optimizer": {"lr": np.float32(0.5), "name": "adam"}, "nesterov": True, "clip": None}, "success"),
        ("b", {"optimizer": {"lr": 0.25}, "layers": [1, 2], "clip": float("inf")}, "failed"),
        ("c", {"seed": 3}, "interrupted"),
    ]:
        logger = TensorBoardLogger(tmp_path / name)
        logger.log_hyperparams(settings)
        logger.log_metrics({"val/accuracy": 0.5}, step=4)
        logger.finalize(status)
    experiment, groups = hparams_backend(tmp_path)
    names = {info.name for info in experiment.hparam_infos}
    assert names == {"optimizer.lr", "optimizer.name", "nesterov", "layers", "clip", "seed"}
    by_run = {group.sessions[0].name: group for group in groups}
    assert by_run["a"].hparams["optimizer.lr"].number_value == 0.5
    assert by_run["a"].hparams["nesterov"].bool_value is True
    assert by_run["b"].hparams["layers"].string_value == "[1, 2]"
    assert [by_run[run].sessions[0].status for run in "abc"] == [1, 2, 0]  # success, failure, unknown
    assert by_run["a"].sessions[0].metric_values[0].value == 0.5


@pytest.mark.parametrize(("first", "second", "shown"), [
    ("failed", "success", 1), ("success", "failed", 2), ("failed", "interrupted", 0), ("interrupted", "success", 1),
])  # fmt: skip
def test_a_continued_run_shows_how_it_ended_itself(tmp_path, first, second, shown):
    for step, status in ((1, first), (2, second)):
        logger = TensorBoardLogger(tmp_path / "run")
        if step == 2:
            logger.continue_from(1)
        logger.log_hyperparams({"seed": 0})
        logger.log_metrics({"loss": 0.5 / step}, step)
        logger.finalize(status)
    _, groups = hparams_backend(tmp_path)
    (session,) = groups[0].sessions
    assert session.status == shown
    assert scalars(tmp_path / "run", "loss") == [(1, 0.5), (2, 0.25)]


def test_a_test_after_the_fit_does_not_change_how_the_fit_ended(tmp_path):
    logger = TensorBoardLogger(tmp_path / "run")
    logger.log_hyperparams({"seed": 0})
    logger.finalize("failed")
    logger.log_metrics({"test/loss": 0.5}, 1)
    logger.finalize("success")
    assert hparams_backend(tmp_path)[1][0].sessions[0].status == 2


def test_a_second_fit_with_the_same_logger_begins_the_run_anew(tmp_path):
    logger = TensorBoardLogger(tmp_path / "run")
    for status in ("failed", "success"):
        logger.log_hyperparams({"seed": 0})
        logger.finalize(status)
    assert hparams_backend(tmp_path)[1][0].sessions[0].status == 1


def test_layout_pairs_train_and_val_curves_of_a_metric(tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2

    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"train/loss_step": 1.0, "lr": 1.0}, step=1)
    logger.log_metrics({"val/loss": 1.0, "val/only": 1.0}, step=2)
    logger.finalize("success")
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (chart,) = layout.category[0].chart
    assert chart.title == "loss"
    assert list(chart.multiline.tag) == [r"(train|val)/loss(_step|_epoch)?$"]


def test_pr_curve_is_shown_by_the_plugin_with_the_counts_of_every_threshold(tmp_path):
    from tensorboard.util import tensor_util

    labels, scores = np.array([0, 1, 1, 0]), np.array([0.1, 0.4, 0.9, 0.6])
    logger = TensorBoardLogger(tmp_path)
    logger.log_pr_curve("val/cats", labels, scores, 3)
    logger.finalize("success")
    events = read(tmp_path)
    assert list(events.PluginTagToContent("pr_curves")) == ["val/cats"]
    (event,) = events.Tensors("val/cats")
    tp, fp, tn, fn, precision, recall = tensor_util.make_ndarray(event.tensor_proto)
    assert event.step == 3 and tp.shape == (127,)
    half = 63  # the threshold 0.5
    assert [x[half] for x in (tp, fp, tn, fn, precision, recall)] == [1, 1, 1, 1, 0.5, 0.5]


def test_embeddings_are_found_by_the_projector(tmp_path):
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin

    logger = TensorBoardLogger(tmp_path / "run")
    logger.log_embedding("digits", np.eye(3), 5, metadata=["a", "b", "c"], images=np.zeros((3, 4, 4)))
    logger.finalize("success")
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    plugin = ProjectorPlugin(base_plugin.TBContext(data_provider=provider, logdir=str(tmp_path)))
    plugin._update_configs()
    (embedding,) = plugin._configs["run"].embeddings
    assert embedding.tensor_name == "digits at step 5" and list(embedding.tensor_shape) == [3, 3]


def test_a_figure_is_an_image(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    logger = TensorBoardLogger(tmp_path)
    logger.log_figure("confusion", figures.Figure(figsize=(2, 1), dpi=50), 4)
    logger.finalize("success")
    (event,) = read(tmp_path).Images("confusion")
    assert (event.step, event.width, event.height) == (4, 100, 50)


def test_named_runs_get_a_directory_each(tmp_path):
    directories = []
    for version in (None, None, 7, None, "mine"):
        logger = TensorBoardLogger(tmp_path, name="mnist", version=version)
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.finalize("success")
        directories.append((logger.log_dir.relative_to(tmp_path).as_posix(), logger.version))
    versions = ["version_0", "version_1", "version_7", "version_8", "mine"]
    assert directories == [(f"mnist/{version}", version) for version in versions]


def test_second_run_in_one_directory_is_reported(tmp_path, caplog):
    for reports in (0, 1):
        logger = TensorBoardLogger(tmp_path)
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.finalize("success")
        assert caplog.text.count("already holds the record of another run") == reports


def test_logging_after_finalize_goes_to_the_same_directory(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    logger.log_metrics({"test/loss": 2.0}, step=1)
    logger.finalize("success")
    assert scalars(tmp_path, "loss") == [(1, 1.0)]
    assert scalars(tmp_path, "test/loss") == [(1, 2.0)]
    assert len(list(tmp_path.iterdir())) == 2


def test_continued_run_replaces_the_records_after_its_checkpoint(tmp_path, caplog):
    first = TensorBoardLogger(tmp_path)
    for step in range(1, 6):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("interrupted")
    second = TensorBoardLogger(tmp_path)
    second.continue_from(3)
    for step in range(4, 7):
        second.log_metrics({"loss": 10.0 + step}, step)
    second.finalize("success")
    assert second.log_dir == tmp_path
    assert caplog.text == ""
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0)]


def test_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    logger = TensorBoardLogger(tmp_path / "file" / "run")
    with pytest.raises(ConfigurationError, match=r"TensorBoardLogger cannot write to .*file/run(.|\n)*Fix: choose"):
        logger.log_hyperparams({"seed": 0})


def test_a_fit_in_plain_python_tells_its_config_partition_and_environment(tmp_path):
    trainer = quiet(max_epochs=1, logger=TensorBoardLogger(tmp_path))
    trainer.texts["note"] = "by hand"
    trainer.fit(Scalar(start=2.0), targets(1))
    events = read(tmp_path)
    texts = {
        tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("config", "partition", "environment", "note")
    }
    config = yaml.safe_load(texts["config"].removeprefix("```yaml").removesuffix("```"))
    assert config["model"] == {"_target_": "nets.Scalar", "start": 2.0, "learning_rate": 0.1}
    assert config["trainer"]["max_epochs"] == 1 and config["trainer"]["precision"] == "32"
    assert "w" in texts["partition"] and "Param" in texts["partition"]
    assert f"| jax | {jax.__version__} |" in texts["environment"]
    assert texts["note"] == "by hand"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_write_the_parents_records_again(tmp_path):
    script = f"""
import os
from nnx_fit.loggers.tensorboard import TensorBoardLogger
logger = TensorBoardLogger({str(tmp_path)!r})
logger.log_metrics({{"loss": 1.0}}, 1)
child = os.fork()
if child:
    os.waitpid(child, 0)
    logger.log_metrics({{"loss": 2.0}}, 2)
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
