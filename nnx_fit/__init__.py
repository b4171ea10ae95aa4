"""nnx_fit: a training library for Flax NNX. Subclass `FitModule`, hand it to a `Trainer`, configure it with Hydra.

Names are resolved on first use, so that importing a part of the package loads only what that part needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ArrayLoader": "nnx_fit.data.array_loader",
    "BackboneFinetuning": "nnx_fit.callbacks.backbone_finetuning",
    "BasePredictionWriter": "nnx_fit.callbacks.prediction_writer",
    "BatchSizeFinder": "nnx_fit.callbacks.batch_size_finder",
    "CSVLogger": "nnx_fit.loggers.csv",
    "Callback": "nnx_fit.callbacks.callback",
    "CheckpointError": "nnx_fit.errors",
    "ConfigurationError": "nnx_fit.errors",
    "DataModule": "nnx_fit.data.datamodule",
    "DeviceStatsMonitor": "nnx_fit.callbacks.device_stats_monitor",
    "EMAWeights": "nnx_fit.callbacks.ema_weights",
    "EarlyStopping": "nnx_fit.callbacks.early_stopping",
    "FitModule": "nnx_fit.module",
    "GradientAccumulationScheduler": "nnx_fit.callbacks.gradient_accumulation_scheduler",
    "GradientMonitor": "nnx_fit.callbacks.gradient_monitor",
    "History": "nnx_fit.metrics.history",
    "LambdaCallback": "nnx_fit.callbacks.lambda_callback",
    "LearningRateFinder": "nnx_fit.callbacks.learning_rate_finder",
    "LearningRateMonitor": "nnx_fit.callbacks.learning_rate_monitor",
    "Logger": "nnx_fit.loggers.logger",
    "MLFlowLogger": "nnx_fit.loggers.mlflow",
    "ModelCheckpoint": "nnx_fit.callbacks.model_checkpoint",
    "ModelSummary": "nnx_fit.callbacks.model_summary",
    "NnxFitError": "nnx_fit.errors",
    "NonFiniteError": "nnx_fit.errors",
    "OptimizerSpec": "nnx_fit.optimizers",
    "ProfilerCallback": "nnx_fit.callbacks.profiler",
    "RichProgressBar": "nnx_fit.callbacks.progress_bar",
    "StateError": "nnx_fit.errors",
    "StatePartition": "nnx_fit.state.partition",
    "TensorBoardLogger": "nnx_fit.loggers.tensorboard",
    "ThroughputMonitor": "nnx_fit.callbacks.throughput_monitor",
    "Timer": "nnx_fit.callbacks.timer",
    "Trainer": "nnx_fit.trainer",
    "VariableMonitor": "nnx_fit.callbacks.variable_monitor",
    "WandbLogger": "nnx_fit.loggers.wandb",
    "export": "nnx_fit.export",
    "instantiate": "nnx_fit.instantiation",
    "partition": "nnx_fit.state.partition",
    "seed_everything": "nnx_fit.seeding",
}

if TYPE_CHECKING:
    from nnx_fit import export as export
    from nnx_fit.callbacks.backbone_finetuning import BackboneFinetuning as BackboneFinetuning
    from nnx_fit.callbacks.batch_size_finder import BatchSizeFinder as BatchSizeFinder
    from nnx_fit.callbacks.callback import Callback as Callback
    from nnx_fit.callbacks.device_stats_monitor import DeviceStatsMonitor as DeviceStatsMonitor
    from nnx_fit.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from nnx_fit.callbacks.ema_weights import EMAWeights as EMAWeights
    from nnx_fit.callbacks.gradient_accumulation_scheduler import (
        GradientAccumulationScheduler as GradientAccumulationScheduler,
    )
    from nnx_fit.callbacks.gradient_monitor import GradientMonitor as GradientMonitor
    from nnx_fit.callbacks.lambda_callback import LambdaCallback as LambdaCallback
    from nnx_fit.callbacks.learning_rate_finder import LearningRateFinder as LearningRateFinder
    from nnx_fit.callbacks.learning_rate_monitor import LearningRateMonitor as LearningRateMonitor
    from nnx_fit.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from nnx_fit.callbacks.model_summary import ModelSummary as ModelSummary
    from nnx_fit.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
    from nnx_fit.callbacks.profiler import ProfilerCallback as ProfilerCallback
    from nnx_fit.callbacks.progress_bar import RichProgressBar as RichProgressBar
    from nnx_fit.callbacks.throughput_monitor import ThroughputMonitor as ThroughputMonitor
    from nnx_fit.callbacks.timer import Timer as Timer
    from nnx_fit.callbacks.variable_monitor import VariableMonitor as VariableMonitor
    from nnx_fit.data.array_loader import ArrayLoader as ArrayLoader
    from nnx_fit.data.datamodule import DataModule as DataModule
    from nnx_fit.errors import CheckpointError as CheckpointError
    from nnx_fit.errors import ConfigurationError as ConfigurationError
    from nnx_fit.errors import NnxFitError as NnxFitError
    from nnx_fit.errors import NonFiniteError as NonFiniteError
    from nnx_fit.errors import StateError as StateError
    from nnx_fit.instantiation import instantiate as instantiate
    from nnx_fit.loggers.csv import CSVLogger as CSVLogger
    from nnx_fit.loggers.logger import Logger as Logger
    from nnx_fit.loggers.mlflow import MLFlowLogger as MLFlowLogger
    from nnx_fit.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
    from nnx_fit.loggers.wandb import WandbLogger as WandbLogger
    from nnx_fit.metrics.history import History as History
    from nnx_fit.module import FitModule as FitModule
    from nnx_fit.optimizers import OptimizerSpec as OptimizerSpec
    from nnx_fit.seeding import seed_everything as seed_everything
    from nnx_fit.state.partition import StatePartition as StatePartition
    from nnx_fit.state.partition import partition as partition
    from nnx_fit.trainer import Trainer as Trainer

__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = importlib.import_module(_HOMES[name])
        value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nnx_fit' has no attribute {name!r}; it has: {', '.join(sorted(_HOMES))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
