"""`GradientMonitor`: the norm of the gradients, taken inside the train program, where alone they exist."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.variable_monitor import VariableMonitor
from nnx_fit.callbacks.watched import layer_of
from nnx_fit.errors import ConfigurationError

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.programs.train_options import StepView
    from nnx_fit.trainer import Trainer


class GradientMonitor(Callback):
    """Logs the norm of each update's gradients: after `on_gradients`, before clipping, unscaled.

    It is logged with the other metrics of a step, every `log_every_n_steps` of the Trainer: `grad_norm` is that of all
    trained parameters together, and with `per_layer=True` `gradients/<layer>/norm` that of each layer. Under
    accumulation it is that of the window's mean. The host has nothing to do for it.

    The norm is `(sum |g|^p)^(1/p)` in float32, or the largest `|g|` for an infinite `p`. Where `p` is not 2 it is part
    of the names, so that several of these may be logged: `grad_norm_1`, `gradients/<layer>/norm_inf`. The Euclidean
    norms of layers are logged by `VariableMonitor(params=True)` too; where there is one, they are left to it.

    Args:
        norm_type: The `p` of the norm, above 0; `inf` for the largest magnitude.
        per_layer: Log the norm of each layer too.

    Raises:
        ConfigurationError: The norm is none.

    Example:
        >>> from nnx_fit.callbacks.gradient_monitor import GradientMonitor
        >>> GradientMonitor(per_layer=True).names(["encoder.linear"])
        ['grad_norm', 'gradients/encoder.linear/norm']
    """

    reads_module = False
    logs = False

    def __init__(self, norm_type: float | str = 2.0, per_layer: bool = False):
        self.norm_type = _norm_type(norm_type)
        self.per_layer = per_layer
        self._norm_name = "norm" if self.norm_type == 2 else f"norm_{self.norm_type:g}"
        self._layers_are_logged = False

    def names(self, layers: Sequence[str]) -> list[str]:
        """What is logged of a module with these layers, by dotted path."""
        own = self.per_layer and not self._layers_are_logged
        return [f"grad_{self._norm_name}", *(f"gradients/{layer}/{self._norm_name}" for layer in layers if own)]

    def on_train_start(self, trainer: Trainer, module: FitModule) -> None:
        """Finds out whether another monitor logs the layers already."""
        self._layers_are_logged = self.norm_type == 2 and any(
            isinstance(callback, VariableMonitor) and callback.params and trainer.loggers
            for callback in trainer.callbacks
        )

    def step_metrics(self, view: StepView) -> Mapping[str, Any]:
        """The norms."""
        layers: dict[str, list[jax.Array]] = {}
        for path, gradient in nnx.to_flat_state(view.grads):
            layers.setdefault(layer_of(path), []).extend(map(self._norm, jax.tree.leaves(gradient)))
        # A norm of norms is the norm of all.
        norms = [self._norm(jnp.stack(own)) for own in layers.values()]
        return dict(zip(self.names(list(layers)), [self._norm(jnp.stack(norms)), *norms], strict=False))

    def _norm(self, x: jax.Array) -> jax.Array:
        magnitudes = jnp.abs(x).astype(jnp.float32)
        if self.norm_type == 2:
            # As a product: far faster than a sum on a CPU, and shards stay where they are.
            return jnp.sqrt(jnp.tensordot(magnitudes, magnitudes, x.ndim, precision=jax.lax.Precision.HIGHEST))
        largest = jnp.max(magnitudes, initial=0.0)
        if math.isinf(self.norm_type):
            return largest
        # Relative to the largest one, whose power would soon be too large or too small.
        scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
        return scale * jnp.sum((magnitudes / scale) ** self.norm_type) ** (1 / self.norm_type)


def _norm_type(value: Any) -> float:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
    if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
        raise ConfigurationError(
            f"GradientMonitor(norm_type={value!r}): expected a number above 0. Fix: pass 2 for the Euclidean norm, 1 "
            'for the sum of magnitudes, or "inf" for the largest one.'
        )
    return float(number)
