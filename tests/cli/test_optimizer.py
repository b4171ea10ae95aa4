"""The groups `optimizer` and `schedule`: what the Trainer gets of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nnx_fit as nf
from nnx_fit.cli import main
from nnx_fit.cli.optimizer import make_optimizer

CONF = Path(main.__file__).parents[2] / "conf"


def made(schedule: str, **changes: Any) -> nf.OptimizerSpec:
    """What SGD at 0.25 becomes in a run of 200 steps."""
    cfg = OmegaConf.create(
        {
            "optimizer": {"_target_": "optax.sgd", "learning_rate": 0.25},
            "schedule": OmegaConf.load(CONF / "schedule" / f"{schedule}.yaml"),
        }
    )
    cfg.schedule.update(changes)
    optimizer = make_optimizer(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    assert optimizer is not None
    return optimizer(200)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "warmup_cosine", "exponential", "onecycle"])
def test_each_schedule_peaks_at_the_learning_rate(schedule: str) -> None:
    spec = made(schedule)
    rates = [float(spec.schedule(step)) for step in range(200)]  # type: ignore[operator,misc]
    assert max(rates) == pytest.approx(0.25, rel=1e-3)


def test_a_warm_up_is_a_share_of_the_run() -> None:
    """A twentieth of 200 steps up, then half a cosine down to zero at the end."""
    spec = made("warmup_cosine")
    rates = np.array([float(spec.schedule(step)) for step in range(201)])  # type: ignore[operator,misc]
    np.testing.assert_allclose(rates[:11], 0.25 * np.arange(11) / 10, atol=1e-6)
    np.testing.assert_allclose(rates[10:], 0.125 * (1 + np.cos(np.pi * np.arange(191) / 190)), atol=1e-6)


def test_a_plateau_follows_the_optimizer_and_names_its_metric() -> None:
    spec = made("plateau", monitor="val/error", patience=1, factor=0.5)
    assert (spec.monitor, spec.schedule) == ("val/error", 0.25)
    tx = optax.with_extra_args_support(spec.transformation())
    state = tx.init(1.0)
    moves = []
    for value in (1.0, 1.0, 1.0):
        update, state = tx.update(1.0, state, 1.0, value=value)
        moves.append(float(update))
    assert moves == [-0.25, -0.125, -0.0625]


def test_a_monitor_on_a_schedule_of_steps_is_a_mistake() -> None:
    with pytest.raises(nf.ConfigurationError, match=r"schedule\.monitor=.*\nFix: schedule=plateau"):
        made("cosine", monitor="val/loss")


def test_a_plateau_reduces_the_rate_of_a_run(project_folder: Path) -> None:
    """Nothing improves by half in one epoch here, so every validation but the first reduces."""
    words = "experiment=mine name=p schedule=plateau schedule.patience=1 schedule.factor=0.5 schedule.rtol=0.999"
    assert main.run([*words.split(), "trainer.max_epochs=4", "test_after_fit=false"]) == 0
    events = EventAccumulator(str(project_folder / "outputs/p"))
    events.Reload()
    rate = OmegaConf.load(project_folder / "outputs/p/.hydra/config.yaml").optimizer.learning_rate
    expected = rate * np.repeat([1.0, 1.0, 0.5, 0.25], 2)
    np.testing.assert_allclose([event.value for event in events.Scalars("lr")], expected, rtol=1e-6)


def test_a_metric_that_nothing_logs_is_refused(project_folder: Path, fails: Callable[[str], str]) -> None:
    said = fails("experiment=mine name=q schedule=plateau schedule.monitor=val/los")
    assert "monitor='val/los'" in said
    assert "Did you mean 'val/loss'?" in said
