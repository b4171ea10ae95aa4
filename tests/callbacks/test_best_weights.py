"""EarlyStopping(restore_best=True): the module that fit returns holds the values of its best check."""

import logging
import os
import signal

import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx
from scripted import ScriptedLoader, scripted_fit

import nnx_fit as nf
from nnx_fit.checkpoint.store import load_arrays, load_meta


def weight(step, *, start=1.0, target=0.5):
    """The parameter of `nets.Scalar` after some updates: each takes a tenth of the way to the target."""
    return target + (start - target) * 0.9**step


def stopping(**options):
    return nf.EarlyStopping("val/target", restore_best=True, **options)


def fitted(values, callback, **options):
    trainer = nets.quiet(**{"max_epochs": len(values), "jit": False, "callbacks": callback, **options})
    return scripted_fit(values, trainer)


def of(trainer):
    return float(trainer.module.w[...])


@pytest.mark.parametrize(
    ("values", "options", "trainer", "step"),
    [
        ([3, 1, 2, 2, 2], {"patience": 2}, {}, 4),  # stopped by itself
        ([3, 1, 2], {"patience": 9}, {}, 4),  # by max_epochs
        ([3, 1, 2, 2], {"patience": 9}, {"max_steps": 5}, 4),
        ([3, 2, 1], {}, {}, 6),  # the last is the best
        ([1, 1, 1], {}, {}, 2),  # a tie takes nothing away
        ([1, 5, 2], {"mode": "max"}, {}, 4),
        ([3, 1, float("nan")], {}, {}, 4),  # stopped as the metric is not finite
        ([3, 0.1, 0.2], {"stopping_threshold": 0.15}, {}, 4),
        ([3, 2.9, 2.95], {"min_delta": 0.5}, {}, 4),  # better, although no improvement by min_delta
        ([0, 2, 3], {"start_from_epoch": 1}, {}, 4),
    ],
)
def test_the_module_holds_the_best_weights_whatever_stops_it(values, options, trainer, step):
    callback = stopping(**options)
    done = fitted(values, callback, **trainer)
    assert of(done) == pytest.approx(weight(step), rel=1e-6)
    assert callback.best_step == step


def test_without_a_single_finite_value_the_last_weights_stay():
    nan = float("nan")
    callback = stopping(check_finite=False)
    assert of(fitted([nan, nan], callback)) == pytest.approx(weight(4), rel=1e-6)
    assert callback.best_step == -1


