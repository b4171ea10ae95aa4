"""`VariableMonitor`: running statistics, and on request parameters, gradients and updates, over time.

What is watched is bound to tags in `watched.py` and binned on the device in `summaries.py`; this file says when, and
hands on what has arrived. Only the norms of gradients are taken inside the train program, where alone they exist.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.callbacks.summaries import DRIFT, MEAN, STD, UNKNOWN, histograms, scale_of, summarize
from nnx_fit.callbacks.watched import AtPaths, Watched, find_watched, layer_of
from nnx_fit.state.live import copied

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.programs.train_options import StepView
    from nnx_fit.trainer import Trainer


class VariableMonitor(Callback):
    """Logs the Variables of the *stats* role, whatever their type, and on request parameters and how they move.

    Every `every_n_steps` updates, and at the end of training, for each array:

    - `state/<path>`: a histogram, with `state/<path>/mean` and `state/<path>/std`. A mean that is NaN or infinite
      tells of such values; the histogram is of the others.
    - `state/<path>/drift`: for a running statistic, how far it is from the statistic of the last batch alone:
      `|b - r| / max(|b|, |r|)`, where `b = (r' - m r) / (1 - m)` is the batch statistic that moved it from `r` to `r'`
      with momentum `m` (see `nnx_fit.callbacks.summaries.drift`). Known for `nnx.BatchNorm`, and for any layer with a
      `momentum` whose Variable is an `nnx.BatchStat` or has mean, var or std in its name. The step is taken for one
      call of the layer. A value near 0 says that evaluation sees what training sees.

    With `params=True` also:

    - `params/<path>` and `updates/<path>`: histograms, and mean and deviation of the parameters.
    - `params/<layer>/norm`, `updates/<layer>/norm` and `updates/<layer>/ratio`, the update's norm to the parameters':
      a healthy one is often about 1e-3. An update is what changed in the parameters, in their own precision.
    - `gradients/<layer>/norm`: with the other metrics of a step, every `log_every_n_steps`.

    All arrays are summarized by one program on the device. The run neither waits for it nor for what it gives.

    Args:
        every_n_steps: Updates between two records. Default: twice the Trainer's `log_every_n_steps`.
        include: NNX filter of the Variables to log. Default: those of the *stats* role.
        params: Log parameters, trained and frozen ones, and gradients and updates.
    """

    reads_module = False
    logs = False

    def __init__(self, every_n_steps: int | None = None, include: Any = None, params: bool = False):
        if every_n_steps is not None:
            whole_number("VariableMonitor", "every_n_steps", every_n_steps, least=1)
        self.every_n_steps = every_n_steps
        self.include = include
        self.params = params
        self._interval = 0
        self._layout: Any = None
        self._watched: list[Watched] = []
        self._selector: Any = None
        self._moving: list[int] = []
        self._previous: tuple[int, dict[int, jax.Array]] = (-1, {})
        self._recorded_step = -1
        self._norms = False

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Starts over with each fit."""
        if stage == "fit":
            self._recorded_step = -1

    def state_dict(self) -> dict[str, Any]:
        """The update after which the values were recorded last."""
        return {"recorded_step": self._recorded_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._recorded_step = int(state.get("recorded_step", -1))

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Finds out what there is to do."""
        self._layout = None
        self._interval = (self.every_n_steps or 2 * trainer.options.log_every_n_steps) if trainer.loggers else 0
        self._norms = self.params and bool(self._interval)
        if self._interval:
            self._remember(trainer)

    @pausing
    def on_train_batch_end(self, trainer: Trainer, module: FitModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Records where it is due."""
        if self._interval:
            # The first batches of a window of accumulation come before the first update.
            if trainer.global_step % self._interval == 0 and trainer.global_step not in (0, self._recorded_step):
                self._record(trainer)
            self._remember(trainer)

    def on_train_end(self, trainer: Trainer, module: FitModule) -> None:
        """Records the values that the run ends with; one that a signal cuts off continues and has no end there."""
        if self._interval and not trainer.interrupted and 0 < trainer.global_step != self._recorded_step:
            self._record(trainer)
        self._previous = (-1, {})

    def step_metrics(self, view: StepView) -> Mapping[str, Any]:
        """The norms of the gradients, layer by layer."""
        if not self._norms:
            return {}
        layers: dict[str, list[jax.Array]] = {}
        for path, gradient in nnx.to_flat_state(view.grads):
            layers.setdefault(layer_of(path), []).append(gradient)
        # In every step, without a branch: a branch would make XLA compile the update itself to other bits, and a GPU's
        # host would wait for its condition.
        return {f"gradients/{layer}/norm": jnp.sqrt(sum(map(_sum_squares, own))) for layer, own in layers.items()}

    def _live(self, trainer: Trainer) -> list[jax.Array]:
        """The arrays that are watched, in the program's hands: the next step donates them."""
        if trainer.layout is not self._layout:
            self._layout = trainer.layout
            self._watched = find_watched(trainer, self.include, self.params)
            self._selector = AtPaths(self._watched)
            self._moving = [
                i for i, array in enumerate(self._watched) if array.decay or (self.params and array.trained)
            ]
            self._previous = (-1, {})
        found = trainer.peek(self._selector)
        return [found[array.name] for array in self._watched]

    def _remember(self, trainer: Trainer) -> None:
        """Before a step that will be recorded: keeps what it moves, on the device."""
        until_recorded = self._interval - trainer.global_step % self._interval
        self.paused_until = trainer.global_step + until_recorded - 1
        if until_recorded == 1:
            live = self._live(trainer)
            kept = copied([live[i] for i in self._moving]) if self._moving else []
            self._previous = (trainer.global_step, dict(zip(self._moving, kept, strict=True)))

    def _record(self, trainer: Trainer) -> None:
        live = self._live(trainer)
        self._recorded_step = trainer.global_step
        if not live:
            return
        step, previous = self._previous
        follows = step == trainer.global_step - 1
        watched = self._watched
        summary = summarize(
            live,
            # Without the step before, the arrays stand in for it, so that there is one program and not two.
            previous if follows else {i: live[i] for i in self._moving},
            decays=tuple((i, array.decay) for i, array in enumerate(watched) if array.decay),
            updates=tuple(self._updated(watched)),
        )
        trainer.when_ready(
            summary, functools.partial(self._publish, trainer, trainer.global_step, watched, follows, summary)
        )

    def _updated(self, watched: list[Watched]) -> list[int]:
        return [i for i, array in enumerate(watched) if self.params and array.trained]

    def _publish(self, trainer: Trainer, step: int, watched: list[Watched], follows: bool, summary: jax.Array) -> None:
        rows = np.asarray(summary, np.float64)
        tags = [array.tag for array in watched]
        if follows:
            tags += [watched[i].tag.replace("params/", "updates/", 1) for i in self._updated(watched)]
        scalars = dict(_scalars(watched, rows))
        if self.params:
            scalars |= _layer_norms(watched, rows, self._updated(watched), follows)
        binned = histograms(tags, rows[: len(tags)])
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step)
            logger.log_histograms(binned, step)


