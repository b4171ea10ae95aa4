"""The objects of a run, built from its config: model, data, optimizer, callbacks, loggers, Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nnx_fit.cli.optimizer import make_optimizer
from nnx_fit.cli.overrides import key_of
from nnx_fit.cli.targets import accepts, check_targets, find_target
from nnx_fit.determinism import ask_for_deterministic_kernels
from nnx_fit.errors import ConfigurationError
from nnx_fit.instantiation import instantiate


@dataclass(frozen=True)
class Objects:
    """What a run consists of."""

    trainer: Any
    model: Any
    data: Any


def build(cfg: DictConfig, overrides: Sequence[str], run_dir: Path) -> Objects:
    """Checks everything that the config names, then builds it.

    Args:
        cfg: A config that passed `check_config`.
        overrides: The overrides of the command line, for saying which of them has no effect.
        run_dir: Directory of the run.

    Raises:
        ConfigurationError: A target, an argument or a combination is wrong. Nothing was built.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    model_class, data_class = (find_target(plain[group]["_target_"], group) for group in ("model", "data"))
    rngs_name = {"rngs": None} if accepts(model_class, "rngs") else {}
    data_seed = {"seed": plain["seed"]} if accepts(data_class, "seed") and "seed" not in plain["data"] else {}
    check_targets(plain["model"], "model", rngs_name)
    check_targets(plain["data"], "data", data_seed)
    for group in ("callbacks", "logger"):
        for name, entry in (plain.get(group) or {}).items():
            check_targets(entry, f"{group}.{name}")
    optimizer = make_optimizer(plain)
    _check_module(model_class)
    if "configure_optimizers" in _overridden(model_class):
        _refuse_ignored(overrides, model_class)
        optimizer = None

    import nnx_fit

    if plain["trainer"].get("deterministic"):
        ask_for_deterministic_kernels()  # before the first array of the model
    rngs = nnx_fit.seed_everything(plain["seed"])
    model = instantiate(plain["model"], **{name: rngs for name in rngs_name})
    data = instantiate(plain["data"], **data_seed)
    if not any(hasattr(data, f"{kind}_dataloader") for kind in ("train", "val", "test", "predict")):
        raise ConfigurationError(
            f"data._target_={plain['data']['_target_']}: expected a DataModule (with train_dataloader() and the like), "
            f"got {type(data).__name__}."
        )
    trainer = nnx_fit.Trainer(
        **plain["trainer"],
        strategy=plain.get("strategy") or "auto",
        optimizer=optimizer,
        callbacks=_entries(_with_checkpoints_if_enabled(plain), "callbacks"),
        logger=False if plain["trainer"].get("barebones") else _entries(plain, "logger") or False,
        default_root_dir=run_dir,
    )
    trainer.settings = _settings(plain, overrides)
    return Objects(trainer, model, data)


def _settings(plain: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What a sweep's runs are compared by: what is trained, on what, how, and the Trainer's overridden arguments."""
    chosen = {
        name: plain[name] for name in ("seed", "model", "data", "optimizer", "schedule") if plain.get(name) is not None
    }
    keys = [key_of(override) for override in overrides]
    changed = {key.removeprefix("trainer.") for key in keys if key.startswith("trainer.")}
    arguments = {name: value for name, value in plain["trainer"].items() if name in changed}
    return {**chosen, "trainer": arguments} if arguments else chosen


def _entries(plain: dict[str, Any], group: str) -> list[Any]:
    return [instantiate(entry) for entry in (plain.get(group) or {}).values() if entry is not None]


def _with_checkpoints_if_enabled(plain: dict[str, Any]) -> dict[str, Any]:
    """The config without checkpoint callbacks where the trainer's settings switch checkpoints off."""
    if plain["trainer"].get("enable_checkpointing", True) and not plain["trainer"].get("barebones"):
        return plain
    entries = plain.get("callbacks") or {}
    kept = {name: entry for name, entry in entries.items() if not entry or not _saves_checkpoints(entry)}
    return {**plain, "callbacks": kept}


def _saves_checkpoints(entry: dict[str, Any]) -> bool:
    from nnx_fit.callbacks.model_checkpoint import ModelCheckpoint

    target = find_target(entry["_target_"], "callbacks")
    return isinstance(target, type) and issubclass(target, ModelCheckpoint)


def _check_module(model_class: Any) -> None:
    from nnx_fit.module import FitModule

    if isinstance(model_class, type) and not issubclass(model_class, FitModule):
        raise ConfigurationError(
            f"model._target_: {model_class.__name__} is not a FitModule, so the Trainer cannot drive it.\n"
            f"Fix: class {model_class.__name__}(nnx_fit.FitModule) with a training_step."
        )


def _overridden(model_class: Any) -> set[str]:
    from nnx_fit.module import FitModule

    if not isinstance(model_class, type):
        return set()
    return {name for name in vars(FitModule) if getattr(model_class, name) is not getattr(FitModule, name)}


def _refuse_ignored(overrides: Sequence[str], model_class: Any) -> None:
    for override in overrides:
        if key_of(override).split(".")[0] in ("optimizer", "schedule"):
            raise ConfigurationError(
                f"{override} has no effect: {model_class.__name__} has a configure_optimizers of its own.\n"
                "Fix: remove that method, or give the model an argument for it (model.learning_rate=...)."
            )
