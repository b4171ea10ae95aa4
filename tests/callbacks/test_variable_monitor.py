"""VariableMonitor: what reaches the loggers equals what NumPy says of the live values, and the run stays the same."""

import signal

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks import variable_monitor
from nnx_fit.callbacks.summaries import summarize


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
        "state/net.layers.1.mean", "state/net.layers.1.var", "state/odd", "state/steps",
    }  # fmt: skip


def test_a_run_that_a_signal_cuts_off_has_no_end_to_record():
    class Cut(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                signal.raise_signal(signal.SIGTERM)

    recorder = Recorder()
    with pytest.raises(SystemExit):
        tracked_fit([nf.VariableMonitor(every_n_steps=2), Cut()], logger=recorder)
    assert recorder.metrics["state/odd/mean"] == [(2, 2.0)], "the run that continues goes on to 4"


def test_the_end_of_a_run_is_recorded_once(tmp_path):
    saving = nf.ModelCheckpoint(tmp_path)
    tracked_fit([nf.VariableMonitor(every_n_steps=2), saving], enable_checkpointing=True)
    again = Recorder()
    module = Tracked(rngs=nnx.Rngs(0))
    monitor = nf.VariableMonitor(every_n_steps=2)
    batches = [{"x": np.ones((6, 4), np.float32)}] * 5
    nets.quiet(max_epochs=1, logger=again, callbacks=monitor).fit(module, batches, ckpt_path=saving.last_model_path)
    assert again.metrics == {}


def test_default_interval_is_twice_the_log_interval():
    recorder, _ = tracked_fit(nf.VariableMonitor(), log_every_n_steps=1)
    assert [step for step, _ in recorder.metrics["state/odd/mean"]] == [2, 4, 5]


def test_parameters_on_request():
    recorder, _ = tracked_fit(nf.VariableMonitor(every_n_steps=5, params=True))
    assert {"params/net.layers.0.kernel", "params/net.layers.1.scale", "state/odd"} <= set(recorder.histograms)


def test_include_is_a_filter():
    recorder, _ = tracked_fit(nf.VariableMonitor(every_n_steps=5, include=nnx.Any(Odd, nnx.PathContains("kernel"))))
    assert set(recorder.histograms) == {"state/odd", "state/steps", "params/net.layers.0.kernel"}


def test_one_program_for_all_variables_compiled_once():
    summarize.clear_cache()
    tracked_fit(nf.VariableMonitor(every_n_steps=1))
    assert summarize._cache_size() == 1


@pytest.mark.parametrize("options", [{}, {"params": True}], ids=["stats", "params"])
@pytest.mark.parametrize("tx", [optax.adamw(1e-2), optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9))])
def test_monitoring_does_not_change_the_run(options, tx):
    def trained(monitor):
        module = nets.Regressor(rngs=nnx.Rngs(0))
        module.configure_optimizers = lambda: tx
        trainer = nets.quiet(max_epochs=2, logger=Recorder(), callbacks=monitor, log_every_n_steps=2)
        trainer.callbacks = monitor
        trainer.fit(module, nets.loader())
        return nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey)))

    watched = trained([nf.VariableMonitor(every_n_steps=1, **options)])
    jax.tree.map(np.testing.assert_array_equal, trained([]), watched)


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


class Snapshots(nf.Callback):
    """Copies of a module's state after each step, index 0 before the first."""

    def __init__(self):
        self.states = []

    def take(self, module):
        state = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
        self.states.append({".".join(map(str, path)): np.array(leaf[...]) for path, leaf in state})

    def on_train_start(self, trainer, module):
        self.take(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.take(module)

    def of(self, name, step):
        return self.states[step][name].astype(np.float64)


def test_drift_equals_the_batchs_own_statistics():
    recorder = Recorder()
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(3, 2, size=(16, 4)).astype(np.float32)} for _ in range(5)]

    class Normed(nf.FitModule):
        def __init__(self):
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))

        def training_step(self, batch):
            return (self.norm(batch["x"]) ** 2).mean()

    snapshots = Snapshots()
    trainer = nets.quiet(
        max_epochs=1, logger=recorder, callbacks=[snapshots, nf.VariableMonitor(every_n_steps=2)],
        optimizer=optax.sgd(0.1),
    )  # fmt: skip
    trainer.fit(Normed(), batches)
    for name, of_batch in (("mean", lambda x: x.mean(0)), ("var", lambda x: x.var(0))):
        expected = []
        for step in (2, 4):
            running, batch = snapshots.of(f"norm.{name}", step - 1), of_batch(batches[step - 1]["x"])
            scale = max(np.linalg.norm(batch), np.linalg.norm(running))
            expected.append((step, pytest.approx(np.linalg.norm(batch - running) / scale, rel=1e-3)))
        # The record at the end, of step 5, has no step before it to compare with.
        assert recorder.metrics[f"state/norm.{name}/drift"] == expected


