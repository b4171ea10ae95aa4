"""What a run logs again at the step of its checkpoint is in TensorBoard once, however often it was cut off there."""

import nets
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.loggers.tensorboard import TensorBoardLogger

pytest.importorskip("tensorboard")


def scalars(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def continued(directory, state, step=3):
    logger = TensorBoardLogger(directory)
    logger.load_state_dict(state)
    logger.continue_from(step)
    return logger


def begun(directory):
    """A logger at the moment of a checkpoint at step 3, in mid-validation."""
    logger = TensorBoardLogger(directory)
    logger.log_metrics({"loss": 2.0}, 2)
    logger.log_metrics({"loss": 3.0}, 3)
    logger.log_metrics({"val": 0.1}, 3)
    return logger, logger.state_dict()


def go_on(logger, validated=(0.2, 0.3), steps=(4,)):
    for value in validated:
        logger.log_metrics({"val": value}, 3)
    logger.log_metrics({"val/mean": 0.5}, 3)
    for step in steps:
        logger.log_metrics({"loss": float(step)}, step)
    logger.finalize("interrupted")


WHOLE = {"loss": [(2, 2.0), (3, 3.0), (4, 4.0)], "val": [(3, pytest.approx(v)) for v in (0.1, 0.2, 0.3)]}
WHOLE["val/mean"] = [(3, 0.5)]


@pytest.mark.parametrize("lives", [1, 2, 3])
def test_what_is_there_is_not_recorded_again(tmp_path, lives):
    logger, state = begun(tmp_path)
    go_on(logger)
    for _ in range(lives):
        go_on(continued(tmp_path, state))
    assert scalars(tmp_path) == WHOLE


def test_what_was_not_reached_is_recorded(tmp_path):
    logger, state = begun(tmp_path)
    logger.log_metrics({"val": 0.2}, 3)
    logger.finalize("interrupted")
    go_on(continued(tmp_path, state))
    assert scalars(tmp_path) == WHOLE


def test_a_checkpoint_of_the_run_that_continues_knows_what_is_there(tmp_path):
    """It is saved at the same step again, before and after that run has a file of its own."""
    first, state = begun(tmp_path)
    go_on(first, steps=())
    second = continued(tmp_path, state)
    second.log_metrics({"val": 0.2}, 3)
    state = second.state_dict()
    second.finalize("interrupted")
    third = continued(tmp_path, state)
    third.log_metrics({"val": 0.3, "new": 1.0}, 3)
    state = third.state_dict()
    third.log_metrics({"new": 2.0}, 3)
    third.finalize("interrupted")
    fourth = continued(tmp_path, state)
    fourth.log_metrics({"new": 2.0}, 3)
    fourth.log_metrics({"val/mean": 0.5, "loss": 4.0}, 4)
    fourth.finalize("success")
    assert scalars(tmp_path) == WHOLE | {
        "new": [(3, 1.0), (3, 2.0)],
        "val/mean": [(3, 0.5), (4, 0.5)],
    }


def test_without_a_state_everything_is_recorded(tmp_path):
    logger, _ = begun(tmp_path)
    logger.finalize("interrupted")
    again = continued(tmp_path, {})
    again.log_metrics({"loss": 5.0}, 3)
    again.finalize("success")
    assert scalars(tmp_path)["loss"] == [(2, 2.0), (3, 3.0), (3, 5.0)]


def test_a_fit_that_is_killed_after_its_checkpoint_has_each_value_once(tmp_path):

    class Killed(nf.Callback):
        def on_validation_end(self, trainer, module):
            if trainer.global_step == 4:
                raise KeyError("killed")

    def fit(directory, *callbacks, **how):
        saving = nf.ModelCheckpoint(directory / "c", every_n_train_steps=2, save_on_exception=False)
        options = {"max_epochs": 2, "val_check_interval": 2, "log_every_n_steps": 1, "enable_checkpointing": True}
        logger = TensorBoardLogger(directory)
        trainer = nets.quiet(callbacks=[*callbacks, saving], logger=logger, **options)
        return trainer.fit(nets.Regressor(rngs=nnx.Rngs(0)), nets.loader(), nets.loader(16), **how)

    fit(tmp_path / "whole")
    with pytest.raises(KeyError):
        fit(tmp_path / "cut", Killed())
    fit(tmp_path / "cut", ckpt_path="last")
    assert scalars(tmp_path / "cut") == scalars(tmp_path / "whole")


def test_a_fresh_start_leaves_nothing_of_a_run_that_saved_nothing(tmp_path):
    """Not even what it had recorded before its first update, in a validation in the first window."""

    def fit(directory):
        logger = TensorBoardLogger(directory)
        saving = nf.ModelCheckpoint(directory / "c", save_last=False, save_top_k=0)
        options = {"val_check_interval": 1, "accumulate_grad_batches": 2, "enable_checkpointing": True}
        trainer = nets.quiet(max_epochs=1, callbacks=saving, logger=logger, **options)
        trainer.fit(nets.Regressor(rngs=nnx.Rngs(0)), nets.loader(), nets.loader(16), ckpt_path="last")

    fit(tmp_path / "once")
    fit(tmp_path / "twice")
    fit(tmp_path / "twice")
    assert scalars(tmp_path / "once")["val/loss"][0][0] == 0
    assert scalars(tmp_path / "twice") == scalars(tmp_path / "once")
