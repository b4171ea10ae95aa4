"""The documentation tells the truth: its code is run, and what stands below a piece of code is what that code says.

A page is run from top to bottom in one namespace. A `text` block right after a `python` block is what the code prints,
logs and warns of, and the error that it ends with, if it does. To write the blocks of a page anew after a message
changed: `python tests/test_docs.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["state.md", "from_lightning.md", "export.md", "checkpoints.md"]

_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What stands in a page for the folder that the code runs in.
HOME = "/home/me/project"


@dataclasses.dataclass
class Snippet:
    """A piece of code with the block below it; the span is that block's content in the page."""

    code: str
    line: int
    expected: str | None = None
    span: tuple[int, int] = (0, 0)


def snippets(page: str) -> list[Snippet]:
    found: list[Snippet] = []
    end = 0
    for block in _BLOCK.finditer(page):
        if block[1] == "python":
            found.append(Snippet(block[2], page.count("\n", 0, block.start()) + 1))
        else:
            assert found and page[end : block.start()].strip() == "", f"no code stands right above:\n{block[2]}"
            found[-1].expected, found[-1].span = block[2], block.span(2)
        end = block.end()
    return found


def said_by(snippet: Snippet, namespace: dict[str, Any], name: str) -> str:
    """What a piece of code prints, logs and warns of, and the library's error that it ends with."""
    import nnx_fit as nf

    out = io.StringIO()
    with _heard(out):
        try:
            # Padded, so that a failure shows the line of the page.
            exec(compile("\n" * snippet.line + snippet.code, name, "exec"), namespace)
        except nf.NnxFitError as error:
            print(f"{type(error).__name__}: {error}", file=out)
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.MULTILINE).replace(str(Path.cwd()), HOME)


@contextlib.contextmanager
def _heard(out: io.StringIO) -> Iterator[None]:
    log, listener = logging.getLogger("nnx_fit"), logging.StreamHandler(out)
    listener.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, category, *rest: print(f"{category.__name__}: {message}", file=out)
            yield
    finally:
        log.removeHandler(listener)
        log.setLevel(level)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_is_what_the_library_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = type(sys)("page")
    monkeypatch.setitem(sys.modules, "page", module)
    vars(module)["__name__"] = "page"
    found = snippets((DOCS / name).read_text())
    assert sum(snippet.expected is not None for snippet in found) > 1
    differing = []
    for snippet in found:
        said = said_by(snippet, vars(module), name)
        if said != (snippet.expected or ""):
            differing.append(f"{name}:{snippet.line} says\n{said}\nand not\n{snippet.expected or 'nothing'}")
    assert not differing, "\n\n".join(differing)


def _rewrite(name: str, folder: str) -> None:
    """Puts what the code says now into the blocks of a page."""
    page = (DOCS / name).read_text()
    os.chdir(folder)
    namespace: dict[str, Any] = vars(sys.modules.setdefault("page", type(sys)("page")))
    said = [(snippet, said_by(snippet, namespace, name)) for snippet in snippets(page)]
    for snippet, text in reversed(said):
        if snippet.expected is not None:
            page = page[: snippet.span[0]] + text + page[snippet.span[1] :]
        elif text:
            print(f"{name}:{snippet.line} says, and no block shows it:\n{text}", file=sys.stderr)
    (DOCS / name).write_text(page)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        for each in PAGES:
            _rewrite(each, str(Path(scratch).resolve()))
