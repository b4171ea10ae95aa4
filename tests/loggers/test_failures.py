"""Loggers that fail while a run is under way: said once, by name and cause; everything else goes on."""

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.loggers.logger import Logger


class Flaky(Logger):
    """Raises what it is told to raise."""

    def __init__(self):
        self.error: Exception | None = None
        self.kept = []

    def log_metrics(self, metrics, step):
        if self.error is not None:
            raise self.error
        self.kept.append((metrics, step))

    def log_text(self, tag, text, step=0):
        self.kept.append((tag, text))

    def finalize(self, status):
        self.kept.append(status)


class Outer(Flaky):
    """A method that calls that of the class above it."""

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)


def attached(*loggers):
    return FanOut(loggers)


def test_a_logger_without_a_trainer_raises_like_any_object():
    logger = Flaky()
    logger.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        logger.log_metrics({"a": 1.0}, 1)


def test_each_cause_is_reported_once_with_logger_method_step_and_cause(caplog):
    first, second = Flaky(), Flaky()
    loggers = attached(first, second)
    for step, error in enumerate([OSError(28, "No space left"), OSError(28, "No space left"), RuntimeError("gone")], 1):
        first.error = error
        loggers.log_metrics({"a": 1.0}, step)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert re.match(r"Flaky \(number 1 .*failed in log_metrics at step 1: OSError: .*No space left", caplog.messages[0])
    assert "failed in log_metrics at step 3: RuntimeError: gone" in caplog.messages[1]
    assert "The run goes on" in caplog.messages[0]
    assert second.kept == [({"a": 1.0}, 1), ({"a": 1.0}, 2), ({"a": 1.0}, 3)]


@pytest.mark.parametrize("kind", [Flaky, Outer])
def test_a_logger_that_works_again_says_so_and_fails_anew(kind, caplog):
    logger = kind()
    loggers = attached(logger)
    for step in range(1, 7):
        logger.error = RuntimeError("gone") if step in (2, 3, 5) else None
        loggers.log_metrics({"a": 1.0}, step)
    loggers.finalize("success")
    assert [message.split(":")[0].split(";")[0].split("\n")[0] for message in caplog.messages] == [
        f"{kind.__name__} failed in log_metrics at step 2",
        f"{kind.__name__} works again",
        f"{kind.__name__} failed in log_metrics at step 5",
        f"{kind.__name__} works again",
        kind.__name__,
    ]
    assert "2 calls of log_metrics" in caplog.messages[1]
    assert "3 of log_metrics" in caplog.messages[-1]
    assert logger.kept == [({"a": 1.0}, 1), ({"a": 1.0}, 4), ({"a": 1.0}, 6), "success"]


def test_what_works_is_not_mistaken_for_what_does_not(caplog):
    logger = Flaky()
    attached(logger)
    logger.error = RuntimeError("gone")
    for step in (1, 2):
        logger.log_metrics({"a": 1.0}, step)
        logger.log_text("a", "b")
    assert len(caplog.messages) == 1


def test_mistakes_of_the_caller_are_raised_to_the_caller(tmp_path):
    logger = nf.TensorBoardLogger(tmp_path)
    attached(logger)
    with pytest.raises(nf.ConfigurationError, match="channels"):
        logger.log_image("x", np.zeros((2, 2, 7)), 1)
    with pytest.raises(TypeError, match="missing"):
        logger.log_metrics({"a": 1.0})  # pyright: ignore[reportCallIssue]
    with pytest.raises(KeyboardInterrupt):
        logger = Flaky()
        attached(logger)
        logger.error = KeyboardInterrupt()  # pyright: ignore[reportAttributeAccessIssue]
        logger.log_metrics({"a": 1.0}, 1)


