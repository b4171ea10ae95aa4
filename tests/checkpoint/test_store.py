"""CheckpointStore: what goes in comes out, with real Orbax files."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnx_fit.checkpoint.store import CheckpointStore, find_checkpoints, is_complete, load_arrays, load_meta
from nnx_fit.errors import CheckpointError

META = {"global_step": 7, "nested": {"list": [1, 2.5, None, True], "text": "é"}, "inf": float("inf")}


@pytest.fixture
def store():
    store = CheckpointStore()
    yield store
    store.close()


def arrays_of_every_kind():
    return {
        "params": {
            "net.layers.0.kernel": jax.random.normal(jax.random.key(0), (16, 8)),
            "net.layers.10.kernel": jnp.full((3,), 1.5, jnp.bfloat16),
            "net": jnp.float32(3.25),
            'odd/a b\\"%.é:*?': jnp.arange(3),
            "": jnp.int32(1),
            "..": jnp.uint8(2),
            "%": jnp.float16(0.5),
        },
        "rngs": {
            "dropout.key": jax.random.key(3),
            "dropout.count": jnp.uint32(2**32 - 1),
            "keys": jax.random.split(jax.random.key(1, impl="rbg"), 4),
        },
        "host": {
            "float64": np.linspace(0, 1, 5),
            "int64": np.int64(2**60),
            "flag": True,
            "python": 2.5,
            "bf16": np.ones((2, 2), jnp.bfloat16),
        },
        "no.elements": {"a": np.zeros((0, 3), np.float32), "b": jnp.zeros((2, 0), jnp.bfloat16)},
        "no": {"elements.a": jnp.ones(())},
        "nothing": {},
    }


def same(a, b):
    if isinstance(b, jax.Array) and jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
        assert a.dtype == b.dtype
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    else:
        assert isinstance(a, np.ndarray)
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_is_bit_exact(store, tmp_path, asynchronous):
    arrays = arrays_of_every_kind()
    store.save(tmp_path / "a b", arrays, META, asynchronous=asynchronous)
    store.wait()
    assert load_meta(tmp_path / "a b") == META
    loaded = load_arrays(tmp_path / "a b")
    assert {group: list(entries) for group, entries in loaded.items()} == {
        group: list(entries) for group, entries in arrays.items()
    }
    for group, entries in arrays.items():
        assert [name for name, value in entries.items() if not same(loaded[group][name], value)] == []


def test_one_group_is_read_alone(store, tmp_path):
    store.save(tmp_path / "c", arrays_of_every_kind(), META, asynchronous=False)
    loaded = load_arrays(tmp_path / "c", ["rngs", "nothing"])
    assert list(loaded) == ["rngs", "nothing"] and loaded["nothing"] == {}
    assert same(loaded["rngs"]["dropout.key"], jax.random.key(3))
    with pytest.raises(CheckpointError, match="does not hold optimizer; it holds params, rngs"):
        load_arrays(tmp_path / "c", ["optimizer"])


def test_no_arrays_at_all(store, tmp_path):
    store.save(tmp_path / "c", {"params": {}}, META, asynchronous=False)
    assert load_arrays(tmp_path / "c") == {"params": {}}


def test_asynchronous_save_holds_the_values_at_the_time_of_the_call(store, tmp_path):
    host = np.zeros(100_000)
    device = jnp.zeros(1_000_000)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    device = step(device)
    store.save(tmp_path / "c", {"a": {"host": host, "device": device}}, META, asynchronous=True)
    host += 5
    for _ in range(20):
        device = step(device)
    jax.block_until_ready(device)
    store.wait()
    loaded = load_arrays(tmp_path / "c")["a"]
    assert (loaded["host"] == 0).all() and (loaded["device"] == 1).all()


def test_relative_paths_are_taken_from_the_working_directory(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.save(Path("c"), {"a": {"x": jnp.ones(2)}}, META, asynchronous=False)
    assert is_complete(tmp_path / "c")
    assert list(load_arrays("c")["a"]) == ["x"]


def test_saving_again_replaces_and_leaves_nothing_else(store, tmp_path):
    for value in (1, 2, 3):
        store.save(tmp_path / "last", {"a": {"x": jnp.full(2, value)}}, {"global_step": value}, asynchronous=True)
    store.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert load_meta(tmp_path / "last") == {"global_step": 3}
    assert load_arrays(tmp_path / "last")["a"]["x"].tolist() == [3, 3]


def test_directory_of_somebody_else_is_never_replaced(store, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("ten years")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        store.save(tmp_path / "thesis", {"a": {"x": jnp.ones(2)}}, META, asynchronous=False)
    assert (tmp_path / "thesis" / "text.tex").read_text() == "ten years"


def test_failed_save_is_an_error_and_the_next_one_works(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/c could not be written(.|\n)*Fix: check"):
        store.save(tmp_path / "file" / "c", {"a": {"x": jnp.ones(2)}}, META, asynchronous=False)
    store.save(tmp_path / "c", {"a": {"x": jnp.ones(2)}}, META, asynchronous=False)
    assert is_complete(tmp_path / "c")


def test_background_failure_is_raised_by_wait(store, tmp_path):
    store.save(tmp_path / "c", {"a": {"x": jnp.ones(2)}}, META, asynchronous=False)
    limit = f"""