def test_the_last_checkpoint_is_the_state_the_run_ended_in(tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target")
    trainer = fitted([1, 2, 3], [stopping(), checkpoint], enable_checkpointing=True)
    assert of(trainer) == pytest.approx(weight(2), rel=1e-6)
    assert load_meta(tmp_path / "last")["global_step"] == 6
    assert float(load_arrays(tmp_path / "last")["params"]["w"]) == pytest.approx(weight(6), rel=1e-6)
    assert float(load_arrays(tmp_path / "epoch=0-step=2")["params"]["w"]) == of(trainer)
    # Saved after the fit, a checkpoint holds what the module holds.
    trainer.save_checkpoint(tmp_path / "after")
    assert float(load_arrays(tmp_path / "after")["params"]["w"]) == of(trainer)


def test_a_continued_run_knows_the_best_weights_of_its_first_part(tmp_path):
    whole = fitted([2, 1, 3, 4], stopping())
    fitted([2, 1, 3], [stopping(), nf.ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    callback = stopping()
    trainer = nets.quiet(max_epochs=4, jit=False, callbacks=callback)
    scripted_fit([4], trainer, ckpt_path=tmp_path / "last")
    assert of(trainer) == of(whole) == pytest.approx(weight(4), rel=1e-6)
    assert callback.best_step == 4


def test_weights_that_the_continued_run_never_kept_are_said_to_be_missing(tmp_path, caplog):
    other = nf.EarlyStopping("val/target")
    fitted([1, 2], [other, nf.ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    trainer = nets.quiet(max_epochs=4, jit=False, callbacks=stopping())
    scripted_fit([3, 4], trainer, ckpt_path=tmp_path / "last")
    # What there is to restore is the best of this part.
    assert of(trainer) == pytest.approx(weight(6), rel=1e-6)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "val/target was 1 in the part of the run that this one continues" in warning


def test_statistics_and_frozen_parameters_belong_to_the_weights():
    class Keep(nf.Callback):
        phase = "save"

        def on_train_epoch_end(self, trainer, module):
            self.kept = [*getattr(self, "kept", []), nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))]

    class Counted(nets.Regressor):
        def validation_step(self, batch):
            self.log("val/target", batch["target"].mean())

    keep = Keep()
    module = Counted(rngs=nnx.Rngs(0))
    module.freeze("head")
    callback = stopping(patience=1)
    trainer = nets.quiet(max_epochs=4, callbacks=[callback, keep])
    trainer.fit(module, nets.loader(), ScriptedLoader([2, 1, 3]))
    assert trainer.current_epoch == 3
    restored = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
    mean = ("blocks", 0, "norm", "mean")
    assert not np.array_equal(_at(keep.kept[1], mean), _at(keep.kept[2], mean))
    for path in (mean, ("blocks", 1, "linear", "kernel"), ("head", "kernel")):
        assert np.array_equal(_at(restored, path), _at(keep.kept[1], path)), path


def test_an_attribute_that_is_a_bare_array_belongs_to_the_weights():
    class Counting(nets.Scalar):
        def __init__(self):
            super().__init__()
            self.count = nnx.data(jnp.zeros(()))

        def training_step(self, batch):
            self.count = self.count + 1
            return super().training_step(batch)

    module = Counting()
    nets.quiet(max_epochs=3, callbacks=stopping()).fit(module, nets.targets(0.5, 0.5), ScriptedLoader([2, 1, 3]))
    assert float(module.count) == 4.0


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def test_it_does_not_change_the_training():
    def history(callback):
        module = nets.Regressor(depth=1, rngs=nnx.Rngs(0))
        trainer = nets.quiet(max_epochs=3, log_every_n_steps=1, callbacks=callback)
        return trainer.fit(module, nets.loader(), nets.loader())

    with_it = history(nf.EarlyStopping("val/loss", patience=9, restore_best=True))
    without = history(nf.EarlyStopping("val/loss", patience=9))
    assert (
        with_it["train/loss_step" if "train/loss_step" in with_it else "train/loss"]
        == (without["train/loss_step" if "train/loss_step" in without else "train/loss"])
    )
    assert with_it["val/loss"] == without["val/loss"]


def test_the_average_that_was_evaluated_is_what_is_restored():
    average = nf.EMAWeights(decay=0.5)
    seen = []

    class Look(nf.Callback):
        def on_validation_end(self, trainer, module):
            seen.append(float(average.weights["w"]))

    trainer = fitted([3, 1, 2], [average, Look(), stopping()])
    assert of(trainer) == pytest.approx(seen[1], rel=1e-6)
    # By hand: the average begins with the start, and takes in half of the weight after each of four updates.
    expected = 1.0
    for step in range(1, 5):
        expected = 0.5 * expected + 0.5 * weight(step)
    assert of(trainer) == pytest.approx(expected, rel=1e-6)


def test_a_signal_ends_with_the_best_weights_and_an_error_leaves_the_last():
    class Ends(nf.Callback):
        def __init__(self, how):
            self.how = how

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                self.how()

    def interrupts():
        os.kill(os.getpid(), signal.SIGINT)

    def fails():
        raise RuntimeError("mine")

    for how, error, step in ((interrupts, KeyboardInterrupt, 2), (fails, RuntimeError, 5)):
        trainer = nets.quiet(max_epochs=3, jit=False, callbacks=[Ends(how), stopping()])
        module = nets.Scalar()
        with pytest.raises(error):
            trainer.fit(module, nets.targets(0.5, 0.5), ScriptedLoader([1, 2, 3]))
        assert float(module.w[...]) == pytest.approx(weight(step), rel=1e-6)


def test_training_metrics_are_watched_without_a_validation():
    callback = nf.EarlyStopping("loss", mode="max", patience=9, restore_best=True)
    module = nets.Scalar()
    nets.quiet(max_epochs=3, jit=False, callbacks=callback).fit(module, nets.targets(0.5, 0.5))
    assert float(module.w[...]) == pytest.approx(weight(2), rel=1e-6)


def test_two_of_them_are_refused():
    with pytest.raises(nf.ConfigurationError, match=r"2 EarlyStopping have restore_best=True"):
        fitted([1], [stopping(), stopping()])


def test_another_fit_starts_over():
    callback = stopping()
    trainer = nets.quiet(max_epochs=2, jit=False, callbacks=callback)
    scripted_fit([0.1, 1], trainer)
    scripted_fit([9, 8], trainer)
    assert callback.best_step == 4 and of(trainer) == pytest.approx(weight(4), rel=1e-6)


def test_what_is_restored_is_said(capsys, caplog):
    fitted([3, 1, 2], stopping())
    said = capsys.readouterr().out + caplog.text
    assert "EarlyStopping: the module holds the best weights, val/target = 1 at step 4." in said
