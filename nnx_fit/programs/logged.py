"""`Logged`: everything that one traced step logs, by the step's hooks and by callbacks that look into it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.capture import MetricSpec, make_spec, scalar
from nnx_fit.metrics.objects import LoggedMetric
from nnx_fit.programs.step import StepResult
from nnx_fit.programs.train_options import Monitor, StepView


@dataclasses.dataclass
class Logged:
    """What a step logs: (value, weight) of each name, how the name is treated, and metric objects."""

    values: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    specs: dict[str, MetricSpec] = dataclasses.field(default_factory=dict)
    objects: dict[str, LoggedMetric] = dataclasses.field(default_factory=dict)

    def add(self, result: StepResult) -> None:
        """Takes over what another hook of the step logged."""
        for name, spec in result.specs.items():
            if name in self.specs:
                raise ConfigurationError(
                    f"self.log({name!r}, ...) was called in training_step and in on_gradients. Fix: rename one of them."
                )
            self.values[name], self.specs[name] = result.metrics[name], spec
        self.objects |= result.objects

    def monitor(self, view: StepView, monitors: tuple[Monitor, ...]) -> None:
        """Takes what callbacks make of the step."""
        own = set(self.specs)
        for monitor in monitors:
            for name, value in monitor(view).items():
                if name in own:
                    raise ConfigurationError(
                        f"{name!r} is logged by the step and by a callback of this run.\n"
                        "Fix: rename yours in self.log, or leave out the callback."
                    )
                self.values[name] = (scalar(name, value), jnp.float32(1))
                self.specs[name] = make_spec(name, (True, False))
