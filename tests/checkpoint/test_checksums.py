"""Whatever happens to the files of a checkpoint, it is found out and the file is named."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from nnx_fit.checkpoint import checksums
from nnx_fit.checkpoint.directories import check_files, newest_undamaged
from nnx_fit.checkpoint.store import CheckpointStore, load_arrays, load_meta
from nnx_fit.errors import CheckpointError

ARRAYS = {"params": {"w": jnp.arange(12.0).reshape(3, 4), "half": jnp.ones(3, jnp.bfloat16)}, "rngs": {}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Three checkpoints, the second a little further than the first; nothing changes them for good."""
    directory = tmp_path_factory.mktemp("checkpoints")
    store = CheckpointStore()
    for step in (1, 2):
        arrays = ARRAYS | {"rngs": {"key": jax.random.key(step)}}
        store.save(directory / f"step={step}", arrays, {"global_step": step, "name": "é"}, asynchronous=True)
    store.close()
    return directory


def files(directory):
    return sorted(path for path in (directory / "step=2").rglob("*") if path.is_file())


@st.composite
def damages(draw):
    """How to damage a file of some size: the place and the bit that flips, or what is left of it, or nothing."""
    kind = draw(st.sampled_from(["flip", "flip", "truncate", "delete", "write"]))
    return draw(st.integers(0, 10**6)), kind, draw(st.integers(0, 10**6)), draw(st.integers(0, 7))


def damage(path: Path, kind: str, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: place % len(content)])
    elif kind == "write":
        path.write_bytes(bytes(content) + b"\n" * (1 + place % 5))
    else:
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)


@settings(max_examples=100, deadline=None)
@given(damages())
def test_any_damage_to_any_file_is_an_error_that_names_it(directory, what):
    which, *how = what
    path = files(directory)[which % len(files(directory))]
    content = path.read_bytes()
    try:
        damage(path, *how)
        for load in (check_files, load_arrays):
            with pytest.raises(CheckpointError) as caught:
                load(directory / "step=2")
            message = str(caught.value)
            assert path.relative_to(directory / "step=2").as_posix() in message
            assert "step=1" in message.partition("Fix: ")[2]
        assert newest_undamaged(directory) == directory / "step=1"
    finally:
        path.write_bytes(content)
    assert newest_undamaged(directory) == directory / "step=2"
    np.testing.assert_array_equal(load_arrays(directory / "step=2")["params"]["w"], ARRAYS["params"]["w"])


def test_a_file_that_ends_with_its_own_checksum_is_told_from_another_one(tmp_path):
    """Orbax writes such files, and of each of them the CRC-32C is one and the same."""
    bodies = [b"one" * 9, b"two" * 9]
    ended = [body + crc32c(body).to_bytes(4, "little") for body in bodies]
    assert crc32c(ended[0]) == crc32c(ended[1])
    (tmp_path / "file").write_bytes(ended[0])
    sums = checksums.sums_of(tmp_path)
    (tmp_path / "file").write_bytes(ended[1])
    assert checksums.damage(tmp_path, sums) == ["file has changed: its checksum is another one"]


def test_checkpoints_of_before_there_were_checksums_load(directory, tmp_path):
    copy = Path(shutil.copytree(directory / "step=2", tmp_path / "copy"))
    document = checksums.unsealed((copy / "meta" / "meta.json").read_bytes())
    del document["files"]
    sealed = checksums.sealed(document)
    (copy / "meta" / "meta.json").write_bytes(sealed[: sealed.rindex(b', "checksum"')] + b"}")
    check_files(copy)
    assert load_meta(copy) == {"global_step": 2, "name": "é"}
    np.testing.assert_array_equal(load_arrays(copy)["params"]["w"], ARRAYS["params"]["w"])


def test_files_that_somebody_added_do_no_harm(directory, tmp_path):
    copy = Path(shutil.copytree(directory / "step=2", tmp_path / "copy"))
    (copy / "notes.txt").write_text("the good one")
    check_files(copy)


@pytest.mark.parametrize(
    "document", [{"files": {}}, {"a": [1, "é", None, float("inf")], "files": {"x": [3, "00"]}, "checksum": "00000000"}]
)
def test_a_sealed_document_comes_back_and_no_other_byte_does(document):
    text = checksums.sealed(document)
    assert checksums.unsealed(text) == document
    for place in range(len(text) - 1):
        with pytest.raises(ValueError):
            checksums.unsealed(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])


def test_what_is_wrong_with_each_file_is_said(tmp_path):
    for name in ("same", "changed", "short", "gone"):
        (tmp_path / name).write_bytes(b"0123456789")
    sums = checksums.sums_of(tmp_path)
    assert set(sums) == {"same", "changed", "short", "gone"}
    assert sums["same"] == (10, "a684c7c6")  # zlib.crc32(b"0123456789")
    (tmp_path / "changed").write_bytes(b"0123456780")
    (tmp_path / "short").write_bytes(b"0123")
    (tmp_path / "gone").unlink()
    assert sorted(checksums.damage(tmp_path, sums)) == [
        "changed has changed: its checksum is another one",
        "gone is missing",
        "short has 4 bytes, 10 were written",
    ]


def test_a_small_file_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    file, events = tmp_path / "outcome.json", []
    file.write_text("old")

    def noted(name, change):
        def run(*args):
            events.append((name, file.read_text()))
            return change(*args)

        return run

    monkeypatch.setattr(os, "fsync", noted("on the disk", os.fsync))
    monkeypatch.setattr(os, "replace", noted("named", os.replace))
    checksums.write_at_once(file, "new")
    assert events == [("on the disk", "old"), ("named", "old")]
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    assert file.read_text() == "new"
