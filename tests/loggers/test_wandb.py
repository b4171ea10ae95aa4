"""WandbLogger offline, read back from the files that `wandb sync` would upload."""

import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.wandb import WandbLogger

pytest.importorskip("wandb")

ROOT = Path(__file__).parents[2]
FIT = """
import os, sys
sys.path.insert(0, "tests/support")
import numpy as np
import wandb
from nets import Scalar, quiet, targets
import nnx_fit as nf
from nnx_fit.loggers.logger import Histogram

root = sys.argv[1]

class Pictures(nf.Callback):
    def on_train_end(self, trainer, module):
        logger, step = trainer.logger, trainer.global_step
        logger.log_image("samples", np.zeros((2, 3, 3), np.uint8), step)
        logger.log_pr_curve("curve", [0, 1], [0.25, 0.75], step)
        logger.log_embedding("points", np.eye(2), step, metadata=["a", "b"], images=np.zeros((2, 4, 4)))
        moments = {"num": 3, "min": 0, "max": 2, "sum": 4, "sum_squares": 6}
        logger.log_histograms({"weights": Histogram(np.array([1, 2]), np.array([0.0, 1.0, 2.0]), moments)}, step)

class Breaks(nf.Callback):
    def on_train_end(self, trainer, module):
        raise RuntimeError("broken")

def trainer(logger, *callbacks, **options):
    return quiet(log_every_n_steps=1, logger=logger, callbacks=list(callbacks), **options)

logger = nf.WandbLogger("digits", name="wide", save_dir=f"{root}/a", offline=True, tags=["t"], group="g")
saving = nf.ModelCheckpoint(dirpath=f"{root}/ckpt")
first = trainer(logger, Pictures(), saving, max_epochs=1, enable_checkpointing=True)
first.fit(Scalar(start=1.0), targets(3.0, 3.0, 3.0))
logger.log_metrics({"test/loss": 0.5}, 3)

again = nf.WandbLogger("digits", name="wide", save_dir=f"{root}/a", offline=True)
try:
    trainer(again, Breaks(), max_epochs=2).fit(Scalar(), targets(3.0, 3.0, 3.0), ckpt_path=f"{root}/ckpt/last")
except RuntimeError as error:
    print(error)
other = nf.WandbLogger("digits", save_dir=f"{root}/b", offline=True, prefix="p-")
trainer(other, max_epochs=1).fit(Scalar(), targets(3.0))

stopped = nf.WandbLogger("digits", save_dir=f"{root}/c", offline=True)
stopped.log_metrics({"loss": 1.0}, 1)
stopped.finalize("interrupted")

os.makedirs(f"{root}/d")
mine = wandb.init(project="mine", dir=f"{root}/d", mode="offline")
borrower = nf.WandbLogger("digits", save_dir=f"{root}/e", offline=True)
borrower.log_metrics({"loss": 2.0}, 7)
borrower.finalize("failed")
mine.log({"own": 1.0})
mine.finish(exit_code=0)

last = nf.WandbLogger("digits", save_dir=f"{root}/f", offline=True)
last.log_metrics({"loss": 1.0}, 1)
last.finalize("success")
sys.exit(3)  # for whatever came after the fit
"""


def records(file):
    """The records of a run's file, whose format is that of LevelDB's log: blocks of 32 KiB, records in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


def items(record):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("wandb")
    settings = {"HOME": str(root), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    of_wandb = "ignore:Implicitly cleaning up:ResourceWarning"  # its own temporary directories
    command = [sys.executable, "-W", "error", "-W", of_wandb, "-c", FIT, str(root)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=False, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "broken" in done.stdout and "Warning" not in done.stderr and "Exception ignored" not in done.stderr
    files = sorted(root.glob("*/wandb/offline-run-*/run-*.wandb"), key=lambda path: (path.parts[-4], path.parent.name))
    assert len(files) == 6
    return [list(records(file)) for file in files]


def history(run):
    return [items(record.history.item) for record in run if record.HasField("history")]


def values(run, name):
    return [(row["global_step"], row[name]) for row in history(run) if name in row]


def test_every_record_has_its_global_step(runs):
    first, again, other, *_ = runs
    # w moves from 1 to 3 by a tenth of the way in each step
    losses = [(step, pytest.approx(0.5 * (2.0 * 0.9 ** (step - 1)) ** 2)) for step in range(1, 7)]
    assert values(first, "loss") == losses[:3]
    assert values(first, "test/loss") == [(3, 0.5)]
    assert values(again, "loss") == losses[3:]
    assert values(other, "p-loss") == losses[:1]
    assert all("global_step" in row for run in (*runs[:4], runs[5]) for row in history(run))


def test_global_step_is_the_x_axis_of_every_chart(runs):
    for run in runs:
        (rule,) = [r.metric for r in run if r.HasField("metric") and r.metric.glob_name == "*"]
        assert rule.step_metric == "global_step"


def test_a_fit_that_continues_has_the_id_of_the_run_it_continues(runs):
    ids = [next(r.run.run_id for r in run if r.HasField("run")) for run in runs]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 5 and all(ids)


def test_project_name_tags_and_settings_are_those_given(runs):
    run = next(r.run for r in runs[0] if r.HasField("run"))
    assert (run.project, run.display_name, list(run.tags), run.run_group) == ("digits", "wide", ["t"], "g")
    settings = {}
    for record in runs[0]:
        if record.HasField("config"):
            settings |= items(record.config.update)
    assert settings["start"] == 1.0 and settings["learning_rate"] == 0.1


def test_the_end_says_how_the_last_verb_ended(runs):
    exits = [[r.exit.exit_code for r in run if r.HasField("exit")] for run in runs]
    assert exits == [[0], [1], [0], [255], [0], [0]]
    for run, status in zip(runs, ("success", "failed", "success", "interrupted", "failed", "success"), strict=True):
        summary = {}
        for record in run:
            if record.HasField("summary"):
                summary |= items(record.summary.update)
        assert summary["status"] == status


def test_a_run_that_was_open_before_is_used_and_left_open(runs):
    mine = runs[4]
    assert next(r.run.project for r in mine if r.HasField("run")) == "mine"
    assert values(mine, "loss") == [(7, 2.0)]
    assert [row["own"] for row in history(mine) if "own" in row] == [1.0]


def test_texts_pictures_tables_and_histograms_are_there(runs):
    rows = history(runs[0])
    kinds = Counter(value for row in rows for name, value in row.items() if name.endswith("/_type"))
    # config, environment, partition; an image; the tables of the curve and the embedding; a histogram
    assert kinds == {"html-file": 3, "image-file": 1, "table-file": 2, "histogram": 1}
    (histogram,) = [row for row in rows if "weights/values" in row]
    assert histogram["weights/values"] == [1, 2] and histogram["weights/bins"] == [0.0, 1.0, 2.0]


def test_making_a_logger_starts_nothing(tmp_path):
    logger = WandbLogger(save_dir=tmp_path / "run", offline=True)
    logger.continue_from(3)
    logger.finalize("success")
    assert logger.log_dir is None and logger.version is None
    assert not (tmp_path / "run").exists()


def test_two_ids_are_one_too_many():
    with pytest.raises(ConfigurationError, match="Fix: pass one"):
        WandbLogger(id="a", version="b")


def test_without_wandb_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("nnx_fit.loggers.wandb.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "nnx-fit\[wandb\]"'):
        WandbLogger()


def test_what_wandb_does_not_take_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot start a run: .*colour(.|\n)*Fix"):
        WandbLogger(save_dir=tmp_path, offline=True, colour="red").log_metrics({"a": 1.0}, 1)