import resource, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp
from nnx_fit.checkpoint.store import CheckpointStore, load_arrays
from nnx_fit.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = CheckpointStore()
x = jax.random.normal(jax.random.key(0), (1_000_000,))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
store.save(Path({str(tmp_path)!r}) / "c", {{"a": {{"x": x}}}}, {{}}, asynchronous=True)
try:
    store.wait()
except CheckpointError as error:
    assert "/c could not be written" in str(error), error
    store.close()
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", limit], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert load_arrays(tmp_path / "c")["a"]["x"].tolist() == [1, 1]


def test_plain_values_that_are_not_json_are_refused_before_anything_is_written(store, tmp_path):
    with pytest.raises(CheckpointError, match=r"not JSON(.|\n)*on_save_checkpoint"):
        store.save(tmp_path / "c", {}, {"x": object()}, asynchronous=False)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
import jax
from nnx_fit.checkpoint.store import CheckpointStore
store = CheckpointStore()
arrays = {"params": {f"layer.{i}": jax.random.normal(jax.random.key(i), (64, 64)) for i in range(200)}}
for step, name in enumerate(["first", "last", "last", "last"]):
    store.save(Path(sys.argv[1]) / name, arrays, {"global_step": step}, asynchronous=True)
    print(step, flush=True)
    sys.stdin.readline()
store.close()
"""


@pytest.mark.parametrize("saves", [1, 3])
def test_killed_save_never_leaves_a_broken_checkpoint(tmp_path, saves):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    for save in range(saves):
        assert process.stdout.readline() == f"{save}\n"
        if save < saves - 1:
            process.stdin.write("\n")
            process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = find_checkpoints(tmp_path)
    assert {path for path in tmp_path.iterdir() if is_complete(path)} == set(found)
    # At most the save under way is lost, and every checkpoint that counts as one can be read.
    assert len(found) >= saves - 1
    for path in found:
        assert len(load_arrays(path)["params"]) == 200
        assert load_meta(path)["global_step"] < saves
    if saves > 1:
        assert load_meta(found[0])["global_step"] >= saves - 2


def test_orbax_does_not_write_into_the_runs_log(store, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        store.save(tmp_path / "c", {"a": {"x": jnp.ones(2)}}, META, asynchronous=False)
        load_arrays(tmp_path / "c")
    assert [record for record in caplog.records if "orbax" in record.pathname] == []


def test_damaged_files_are_one_clear_error(store, tmp_path):
    store.save(tmp_path / "c", {"a": {"x": jax.random.normal(jax.random.key(0), (1000,))}}, META, asynchronous=False)
    for file in (tmp_path / "c" / "arrays").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"checkpoint .*/c is damaged"):
        load_arrays(tmp_path / "c")
