"""Typed schemas of the callbacks in `conf/callbacks/`, each with the arguments and defaults of its constructor.

How schemas are used, and those of everything else, is in `configs`. Nothing here imports JAX.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Union

from omegaconf import MISSING


def one_of(default: str | None, *choices: str) -> Any:
    """A field that takes one of a fixed set of strings."""
    return field(default=default, metadata={"choices": choices})


@dataclass
class ModelCheckpointConfig:
    """Arguments of `nnx_fit.ModelCheckpoint`."""

    _target_: str = "nnx_fit.ModelCheckpoint"
    dirpath: str | None = None
    filename: str | None = None
    monitor: str | None = None
    mode: str = one_of("min", "min", "max")
    save_top_k: int = 1
    save_last: bool | None = None
    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: Any = None
    save_on_exception: bool = True
    save_weights_only: bool = False
    async_save: bool = True
    save_on_train_epoch_end: bool | None = None
    auto_insert_metric_name: bool = True
    enable_version_counter: bool = True
    verbose: bool = False


@dataclass
class EarlyStoppingConfig:
    """Arguments of `nnx_fit.EarlyStopping`."""

    _target_: str = "nnx_fit.EarlyStopping"
    monitor: str | None = MISSING
    min_delta: float = 0.0
    patience: int = 3
    mode: str = one_of("min", "min", "max")
    verbose: bool = False
    strict: bool = True
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    check_on_train_epoch_end: bool | None = None
    start_from_epoch: int = 0
    restore_best: bool = False


@dataclass
class LearningRateMonitorConfig:
    """Arguments of `nnx_fit.LearningRateMonitor`."""

    _target_: str = "nnx_fit.LearningRateMonitor"
    logging_interval: str | None = one_of(None, "step", "epoch")
    log_momentum: bool = False
    log_weight_decay: bool = False


@dataclass
class VariableMonitorConfig:
    """Arguments of `nnx_fit.VariableMonitor`."""

    _target_: str = "nnx_fit.VariableMonitor"
    every_n_steps: int | None = None
    include: Any = None
    params: bool = False


@dataclass
class GradientMonitorConfig:
    """Arguments of `nnx_fit.GradientMonitor`."""

    _target_: str = "nnx_fit.GradientMonitor"
    norm_type: Union[float, str] = 2.0  # noqa: UP007
    per_layer: bool = False


@dataclass
class ThroughputMonitorConfig:
    """Arguments of `nnx_fit.ThroughputMonitor`."""

    _target_: str = "nnx_fit.ThroughputMonitor"
    window: int = 100
    batch_size_fn: Any = None


@dataclass
class DeviceStatsMonitorConfig:
    """Arguments of `nnx_fit.DeviceStatsMonitor`."""

    _target_: str = "nnx_fit.DeviceStatsMonitor"
    cpu_stats: bool | None = None


@dataclass
class EMAWeightsConfig:
    """Arguments of `nnx_fit.EMAWeights`."""

    _target_: str = "nnx_fit.EMAWeights"
    decay: float = 0.999
    every_n_steps: int = 1
    start_step: int = 0
    use_for_eval: bool = True


@dataclass
class TimerConfig:
    """Arguments of `nnx_fit.Timer`."""

    _target_: str = "nnx_fit.Timer"
    duration: Any = None
    interval: str = one_of("step", "step", "epoch")
    verbose: bool = True


@dataclass
class ProfilerConfig:
    """Arguments of `nnx_fit.ProfilerCallback`."""

    _target_: str = "nnx_fit.ProfilerCallback"
    start_step: int = 10
    num_steps: int = 5
    dirpath: str | None = None


@dataclass
class GradientAccumulationSchedulerConfig:
    """Arguments of `nnx_fit.GradientAccumulationScheduler`."""

    _target_: str = "nnx_fit.GradientAccumulationScheduler"
    # Hydra adds no keys to a typed dict; what stands in it is for the constructor to check.
    scheduling: Any = MISSING


@dataclass
class BackboneFinetuningConfig:
    """Arguments of `nnx_fit.BackboneFinetuning`."""

    _target_: str = "nnx_fit.BackboneFinetuning"
    unfreeze_backbone_at_epoch: int = 10
    backbone: Any = "backbone"
    train_bn: bool = True
    verbose: bool = False


@dataclass
class BatchSizeFinderConfig:
    """Arguments of `nnx_fit.BatchSizeFinder`."""

    _target_: str = "nnx_fit.BatchSizeFinder"
    mode: str = one_of("power", "power", "binsearch")
    steps_per_trial: int = 3
    init_val: int = 2
    max_trials: int = 25
    batch_arg_name: str = "batch_size"
    margin: float = 0.05
    max_val: int | None = 8192


@dataclass
class LearningRateFinderConfig:
    """Arguments of `nnx_fit.LearningRateFinder`."""

    _target_: str = "nnx_fit.LearningRateFinder"
    min_lr: float = 1e-8
    max_lr: float = 1.0
    num_training_steps: int = 100
    mode: str = one_of("exponential", "exponential", "linear")
    early_stop_threshold: float | None = 4.0
    update_attr: bool = True
    attr_name: str = ""


@dataclass
class ModelSummaryConfig:
    """Arguments of `nnx_fit.ModelSummary`."""

    _target_: str = "nnx_fit.ModelSummary"
    max_depth: int = -1
    max_rows: int = 40


@dataclass
class RichProgressBarConfig:
    """Arguments of `nnx_fit.RichProgressBar`."""

    _target_: str = "nnx_fit.RichProgressBar"
    refresh_rate: int = 1
    leave: bool = False
    log_interval: float = 30.0


# By the name of their YAML file.
CALLBACK_SCHEMAS: dict[str, type] = {
    "model_checkpoint": ModelCheckpointConfig,
    "early_stopping": EarlyStoppingConfig,
    "learning_rate_monitor": LearningRateMonitorConfig,
    "variable_monitor": VariableMonitorConfig,
    "gradient_monitor": GradientMonitorConfig,
    "throughput_monitor": ThroughputMonitorConfig,
    "device_stats_monitor": DeviceStatsMonitorConfig,
    "ema_weights": EMAWeightsConfig,
    "timer": TimerConfig,
    "profiler": ProfilerConfig,
    "gradient_accumulation_scheduler": GradientAccumulationSchedulerConfig,
    "backbone_finetuning": BackboneFinetuningConfig,
    "batch_size_finder": BatchSizeFinderConfig,
    "learning_rate_finder": LearningRateFinderConfig,
    "model_summary": ModelSummaryConfig,
    "rich_progress_bar": RichProgressBarConfig,
}
