"""The Trainer as users and callbacks see it: what it brings, what may be read off it and when."""

import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, Scalar, arrays, quiet, targets

import nnx_fit as nf
from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.loggers.logger import Logger


def eager(**options):
    return quiet(jit=False, **options)


def names(callbacks):
    return [type(callback).__name__ for callback in callbacks]


def test_a_directory_of_its_own_is_dated_and_never_shared():
    directories = [nf.Trainer(max_epochs=1).default_root_dir for _ in range(50)]
    assert len(set(directories)) == 50
    for directory in directories:
        assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-[0-9a-f]{6}", directory.as_posix())
        assert not directory.exists()


def test_making_a_trainer_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nf.Trainer(max_epochs=1)
    nf.Trainer(max_epochs=1, default_root_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_a_trainer_brings_by_default():
    trainer = nf.Trainer(max_epochs=1)
    assert names(trainer.loggers) == ["TensorBoardLogger"]
    brought = {"RichProgressBar", "ModelSummary", "VariableMonitor", "LearningRateMonitor", "ModelCheckpoint"}
    assert set(names(trainer.callbacks)) == brought
    assert trainer.checkpoint_callback is trainer.callbacks[names(trainer.callbacks).index("ModelCheckpoint")]
    assert trainer.logger is trainer.loggers[0]


def test_what_is_given_is_not_brought_twice_and_what_is_disabled_not_at_all():
    mine = [
        nf.ModelCheckpoint(),
        nf.ModelSummary(),
        nf.RichProgressBar(),
        nf.VariableMonitor(),
        nf.LearningRateMonitor(),
    ]
    assert nf.Trainer(max_epochs=1, callbacks=mine).callbacks == mine
    assert quiet(max_epochs=1).callbacks == [] and quiet(max_epochs=1).loggers == []
    assert quiet(max_epochs=1).checkpoint_callback is None and quiet(max_epochs=1).logger is None
    single = Callback()
    assert quiet(max_epochs=1, callbacks=single).callbacks == [single]


def test_loggers_may_be_one_several_or_none(tmp_path):
    csv = nf.CSVLogger(tmp_path)
    assert nf.Trainer(max_epochs=1, logger=csv).loggers == [csv]
    both = [csv, Logger()]
    assert nf.Trainer(max_epochs=1, logger=both).loggers == both
    assert nf.Trainer(max_epochs=1, logger=False).loggers == nf.Trainer(max_epochs=1, logger=None).loggers == []


def test_a_trainer_without_logger_and_checkpoints_writes_nothing_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = nf.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Scalar(), targets(1, 2), targets(1))
    trainer.validate(Scalar(), targets(1))
    assert list(tmp_path.iterdir()) == []


