"""The main job as a user runs it: from an empty folder, to the accuracy it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_the_main_job_reaches_its_accuracy_and_leaves_a_complete_run(tmp_path):
    program = "import sys; from nnx_fit.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "name=job"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"test/accuracy\s+([\d.]+)", done.stdout + done.stderr)[-1]) >= 0.98
    assert "tensorboard --logdir outputs/job" in done.stdout + done.stderr

    run = tmp_path / "outputs" / "job"
    assert os.listdir(tmp_path) == ["outputs"]
    assert yaml.safe_load((run / ".hydra" / "config.yaml").read_text())["name"] == "job"
    assert "last" in os.listdir(run / "checkpoints")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/accuracy", "test/accuracy", "lr"} <= scalars
    assert any(tag.startswith("state/") for tag in events.Tags()["histograms"])
    assert {"config/text_summary", "partition/text_summary"} <= set(events.Tags()["tensors"])
