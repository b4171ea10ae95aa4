"""The public names: each resolves, none is loaded before it is used, and a wrong one says which there are."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nnx_fit as nf

NAMES = {
    "ArrayLoader",
    "BatchSizeFinder",
    "LearningRateFinder",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "ConfigurationError",
    "DataModule",
    "EarlyStopping",
    "FitModule",
    "DeviceStatsMonitor",
    "GradientMonitor",
    "LambdaCallback",
    "ThroughputMonitor",
    "Timer",
    "BackboneFinetuning",
    "BasePredictionWriter",
    "EMAWeights",
    "ProfilerCallback",
    "GradientAccumulationScheduler",
    "History",
    "LearningRateMonitor",
    "MLFlowLogger",
    "WandbLogger",
    "Logger",
    "ModelCheckpoint",
    "ModelSummary",
    "NnxFitError",
    "NonFiniteError",
    "OptimizerSpec",
    "RichProgressBar",
    "StateError",
    "StatePartition",
    "TensorBoardLogger",
    "Trainer",
    "VariableMonitor",
    "__version__",
    "export",
    "instantiate",
    "partition",
    "seed_everything",
}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_resolves_to_the_thing_of_that_name(name):
    value = getattr(nf, name)
    assert name == "__version__" or value.__name__ in (name, f"nnx_fit.{name}")
    assert value is not None


def test_all_and_dir_are_the_public_names():
    assert set(nf.__all__) == NAMES
    assert set(dir(nf)) >= NAMES


def test_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from nnx_fit import *", namespace)
    assert set(namespace) >= NAMES


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'Trainr'; it has: .*Trainer"):
        nf.Trainr  # noqa: B018


def test_a_name_that_is_not_there_yet_is_not_there():
    assert not hasattr(nf, "nothing_of_that_name")
    with pytest.raises(ImportError, match="nothing_of_that_name"):
        exec("from nnx_fit import nothing_of_that_name")


HEAVY = "['jax', 'flax', 'optax', 'orbax', 'torch', 'tensorboardX', 'hydra', 'rich', 'numpy']"


@pytest.mark.parametrize("module", ["nnx_fit", "nnx_fit.errors", "nnx_fit.configs", "nnx_fit.loops.progress"])
def test_importing_the_package_loads_nothing_heavy(module):
    allowed = "['hydra', 'rich']" if module == "nnx_fit.configs" else "[]"
    code = f"import sys, {module}; print([n for n in {HEAVY} if n in sys.modules and n not in {allowed}])"
    assert python(code) == "[]"


def test_the_errors_load_without_jax():
    assert python("import sys, nnx_fit; nnx_fit.ConfigurationError; print('jax' in sys.modules)") == "False"


def test_a_trainer_loads_no_optional_package():
    optional = "['torch', 'grain', 'sklearn', 'pandas', 'matplotlib', 'wandb', 'mlflow', 'safetensors']"
    code = f"import sys, nnx_fit; nnx_fit.Trainer; print([n for n in {optional} if n in sys.modules])"
    assert python(code) == "[]"


def test_the_errors_are_what_their_users_catch():
    assert issubclass(nf.ConfigurationError, ValueError)
    for name in ("ConfigurationError", "StateError", "CheckpointError", "NonFiniteError"):
        assert issubclass(getattr(nf, name), nf.NnxFitError)
