"""The other examples: the quickstart trains, and the project of one's own is a project."""

from __future__ import annotations

import re
import sys

import pytest
from flax import nnx
from nets import quiet
from omegaconf import OmegaConf
from programs import REPOSITORY, program

import nnx_fit as nf

PROJECT = REPOSITORY / "examples" / "own_project"


@pytest.mark.slow
def test_the_quickstart_runs_and_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program("examples/quickstart.py").main()
    said = capsys.readouterr().out
    assert float(re.search(r"validation accuracy after \d+ steps: ([\d.]+)%", said)[1]) > 95
    assert "the point (0.5, 0.5) belongs to arm" in said
    assert list(tmp_path.glob("outputs/*/*/events.out.tfevents.*"))
    assert list(tmp_path.glob("outputs/*/*/checkpoints/*"))


@pytest.mark.slow
def test_the_gan_reaches_every_spot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program("examples/gan.py").main()
    said = re.search(r"after 3000 steps the generator reaches (\d) of 8 spots; ([\d.]+)%", capsys.readouterr().out)
    assert int(said[1]) == 8
    assert float(said[2]) > 70


@pytest.fixture
def waves(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT))
    yield
    sys.modules.pop("waves", None)


def test_the_projects_configs_build_what_they_name(waves):
    model = nf.instantiate(OmegaConf.load(PROJECT / "conf/model/wave_net.yaml"), rngs=nnx.Rngs(0))
    data = nf.instantiate(OmegaConf.load(PROJECT / "conf/data/waves.yaml"), seed=0)
    assert dict(model.hparams) == {"width": 32, "depth": 2}
    assert (data.points, data.noise, data.batch_size) == (2000, 0.1, 50)


def test_the_projects_model_learns_its_waves(waves):
    import optax
    import waves as project  # type: ignore[import-not-found]

    trainer = quiet(max_epochs=8, optimizer=optax.adam(1e-2))
    history = trainer.fit(project.WaveNet(rngs=nnx.Rngs(0)), datamodule=project.WaveData(points=1000))
    losses = [loss for _, loss in history["val/loss"]]
    assert min(losses) < 0.05, "the noise alone is 0.005; always saying zero is 0.25"


def test_the_projects_experiment_overrides_what_it_says():
    experiment = OmegaConf.load(PROJECT / "conf/experiment/waves.yaml")
    overridden = [next(iter(entry.items())) for entry in experiment.defaults]
    for group, choice in overridden:
        folder = group.removeprefix("override /")
        own, packaged = PROJECT / "conf" / folder, REPOSITORY / "conf" / folder
        assert (own / f"{choice}.yaml").exists() or (packaged / f"{choice}.yaml").exists(), (folder, choice)
    assert experiment.monitor == "val/loss"
