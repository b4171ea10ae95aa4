"""The `nnx-fit` command in this process and in one of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import absl.logging
import pytest

from nnx_fit.cli import main

REPOSITORY = Path(main.__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what the command sets in the process is taken back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Configuring the log closes every handler there is, and absl's closes its stream with it: pytest's own.
    monkeypatch.setattr(absl.logging.get_absl_handler().python_handler, "stream", sys.__stderr__)
    for name in ("HYDRA_FULL_ERROR", "NNX_FIT_RUN_ID"):
        monkeypatch.setenv(name, "")
    root = logging.getLogger()
    handlers, level, modules = list(root.handlers), root.level, set(sys.modules)
    own = [logging.getLogger(name) for name in ("nnx_fit", "nnx_fit.record")]
    before = [(list(each.handlers), each.level, each.propagate) for each in own]
    yield tmp_path
    for handler in set(root.handlers) - set(handlers):
        handler.close()
        root.removeHandler(handler)
    root.setLevel(level)
    for each, (held, its_level, propagates) in zip(own, before, strict=True):
        for handler in set(each.handlers) - set(held):
            handler.close()
            each.removeHandler(handler)
        each.setLevel(its_level)
        each.propagate = propagates
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a command line that must be refused, and returns what it says."""

    def run(line: str) -> str:
        capsys.readouterr()
        assert main.run(line.split()) == 1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.err.strip()

    return run


@pytest.fixture
def command(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `nnx-fit` as a process of its own, in the working directory of the test."""

    def run(*words: str, cwd: Path = folder, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "default", **variables}
        program = "from nnx_fit.cli.main import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


TINY = """
import numpy as np
import nnx_fit as nf
from flax import nnx
from hydra.experimental.callback import Callback

RETURNED = []


class Line(nf.FitModule):
    def __init__(self, start: float = 0.0, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.constant(start)(rngs.params(), (1,)))

    def __call__(self, batch):
        return batch["x"] * self.weight[...]

    def training_step(self, batch):
        loss = ((self(batch) - batch["y"]) ** 2).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val/loss", ((self(batch) - batch["y"]) ** 2).mean())

    def test_step(self, batch):
        self.log("test/loss", ((self(batch) - batch["y"]) ** 2).mean())


class OwnOptimizer(Line):
    def configure_optimizers(self):
        import optax

        return optax.sgd(0.1)


class Broken(Line):
    def training_step(self, batch):
        return batch["no such key"]


class Points(nf.DataModule):
    def __init__(self, count: int = 8, seed: int = 0):
        self.count, self.seed = count, seed

    def train_dataloader(self):
        x = np.linspace(-1, 1, self.count, dtype=np.float32)
        return nf.ArrayLoader({"x": x, "y": 3 * x}, 4, shuffle=True, seed=self.seed)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Keep(Callback):
    def on_job_end(self, config, job_return, **kwargs):
        RETURNED.append(job_return.return_value)
"""

EXPERIMENT = """# @package _global_
defaults:
  - override /optimizer: sgd
model: {_target_: tiny.Line}
data: {_target_: tiny.Points}
monitor: val/loss
trainer: {max_epochs: 2, log_every_n_steps: 1, enable_progress_bar: false}
"""


@pytest.fixture
def project_folder(folder: Path) -> Path:
    """A user's project: a module, an experiment, and nothing else."""
    (folder / "tiny.py").write_text(TINY)
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    return folder
