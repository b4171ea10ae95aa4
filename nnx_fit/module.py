"""`FitModule`: an `nnx.Module` with the hooks of a training run. Nothing of a Trainer is ever part of its graph."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from flax import nnx

from nnx_fit import scope
from nnx_fit.errors import ConfigurationError
from nnx_fit.hooks import ModuleHooks, StepHooks
from nnx_fit.state.filters import Edited, PathPrefix, hashable
from nnx_fit.state.modes import set_mode

if TYPE_CHECKING:
    from nnx_fit.trainer import Trainer


class Hyperparameters(dict[str, Any]):
    """Constructor arguments by name, readable as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}; there are: {', '.join(self) or 'none'}") from None


_HPARAMS: weakref.WeakKeyDictionary[Any, Hyperparameters] = weakref.WeakKeyDictionary()


class _FitModuleMeta(type(nnx.Module)):
    """Records a module's constructor arguments before its `__init__` runs."""

    def _pytree_meta_construct(cls, self: Any, *args: Any, **kwargs: Any) -> None:
        _HPARAMS[self] = _constructor_arguments(cls, args, kwargs)
        super()._pytree_meta_construct(self, *args, **kwargs)


class FitModule(ModuleHooks, StepHooks, nnx.Module, metaclass=_FitModuleMeta):
    """A model with its training logic: subclass it, write `training_step` and `configure_optimizers`.

    It stays a normal NNX module. Step hooks run inside a compiled program, in the right mode; host hooks run between
    steps and may read and write its Variables.

    Attributes:
        trainable: NNX filter of the Variables that train. Intersected with `nnx.Param` unless it names another
            Variable type.
        eval_modules: Dotted path prefixes of sub-modules that stay in eval mode while training.
        eval_mutable: NNX filter of Variables that an eval step may change.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import nnx_fit as nf
        >>> class Line(nf.FitModule):
        ...     def __init__(self, *, rngs: nnx.Rngs):
        ...         self.linear = nnx.Linear(1, 1, rngs=rngs)
        ...     def training_step(self, batch):
        ...         loss = ((self.linear(batch["x"]) - batch["y"]) ** 2).mean()
        ...         self.log("train/loss", loss)
        ...         return loss
        ...     def configure_optimizers(self):
        ...         return optax.sgd(0.1)
        >>> Line(rngs=nnx.Rngs(0)).trainable
        <class 'flax.nnx.variablelib.Param'>
    """

    trainable: Any = nnx.Param
    eval_modules: tuple[str, ...] = ()
    eval_mutable: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("trainable", "eval_mutable"):
            value = hashable(value)
        elif name == "eval_modules":
            value = (value,) if isinstance(value, str) else tuple(value)
        super().__setattr__(name, value)

    def training_step(self, batch: Any) -> Any:
        """One training step: returns the loss, a scalar, or a dict with `"loss"` and anything else.

        May also take `batch_idx`. Runs inside a compiled program, in train mode.
        """
        _missing(self, "training_step", "fit")

    def validation_step(self, batch: Any) -> Any:
        """One validation step. May also take `batch_idx` and, with several loaders, `dataloader_idx`."""
        _missing(self, "validation_step", "validate")

    def test_step(self, batch: Any) -> Any:
        """One test step. May also take `batch_idx` and, with several loaders, `dataloader_idx`."""
        _missing(self, "test_step", "test")

    def predict_step(self, batch: Any) -> Any:
        """One predict step; by default `self(batch)`. May also take `batch_idx` and `dataloader_idx`."""
        if not callable(self):
            _missing(self, "predict_step", "predict")
        return self(batch)

    def configure_optimizers(self) -> Any:
        """The optimizer: an `optax.GradientTransformation` or an `OptimizerSpec`."""
        _missing(self, "configure_optimizers", "fit")

    def log(
        self,
        name: str,
        value: Any,
        *,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        prog_bar: bool = False,
        logger: bool = True,
        reduce: str = "mean",
        batch_size: Any = None,
    ) -> None:
        """Logs a scalar.

        Args:
            name: Name of the metric, recorded as it is.
            value: A scalar array or number.
            on_step: Record the step's value. Default: in training batch hooks.
            on_epoch: Reduce over the epoch and record that. Default: everywhere else.
            prog_bar: Show it in the progress bar.
            logger: Hand it to loggers.
            reduce: How an epoch's values are reduced: `"mean"` (weighted by batch size), `"sum"`, `"min"`, `"max"`.
            batch_size: Number of examples behind the value. Default: the batch's leading axis.

        Raises:
            ConfigurationError: The value is no scalar, the hook cannot log, or the name was logged with other options.
        """
        options = {
            "on_step": on_step,
            "on_epoch": on_epoch,
            "prog_bar": prog_bar,
            "logger": logger,
            "reduce": reduce,
            "batch_size": batch_size,
        }
        step = scope.current_step()
        if step is not None:
            step.capture.log(name, value, **options)
            return
        run = scope.run_of(self)
        if run is None:
            raise ConfigurationError(
                f"self.log({name!r}, ...) was called outside of a run: no Trainer runs this module.\n"
                "Fix: call it in a step, or in a batch or epoch hook."
            )
        run.log(name, value, **options)

    def log_dict(self, metrics: Mapping[str, Any], **options: Any) -> None:
        """Logs several scalars with the same options; see `log`."""
        for name, value in metrics.items():
            self.log(name, value, **options)

    def freeze(self, *selectors: Any) -> None:
        """Stops the Variables below the path prefixes, or matching the filters, from being trained."""
        self._edit_trainable(False, selectors)

    def unfreeze(self, *selectors: Any) -> None:
        """Lets the Variables below the path prefixes, or matching the filters, be trained again."""
        self._edit_trainable(True, selectors)

    def _edit_trainable(self, train: bool, selectors: tuple[Any, ...]) -> None:
        chosen = [PathPrefix(item) if isinstance(item, str) else hashable(item) for item in selectors or (...,)]
        current = self.trainable if isinstance(self.trainable, Edited) else Edited(hashable(self.trainable))
        self.trainable = current.edited(train, chosen)

    def train(self, **attributes: Any) -> None:
        """Sets train mode on this module and all below it but `eval_modules`."""
        set_mode(self, True, self.eval_modules)
        self.set_attributes(**attributes, raise_if_not_found=False)

    def eval(self, **attributes: Any) -> None:
        """Sets eval mode on this module and all below it."""
        set_mode(self, False)
        self.set_attributes(**attributes, raise_if_not_found=False)

    @property
    def training(self) -> bool:
        """Whether the module is in train mode: in a run its stage's mode, else what `train()` or `eval()` set."""
        return vars(self).get("_training", True)

    @training.setter
    def training(self, value: bool) -> None:
        self._training = bool(value)

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module, or ran it last."""
        run = scope.run_of(self)
        if run is None:
            raise ConfigurationError(
                f"{type(self).__name__}.trainer: no Trainer has run this module yet. Fix: read it in a hook or a step."
            )
        return run.trainer

    @property
    def global_step(self) -> Any:
        """Updates completed so far; in a step a traced int32 scalar, before the step's own update."""
        step = scope.current_step()
        if step is not None:
            return step.global_step
        run = scope.run_of(self)
        return run.global_step if run is not None else 0

    @property
    def current_epoch(self) -> Any:
        """Index of the epoch; in a step a traced int32 scalar."""
        step = scope.current_step()
        if step is not None:
            return step.current_epoch
        run = scope.run_of(self)
        return run.current_epoch if run is not None else 0

    @property
    def hparams(self) -> Hyperparameters:
        """The constructor's arguments that are plain values (numbers, strings, lists and dicts of them)."""
        return _HPARAMS.get(scope.origin_of(self), Hyperparameters())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "hparams": self.hparams}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _HPARAMS[self] = state["hparams"]
        super().__setstate__({name: value for name, value in state.items() if name != "hparams"})


def _constructor_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hyperparameters:
    signature = inspect.signature(cls.__init__)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return Hyperparameters()  # the constructor itself raises the right error
    bound.apply_defaults()
    found = Hyperparameters()
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL and not value:
            continue
        items = value.items() if kind is inspect.Parameter.VAR_KEYWORD else [(name, value)]
        found.update({key: plain for key, item in items if (plain := _plain(item)) is not _NOT_PLAIN})
    return found


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return (
            _NOT_PLAIN
            if any(item is _NOT_PLAIN for item in items)
            else (list if isinstance(value, list) else tuple)(items)
        )
    if isinstance(value, Mapping):
        mapped = {key: _plain(item) for key, item in value.items()}
        plain = all(isinstance(key, str) and item is not _NOT_PLAIN for key, item in mapped.items())
        return mapped if plain else _NOT_PLAIN
    return _NOT_PLAIN


def _missing(module: FitModule, hook: str, verb: str) -> NoReturn:
    raise ConfigurationError(
        f"{type(module).__name__} has no {hook}, which Trainer.{verb} needs.\nFix: define `def {hook}(self, ...)`."
    )
