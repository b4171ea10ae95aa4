"""`Callback`: the host hooks that a piece of reusable behaviour can add to a run.

A callback sees the run from outside the compiled step. What it wants to know from inside the step it asks for with
`step_metrics`, which is traced into the train program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    import jax

    from nnx_fit.module import FitModule
    from nnx_fit.programs.train_options import StepView
    from nnx_fit.trainer import Trainer

Phase = Literal["before", "decide", "save"]
_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def pausing(hook: _Hook) -> _Hook:
    """Marks an `on_train_batch_end` with little to do: it makes no use of `outputs`, and most steps do not concern it.

    The hook need not be called before `self.paused_until`, so that steps in between cost nothing, and the step's
    outputs stay on the device. A subclass that overrides the hook says so again, or is called after each step.
    """
    hook.pausing = True  # type: ignore[attr-defined]
    return hook


class Callback:
    """Base class of all callbacks: every hook does nothing until a subclass overrides it.

    Hooks that are not overridden cost nothing. Before an overridden hook runs, the module's Variables are brought
    up to date, so that it may read and write them; a callback that never does either says so with
    `reads_module = False` and spares the run that work.

    Attributes:
        phase: When the callback's hooks run relative to the others: `"before"` the module's own hook (default), or
            after it to `"decide"` whether to go on, or last of all to `"save"`.
        reads_module: Whether the callback's hooks may read or write the module's Variables.
        logs: Whether its hooks may call `module.log`; `False` lets a mistyped `monitor` show at the first step.
        paused_until: `global_step` from which on an `on_train_batch_end` marked as `pausing` is called again.
    """

    phase: ClassVar[Phase] = "before"
    reads_module: bool = True
    logs: bool = True
    paused_until: int = 0

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Called first; `stage` is `"fit"`, `"validate"`, `"test"` or `"predict"`."""

    def teardown(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Called last, also after an exception."""

    def on_fit_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called when `fit` begins, before the sanity check."""

    def on_fit_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called when `fit` ends."""

    def on_sanity_check_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before the sanity check's validation."""

    def on_sanity_check_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after the sanity check's validation."""

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before the first epoch."""

    def on_train_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after the last epoch."""

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before the first batch of an epoch."""

    def on_train_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after the last batch of an epoch and its validation."""

    def on_train_batch_start(self, trainer: Trainer, module: FitModule, batch: Any, batch_idx: int) -> None:
        """Called before a training step."""

    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after a training step; `outputs` holds `"loss"` and whatever else the step returned."""

    def on_validation_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before a validation loop."""

    def on_validation_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after a validation loop."""

    def on_validation_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before the first validation batch."""

    def on_validation_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after the last validation batch, before the epoch's metrics are reduced."""

    def on_validation_batch_start(
        self, trainer: Trainer, module: FitModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a validation step."""

    def on_validation_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after a validation step."""

    def on_test_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before a test loop."""

    def on_test_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after a test loop."""

    def on_test_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before the first test batch."""

    def on_test_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after the last test batch, before the metrics are reduced."""

    def on_test_batch_start(
        self, trainer: Trainer, module: FitModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a test step."""

    def on_test_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after a test step."""

    def on_predict_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before a predict loop."""

    def on_predict_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after a predict loop."""

    def on_predict_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Called before the first predict batch."""

    def on_predict_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Called after the last predict batch."""

    def on_predict_batch_start(
        self, trainer: Trainer, module: FitModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a predict step."""

    def on_predict_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after a predict step."""

    def on_exception(self, trainer: Trainer, module: FitModule, exception: BaseException) -> None:
        """Called when anything, an interrupt included, ends the run early."""

    def on_save_checkpoint(self, trainer: Trainer, module: FitModule, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint is written; may add plain values to `checkpoint`."""

    def on_load_checkpoint(self, trainer: Trainer, module: FitModule, checkpoint: Mapping[str, Any]) -> None:
        """Called with a checkpoint's plain values before a run continues from it."""

    def state_dict(self) -> dict[str, Any]:
        """What the callback needs in order to continue: plain values (numbers, strings, lists, dicts)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def arrays(self) -> dict[str, jax.Array]:
        """Arrays of the callback's own that belong in a checkpoint, by name: what `state_dict` cannot hold.

        They may be live: they are copied to the host before training goes on.
        """
        return {}

    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Takes back what `arrays` gave, on the host: after `load_state_dict` in a fit that continues.

        Also called, without `load_state_dict`, when `validate`, `test` or `predict` loads a checkpoint's weights. Not
        called when the checkpoint holds none.
        """

    def step_metrics(self, view: StepView) -> Mapping[str, Any]:
        """Scalars to log from inside the train program: traced once, at no cost on the host.

        Args:
            view: What the step knows: parameters, gradients, updates, learning rates, counters (all traced).

        Returns:
            Names and scalar arrays; logged on every log point like `self.log(name, value, on_step=True)`.
        """
        del view
        return {}


def keyed(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    """Each callback with the name its state is kept under: its class, numbered where there are several."""
    counts: dict[str, int] = {}
    named = []
    for callback in callbacks:
        name = type(callback).__qualname__
        counts[name] = counts.get(name, 0) + 1
        named.append((name if counts[name] == 1 else f"{name}#{counts[name]}", callback))
    return named
