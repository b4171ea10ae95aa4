"""A file is whole or not there; a damaged, foreign or newer one is one error that says so."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import textwrap
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import nnx_fit as nf
from nnx_fit.export import files
from nnx_fit.export.files import Entry, read, write

ENTRIES = {
    "kernel": Entry.of(jnp.arange(64.0).reshape(8, 8), "params"),
    "key": Entry.of(jax.random.key(3, impl="rbg"), "rngs"),
    "transposed": Entry.of(np.arange(6.0).reshape(2, 3).T, "stats"),
}


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "x.safetensors"
    write(file, "weights", ENTRIES, {"note": [1, None]})
    return file


def test_what_is_read_is_what_was_written(file):
    found = read(file, ("weights",))
    assert found.about == {"note": [1, None]}
    assert list(found.entries) == list(ENTRIES)
    for name, entry in ENTRIES.items():
        assert (found.entries[name].role, found.entries[name].prng) == (entry.role, entry.prng)
        np.testing.assert_array_equal(found.entries[name].array, entry.array)
    assert found.entries["key"].value == jax.random.key(3, impl="rbg")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_every_flipped_byte_and_every_truncation_is_an_error(file):
    whole = file.read_bytes()
    expected = read(file, ("weights",)).entries
    silent = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(bytes(damaged))
        try:
            found = read(file, ("weights",)).entries
        except nf.CheckpointError as error:
            assert str(file) in str(error)
        else:
            silent += [place] if _differ(found, expected) else []
    assert silent == []
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(nf.CheckpointError, match="is damaged, or no safetensors file"):
            read(file, ("weights",))


def _differ(found, expected):
    return found.keys() != expected.keys() or any(
        found[name].role != entry.role
        or found[name].array.shape != entry.array.shape
        or found[name].array.dtype != entry.array.dtype
        or (found[name].array != entry.array).any()
        for name, entry in expected.items()
    )


def test_a_flipped_weight_is_named(file):
    whole = bytearray(file.read_bytes())
    place = whole.find(np.arange(64, dtype=np.float32).tobytes())
    whole[place + 40] ^= 1
    file.write_bytes(bytes(whole))
    with pytest.raises(nf.CheckpointError, match="`kernel` is not what was written"):
        read(file, ("weights",))


def test_a_newer_format_is_an_error_that_says_what_to_do(file):
    text = json.dumps({"format": files.FORMAT + 1, "kind": "weights", "nnx_fit": "9.0", "arrays": {}})
    save_file({}, file, metadata={"nnx_fit": text, "nnx_fit_crc32": str(zlib.crc32(text.encode()))})
    with pytest.raises(nf.CheckpointError, match=r"format 2 and was written by nnx_fit 9\.0(?s:.)*update nnx_fit"):
        read(file, ("weights",))


@pytest.mark.parametrize(
    ("content", "kinds", "message"),
    [
        (b"no safetensors at all, but long enough to be looked at", ("weights", None), "is damaged, or no safetensors"),
        (struct.pack("<Q", 2**60) + b"{}", ("weights", None), "is damaged, or no safetensors"),
        (None, ("program",), "is a weights file of nnx_fit; expected one of kind program(?s:.)*save_program"),
    ],
)
def test_a_foreign_file_is_an_error(content, kinds, message, file):
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(nf.CheckpointError, match=message):
        read(file, kinds)


def test_a_file_of_another_library_will_do_where_it_is_asked_for(file):
    save_file({"a": np.ones(2)}, file)
    assert read(file, ("weights", None)).entries["a"].role is None
    with pytest.raises(nf.CheckpointError, match="that nnx_fit did not write"):
        read(file, ("program",))


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(nf.CheckpointError, match="does not exist"):
        read(tmp_path / "nothing", ("weights",))
    with pytest.raises(nf.CheckpointError, match="is a directory"):
        read(tmp_path, ("weights",))


def test_what_cannot_be_written_leaves_what_was_there(file, tmp_path):
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = f"""
        import resource, signal
        import numpy as np
        import nnx_fit as nf
        from nnx_fit.export.files import Entry, write
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {limits[1]}))
        try:
            write({str(file)!r}, "weights", {{"a": Entry.of(np.zeros(100_000), "params")}}, {{}})
        except nf.CheckpointError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "could not be written" in done.stdout, done.stderr
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_who_reads_the_old_file_reads_it_to_its_end(file):
    before = file.read_bytes()
    with file.open("rb") as opened:
        start = opened.read(50)
        write(file, "weights", {"kernel": Entry.of(np.zeros(3), "params")}, {})
        assert start + opened.read() == before
    assert list(read(file, ("weights",)).entries) == ["kernel"]


def test_a_place_that_cannot_be_is_an_error(file):
    with pytest.raises(nf.CheckpointError, match="could not be written"):
        write(file / "below", "weights", ENTRIES, {})
    with pytest.raises(nf.CheckpointError, match="could not be written"):
        write(file.parent, "weights", ENTRIES, {})


def test_directories_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "x", "weights", ENTRIES, {})
    assert list(read(tmp_path / "a" / "b" / "x", ("weights",)).entries) == list(ENTRIES)


@pytest.mark.parametrize("package", ["safetensors", "flatbuffers"])
def test_a_missing_package_is_named_with_its_extra(package, file):
    write(file, "program", {files.PROGRAM: Entry.of(np.zeros(9, np.uint8), "program")}, {})
    code = f"""
        import sys
        sys.modules[{package!r}] = None
        import nnx_fit as nf
        try:
            nf.export.load_program({str(file)!r})
        except nf.ConfigurationError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    expected = f'needs {package}, which is not installed. Fix: pip install "nnx-fit[export]"'
    assert expected in done.stdout, done.stderr
