"""`Finder`: a callback that chooses a setting by trial, before data and optimizer of a run are taken.

When a finder is asked is the Trainer's business; how a trial is run is in `trial.py`.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnx_fit.callbacks.callback import Callback

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer

logger = logging.getLogger("nnx_fit")


@dataclasses.dataclass(frozen=True)
class GivenData:
    """What a verb was given to run on.

    Attributes:
        verb: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        loaders: Training data of a fit, or the data of the other verbs; `None` if the data module or the module has it.
        val_loaders: Validation data of a fit, or `None`.
        datamodule: A data module that is set up, or `None`.
    """

    verb: str
    loaders: Any = None
    val_loaders: Any = None
    datamodule: Any = None


class Finder(Callback, abc.ABC):
    """Base class of callbacks that choose a setting by trial.

    Asked once all `setup` hooks were called, and before loaders and optimizers are asked for, so that what it sets
    counts as if it had been set from the beginning. A run that continues does not search again.
    """

    reads_module = False
    logs = False

    @abc.abstractmethod
    def find(self, trainer: Trainer, module: FitModule, data: GivenData) -> None:
        """Searches, and sets what was found."""

    @abc.abstractmethod
    def adopt(self, trainer: Trainer, module: FitModule, data: GivenData) -> None:
        """Sets what an earlier run found, from which this one continues: `load_state_dict` has given it back."""

    def ask(self, trainer: Trainer, module: FitModule, data: GivenData, saved: Mapping[str, Any] | None) -> None:
        """Searches in a run that begins, and takes what was found before in one that continues.

        Args:
            trainer: The Trainer.
            module: Its module, which is set up.
            data: What the verb was given to run on.
            saved: State of the finder in the checkpoint that the run continues from, empty if there is none of it;
                `None` in a run that begins.
        """
        if trainer.options.fast_dev_run:
            logger.info("%s does nothing with fast_dev_run.", type(self).__name__)
        elif saved is None:
            self.find(trainer, module, data)
        elif saved:
            self.load_state_dict(saved)
            self.adopt(trainer, module, data)
