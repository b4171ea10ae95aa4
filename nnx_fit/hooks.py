"""`ModuleHooks`: the host hooks of a `FitModule`, in the order a run calls them. All do nothing by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class StepHooks:
    """Hooks that run inside the compiled step."""

    def on_gradients(self, grads: Any) -> Any:
        """Called in the compiled step between the gradients and the update, before clipping; returns the gradients.

        Args:
            grads: Gradients of the trained Variables, a pure `nnx.State`; under accumulation, the mean of the window.
        """
        return grads


def overrides_gradients(module: Any) -> bool:
    """Whether a module has an `on_gradients` of its own."""
    return type(module).on_gradients is not StepHooks.on_gradients


class ModuleHooks:
    """Host hooks: they run between compiled steps and may read and write the module's Variables."""

    def setup(self, stage: str) -> None:
        """Called first; `stage` is `"fit"`, `"validate"`, `"test"` or `"predict"`. May create layers."""

    def teardown(self, stage: str) -> None:
        """Called last, also after an exception."""

    def on_fit_start(self) -> None:
        """Called when `fit` begins, before the sanity check."""

    def on_fit_end(self) -> None:
        """Called when `fit` ends."""

    def on_train_start(self) -> None:
        """Called before the first epoch."""

    def on_train_end(self) -> None:
        """Called after the last epoch."""

    def on_train_epoch_start(self) -> None:
        """Called before the first batch of an epoch."""

    def on_train_epoch_end(self) -> None:
        """Called after the last batch of an epoch and its validation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Called before a training step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after a training step; `outputs` holds `"loss"` and whatever else the step returned."""

    def on_validation_start(self) -> None:
        """Called before a validation loop."""

    def on_validation_end(self) -> None:
        """Called after a validation loop."""

    def on_validation_epoch_start(self) -> None:
        """Called before the first validation batch."""

    def on_validation_epoch_end(self) -> None:
        """Called after the last validation batch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a validation step."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a validation step."""

    def on_test_start(self) -> None:
        """Called before a test loop."""

    def on_test_end(self) -> None:
        """Called after a test loop."""

    def on_test_epoch_start(self) -> None:
        """Called before the first test batch."""

    def on_test_epoch_end(self) -> None:
        """Called after the last test batch."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a test step."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a test step."""

    def on_predict_start(self) -> None:
        """Called before a predict loop."""

    def on_predict_end(self) -> None:
        """Called after a predict loop."""

    def on_predict_epoch_start(self) -> None:
        """Called before the first predict batch."""

    def on_predict_epoch_end(self) -> None:
        """Called after the last predict batch."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a predict step."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a predict step."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint is written; may add plain values to `checkpoint`."""

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Called with a checkpoint's plain values before a run continues from it."""
