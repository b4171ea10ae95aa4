"""RichProgressBar: plain lines in a pipe, bars on a terminal, and no waiting."""

import io
import logging
import re
import sys

import nets
import pytest

import nnx_fit as nf


class Shown(nets.Scalar):
    """Shows its weight in the progress bar, and no other metric."""

    def training_step(self, batch):
        self.log("w", self.w[...], prog_bar=True)
        return super().training_step(batch)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def to_terminal(monkeypatch):
    """Makes standard output a terminal, for the rest of the test."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "__stdout__", stream)
    return stream


def assert_given_back(terminal):
    """The cursor is shown again, and standard output is as before."""
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l") >= 0
    assert sys.stdout is terminal


def trainer_with(bar, **options):
    return nets.quiet(callbacks=bar, **{"max_epochs": 2, "jit": False, **options})


def fit(bar, module=None, **options):
    trainer = trainer_with(bar, **options)
    trainer.fit(module or nets.Scalar(), nets.targets(0.5, 0.5, 0.5), nets.targets(1.0))
    return trainer


def test_pipe_gets_one_line_per_epoch(capsys):
    fit(nf.RichProgressBar(), num_sanity_val_steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\[.*\]", "[]", line) for line in lines] == ["Epoch 0/1: 3/3 []", "Epoch 1/1: 3/3 []"]
    assert re.fullmatch(r"Epoch 0/1: 3/3 \[\d\d:\d\d, .* it/s\]", lines[0])


def test_line_shows_the_metrics_that_ask_for_it(capsys):
    fit(nf.RichProgressBar(), Shown(learning_rate=0.0), max_epochs=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("it/s] w=1")


def test_test_and_prediction_get_a_line(capsys):
    class Everything(nets.Scalar):
        def test_step(self, batch):
            self.log("test/target", batch["target"].mean())

        def predict_step(self, batch):
            return batch["target"]

    trainer, module, batches = trainer_with(nf.RichProgressBar()), Everything(), nets.targets(1.0, 2.0)
    for verb in (trainer.test, trainer.predict, trainer.validate):
        verb(module, batches)
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(" [")[0] for line in out] == ["Test: 2/2", "Prediction: 2/2"]


def test_lines_go_through_logging_where_it_is_set_up(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="nnx_fit"):
        fit(nf.RichProgressBar())
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["Epoch 0/1", "Epoch 1/1"]
    assert capsys.readouterr().out == ""


def test_refresh_rate_zero_shows_nothing(capsys):
    fit(nf.RichProgressBar(0))
    assert capsys.readouterr().out == ""


def test_epochs_without_a_bound_have_no_total(capsys):
    fit(nf.RichProgressBar(), max_epochs=-1, max_steps=4)
    assert [line.partition(" [")[0] for line in capsys.readouterr().out.splitlines()] == [
        "Epoch 0: 3/3",
        "Epoch 1: 1/3",
    ]


def test_terminal_gets_bars(monkeypatch):
    terminal = to_terminal(monkeypatch)

    class Talks(nf.Callback):
        def on_train_epoch_end(self, trainer, module):
            print("said in between")

    fit([nf.RichProgressBar(leave=True), Talks()], Shown(learning_rate=0.0), max_epochs=1)
    shown = terminal.getvalue()
    for part in ("Epoch 0/0", "3/3", "it/s", "w=1", "━", "said in between"):
        assert part in shown
    assert_given_back(terminal)


def test_terminal_is_given_back_after_an_error(monkeypatch):
    terminal = to_terminal(monkeypatch)

    class Fails(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit([nf.RichProgressBar(), Fails()])
    assert_given_back(terminal)


def test_logging_prints_above_the_bars(monkeypatch):
    terminal = to_terminal(monkeypatch)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("nnx_fit")
    logger.addHandler(handler)
    during = []

    class Looks(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            during.append(handler.stream is terminal)

    try:
        fit([nf.RichProgressBar(), Looks()])
    finally:
        logger.removeHandler(handler)
    assert not any(during) and handler.stream is terminal


def test_device_is_not_waited_for(monkeypatch):
    read = []
    monkeypatch.setattr(nf.Trainer, "callback_metrics", property(lambda self: read.append("waited") or {}))
    fit(nf.RichProgressBar())
    assert read == []