def _scalars(watched: list[Watched], rows: np.ndarray) -> Iterator[tuple[str, float]]:
    means, deviations, drifts = rows[:, MEAN].tolist(), rows[:, STD].tolist(), rows[:, DRIFT].tolist()
    for i, array in enumerate(watched):
        yield f"{array.tag}/mean", means[i]
        yield f"{array.tag}/std", deviations[i]
        if drifts[i] != UNKNOWN:
            yield f"{array.tag}/drift", drifts[i]


def _layer_norms(
    watched: list[Watched], rows: np.ndarray, updated: list[int], follows: bool
) -> Iterator[tuple[str, float]]:
    places: dict[str, list[int]] = {}
    updates: dict[str, list[int]] = {}
    for i, array in enumerate(watched):
        if array.tag.startswith("params/"):
            places.setdefault(array.layer, []).append(i)
    for k, i in enumerate(updated):
        updates.setdefault(watched[i].layer, []).append(len(watched) + k)
    for layer, own in places.items():
        yield f"params/{layer}/norm", scale_of(rows[own])
        if follows and layer in updates:
            size = scale_of(rows[updates[layer]])
            weight = scale_of(rows[[i for i in own if watched[i].trained]])
            yield f"updates/{layer}/norm", size
            if weight != 0:
                yield f"updates/{layer}/ratio", size / weight


def _sum_squares(x: jax.Array) -> jax.Array:
    """The sum of squared magnitudes, as a product: far faster than a sum on a CPU. Shards stay where they are."""
    x = (jnp.abs(x) if jnp.iscomplexobj(x) else x).astype(jnp.float32)
    axes = tuple(range(x.ndim))
    return jax.lax.dot_general(x, x, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST)
