"""`BasePredictionWriter`: hands predictions, as arrays on the host, to a subclass that writes them somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer

WriteInterval = Literal["batch", "epoch", "batch_and_epoch"]


class _Waiting(NamedTuple):
    """A batch whose prediction is under way to the host."""

    prediction: Any
    indices: Sequence[int] | None
    batch: Any
    batch_idx: int
    dataloader_idx: int


class BasePredictionWriter(Callback):
    """Base class of callbacks that write what `Trainer.predict` computes: override one or both of the two hooks.

    A prediction is what `predict_step` returned, with NumPy arrays for arrays. It is handed on while the device
    computes the next batch, so that writing does not keep it waiting; every one that was computed is written, also when
    an error or a signal ends the prediction early.

    Differences to Lightning: `batch_indices` are those of `indices_of`, which gives `None` until it is overridden: a
    loader here is any iterable, and has no sampler to ask. With several loaders the lists of `write_on_epoch_end` have
    one list for each loader, with one loader they do not, the indices as the predictions.

    Args:
        write_interval: `"batch"` calls `write_on_batch_end`, `"epoch"` calls `write_on_epoch_end` once, with
            everything, and `"batch_and_epoch"` does both.

    Raises:
        ConfigurationError: `write_interval` is none of these, or the hook that it calls is not overridden.

    Example:
        >>> import numpy as np
        >>> from nnx_fit.callbacks.prediction_writer import BasePredictionWriter
        >>> class Files(BasePredictionWriter):
        ...     def indices_of(self, batch):
        ...         return batch["row"].tolist()  # ArrayLoader({"x": x, "row": np.arange(len(x))}, 32)
        ...     def write_on_batch_end(
        ...         self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx
        ...     ):
        ...         np.savez(f"predictions/{batch_idx}.npz", rows=batch_indices, values=prediction)
        >>> Files("batch").write_interval
        'batch'
    """

    def __init__(self, write_interval: WriteInterval = "batch"):
        if write_interval not in get_args(WriteInterval):
            raise ConfigurationError(
                f"{type(self).__name__}(write_interval={write_interval!r}): expected one of "
                f"{', '.join(map(repr, get_args(WriteInterval)))}. Fix: pass one of them."
            )
        self.write_interval = write_interval
        self._waiting: _Waiting | None = None
        self._predictions: list[list[Any]] = []
        self._indices: list[list[Sequence[int] | None]] = []

    def indices_of(self, batch: Any) -> Sequence[int] | None:
        """The rows of the data set that a batch is made of, where the batch tells; by default `None`.

        Args:
            batch: The batch, as the loader yielded it.
        """
        del batch
        return None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        module: FitModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes the prediction of one batch.

        Args:
            trainer: The Trainer.
            module: The module.
            prediction: What `predict_step` returned, on the host.
            batch_indices: What `indices_of` gives for the batch.
            batch: The batch.
            batch_idx: Its index in its loader.
            dataloader_idx: The index of its loader.
        """

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        module: FitModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes all predictions.

        Args:
            trainer: The Trainer.
            module: The module.
            predictions: One item for each batch, in lists of their own when there are several loaders.
            batch_indices: What `indices_of` gives for each batch, in lists of the same form.
        """

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Refuses to write nothing."""
        for interval, hook in (("batch", "write_on_batch_end"), ("epoch", "write_on_epoch_end")):
            wanted = self.write_interval in (interval, "batch_and_epoch")
            if stage == "predict" and wanted and getattr(type(self), hook) is getattr(BasePredictionWriter, hook):
                raise ConfigurationError(
                    f"{type(self).__name__}(write_interval={self.write_interval!r}): {type(self).__name__} has no "
                    f"{hook}, so that nothing would be written.\nFix: define it, or pass another write_interval."
                )

    def on_predict_start(self, trainer: Trainer, module: FitModule) -> None:
        """Starts over."""
        loaders = len(trainer.num_predict_batches)
        self._waiting = None
        self._predictions, self._indices = [[] for _ in range(loaders)], [[] for _ in range(loaders)]

    def on_predict_batch_end(
        self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sends a prediction on its way to the host, and hands on the one before it."""
        for leaf in jax.tree.leaves(outputs):
            if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf.copy_to_host_async()
        self._hand_on(trainer, module)
        self._waiting = _Waiting(outputs, self.indices_of(batch), batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, module: FitModule) -> None:
        """Hands on the last prediction, and all of them together."""
        self._hand_on(trainer, module)
        if self.write_interval != "batch":
            several = len(self._predictions) > 1
            predictions, indices = self._predictions, self._indices
            self._predictions, self._indices = [], []
            self.write_on_epoch_end(
                trainer, module, predictions if several else predictions[0], indices if several else indices[0]
            )

    def on_exception(self, trainer: Trainer, module: FitModule, exception: BaseException) -> None:
        """Hands on the last prediction that was computed."""
        self._hand_on(trainer, module)

    def _hand_on(self, trainer: Trainer, module: FitModule) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        waiting = waiting._replace(prediction=jax.device_get(waiting.prediction))
        if self.write_interval != "epoch":
            self.write_on_batch_end(trainer, module, *waiting)
        if self.write_interval != "batch":
            self._predictions[waiting.dataloader_idx].append(waiting.prediction)
            self._indices[waiting.dataloader_idx].append(waiting.indices)
