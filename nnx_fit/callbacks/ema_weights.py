"""`EMAWeights`: an exponential moving average of the trained parameters, evaluated in their place."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.callbacks.weights import Displaced, current_variables, fill, layout_of, names_of
from nnx_fit.errors import ConfigurationError
from nnx_fit.state import graph
from nnx_fit.state.layout import Layout

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer

# What an array is called in a checkpoint: its average, and its own value where the module holds the average just then.
AVERAGE, TRAINED = "average of ", "trained "


class EMAWeights(Callback):
    """Keeps an exponential moving average of the trained parameters, and evaluates it instead of them.

    The average begins as the parameters after `start_step` updates. After every `every_n_steps` further ones it becomes
    `decay * average + (1 - decay) * parameters`. It lives on the device, in float32 or the parameters' own precision if
    that is higher, and is computed there without waiting: one small program per average. Training with it gives the
    same bits as training without it. It is part of every checkpoint, and a run that continues goes on with it.

    Within a fit the module holds the average while it is validated, from this callback's `on_validation_start` to its
    `on_validation_end`; callbacks and hooks that come later, checkpoints among them, see the trained parameters again.
    `validate`, `test` and `predict` evaluate the average that is in their `ckpt_path`; without one they evaluate the
    module as it is, and `copy_to` puts the average into it.

    Differences to Lightning's `EMAWeightAveraging`: the average begins with the parameters of `start_step`, not with
    those after the first update; running statistics are not averaged; a fit ends with the trained parameters in the
    module, so that `last` continues the training, and not with the average.

    Args:
        decay: What is kept of the average each time, from 0 to below 1.
        every_n_steps: Updates between two averages.
        start_step: Number of updates after which the average begins; until then the parameters themselves are
            evaluated.
        use_for_eval: Evaluate the average. `False` only keeps it.

    Raises:
        ConfigurationError: An argument is out of range, or two averages are to be evaluated.

    Example:
        >>> import nnx_fit as nf
        >>> from nnx_fit.callbacks.ema_weights import EMAWeights
        >>> ema = EMAWeights(decay=0.99, every_n_steps=10)
        >>> trainer = nf.Trainer(max_epochs=1, callbacks=ema, logger=False)
        >>> ema.weights
        {}
    """

    reads_module = False
    logs = False

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0, *, use_for_eval: bool = True):
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ConfigurationError(
                f"EMAWeights(decay={decay!r}): expected a number from 0 to below 1. Fix: pass one such as 0.999."
            )
        self.decay = float(decay)
        self.every_n_steps = whole_number("EMAWeights", "every_n_steps", every_n_steps, least=1)
        self.start_step = whole_number("EMAWeights", "start_step", start_step)
        self.use_for_eval = use_for_eval
        self._average: dict[str, jax.Array] = {}
        self._step = -1
        self._evaluated = False
        self._layout: Layout | None = None
        self._selector: Any = None
        self._kept: list[Displaced] = []
        self._displaced: dict[str, Any] = {}

    @property
    def weights(self) -> dict[str, jax.Array]:
        """A copy of the average by dotted path; empty before it begins."""
        return {name: jnp.copy(array) for name, array in self._average.items()}

    def copy_to(self, module: nnx.Module) -> None:
        """Puts the average into a module, in the place of its parameters.

        Args:
            module: The module that was trained, or another one with the same parameters; not in a run.

        Raises:
            ConfigurationError: There is no average, or the module lacks one of its parameters.
        """
        layout = Layout.of(module)
        missing = self._average.keys() - {name for slot in layout.slots for name in names_of(slot)}
        if missing or not self._average:
            what = f"the module has no {min(missing)}" if missing else "no average has begun"
            raise ConfigurationError(
                f"EMAWeights.copy_to: {what}.\nFix: pass the module that was trained, after a fit that made more than "
                f"start_step={self.start_step} updates."
            )
        self._put(layout, _variables(module))

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Starts over with each fit. What an earlier one averaged says nothing of another verb's module."""
        self._evaluated = stage == "fit"
        self._layout, self._kept, self._displaced = None, [], {}
        evaluated = [each for each in trainer.callbacks if isinstance(each, EMAWeights) and each.use_for_eval]
        if len(evaluated) > 1:
            raise ConfigurationError(
                f"{len(evaluated)} EMAWeights have use_for_eval=True, and only one average can be evaluated.\n"
                "Fix: pass use_for_eval=False to the others."
            )
        if stage == "fit":
            self._average, self._step = {}, -1

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Begins the average, or goes on with the one of a checkpoint."""
        if self._displaced:
            fill(layout_of(trainer), current_variables(trainer), self._displaced)
            self._displaced = {}
        self._advance(trainer)

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes the parameters after an update into the average."""
        self._advance(trainer)

    def on_validation_start(self, trainer: Trainer, module: FitModule) -> None:
        """Puts the average in the place of the parameters."""
        self._swap_in(trainer)

    def on_validation_end(self, trainer: Trainer, module: FitModule) -> None:
        """Puts the parameters back."""
        self._swap_back()

    def on_test_start(self, trainer: Trainer, module: FitModule) -> None:
        """Puts the average in the place of the parameters."""
        self._swap_in(trainer)

    def on_test_end(self, trainer: Trainer, module: FitModule) -> None:
        """Puts the parameters back."""
        self._swap_back()

    def on_predict_start(self, trainer: Trainer, module: FitModule) -> None:
        """Puts the average in the place of the parameters."""
        self._swap_in(trainer)

    def on_predict_end(self, trainer: Trainer, module: FitModule) -> None:
        """Puts the parameters back."""
        self._swap_back()

    def on_exception(self, trainer: Trainer, module: FitModule, exception: BaseException) -> None:
        """Puts the parameters back: what is saved now must continue the training."""
        self._swap_back()

    def teardown(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Puts the parameters back if nothing else did."""
        self._swap_back()

    def state_dict(self) -> dict[str, Any]:
        """The update that the average has taken in last."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._step = int(state["step"])

    def arrays(self) -> dict[str, jax.Array]:
        """The average; in an evaluation also the parameters, as the module holds the average in their place."""
        found = {f"{AVERAGE}{name}": array for name, array in self._average.items()}
        for slot, _, raw in self._kept:
            found |= {
                f"{TRAINED}{name}": part for name, part in zip(names_of(slot), slot.parts(raw) or (), strict=True)
            }
        return found

    def load_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Takes back what `arrays` gave."""
        loaded = {name: jnp.array(array) for name, array in arrays.items()}
        self._average = {name.removeprefix(AVERAGE): x for name, x in loaded.items() if name.startswith(AVERAGE)}
        self._displaced = {name.removeprefix(TRAINED): x for name, x in loaded.items() if name.startswith(TRAINED)}
        self._evaluated = True

    def _advance(self, trainer: Trainer) -> None:
        step, start, every = trainer.global_step, self.start_step, self.every_n_steps
        if step >= start and (step - start) % every == 0 and step != self._step:
            self._step = step
            self._take_in(self._live(trainer))
        self.paused_until = max(start, step + every - (step - start) % every)

    def _take_in(self, live: dict[str, jax.Array]) -> None:
        """Averages what was trained before, and begins with what is trained from now on."""
        known = [name for name in live if name in self._average]
        averaged = _averaged([self._average[name] for name in known], [live[name] for name in known], decay=self.decay)
        fresh = {name: array for name, array in live.items() if name not in self._average}
        begun = _begun(fresh) if fresh else {}
        self._average = dict(zip(known, averaged, strict=True)) | begun

    def _live(self, trainer: Trainer) -> dict[str, jax.Array]:
        """The parameters in the program's hands: the next step donates them."""
        if trainer.layout is not self._layout:
            self._layout = layout_of(trainer)
            paths = frozenset(slot.path for slot in self._layout.slots if slot.role == "params")
            self._selector = lambda path, value: path in paths
        return trainer.peek(self._selector)

    def _swap_in(self, trainer: Trainer) -> None:
        if self.use_for_eval and self._evaluated and self._average and not self._kept:
            self._kept = self._put(layout_of(trainer), current_variables(trainer))

    def _swap_back(self) -> None:
        for _, variable, raw in self._kept:
            variable.set_raw_value(raw)
        self._kept = []

    def _put(self, layout: Layout, variables: Mapping[graph.Path, nnx.Variable]) -> list[Displaced]:
        pairs = (pair for slot in layout.slots for pair in zip(names_of(slot), slot.shapes, strict=True))
        dtypes = {name: shape.dtype for name, shape in pairs}
        names = tuple(self._average)
        values = _cast(list(self._average.values()), dtypes=tuple(dtypes[name] for name in names))
        return fill(layout, variables, dict(zip(names, values, strict=True)))


def _variables(module: nnx.Module) -> dict[graph.Path, nnx.Variable]:
    return {path: leaf for path, leaf in graph.flatten(module)[1] if isinstance(leaf, nnx.Variable)}


@functools.partial(jax.jit, static_argnames="decay", donate_argnums=0)
def _averaged(average: Sequence[jax.Array], live: Sequence[jax.Array], *, decay: float) -> list[jax.Array]:
    return [decay * old + (1 - decay) * new.astype(old.dtype) for old, new in zip(average, live, strict=True)]


@jax.jit
def _begun(live: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # In bfloat16 what a step adds would be lost to rounding.
    return {name: jnp.copy(x).astype(jnp.promote_types(x.dtype, jnp.float32)) for name, x in live.items()}


@functools.partial(jax.jit, static_argnames="dtypes")
def _cast(arrays: Sequence[jax.Array], *, dtypes: tuple[Any, ...]) -> list[jax.Array]:
    return [jnp.copy(array).astype(dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
