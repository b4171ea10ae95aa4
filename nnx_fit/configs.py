"""Typed schemas of `conf/`: which settings exist, of which type, with which default.

Hydra merges the YAML files and the command line into these dataclasses, so that a wrong name or type is refused while
the config is composed. What a dataclass cannot say (a fixed set of values) stands in the field's metadata and is
checked by `nnx_fit.cli.checks`. Nothing here imports JAX: `--help` and tab completion load this file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Union

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, OmegaConf

from nnx_fit.callback_configs import CALLBACK_SCHEMAS, one_of
from nnx_fit.errors import ConfigurationError

# OmegaConf resolves these aliases as type hints at run time.
Number = Union[int, float]  # noqa: UP007


@dataclass
class RunConfig:
    """The plain top-level keys; the groups stand beside them."""

    seed: int = 0
    name: str | None = None
    resume: str | None = one_of(None, "auto")
    ckpt_path: str | None = None
    monitor: str | None = None
    test_after_fit: bool = True


@dataclass
class TrainerConfig:
    """Every argument of `nnx_fit.Trainer` that is a plain value."""

    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Any = None
    limit_train_batches: Number = 1.0
    limit_val_batches: Number = 1.0
    limit_test_batches: Number = 1.0
    limit_predict_batches: Number = 1.0
    overfit_batches: Number = 0.0
    fast_dev_run: Union[bool, int] = False  # noqa: UP007
    num_sanity_val_steps: int = 2
    val_check_interval: Number = 1.0
    check_val_every_n_epoch: int | None = 1
    log_every_n_steps: int = 50
    steps_per_call: Union[int, str] = "auto"  # noqa: UP007
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = one_of("norm", "norm", "value")
    precision: str = one_of("32", "32", "bf16-mixed", "bf16-true", "16-mixed")
    enable_checkpointing: bool = True
    enable_progress_bar: bool = True
    enable_model_summary: bool = True
    state_guard: str = one_of("error", "error", "warn", "off")
    detect_nonfinite: bool = False
    deterministic: bool = False
    profiler: str | None = one_of(None, "simple", "advanced", "jax")
    barebones: bool = False
    jit: bool = True
    devices: Union[int, str] = "auto"  # noqa: UP007
    reload_dataloaders_every_n_epochs: int = 0


# Arguments of the Trainer that are objects, and where the configuration has them.
OWN_GROUP = {
    "callbacks": "the group callbacks (callbacks=none for none)",
    "logger": "the group logger (logger=csv, logger=none)",
    "optimizer": "the groups optimizer and schedule (optimizer=sgd)",
    "strategy": "the group strategy (strategy=auto)",
    "default_root_dir": "name=NAME or hydra.run.dir=DIRECTORY",
}


@dataclass
class TensorBoardLoggerConfig:
    """Arguments of `nnx_fit.TensorBoardLogger`."""

    _target_: str = "nnx_fit.TensorBoardLogger"
    save_dir: str = MISSING
    name: str | None = None
    version: Union[int, str, None] = None  # noqa: UP007


@dataclass
class CSVLoggerConfig:
    """Arguments of `nnx_fit.CSVLogger`."""

    _target_: str = "nnx_fit.CSVLogger"
    save_dir: str = MISSING
    name: str | None = None
    version: Union[int, str, None] = None  # noqa: UP007


@dataclass
class WandbLoggerConfig:
    """Arguments of `nnx_fit.WandbLogger`; others of `wandb.init` are added with `+logger.wandb.NAME=...`."""

    _target_: str = "nnx_fit.WandbLogger"
    project: str | None = None
    name: str | None = None
    save_dir: str = MISSING
    id: str | None = None
    version: str | None = None
    offline: bool = False
    prefix: str = ""
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None
    notes: str | None = None


@dataclass
class MLFlowLoggerConfig:
    """Arguments of `nnx_fit.MLFlowLogger`."""

    _target_: str = "nnx_fit.MLFlowLogger"
    experiment_name: str = "nnx_fit"
    run_name: str | None = None
    tracking_uri: str | None = None
    tags: dict[str, Any] | None = None
    save_dir: str = "./mlruns"
    prefix: str = ""
    artifact_location: str | None = None
    run_id: str | None = None


# The option of the group `schema`, by which the YAML files name a dataclass.
SCHEMAS: dict[str, type] = {
    "trainer": TrainerConfig,
    **CALLBACK_SCHEMAS,
    "tensorboard": TensorBoardLoggerConfig,
    "csv": CSVLoggerConfig,
    "wandb": WandbLoggerConfig,
    "mlflow": MLFlowLoggerConfig,
}

GROUPS = (
    "trainer",
    "model",
    "data",
    "optimizer",
    "schedule",
    "callbacks",
    "logger",
    "strategy",
    "experiment",
    "debug",
    "schema",
)


def schema_of_target(target: Any) -> type | None:
    """The dataclass that describes a `_target_`, or `None` where there is none."""
    for schema in SCHEMAS.values():
        if getattr(schema, "_target_", None) == target:
            return schema
    return None


def _run_name(name: str | None, stamp: str, run_id: str) -> str:
    """The directory of a run below `outputs/`; refused here, before Hydra creates it."""
    if name is None:
        return f"{stamp}-{run_id}"
    if not str(name).strip("/. ") or {"..", "/"} & set(PurePath(str(name)).parts):
        raise ConfigurationError(f"name={name}: expected a directory name below outputs/.")
    return str(name)


def _run_dir() -> str:
    """The directory of the run that is under way; a placeholder while a config is only shown."""
    if not HydraConfig.initialized():
        return "<run directory>"
    runtime = HydraConfig.get().runtime
    return "<run directory>" if OmegaConf.is_missing(runtime, "output_dir") else str(Path(runtime.output_dir))


def _run_label() -> str:
    """What a run is called where many runs are listed: its directory, as seen from where it was started."""
    return os.path.relpath(_run_dir()) if os.path.isabs(_run_dir()) else _run_dir()


def register() -> None:
    """Puts the schemas and the resolvers that `conf/` uses where Hydra finds them. May be called again."""
    os.environ.setdefault("NNX_FIT_RUN_ID", "0")
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(group="schema", name=name, node=schema, provider="nnx_fit")
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("run_label", _run_label, replace=True)