@pytest.mark.parametrize("momentum", [0.9, 0.1], ids=["what is kept", "what is taken in"])
def test_drift_of_a_batch_norm_written_by_hand(momentum):
    class ByHand(nf.FitModule):
        def __init__(self):
            self.momentum = momentum
            self.running_mean = nnx.Variable(jnp.ones(3))
            self.counted = nnx.Variable(jnp.zeros(()))
            self.scale = nnx.Param(jnp.ones(3))

        def training_step(self, batch):
            self.running_mean[...] = 0.9 * self.running_mean[...] + 0.1 * batch["x"].mean(0)
            self.counted[...] += 1
            return (self.scale[...] * batch["x"]).mean()

    recorder = Recorder()
    trainer = nets.quiet(
        max_epochs=1, logger=recorder, callbacks=[nf.VariableMonitor(every_n_steps=1)], optimizer=optax.sgd(0.1)
    )
    trainer.fit(ByHand(), [{"x": np.full((4, 3), 2, np.float32)}])
    assert recorder.metrics["state/running_mean/drift"] == [(1, pytest.approx(0.5, rel=1e-5))]
    assert "state/counted/drift" not in recorder.metrics


def test_no_drift_of_a_statistic_that_no_batch_moved():
    class Frozen(Tracked):
        eval_modules = ("net.layers.1",)

    recorder = Recorder()
    trainer = nets.quiet(max_epochs=1, logger=recorder, callbacks=[nf.VariableMonitor(every_n_steps=1)])
    trainer.fit(Frozen(rngs=nnx.Rngs(0)), [{"x": np.ones((6, 4), np.float32)}] * 2)
    assert "state/net.layers.1.mean/mean" in recorder.metrics
    assert not [name for name in recorder.metrics if name.endswith("/drift")]


def test_norms_and_ratios_equal_numpys():
    snapshots, recorder = Snapshots(), Recorder()
    module = nets.Regressor(rngs=nnx.Rngs(0))
    monitor = nf.VariableMonitor(every_n_steps=2, params=True)
    trainer = nets.quiet(max_epochs=1, logger=recorder, callbacks=[snapshots, monitor], log_every_n_steps=2)
    trainer.fit(module, nets.loader())
    for layer, names in (("head", ("kernel", "bias")), ("blocks.0.norm", ("scale", "bias"))):
        weights, updates = [], []
        for step in (2, 4):
            now = [snapshots.of(f"{layer}.{name}", step).ravel() for name in names]
            old = [snapshots.of(f"{layer}.{name}", step - 1).ravel() for name in names]
            weights.append(np.linalg.norm(np.concatenate(now)))
            updates.append(np.linalg.norm(np.concatenate(now) - np.concatenate(old)))
        values = {key: [value for _, value in recorder.metrics[f"{key}"]] for key in recorder.metrics}
        np.testing.assert_allclose(values[f"params/{layer}/norm"], weights, rtol=1e-4)
        np.testing.assert_allclose(values[f"updates/{layer}/norm"], updates, rtol=1e-3)
        np.testing.assert_allclose(values[f"updates/{layer}/ratio"], np.divide(updates, weights), rtol=1e-3)
    assert [step for step, _ in recorder.histograms["updates/head.kernel"]] == [2, 4]


def test_gradient_norm_is_that_of_each_logged_step():
    recorder = Recorder()
    module = nets.Scalar(start=0.0, learning_rate=0.1)
    trainer = nets.quiet(
        max_epochs=1, logger=recorder, callbacks=[nf.VariableMonitor(every_n_steps=4, params=True)],
        log_every_n_steps=2,
    )  # fmt: skip
    history = trainer.fit(module, nets.targets(1, 1, 1, 1))
    # w approaches 1 by a tenth of the distance in each step, and the distance is the gradient.
    expected = [(2, pytest.approx(0.9)), (4, pytest.approx(0.9**3))]
    assert recorder.metrics["gradients/w/norm"] == expected == list(history["gradients/w/norm"])


def test_without_loggers_nothing_is_added_to_the_program():
    trainer = nets.quiet(max_epochs=1, callbacks=[nf.VariableMonitor(every_n_steps=1, params=True)])
    assert "gradients/w/norm" not in trainer.fit(nets.Scalar(), nets.targets(1, 2))


