"""A document that is sealed is checked all the same, entry by entry, and what is wrong is said."""

import copy
import json

import pytest
from nets import Scalar, quiet, targets

from nnx_fit.checkpoint import documents
from nnx_fit.checkpoint.checksums import sealed, unsealed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a real run saved."""
    path = tmp_path_factory.mktemp("run") / "saved"
    trainer = quiet(max_epochs=1, jit=False)
    trainer.fit(Scalar(), targets(1, 2))
    trainer.save_checkpoint(path)
    document = unsealed((path / "meta" / "meta.json").read_bytes())
    return document


def changed(document, place, value):
    """A copy with another entry at a dotted place, or without it."""
    document = copy.deepcopy(document)
    *parents, last = place.split(".")
    node = document
    for name in parents:
        node = node[name]
    if value is MISSING:
        del node[last]
    else:
        node[last] = value
    return document


MISSING = object()


def test_what_a_run_saves_passes_and_so_does_an_older_one(saved):
    version, document = documents.read(sealed(saved))
    assert version == 1
    documents.check({name: document[name] for name in saved})
    for place in (
        "meta.life",
        "meta.progress.ended_step",
        "meta.loggers",
        "meta.hook",
        "meta.stop",
        "meta.precision",
        "files",
    ):
        documents.check(changed(saved, place, MISSING))
    bare = {"format": 1, "index": {"a": [{"name": "x"}]}, "meta": {}}
    documents.check(bare)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("meta", [], "meta is a list"),
        ("meta.stop", 5, "meta.stop is no reason"),
        ("meta.hook", "on_train_epoch_end", "meta.hook does not say"),
        ("meta.hook", ["on_train_epoch_end", [1]], "meta.hook does not say"),
        ("index", MISSING, "index is missing"),
        ("index.optimizer", MISSING, "index has no optimizer"),
        ("index.params", {"x": 1}, "index.params names no arrays"),
        ("index.params", [{"nam": "x"}], "index.params names no arrays"),
        ("files", {"arrays/manifest.ocdbt": 5}, "files has no sums for arrays/manifest.ocdbt"),
        ("files", {"/etc/passwd": [1, "00"]}, "files has no sums for /etc/passwd"),
        ("files", {"../x": [1, "00"]}, "files has no sums for ../x"),
        ("meta.global_step", "x", "meta.global_step is 'x'"),
        ("meta.global_step", None, "meta.global_step is None"),
        ("meta.life", 1.5, "meta.life is 1.5"),
        ("meta.hparams", None, "meta.hparams is nothing"),
        ("meta.progress", 3, "meta.progress is a int"),
        ("meta.progress.epoch", MISSING, "meta.progress has no epoch"),
        ("meta.progress.epoch", "soon", "meta.progress"),
        ("meta.progress.epoch", 1.5, "meta.progress.epoch is 1.5"),
        ("meta.progress.in_epoch", 1, "meta.progress.in_epoch is 1"),
        ("meta.callbacks", MISSING, "meta.callbacks is missing"),
        ("meta.ledger", [], "meta.ledger is a list"),
        ("meta.loader", MISSING, "meta.loader is missing"),
        ("meta.history", {"loss": [[1, "x"]]}, "meta.history.loss has other things than steps and values"),
    ],
)
def test_each_odd_entry_is_named(saved, place, value, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        documents.check(changed(saved, place, value))


@pytest.mark.parametrize("version", [None, "1", True, 1.0])
def test_format_is_a_whole_number(saved, version):
    with pytest.raises(ValueError, match="which format"):
        documents.read(sealed({**saved, "format": version}))


@pytest.mark.parametrize("text", [b"[" * 200_000, b"", b"null", b"[]", b"\xff\xfe{}"], ids=lambda text: repr(text[:8]))
def test_what_is_no_document_at_all_is_told_without_a_traceback_of_the_parser(text):
    with pytest.raises(ValueError, match=r"cut off|holds no document|nested deeper"):
        documents.read(text)
    with pytest.raises(ValueError):
        documents.read(json.dumps({"format": 1, "files": {}}).encode())
