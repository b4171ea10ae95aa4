"""`DataModule`: one object that prepares the data of a run and hands out its loaders.

It only says which loaders there are. What a loader is, is in `loaders`; when each method is called is the Trainer's
business. No JAX in here, so that a configuration can name a data module without loading it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nnx_fit.errors import ConfigurationError

Stage = Literal["fit", "validate", "test", "predict"]
LoaderKind = Literal["train", "val", "test", "predict"]


class DataModule:
    """Base class of data modules: subclass it and override the loaders that you have.

    The Trainer calls `prepare_data`, then `setup(stage)`, then the loader methods of that stage, and `teardown(stage)`
    at the end. A loader is any re-iterable of batches: an `ArrayLoader`, a Grain dataset, a PyTorch `DataLoader`, a
    list; the evaluation methods may also return a list or a dict of loaders.

    Attributes:
        trainer: The Trainer that used the data module last; its `current_epoch` is what
            `reload_dataloaders_every_n_epochs` asks loaders for.

    Example:
        >>> import numpy as np
        >>> from nnx_fit import ArrayLoader, DataModule
        >>> class Squares(DataModule):
        ...     def setup(self, stage):
        ...         self.x = np.arange(6.0)
        ...     def train_dataloader(self):
        ...         return ArrayLoader({"x": self.x, "y": self.x**2}, batch_size=4)
        >>> data = Squares()
        >>> data.setup("fit")
        >>> [len(batch["x"]) for batch in data.train_dataloader()]
        [4, 2]
        >>> data.provides("train"), data.provides("val")
        (True, False)
    """

    trainer: Any = None

    def prepare_data(self) -> None:
        """Downloads or converts files. Called on one process only: do not set attributes here."""

    def setup(self, stage: Stage) -> None:
        """Loads what the loaders of a stage need. Called on every process, before the loaders are asked for.

        Args:
            stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        """

    def train_dataloader(self) -> Any:
        """The loader that `fit` trains on."""
        raise self._missing("train_dataloader", "fit")

    def val_dataloader(self) -> Any:
        """The loader, or list or dict of loaders, for validation in `fit` and for `validate`."""
        raise self._missing("val_dataloader", "validate")

    def test_dataloader(self) -> Any:
        """The loader, or list or dict of loaders, for `test`."""
        raise self._missing("test_dataloader", "test")

    def predict_dataloader(self) -> Any:
        """The loader, or list or dict of loaders, for `predict`."""
        raise self._missing("predict_dataloader", "predict")

    def teardown(self, stage: Stage) -> None:
        """Releases what `setup(stage)` took. Called last, also after an exception."""

    def state_dict(self) -> dict[str, Any]:
        """What the data module needs to continue: plain values (numbers, strings, lists, dicts).

        Positions of the loaders are kept by the Trainer and do not belong here.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, after `setup` and before the loaders are asked for."""

    def provides(self, kind: LoaderKind) -> bool:
        """Whether this data module has a loader of a kind, without building it.

        Args:
            kind: `"train"`, `"val"`, `"test"` or `"predict"`.
        """
        return has_loader(self, kind)

    def _missing(self, method: str, verb: str) -> ConfigurationError:
        return ConfigurationError(
            f"{type(self).__name__} has no {method}(), and `{verb}` needs one.\n"
            f"Fix: define `def {method}(self)` returning a loader, or pass the loaders to trainer.{verb}() directly."
        )


def has_loader(datamodule: object, kind: str) -> bool:
    """Whether an object that need not be a `DataModule` (any with its methods will do) has a loader of a kind.

    Args:
        datamodule: The object.
        kind: `"train"`, `"val"`, `"test"` or `"predict"`.
    """
    name = f"{kind}_dataloader"
    method = getattr(datamodule, name, None)
    return callable(method) and getattr(method, "__func__", method) is not getattr(DataModule, name)
