"""VariableMonitor: what reaches the loggers equals what NumPy says of the live values."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.variable_monitor import BINS, _histograms, _summarize


def summary_of(*arrays):
    rows = np.asarray(_summarize([jnp.asarray(array) for array in arrays]), np.float64)
    return [dict(zip(("num", "min", "max", "sum", "sum_squares", "mean", "std"), row[BINS:], strict=True)) | {
        "counts": row[:BINS]} for row in rows]  # fmt: skip


def histogram_of(array):
    row = np.asarray(_summarize([jnp.asarray(array)]), np.float64)[0]
    return next(_histograms({"x": row}), None)


@pytest.mark.parametrize("shape", [(7,), (1000,), (30, 70), (3, 5, 4, 2)])
def test_summary_equals_numpys(shape):
    values = np.random.default_rng(0).normal(3.0, 0.5, shape).astype(np.float32)
    (got,) = summary_of(values)
    expected = {
        "num": values.size, "min": values.min(), "max": values.max(), "sum": values.sum(),
        "sum_squares": (values**2).sum(), "mean": values.mean(), "std": values.std(),
    }  # fmt: skip
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-4), name
    assert got["counts"].sum() == values.size
    counts, _ = np.histogram(values, BINS)
    # A value on the edge of a bin may be rounded into its neighbor.
    assert np.abs(np.cumsum(got["counts"]) - np.cumsum(counts)).max() <= 2


def test_arrays_of_different_sizes_and_dtypes_keep_their_order():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(i, 1, size).astype(np.float32) for i, size in enumerate((5, 3000, 5, 1, 70_000))]
    means = [summary["mean"] for summary in summary_of(*arrays, jnp.full(4, 1.5, jnp.bfloat16))]
    np.testing.assert_allclose(means, [*(array.mean() for array in arrays), 1.5], rtol=1e-4)


def test_values_that_are_not_finite_stay_out_of_the_bins_and_show_in_the_mean():
    (got,) = summary_of(np.array([1.0, np.nan, 3.0, np.inf], np.float32))
    assert (got["num"], got["min"], got["max"], got["sum"], got["counts"].sum()) == (2, 1, 3, 4, 2)
    assert np.isnan(got["mean"]) and np.isnan(got["std"])
    assert histogram_of(np.array([np.nan, np.inf], np.float32)) is None


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e30, -1e-30, 3.0e38])
def test_constant_array_is_one_bar_around_its_value(value):
    _, counts, edges, moments = histogram_of(np.full(5, value, np.float32))
    (place,) = np.flatnonzero(counts)
    assert counts[place] == moments["num"] == 5
    assert (np.diff(edges) > 0).all()
    assert edges[place] <= np.float32(value) <= edges[place + 1]


def test_range_of_all_floats_is_no_error():
    _, counts, edges, moments = histogram_of(np.array([-3e38, 0, 3e38], np.float32))
    assert counts.sum() == moments["num"] == 3
    assert np.isfinite(edges).all()


class Odd(nnx.Variable):
    """A Variable type that nobody has heard of."""


class Tracked(nf.FitModule):
    def __init__(self, *, rngs: nnx.Rngs):
        self.net = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
        self.odd = Odd(jnp.zeros(()))
        self.steps = Odd(jnp.zeros((), jnp.int32))
        self.nothing = Odd(jnp.zeros((0, 3)))

    def training_step(self, batch):
        self.odd[...] = self.odd[...] + 1
        return self.net(batch["x"]).mean()

    def configure_optimizers(self):
        return optax.sgd(0.1)


class Recorder(nf.Logger):
    def __init__(self):
        self.metrics = {}
        self.histograms = {}

    def log_metrics(self, metrics, step):
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((step, value))

    def log_histogram(self, tag, counts, edges, step, moments):
        self.histograms.setdefault(tag, []).append((step, moments["num"]))


def tracked_fit(monitor, *, steps=5, logger=None, **options):
    recorder = logger or Recorder()
    module = Tracked(rngs=nnx.Rngs(0))
    batches = [{"x": np.random.default_rng(i).normal(size=(6, 4)).astype(np.float32)} for i in range(steps)]
    trainer = nets.quiet(max_epochs=1, logger=recorder, callbacks=monitor, **options)
    trainer.fit(module, batches)
    return recorder, module


def test_running_statistics_are_logged_at_each_interval_and_at_the_end():
    recorder, module = tracked_fit(nf.VariableMonitor(every_n_steps=2))
    assert [step for step, _ in recorder.metrics["state/net.layers.1.mean/mean"]] == [2, 4, 5]
    assert recorder.metrics["state/odd/mean"] == [(2, 2.0), (4, 4.0), (5, 5.0)]
    final = np.asarray(module.net.layers[1].var[...])
    assert recorder.metrics["state/net.layers.1.var/std"][-1][1] == pytest.approx(final.std(), rel=1e-4)
    assert recorder.histograms["state/net.layers.1.var"] == [(2, 8), (4, 8), (5, 8)]
    assert {tag.rpartition("/")[0] for tag in recorder.metrics} == {
        "state/net.layers.1.mean", "state/net.layers.1.var", "state/odd",
    }  # fmt: skip


def test_default_interval_is_twice_the_log_interval():
    recorder, _ = tracked_fit(nf.VariableMonitor(), log_every_n_steps=1)
    assert [step for step, _ in recorder.metrics["state/odd/mean"]] == [2, 4, 5]


def test_parameters_on_request():
    recorder, _ = tracked_fit(nf.VariableMonitor(every_n_steps=5, params=True))
    assert {"params/net.layers.0.kernel", "params/net.layers.1.scale", "state/odd"} <= set(recorder.histograms)


def test_include_is_a_filter():
    recorder, _ = tracked_fit(nf.VariableMonitor(every_n_steps=5, include=nnx.Any(Odd, nnx.PathContains("kernel"))))
    assert set(recorder.histograms) == {"state/odd", "params/net.layers.0.kernel"}


def test_one_program_for_all_variables_compiled_once():
    _summarize.clear_cache()
    tracked_fit(nf.VariableMonitor(every_n_steps=1))
    assert _summarize._cache_size() == 1


def test_monitoring_does_not_change_the_run():
    _, plain = tracked_fit([])
    _, watched = tracked_fit(nf.VariableMonitor(every_n_steps=1, params=True))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(plain, nnx.Not(nnx.RngKey))),
        nnx.to_pure_dict(nnx.state(watched, nnx.Not(nnx.RngKey))),
    )


def test_wrong_interval_is_named():
    with pytest.raises(nf.ConfigurationError, match="every_n_steps=0"):
        nf.VariableMonitor(every_n_steps=0)


def test_tensorboard_reads_the_histograms(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = nf.TensorBoardLogger(tmp_path)
    _, module = tracked_fit(nf.VariableMonitor(every_n_steps=5), logger=logger)
    events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    (event,) = events.Histograms("state/net.layers.1.mean")
    values = np.asarray(module.net.layers[1].mean[...])
    assert event.step == 5
    assert (event.histogram_value.min, event.histogram_value.max) == (values.min(), values.max())
    assert sum(event.histogram_value.bucket) == values.size