class Menagerie(nf.FitModule):
    """Variables of every kind, none of them a float array of a layer."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(()))
        self.flag = nnx.Variable(jnp.array([True, False, True, True]))
        self.count = nnx.Variable(jnp.arange(5))
        self.half = nnx.BatchStat(jnp.full(4, 1.5, jnp.bfloat16))
        self.wave = nnx.Variable(jnp.array([3 + 4j, 0]))
        self.broken = nnx.Variable(jnp.array([1.0, jnp.nan, 3.0]))
        self.endless = nnx.Variable(jnp.array([jnp.inf, -jnp.inf]))
        self.none = nnx.Variable(jnp.zeros((0, 3)))
        self.memory = Odd({"keys": jnp.zeros((2, 2)), "age": jnp.full((), 7.0), "name": "long"})
        self.key = Odd(jax.random.key(0))
        self.bare = jnp.arange(3.0)
        self.rngs = nnx.Rngs(0)

    def training_step(self, batch):
        return self.w[...] * batch["target"].mean()


def test_variables_of_every_kind(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = nets.quiet(
        max_epochs=1, logger=nf.TensorBoardLogger(tmp_path), optimizer=optax.sgd(0.1),
        callbacks=[nf.VariableMonitor(every_n_steps=1, params=True)],
    )  # fmt: skip
    trainer.fit(Menagerie(), nets.targets(1, 2))
    events = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    means = {
        tag.removeprefix("state/").removesuffix("/mean"): events.Scalars(tag)[-1].value
        for tag in events.Tags()["scalars"]
        if tag.startswith("state/") and tag.endswith("/mean")
    }
    expected = {
        "flag": 0.75, "count": 2, "half": 1.5, "wave": 2.5, "broken": np.nan, "endless": np.nan,
        "memory.keys": 0, "memory.age": 7, "bare": 1,
    }  # fmt: skip
    assert means == pytest.approx(expected, nan_ok=True)
    binned = {tag.removeprefix("state/") for tag in events.Tags()["histograms"] if tag.startswith("state/")}
    assert binned == set(expected) - {"endless"}
    assert sum(events.Histograms("state/broken")[-1].histogram_value.bucket) == 2
    groups = {tag.partition("/")[0] for kind in ("scalars", "histograms") for tag in events.Tags()[kind]}
    assert {"state", "params", "updates"} <= groups


class Thawing(nf.Callback):
    """Freezes and unfreezes at the start of epochs."""

    def on_train_epoch_start(self, trainer, module):
        (module.freeze if trainer.current_epoch % 2 == 0 else module.unfreeze)("blocks.0")


def test_set_of_trained_variables_may_change_in_mid_run():
    recorder = Recorder()
    trainer = nets.quiet(
        max_epochs=3, logger=recorder, log_every_n_steps=1,
        callbacks=[Thawing(), nf.VariableMonitor(every_n_steps=1, params=True)],
    )  # fmt: skip
    trainer.fit(nets.Regressor(rngs=nnx.Rngs(0)), nets.loader(32))
    thawed = [step for step, _ in recorder.histograms["updates/blocks.0.linear.kernel"]]
    assert set(thawed) <= {3, 4} and 4 in thawed
    assert [step for step, _ in recorder.metrics["gradients/blocks.0.linear/norm"]] == [3, 4]
    assert [step for step, _ in recorder.histograms["params/blocks.0.linear.kernel"]] == [1, 2, 3, 4, 5, 6]
    assert len(recorder.metrics["state/blocks.0.norm.mean/mean"]) == 6


def test_nothing_is_read_before_it_has_arrived(monkeypatch):
    late = []

    class Late:
        """A summary on its way: to read it before it is there fails, except at the end, where waiting is right."""

        def __init__(self, array):
            self.array, self.polled = array, 0
            late.append(self)

        def copy_to_host_async(self):
            self.array.copy_to_host_async()

        def is_ready(self):
            self.polled += 1
            return self.polled > 2

        def __array__(self, *args, **kwargs):
            assert self.polled > 2 or self is late[-1], "read before it was there"
            return np.asarray(self.array, *args, **kwargs)

    monkeypatch.setattr(variable_monitor, "summarize", lambda *args, **kwargs: Late(summarize(*args, **kwargs)))
    recorder, _ = tracked_fit(nf.VariableMonitor(every_n_steps=4), steps=8)
    assert recorder.metrics["state/odd/mean"] == [(4, 4.0), (8, 8.0)]


def test_a_window_of_accumulation_is_recorded_once_when_it_is_full():
    """The batches before the first update are at step 0, where there is nothing to record."""
    recorder, _ = tracked_fit(nf.VariableMonitor(every_n_steps=2), steps=8, accumulate_grad_batches=2)
    assert [step for step, _ in recorder.metrics["state/odd/mean"]] == [2, 4]
