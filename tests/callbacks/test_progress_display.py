"""The line that stands for a stage, and how often it is written."""

import io
import math

import pytest
from rich.console import Console

from nnx_fit.callbacks.progress_display import LiveDisplay, PlainDisplay, progress_line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("Epoch 0/9", 20, 45, 2.2, {"loss": 0.1234567}), "Epoch 0/9: 20/45 [00:02<00:02, 9.09 it/s] loss=0.1235"),
        (("Epoch 3", 7, math.inf, 70.0, {}), "Epoch 3: 7 [01:10, 0.1 it/s]"),
        (("Test", 0, 4, 0.0, {}), "Test: 0/4 [00:00, ? it/s]"),
        (("Test", 4, 4, 3661.0, {"a": 1.0, "b": float("nan")}), "Test: 4/4 [1:01:01, 0.00109 it/s] a=1 b=nan"),
    ],
)
def test_stage_in_one_line(arguments, line):
    assert progress_line(*arguments) == line


def test_long_stages_report_now_and_then(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("nnx_fit.callbacks.progress_display.time.monotonic", lambda: now)
    display = PlainDisplay(30.0)
    display.begin("train", "Epoch 0", 100)
    pauses = []
    for now in (10.0, 30.0):
        pauses.append(display.update("train", int(now), {}))
    now = 45.0
    display.end("train", 100, {})
    assert pauses == [20.0, 30.0]
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 0: 30/100 [00:30<01:10, 1 it/s]",
        "Epoch 0: 100/100 [00:45, 2.22 it/s]",
    ]


@pytest.mark.parametrize("leave", [False, True])
def test_bars_come_and_go(monkeypatch, leave):
    now = 0.0
    monkeypatch.setattr("nnx_fit.callbacks.progress_display.time.monotonic", lambda: now)
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=140), leave=leave)
    display.begin("train", "Epoch 0", 2)
    now = 1.0
    assert display.update("train", 1, {"loss": 0.5}) == pytest.approx(0.1)
    assert "loss=0.5" in stream.getvalue()
    drawn = len(stream.getvalue())
    now = 1.05
    assert display.update("train", 2, {"loss": 0.25}) == pytest.approx(0.05)
    assert len(stream.getvalue()) == drawn, "redrawn at most ten times a second"
    now = 2.0
    display.begin("validate", "Validation", math.inf)
    now = 3.0
    display.update("validate", 7, {})
    assert "Validation" in stream.getvalue()
    display.end("validate", 7, {})
    display.end("train", 2, {})
    now = 4.0
    display.begin("train", "Epoch 1", 2)
    display.end("train", 2, {})
    display.close()
    assert "Validation" not in stream.getvalue()[-300:]
    assert ("Epoch 0" in stream.getvalue()[-300:]) is leave
