"""Callbacks and the Trainer's profiler from the command line: typed, built, and seen in what a run leaves behind."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nnx_fit.checkpoint.directories import load_meta
from nnx_fit.cli import main


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.slow
def test_callbacks_join_the_default_ones_and_take_their_arguments(
    project_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = "gradient_monitor,throughput_monitor,device_stats_monitor,ema_weights,timer,profiler,early_stopping"
    line = (
        f"experiment=mine callbacks=[default,{added}] callbacks.gradient_monitor.norm_type=inf "
        "callbacks.ema_weights.decay=0.5 callbacks.profiler.start_step=1 callbacks.profiler.num_steps=1 "
        "callbacks.throughput_monitor.window=1 callbacks.device_stats_monitor.cpu_stats=true "
        "callbacks.timer.duration=00:01:00:00 callbacks.early_stopping.restore_best=true "
        "callbacks.early_stopping.start_from_epoch=1 callbacks.model_checkpoint.verbose=true"
    )
    assert main.run(line.split()) == 0
    run = only(project_folder, "outputs/*/*")
    printed = capsys.readouterr().out
    for metric in ("grad_norm_inf", "throughput/steps_per_second", "host/bytes"):
        assert metric in printed, metric
    assert "EarlyStopping: the module holds the best weights" in printed
    assert "ModelCheckpoint: saves epoch=0-step=2, val/loss = " in printed
    assert list(run.glob("plugins/profile/*/*.xplane.pb"))
    callbacks = load_meta(run / "checkpoints" / "last")["callbacks"]
    assert {"EMAWeights", "Timer", "EarlyStopping", "ModelCheckpoint"} <= set(callbacks)
    written = OmegaConf.load(run / ".hydra" / "config.yaml")
    assert OmegaConf.select(written, "callbacks.ema_weights.decay") == 0.5


def test_a_schedule_of_accumulation_is_a_dict_on_the_command_line(project_folder: Path) -> None:
    line = (
        "experiment=mine callbacks=[default,gradient_accumulation_scheduler] "
        "callbacks.gradient_accumulation_scheduler.scheduling={0:1,1:2}"
    )
    assert main.run(line.split()) == 0
    # Two batches an epoch: two updates in the first, one in the second.
    assert load_meta(only(project_folder, "outputs/*/*/checkpoints/last"))["global_step"] == 3


def test_a_schedule_that_was_not_given_is_asked_for(project_folder: Path, fails: Callable[[str], str]) -> None:
    said = fails("experiment=mine callbacks=[default,gradient_accumulation_scheduler]")
    assert "callbacks.gradient_accumulation_scheduler.scheduling has no value" in said


def test_a_sub_module_is_frozen_from_the_command_line(project_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "experiment=mine callbacks=[default,backbone_finetuning] callbacks.backbone_finetuning.backbone=hidden "
        "callbacks.backbone_finetuning.unfreeze_backbone_at_epoch=1"
    )
    assert main.run(line.split()) == 1
    assert "hidden" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "override", "message"),
    [
        ("ema_weights", "ema_weights.dekay=0.5", "Did you mean callbacks.ema_weights.decay?"),
        ("ema_weights", "ema_weights.decay=high", "callbacks.ema_weights.decay=high: expected float"),
        ("gradient_monitor", "gradient_monitor.per_layer=3.5", "callbacks.gradient_monitor.per_layer=3.5: expected"),
        ("throughput_monitor", "throughput_monitor.clock=1", "callbacks.throughput_monitor.clock: no such setting"),
        ("timer", "timer.interval=minute", "callbacks.timer.interval=minute: expected one of step, epoch."),
        ("profiler", "profiler.num_steps=all", "callbacks.profiler.num_steps=all: expected int"),
        ("backbone_finetuning", "backbone_finetuning.train_bn=2.5", "callbacks.backbone_finetuning.train_bn=2.5"),
        ("early_stopping", "early_stopping.start_from_epoch=x", "callbacks.early_stopping.start_from_epoch=x"),
    ],
)
def test_wrong_names_and_types_are_refused(
    project_folder: Path, fails: Callable[[str], str], option: str, override: str, message: str
) -> None:
    assert message in fails(f"experiment=mine callbacks=[default,{option}] callbacks.{override}")
    assert not (project_folder / "outputs").exists()


def test_the_profiler_and_deterministic_kernels_are_settings_of_the_trainer(
    project_folder: Path,
    fails: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    assert "Did you mean simple?" in fails("experiment=mine trainer.profiler=simpel")
    assert "trainer.deterministic=warn" in fails("experiment=mine trainer.deterministic=warn")
    assert main.run(["experiment=mine", "trainer.profiler=simple", "trainer.deterministic=true"]) == 0
    run = only(project_folder, "outputs/*/*")
    table = (run / "profile-fit.txt").read_text()
    assert table in capsys.readouterr().out
    assert "ModelCheckpoint.on_train_epoch_end" in table and (run / "profile-test.txt").exists()


def test_a_barebones_run_has_no_loggers_to_complain_of(project_folder: Path) -> None:
    assert main.run(["experiment=mine", "trainer=barebones", "test_after_fit=false"]) == 0
    run = only(project_folder, "outputs/*/*")
    assert not list(run.glob("events.*")) and not (run / "checkpoints").exists()
