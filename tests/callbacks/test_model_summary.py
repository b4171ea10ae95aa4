"""ModelSummary."""

import io
import sys

import nets
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.model_summary import readable_bytes, summarize, totals
from nnx_fit.state.partition import Row


def row(path, role="params", count=10, kind="Param"):
    return Row(path, role, kind, f"({count},)", "float32", count, 4 * count)


ROWS = [
    row("encoder.0.kernel"),
    row("encoder.0.mean", "stats", 3, "BatchStat"),
    row("encoder.1.kernel"),
    row("encoder.1.mean", "stats", 3, "BatchStat"),
    row("head.kernel", "frozen", 5),
    row("rngs.key", "rngs", 1, "RngKey"),
]


def cells(lines):
    return [(line.path, line.role, line.count) for line in lines]


def test_short_modules_are_shown_in_full():
    assert [line.path for line in summarize(ROWS, -1, 40)] == [row.path for row in ROWS]


def test_depth_joins_by_path_and_role():
    assert cells(summarize(ROWS, 1, 40)) == [
        ("encoder.*", "params", 20),
        ("encoder.*", "stats", 6),
        ("head.kernel", "frozen", 5),
        ("rngs.key", "rngs", 1),
    ]


def test_long_modules_are_joined_at_the_greatest_depth_that_fits():
    deep = [row(f"blocks.{i}.{name}") for i in range(10) for name in ("kernel", "bias")] + ROWS
    assert len(summarize(deep, -1, 20)) == 16
    assert summarize(deep, -1, 20)[0].path == "blocks.0.*"
    assert len(summarize(deep, -1, 5)) == 5


def test_flat_modules_are_cut_with_a_line_for_the_rest():
    lines = summarize([row(f"w{i}") for i in range(100)], -1, 10)
    assert len(lines) == 10
    assert cells(lines)[-1] == ("... and 91 more", "", 910)


def test_totals_cover_everything():
    text = "\n".join(totals(ROWS))
    assert [line.split()[:4:3] for line in text.splitlines()] == [
        ["params", "20"], ["frozen", "5"], ["stats", "6"], ["rngs", "1"],
    ]  # fmt: skip


def test_sizes_are_readable():
    assert [readable_bytes(size) for size in (0, 1023, 1536, 5 * 2**20)] == ["0 B", "1023 B", "1.5 KiB", "5.0 MiB"]


def run(summary):
    """A fit that ends before its first step."""
    trainer = nets.quiet(max_epochs=1, limit_train_batches=0, callbacks=summary)
    trainer.fit(nets.Regressor(rngs=nnx.Rngs(0)), nets.loader(16))


def printed(summary, capsys):
    run(summary)
    return capsys.readouterr().out


def test_table_is_printed_before_training(capsys):
    out = printed(nf.ModelSummary(), capsys)
    assert "Regressor: 16 Variables" in out
    for path in ("blocks.0.linear.kernel", "blocks.1.norm.mean", "head.bias"):
        assert path in out
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["params", "frozen", "stats", "rngs"]


def test_depth_zero_prints_nothing(capsys):
    assert printed(nf.ModelSummary(0), capsys) == ""


def test_terminal_gets_a_table(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", terminal)
    run(nf.ModelSummary(1))
    assert "━" in terminal.getvalue() and "blocks.*" in terminal.getvalue()


def test_wrong_depth_is_named():
    with pytest.raises(nf.ConfigurationError, match="max_depth=-2"):
        nf.ModelSummary(-2)
