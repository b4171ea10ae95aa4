"""`FitModule`: an `nnx.Module` with the hooks of a training run. Nothing of a Trainer is ever part of its graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from flax import nnx

from nnx_fit import scope
from nnx_fit.errors import ConfigurationError
from nnx_fit.hooks import ModuleHooks, StepHooks
from nnx_fit.hparams import Hyperparameters, RecordsArguments, hparams_of, set_hparams
from nnx_fit.metrics.objects import members
from nnx_fit.state.filters import Edited, PathPrefix, hashable
from nnx_fit.state.graph import modules
from nnx_fit.state.modes import set_mode

if TYPE_CHECKING:
    from nnx_fit.trainer import Trainer


class FitModule(ModuleHooks, StepHooks, nnx.Module, metaclass=RecordsArguments):
    """A model with its training logic: subclass it, write `training_step` and `configure_optimizers`.

    It stays a normal NNX module. Step hooks run inside a compiled program, in the right mode; host hooks run between
    steps and may read and write its Variables.

    Attributes:
        trainable: NNX filter of the Variables that train. Intersected with `nnx.Param` unless it names another
            Variable type.
        eval_modules: Dotted path prefixes of sub-modules that stay in eval mode while training.
        eval_mutable: NNX filter of Variables that an eval step may change.
        automatic_optimization: Whether the Trainer differentiates `training_step` and updates. `False` leaves both to
            the step (GANs, several losses): see `value_and_grad` and `optimizers`.

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
    automatic_optimization: bool = True

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
        """The optimizer: an `optax.GradientTransformation`, an `OptimizerSpec`, or a dict or list of those."""
        _missing(self, "configure_optimizers", "fit")

    @classmethod
    def load_from_checkpoint(
        cls, path: str | Path, *, strict: bool = True, rename: Mapping[str, str] | None = None, **overrides: Any
    ) -> Self:
        """A module made from a checkpoint: the constructor's arguments and all values are those that were saved.

        Nothing is initialised that is then replaced: the constructor is traced, and the saved arrays take the places
        of those it would have made. It is run where it cannot be traced, or where `strict=False` leaves something to
        initialise. A checkpoint is data: nothing in it is executed.

        Args:
            path: Directory of the checkpoint, which may be one of weights alone.
            strict: Whether every array must be in the checkpoint and in the module, of one shape and dtype. `False`
                loads those that are, leaves the others as the constructor makes them, and logs which.
            rename: New beginnings of dotted paths by their old ones: `{"encoder": "net.encoder"}`. The longest that
                matches counts; `""` is the beginning of every path.
            **overrides: Arguments that take the place of those that were saved, and those that were not: checkpoints
                have plain values only. `rngs` is `nnx.Rngs(0)` unless it is given.

        Raises:
            CheckpointError: It is damaged, or is of another module: names every path that differs.
            ConfigurationError: The constructor needs an argument that the checkpoint does not have.

        Example:
            >>> model = Classifier.load_from_checkpoint("outputs/mine/checkpoints/last")  # doctest: +SKIP
        """
        from nnx_fit.checkpoint.building import load_module

        return load_module(cls, path, strict=strict, rename=rename, overrides=overrides)

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
        """Logs a number, or a metric object that was updated with the batch.

        An `nnx.Metric` is an attribute of the module; update it, then log it. Its epoch value is what it computes from
        all batches of the loop, and it starts over with each training epoch and each evaluation. Its step value is what
        it computes at that point, from the batches so far: it holds no other. A metric that is merged, such as
        metrax's, is made from the batch in the step and is no attribute; its step value is the batch's own, a window of
        accumulation has the mean of those.

        What such a metric computes may also be a dict or a dataclass, whose entries are recorded as `name/<entry>`; a
        vector, with one number for each class recorded as `name/<class>` and a bar chart in the loggers; or a matrix,
        recorded as `name/<row>/<column>` in `History` alone and shown as a heat map. (More than 1,024 numbers are only
        shown.) Classes are numbered, or named by an attribute `class_names` of the metric or the module. A vector or
        matrix is recorded once in a loop: with `on_step=False, on_epoch=True` in a training step. `nnx_fit.metrics` has
        a `ConfusionMatrix` and `ClassMetrics`.

        Args:
            name: Name of the metric, recorded as it is.
            value: A scalar array or number; an `nnx.Metric` or metrax metric.
            on_step: Record the step's value. Default: in training batch hooks. In an evaluation each batch has its
                record, at the `global_step` of the evaluation.
            on_epoch: Reduce over the epoch and record that. Default: everywhere else.
            prog_bar: Show it in the progress bar.
            logger: Hand it to loggers.
            reduce: How an epoch's values are reduced: `"mean"` (weighted by batch size), `"sum"`, `"min"`, `"max"`. Not
                for a metric object.
            batch_size: Number of examples behind the value. Default: the batch's leading axis. Not for a metric object.

        Raises:
            ConfigurationError: The value is no real number and no metric, the hook cannot log, or the name was logged
                with other options.
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
        run.log(name, value, module=self, **options)

    def log_dict(self, metrics: Any, **options: Any) -> None:
        """Logs several values with the same options; see `log`.

        Args:
            metrics: Names and values: a mapping, or an `nnx.MultiMetric` that was updated in the step.
            **options: Those of `log`.
        """
        for name, value in members(metrics).items():
            self.log(name, value, **options)

    def optimizers(self, name: str | int | None = None) -> Any:
        """The optimizers of the run.

        In a `training_step` with `automatic_optimization = False` each has `update(grads)`. In host hooks, from
        `on_train_start` on, each has `learning_rate`, and `hyperparams` that may be read and set: those that
        `optax.inject_hyperparams` holds.

        Args:
            name: Name of one of them; in a list without names, its index.

        Returns:
            The optimizer of that name; without a name the only optimizer, or a list of all.

        Raises:
            ConfigurationError: There is none of that name, or this is a step that does not optimize by itself.
        """
        step = scope.current_step()
        if step is not None:
            return _manual(step, "optimizers").optimizers(name)
        run = scope.run_of(self)
        if run is None:
            raise ConfigurationError("self.optimizers(): no Trainer runs this module. Fix: call it in a hook.")
        return run.optimizers(name)

    def value_and_grad(
        self, loss_fn: Callable[[], Any], *, optimizer: str | int | None = None, has_aux: bool = False
    ) -> tuple[Any, nnx.State]:
        """Calls a function and differentiates it for what an optimizer trains, in a step that optimizes by itself.

        The function takes no argument and may use `self` freely: what it does to running statistics and RNG streams,
        and what it logs, is kept.

        Args:
            loss_fn: Returns the loss, a scalar; with `has_aux` a pair of the loss and anything else.
            optimizer: Name of the optimizer, or its index in a list; may be left out where there is only one.
            has_aux: Whether the function returns a pair.

        Returns:
            What the function returned, and the gradients for `self.optimizers(optimizer).update`.

        Raises:
            ConfigurationError: `automatic_optimization` is on, or the loss is none.

        Example:
            >>> class GAN(FitModule):
            ...     automatic_optimization = False
            ...     def training_step(self, batch):
            ...         loss, grads = self.value_and_grad(lambda: self.generator_loss(batch), optimizer="generator")
            ...         self.optimizers("generator").update(grads)
        """
        step = scope.current_step()
        if step is None:
            raise ConfigurationError("self.value_and_grad was called outside of a step. Fix: call it in training_step.")
        return _manual(step, "value_and_grad").value_and_grad(loss_fn, optimizer, has_aux)

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
        return hparams_of(scope.origin_of(self))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> FitModule:
        copied = super().__deepcopy__(memo)
        for (_, mine), (_, theirs) in zip(modules(self), modules(copied), strict=True):
            if isinstance(mine, FitModule):
                set_hparams(theirs, copy.deepcopy(hparams_of(mine)))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "hparams": self.hparams}

    def __setstate__(self, state: dict[str, Any]) -> None:
        set_hparams(self, state["hparams"])
        super().__setstate__({name: value for name, value in state.items() if name != "hparams"})


def _manual(step: scope.StepScope, what: str) -> Any:
    if step.optimization is None:
        raise ConfigurationError(
            f"self.{what} was called in {step.hook}, where the Trainer does the updates.\nFix: set "
            "`automatic_optimization = False` in the class, and call it in training_step."
        )
    return step.optimization


def _missing(module: FitModule, hook: str, verb: str) -> NoReturn:
    raise ConfigurationError(
        f"{type(module).__name__} has no {hook}, which Trainer.{verb} needs.\nFix: define `def {hook}(self, ...)`."
    )