class AtStep(nf.Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.action(trainer)


def closed_form_losses(steps, start=1.0, rate=0.1, target=3.0):
    return [0.5 * ((start - target) * (1 - rate) ** step) ** 2 for step in range(steps)]


def test_a_directory_removed_in_mid_run_costs_one_logger_some_records_and_the_run_nothing(tmp_path, caplog):
    csv, board = nf.CSVLogger(tmp_path / "csv"), nf.TensorBoardLogger(tmp_path / "board")
    callbacks = [AtStep(4, lambda trainer: shutil.rmtree(tmp_path / "csv"))]
    trainer = quiet(max_epochs=1, log_every_n_steps=1, logger=[csv, board], callbacks=callbacks)
    history = trainer.fit(Scalar(), targets(*[3.0] * 8))
    assert [value for _, value in history["loss"]] == pytest.approx(closed_form_losses(8))
    assert caplog.text.count("CSVLogger failed in log_metrics") == 1 and "was removed" in caplog.text
    assert caplog.text.count("CSVLogger works again") == 1
    rows = [line.split(",") for line in (tmp_path / "csv" / "metrics.csv").read_text().split()]
    assert rows[0] == ["step", "loss"] and rows[-1][0] == "8"
    assert float(rows[-1][1]) == pytest.approx(closed_form_losses(8)[-1])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 9))


def test_an_image_logged_by_a_hook_to_a_broken_logger_does_not_end_the_run(caplog):
    class NoImages(Logger):
        def log_image(self, tag, image, step):
            raise ConnectionError("server gone")

    def log(trainer):
        trainer.logger.log_image("x", np.zeros((2, 2, 3)), trainer.global_step)

    quiet(max_epochs=1, logger=NoImages(), callbacks=[AtStep(1, log)]).fit(Scalar(), targets(1, 2))
    assert "NoImages failed in log_image at step 1: ConnectionError: server gone" in caplog.text


def test_a_directory_that_cannot_be_written_ends_the_run_at_its_first_record(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = quiet(max_epochs=1, logger=nf.CSVLogger(tmp_path / "file"))
    with pytest.raises(nf.ConfigurationError, match="CSVLogger cannot write"):
        trainer.fit(Scalar(), targets(1, 2))


FULL_DISK = """
import logging, resource, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
sys.path.insert(0, "tests/support")
from nets import Scalar, quiet, targets
import nnx_fit as nf

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

class Full(nf.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            (file,) = trainer.logger.log_dir.glob("events*")
            limit(file.stat().st_size + 10)  # less than a record: it is written in part

root = sys.argv[1]
loggers = [nf.TensorBoardLogger(root), nf.CSVLogger(root)]
trainer = quiet(max_epochs=1, log_every_n_steps=1, logger=loggers, callbacks=[Full()])
trainer.fit(Scalar(), targets(*[3.0] * 12))
limit(resource.RLIM_INFINITY)
loggers[0].log_metrics({"after": 1.0}, 12)
loggers[0].finalize("success")
print("steps", trainer.global_step)
"""


def test_a_full_disk_is_one_line_and_leaves_all_earlier_records_readable(tmp_path):
    pytest.importorskip("resource")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=root, check=True, capture_output=True, text=True
    )
    assert "steps 12" in done.stdout
    assert done.stdout.count("TensorBoardLogger failed in log_metrics") == 1
    assert "File too large" in done.stdout
    assert re.search(r"TensorBoardLogger: calls that failed.*of log_metrics", done.stdout)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == list(range(1, len(steps) + 1)) and 4 <= len(steps) < 12
    assert [event.value for event in events.Scalars("after")] == [1.0]
    rows = (tmp_path / "metrics.csv").read_text().split()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 13))]


def test_reports_carry_the_traceback_where_one_asks_for_it(caplog):
    logger = Flaky()
    attached(logger)
    logger.error = RuntimeError("broken")
    with caplog.at_level(logging.DEBUG, logger="nnx_fit.loggers.failures"):
        logger.log_metrics({"a": 1.0}, 1)
    assert "Traceback" in caplog.text