def test_a_default_fit_leaves_events_and_checkpoints_in_its_directory(tmp_path):
    trainer = nf.Trainer(max_epochs=1, default_root_dir=tmp_path / "run", enable_progress_bar=False)
    trainer.fit(Scalar(), targets(1, 2), targets(1))
    files = [path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")]
    assert sum("events.out.tfevents" in name for name in files) == 1
    assert any(name.endswith("checkpoints/last") for name in files)
    assert trainer.log_dir.is_relative_to(tmp_path / "run")


def test_before_any_run_there_is_nothing_to_see():
    trainer = quiet(max_epochs=3, max_steps=7)
    assert (trainer.global_step, trainer.current_epoch, trainer.stage, trainer.module) == (0, 0, None, None)
    assert trainer.callback_metrics == trainer.logged_metrics == trainer.progress_bar_metrics == {}
    assert not (trainer.should_stop or trainer.sanity_checking or trainer.fitting or trainer.validation_enabled)
    assert not trainer.interrupted and trainer.stop_reason is None and dict(trainer.history) == {}
    assert (trainer.max_epochs, trainer.max_steps, trainer.log_every_n_steps) == (3, 7, 50)
    assert trainer.peek(...) == {} and trainer.compilations == [] and trainer.learning_rates == {}
    with pytest.raises(nf.ConfigurationError, match="no module was run yet"):
        trainer.partition  # noqa: B018


def test_stage_and_mode_in_every_part_of_a_run():
    seen = {}

    class Looks(Callback):
        def _look(self, trainer, module, hook):
            seen.setdefault(
                hook,
                (trainer.stage, trainer.sanity_checking, trainer.fitting, module.training, trainer.module is module),
            )

    for hook in ("on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end", "on_fit_end", "on_test_start"):
        setattr(Looks, hook, lambda self, trainer, module, *args, hook=hook: self._look(trainer, module, hook))

    def on_validation_batch_end(self, trainer, module, *args):
        self._look(trainer, module, "sanity" if trainer.sanity_checking else "validation")

    Looks.on_validation_batch_end = on_validation_batch_end

    class Tested(Scalar):
        def test_step(self, batch):
            pass

    trainer = eager(max_epochs=1, num_sanity_val_steps=1, callbacks=Looks())
    module = Tested()
    module.eval()
    trainer.fit(module, targets(1), targets(1))
    trainer.test(module, targets(1))
    assert seen == {
        "on_fit_start": (None, False, True, False, True),
        "sanity": ("sanity", True, True, False, True),
        "on_train_start": ("train", False, True, True, True),
        "on_train_batch_end": ("train", False, True, True, True),
        "validation": ("validate", False, True, False, True),
        "on_train_end": ("train", False, True, True, True),
        "on_fit_end": (None, False, True, False, True),
        "on_test_start": ("test", False, False, False, True),
    }
    assert trainer.stage is None and not module.training


def test_the_module_knows_its_trainer_and_where_it_is():
    seen = []

    class Asks(Scalar):
        def on_train_epoch_end(self):
            seen.append((self.trainer, self.global_step, self.current_epoch))

    module, trainer = Asks(), eager(max_epochs=2)
    with pytest.raises(nf.ConfigurationError, match="no Trainer has run this module yet"):
        module.trainer  # noqa: B018
    trainer.fit(module, targets(1, 2))
    assert seen == [(trainer, 2, 0), (trainer, 4, 1)] and module.trainer is trainer


def test_a_module_that_another_trainer_ran_in_a_hook_is_its_first_trainers_again():
    class Evaluates(Callback):
        def on_train_epoch_end(self, trainer, module):
            assert eager(max_epochs=1).validate(module, targets(3)) == [{"val/target": 3.0}]

    class Logs(Scalar):
        def on_train_epoch_end(self):
            self.log("epoch", self.current_epoch)

    module, trainer = Logs(), eager(max_epochs=2, callbacks=Evaluates())
    history = trainer.fit(module, targets(1, 2))
    assert module.trainer is trainer and history["epoch"] == [(2, 0.0), (4, 1.0)]


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_verb_in_a_hook_of_the_same_trainer_is_refused(verb):
    class Nests(Callback):
        def on_train_epoch_end(self, trainer, module):
            getattr(trainer, verb)(module, targets(1))

    trainer = eager(max_epochs=1, callbacks=Nests())
    with pytest.raises(nf.ConfigurationError, match=f"Trainer.{verb} was called while this Trainer's fit is under way"):
        trainer.fit(Scalar(), targets(1))
    trainer.callbacks.clear()
    trainer.fit(Scalar(), targets(1))


def test_predicting_needs_a_step_or_a_call():
    with pytest.raises(nf.ConfigurationError, match="Scalar has no predict_step"):
        eager(max_epochs=1).predict(Scalar(), targets(1))


def test_numbers_of_batches():
    trainer = eager(max_epochs=1, limit_val_batches=0.5, limit_predict_batches=2)
    seen = []

    class Looks(Callback):
        def on_fit_start(self, trainer, module):
            seen.append((trainer.num_training_batches, trainer.num_val_batches, trainer.estimated_steps))

    trainer.callbacks.append(Looks())
    trainer.fit(Scalar(), targets(1, 2, 3), [targets(1, 2), lambda: iter(targets(1))][:1])
    assert seen == [(3, [1], 3)]

    class Predicts(Scalar):
        def predict_step(self, batch):
            return batch["target"]

    trainer.predict(Predicts(), [targets(1, 2, 3), targets(1)])
    assert trainer.num_predict_batches == [2, 1]


def test_the_partition_shows_live_values_in_a_hook():
    seen = []

    class Looks(Callback):
        reads_module = False

        def on_train_batch_end(self, trainer, module, *args):
            seen.append(float(trainer.partition.params["w"][...]))

    trainer = quiet(max_epochs=1, callbacks=Looks())
    trainer.fit(Scalar(), targets(2, 2))
    np.testing.assert_allclose(seen, [2 - 0.9, 2 - 0.9**2], rtol=1e-6)
    assert [row.path for row in trainer.partition.rows] == ["w"]


def test_peeking_gives_live_arrays_by_path_without_writing_the_module_back():
    seen = []

    class Looks(Callback):
        reads_module = False

        def on_train_batch_end(self, trainer, module, *args):
            held = trainer._run.live.held
            found = trainer.peek(nnx.BatchStat)
            seen.append((sorted(found), held, trainer._run.live.held, jax.tree.map(np.asarray, found)))

    module = Regressor(4, depth=1, rngs=nnx.Rngs(0))
    data = nf.ArrayLoader({"x": np.eye(4, dtype=np.float32), "y": np.ones((4, 1), np.float32)}, 4)
    quiet(max_epochs=2, callbacks=Looks()).fit(module, data)
    (paths, *held, _), (*_, last) = seen
    assert paths == ["blocks.0.norm.mean", "blocks.0.norm.var"] and held == [True, True]
    np.testing.assert_array_equal(last["blocks.0.norm.mean"], module.blocks[0].norm.mean[...])


def test_what_waits_for_an_array_is_called_once_in_order_and_before_fit_returns():
    called = []

    class Asks(Callback):
        @pausing
        def on_train_batch_end(self, trainer, module, *args):
            step = trainer.global_step
            value = jnp.sum(trainer.peek(nnx.Param)["w"])
            trainer.when_ready(value, lambda: called.append((step, float(value))))
            self.paused_until = step + 2

        def on_train_end(self, trainer, module):
            value = jnp.zeros(())
            trainer.when_ready(value, lambda: called.append(("end", float(value))))

    quiet(max_epochs=1, callbacks=Asks()).fit(Scalar(), targets(0, 0, 0, 0, 0))
    np.testing.assert_allclose([value for _, value in called], [0.9, 0.9**3, 0.9**5, 0], rtol=1e-6)
    assert [step for step, _ in called] == [1, 3, 5, "end"]


def test_learning_rates_are_what_the_monitor_logs():
    class Scheduled(Scalar):
        def configure_optimizers(self):
            return nf.OptimizerSpec(optax.sgd, schedule=optax.linear_schedule(0.3, 0.1, 2))

    trainer = quiet(max_epochs=1, callbacks=nf.LearningRateMonitor())
    trainer.fit(Scheduled(), targets(1, 2, 3))
    assert list(trainer.learning_rates.values()) == [pytest.approx(0.1)]


def test_a_program_is_compiled_once_for_each_shape_and_says_why():
    trainer = quiet(max_epochs=2)
    trainer.fit(Scalar(), [*targets(1, 2), *targets(3, size=1)])
    assert len(trainer.compilations) == 2
    assert "batch['target']: (2,) -> (1,)" in trainer.compilations[1]


def test_a_value_that_a_host_hook_writes_is_trained_on():
    class Resets(Scalar):
        def on_train_epoch_end(self):
            self.w[...] = jnp.float32(5.0)

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 1:
                self.w[...] = self.w[...] + 1

    module = Resets()
    quiet(max_epochs=1).fit(module, targets(2, 2))
    assert float(module.w[...]) == 5.0
    module = Resets()
    quiet(max_epochs=2, max_steps=3).fit(module, targets(2, 2))
    # Steps: 1 -> 1.1, then +1 and -> 2.09, reset to 5 -> 4.7, and the end of the cut epoch resets it again.
    assert float(module.w[...]) == 5.0


def test_host_hooks_see_the_value_of_their_step():
    seen = []

    class Sees(Scalar):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append((float(self.w[...]), float(outputs["loss"]), sorted(outputs)))

        def training_step(self, batch):
            return {"loss": super().training_step(batch), "extra": self.w[...]}

    quiet(max_epochs=1).fit(Sees(), targets(2, 2))
    assert [(w, keys) for w, _, keys in seen] == [
        (pytest.approx(2 - 0.9), ["extra", "loss"]),
        (pytest.approx(2 - 0.81), ["extra", "loss"]),
    ]
    assert [loss for _, loss, _ in seen] == [0.5, pytest.approx(0.5 * 0.81)]


def test_fit_returns_the_history_of_that_fit():
    trainer = eager(max_epochs=1, log_every_n_steps=1)
    history = trainer.fit(Scalar(), targets(1))
    assert isinstance(history, nf.History) and trainer.history is history


def test_a_request_to_stop_may_be_taken_back():
    class Wavers(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.should_stop = True

        def on_train_batch_end(self, trainer, *args):
            assert trainer.should_stop
            trainer.should_stop = False

    trainer = eager(max_epochs=1, callbacks=Wavers())
    trainer.fit(Scalar(), targets(1, 2, 3))
    assert trainer.global_step == 3


def test_all_verbs_run_one_after_the_other_on_one_trainer(tmp_path):
    class Everything(Scalar):
        test_step = Scalar.validation_step

        def predict_step(self, batch):
            return self.w[...]

    module, trainer = Everything(), eager(max_epochs=1)
    trainer.fit(module, targets(2, 2), targets(1))
    w = float(module.w[...])
    assert trainer.validate(module, targets(3)) == trainer.test(module, targets(3)) == [{"val/target": 3.0}]
    assert float(trainer.predict(module, targets(3))[0]) == w == float(module.w[...])
    trainer.save_checkpoint(tmp_path / "after")
    assert trainer.global_step == 2


def test_the_trainer_is_no_part_of_the_modules_graph():
    module = Scalar()
    before = nnx.graphdef(module)
    quiet(max_epochs=1).fit(module, targets(1), targets(1))
    assert nnx.graphdef(module) == before and hash(nnx.graphdef(module)) == hash(before)


def test_a_bound_is_asked_for_once_and_defaults_to_1000_epochs(caplog):
    with caplog.at_level(logging.WARNING, "nnx_fit"):
        assert quiet().max_epochs == 1000
    assert caplog.text.count("no bound") == 1


def test_the_root_may_be_a_string(tmp_path):
    assert quiet(max_epochs=1, default_root_dir=str(tmp_path)).default_root_dir == Path(tmp_path)
    assert quiet(max_epochs=1, default_root_dir=tmp_path).log_dir == tmp_path


def test_shuffled_training_is_reproducible_and_validating_more_often_does_not_change_it():
    results = []
    for options in ({}, {"val_check_interval": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 1}):
        module = Regressor(4, depth=1, rngs=nnx.Rngs(0))
        data = arrays(16, features=4)
        quiet(max_epochs=1, **options).fit(module, nf.ArrayLoader(data, 8, shuffle=True), nf.ArrayLoader(data, 8))
        results.append(jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngKey))))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)
