"""Gradient accumulation: the window's weighted mean, what advances per batch, and what per update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, Scalar, arrays, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError

SIZES = (4, 4, 3, 4, 2)


def uneven(seed=0):
    """Five batches of different sizes."""
    data, ends = arrays(sum(SIZES), seed=seed), np.cumsum(SIZES)
    return [
        {key: value[end - size : end] for key, value in data.items()} for size, end in zip(SIZES, ends, strict=True)
    ]


def windows(batches, length):
    return [batches[start : start + length] for start in range(0, len(batches), length)]


def by_hand(module, batches, length, epochs):
    """The same training, written out: one gradient for each batch, one update for each window."""
    optimizer = nnx.Optimizer(module, optax.adam(module.learning_rate), wrt=nnx.Param)
    gradient = nnx.jit(nnx.grad(lambda module, batch: module.loss(batch)))
    module.train()
    for _ in range(epochs):
        for window in windows(batches, length):
            weights = [len(batch["x"]) for batch in window]
            grads = [gradient(module, batch) for batch in window]
            total = sum(weights)
            mean = jax.tree.map(lambda *each: sum(w * g for w, g in zip(weights, each, strict=True)) / total, *grads)  # noqa: B023
            optimizer.update(module, mean)
    return module


@pytest.mark.parametrize("length", [2, 3, 10])
def test_a_window_is_the_mean_of_its_batches_weighted_by_their_sizes(length):
    batches = uneven()
    expected = by_hand(Regressor(rngs=nnx.Rngs(0)), batches, length, epochs=2)
    module = Regressor(rngs=nnx.Rngs(0))
    trainer = quiet(max_epochs=2, accumulate_grad_batches=length)
    trainer.fit(module, batches)
    assert trainer.global_step == 2 * len(windows(batches, length)) == trainer.estimated_steps
    for kind in (nnx.Param, nnx.BatchStat):
        for (path, value), (_, other) in zip(
            nnx.to_flat_state(nnx.state(module, kind)), nnx.to_flat_state(nnx.state(expected, kind)), strict=True
        ):
            np.testing.assert_allclose(value[...], other[...], rtol=2e-4, atol=5e-5, err_msg=str(path))
    counts = [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(module, nnx.RngCount))]
    assert counts == [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(expected, nnx.RngCount))]


def closed_form(values, length, epochs=1, start=1.0, rate=0.1):
    """`Scalar` under SGD: w and the loss after each update."""
    w, losses = start, []
    for _ in range(epochs):
        for window in windows(values, length):
            losses.append(np.mean([0.5 * (w - target) ** 2 for target in window]))
            w -= rate * np.mean([w - target for target in window])
    return w, losses


def test_a_steps_record_is_the_mean_over_its_window_and_steps_count_updates():
    module, values = Scalar(), [2.0, 4.0, 6.0, 8.0, 10.0]
    history = quiet(max_epochs=2, accumulate_grad_batches=2, log_every_n_steps=1).fit(module, targets(*values))
    w, losses = closed_form(values, 2, epochs=2)
    np.testing.assert_allclose(module.w[...], w, rtol=1e-6)
    steps, found = zip(*history["loss"], strict=True)
    assert steps == (1, 2, 3, 4, 5, 6)
    np.testing.assert_allclose(found, losses, rtol=1e-5)


def test_a_windows_record_weighs_batches_by_size_and_an_epochs_counts_each_batch_once():
    class Logs(Scalar):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.log("target", batch["target"].mean(), on_step=True, on_epoch=True)
            self.log("most", batch["target"].max(), on_step=False, on_epoch=True, reduce="max")
            return loss

    data = [{"target": np.full(size, value, np.float32)} for size, value in ((1, 1.0), (3, 5.0), (2, 9.0))]
    history = quiet(max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1).fit(Logs(), data)
    assert history["target_step"] == [(1, 4.0), (2, 9.0)]
    assert history["most"] == [(2, 9.0)]
    np.testing.assert_allclose(history["target_epoch"][0][1], (1 + 15 + 18) / 6, rtol=1e-6)


def test_validation_within_a_window_keeps_what_is_in_it():
    results = []
    for validates in (False, True):
        module = Regressor(rngs=nnx.Rngs(0))
        trainer = quiet(max_epochs=2, accumulate_grad_batches=3, val_check_interval=1)
        trainer.fit(module, uneven(), uneven(1) if validates else None)
        results.append(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_hooks_come_with_every_batch_and_the_step_moves_with_updates():
    seen = []

    class Notes(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((batch_idx, trainer.global_step, float(module.w[...]) != self.before))
            self.before = float(module.w[...])

        before = 1.0

    quiet(max_epochs=1, accumulate_grad_batches=2, callbacks=Notes()).fit(Scalar(), targets(2, 3, 4, 5, 6))
    assert seen == [(0, 0, False), (1, 1, True), (2, 1, False), (3, 2, True), (4, 3, True)]


def test_max_steps_counts_updates_and_a_schedule_moves_with_them():
    class Scheduled(Scalar):
        def configure_optimizers(self):
            return nf.OptimizerSpec(optax.sgd, schedule=optax.linear_schedule(0.3, 0.1, 2))

    history = quiet(
        max_steps=3, accumulate_grad_batches=2, log_every_n_steps=1, callbacks=nf.LearningRateMonitor()
    ).fit(Scheduled(), targets(*range(9)))
    np.testing.assert_allclose([value for _, value in history["lr"]], [0.3, 0.2, 0.1], rtol=1e-6)


def test_a_window_that_was_begun_is_ended_before_the_run_is():
    class Stops(nf.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            trainer.should_stop = True

    module = Scalar()
    trainer = quiet(max_epochs=1, accumulate_grad_batches=3, callbacks=Stops())
    trainer.fit(module, targets(2, 4, 6, 8))
    assert trainer.global_step == 1
    np.testing.assert_allclose(module.w[...], closed_form([2, 4, 6], 3)[0], rtol=1e-6)


def test_each_program_is_compiled_once_and_none_that_is_not_used(caplog):
    trainer = quiet(max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Scalar(), targets(1, 2, 3, 4))
    assert trainer._run is not None and trainer._run.train_program is not None
    programs = trainer._run.train_program._programs
    assert [len(program.sentinel.causes) for program in programs] == [0, 1, 1]
    assert "compiled again" not in caplog.text
    plain = quiet(max_epochs=1)
    plain.fit(Scalar(), targets(1, 2))
    assert plain._run is not None and plain._run.train_program is not None
    assert [len(program.sentinel.causes) for program in plain._run.train_program._programs] == [1, 0, 0]
    assert plain._run.train_program._window == []  # no gradients are kept


def test_names_that_appear_within_a_window_grow_its_vectors():
    class Many(Scalar):
        def training_step(self, batch):
            for i in range(batch["target"].shape[0]):
                self.log(f"m{i}", batch["target"][i])
            return super().training_step(batch)

    data = [{"target": np.full(size, 1.0, np.float32)} for size in (2, 40)]
    history = quiet(max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1).fit(Many(), data)
    assert history["m0"] == history["m39"] == [(1, 1.0)]


def test_a_run_saved_within_a_window_goes_on_to_the_same_bits(tmp_path):
    class Saves(nf.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer._progress.batches == 7:  # the second of a window of three
                trainer.save_checkpoint(tmp_path / "mid")

    def run(callback=None, ckpt=None):
        module = Regressor(rngs=nnx.Rngs(0))
        trainer = quiet(max_epochs=2, accumulate_grad_batches=3, callbacks=callback, log_every_n_steps=1)
        history = trainer.fit(module, uneven(), ckpt_path=ckpt)
        state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))
        return state, {name: history[name] for name in history}

    whole, logged = run(Saves())
    resumed, logged_again = run(ckpt=tmp_path / "mid")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert logged_again == logged


# --- the scheduler ----------------------------------------------------------------------------------------------------


def test_the_scheduler_changes_the_window_by_epoch_without_another_compilation():
    values, module = [2.0, 4.0, 6.0, 8.0], Scalar()
    scheduler = nf.GradientAccumulationScheduler({1: 2, 2: 4})
    trainer = quiet(max_epochs=4, callbacks=scheduler)
    trainer.fit(module, targets(*values))
    w = 1.0
    for length in (1, 2, 4, 4):
        w = closed_form(values, length, start=w)[0]
    np.testing.assert_allclose(module.w[...], w, rtol=1e-6)
    assert trainer.global_step == trainer.estimated_steps == 4 + 2 + 1 + 1
    assert trainer._run is not None and trainer._run.train_program is not None
    assert [len(program.sentinel.causes) for program in trainer._run.train_program._programs] == [1, 1, 1]


@pytest.mark.parametrize("scheduling", [{}, {-1: 2}, {0: 0}, {0: 1.5}, [2], {True: 2}])
def test_a_schedule_that_is_none_is_refused(scheduling):
    with pytest.raises(ConfigurationError, match="GradientAccumulationScheduler"):
        nf.GradientAccumulationScheduler(scheduling)


def test_two_numbers_of_batches_are_refused():
    trainer = quiet(max_epochs=1, accumulate_grad_batches=2, callbacks=nf.GradientAccumulationScheduler({0: 2}))
    with pytest.raises(ConfigurationError, match="both say how many"):
        trainer.fit(Scalar(), targets(1))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_number_of_batches_that_is_none_is_refused(value):
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches"):
        quiet(accumulate_grad_batches=value)
    with pytest.raises(ConfigurationError, match="accumulate_grad_batches"):
        quiet().accumulate_grad_batches = value


def test_leaves_that_disagree_need_a_batch_size_for_a_window():
    data = [{"target": np.ones(2, np.float32), "other": np.ones(3, np.float32)}] * 2
    with pytest.raises(ConfigurationError, match=r"(?s)leaves disagree.*weighted by it"):
        quiet(max_epochs=1, accumulate_grad_batches=2).fit(Scalar(), data)


def test_sums_of_short_floats_are_kept_long():
    class Short(nf.FitModule):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros((), jnp.bfloat16))

        def training_step(self, batch):
            return (self.w[...] * batch["x"]).sum()

        def configure_optimizers(self):
            return optax.sgd(1.0)

    # In bfloat16 a sum stops growing at 256; the mean of 512 ones would be wrong.
    data = [{"x": np.ones(1, np.float32)}] * 512
    module = Short()
    quiet(max_epochs=1, accumulate_grad_batches=512).fit(module, data)
    assert float(module.w[...]) == -1.0 and module.w[...].dtype == jnp.bfloat16
