"""Checkpoint directories: completeness, order, replacement, deletion."""

import shutil

import jax.numpy as jnp
import pytest

from nnx_fit.checkpoint import directories
from nnx_fit.checkpoint.checksums import sealed, unsealed
from nnx_fit.checkpoint.store import (
    CheckpointStore,
    delete_checkpoint,
    find_checkpoints,
    is_complete,
    load_arrays,
    load_meta,
)
from nnx_fit.errors import CheckpointError


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """One real checkpoint for each of three steps, saved once for the whole file."""
    directory = tmp_path_factory.mktemp("template")
    store = CheckpointStore()
    for step in (1, 2, 3):
        store.save(directory / f"step{step}", {"a": {"x": jnp.full(3, step)}}, {"global_step": step}, asynchronous=True)
    store.close()
    return directory


@pytest.fixture
def make(template, tmp_path):
    def copy(step, name):
        return shutil.copytree(template / f"step{step}", tmp_path / name)

    return copy


def test_found_checkpoints_are_complete_and_newest_first(make, tmp_path):
    make(2, "b")
    make(3, "a")
    make(1, "c")
    make(3, "x.orbax-checkpoint-tmp")
    (make(3, "killed") / "commit_success.txt").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["a", "b", "c"]
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_checkpoint_with_unreadable_values_is_passed_over_with_a_report(make, tmp_path, caplog):
    make(1, "good")
    (make(3, "bad") / "meta" / "meta.json").write_text('{"format": 1, "ind')
    assert [path.name for path in find_checkpoints(tmp_path)] == ["good"]
    assert "bad is damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"There is no checkpoint at .*nowhere(.|\n)*complete checkpoints in .*: good"),
        ("file", r"file is a file; a checkpoint is a directory"),
        ("other", r"other is not a checkpoint of nnx_fit"),
        ("killed", r"killed is incomplete: the process that wrote it ended"),
        ("future", r"future has format 99; .* update nnx_fit"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_the_reason(make, tmp_path, name, message):
    make(1, "good")
    (make(2, "killed") / "commit_success.txt").unlink()
    meta = make(2, "future") / "meta" / "meta.json"
    meta.write_bytes(sealed({**unsealed(meta.read_bytes()), "format": 99}))
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    for load in (load_meta, load_arrays):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)


def rewritten(path, **meta):
    """The checkpoint with other plain values, and a seal that is right."""
    file = path / "meta" / "meta.json"
    document = unsealed(file.read_bytes())
    file.write_bytes(sealed({**document, "meta": {**document["meta"], **meta}}))
    return path


def test_newest_is_of_the_latest_life_however_far_it_got(make, tmp_path):
    rewritten(make(3, "abandoned"), life=1)
    rewritten(make(1, "second"), life=2)
    rewritten(make(2, "third"), life=2)
    assert directories.next_life([tmp_path, tmp_path / "nowhere"]) == 3
    assert [path.name for path in find_checkpoints(tmp_path)] == ["third", "second", "abandoned"]
    assert directories.newest_undamaged(tmp_path) == tmp_path / "third"
    # Those from before lives were counted go by how far they got, and are older.
    make(2, "z").rename(tmp_path / "early")
    make(3, "late")
    assert [path.name for path in find_checkpoints(tmp_path)][-2:] == ["late", "early"]
    assert directories.next_life([tmp_path / "nowhere"]) == 1


def test_sealed_and_odd_is_damaged_and_passed_over(make, tmp_path, caplog):
    make(2, "good")
    path = rewritten(make(3, "odd"), global_step="x")
    with pytest.raises(CheckpointError, match=rf"{path} is damaged:\s+meta/meta.json .*meta.global_step is 'x'"):
        load_meta(path)
    assert directories.newest_undamaged(tmp_path) == tmp_path / "good"
    assert f"{path} is damaged" in caplog.text


def test_saving_over_a_link_or_deleting_it_leaves_what_it_leads_to(make, tmp_path):
    good = make(1, "good")
    (tmp_path / "link").symlink_to(good)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    store = CheckpointStore()
    for name in ("link", "nowhere"):
        store.save(tmp_path / name, {"a": {"x": jnp.ones(3)}}, {"global_step": 9}, asynchronous=False)
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "link", "nowhere"]
    assert [load_meta(tmp_path / name)["global_step"] for name in ("good", "link", "nowhere")] == [1, 9, 9]
    (tmp_path / "again").symlink_to(good)
    delete_checkpoint(tmp_path / "again")
    assert is_complete(good) and not (tmp_path / "again").is_symlink()


def test_deleted_checkpoint_stops_counting_first(make, tmp_path, monkeypatch):
    path = make(1, "a")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directories.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            delete_checkpoint(path)
    assert path.exists() and not is_complete(path)
    delete_checkpoint(path)
    assert not path.exists()


@pytest.mark.parametrize("moment", range(4))
def test_kill_at_any_moment_of_a_replacement_loses_nothing(make, tmp_path, monkeypatch, moment):
    """Step 3 takes the place of step 1; the process dies before its n-th change to the disk."""
    make(1, "last")
    new = make(3, "last.nnx-fit-next")
    changes = 0

    def counted(change):
        def run(*args, **kwargs):
            nonlocal changes
            changes += 1
            if changes > moment:
                raise KeyboardInterrupt
            return change(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(directories.Path, "rename", counted(directories.Path.rename))
        patch.setattr(directories.Path, "unlink", counted(directories.Path.unlink))
        patch.setattr(directories.shutil, "rmtree", counted(directories.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            directories.take_place(new, tmp_path / "last")
    assert load_meta(find_checkpoints(tmp_path)[0]) == {"global_step": 3}
    directories.settle(tmp_path / "last")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert load_meta(tmp_path / "last") == {"global_step": 3}


def test_what_a_killed_save_had_written_is_no_checkpoint_and_goes_with_the_next_one(make, tmp_path):
    for name in ("a.nnx-fit-writing", "a.nnx-fit-writing.orbax-checkpoint-tmp"):
        assert not is_complete(make(3, name))
        with pytest.raises(CheckpointError, match=r"is incomplete.*not at its end"):
            load_meta(tmp_path / name)
    make(1, "b")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["b"]
    assert directories.newest_undamaged(tmp_path) == tmp_path / "b"
    store = CheckpointStore()
    store.save(tmp_path / "a", {"a": {"x": jnp.ones(3)}}, {"global_step": 9}, asynchronous=False)
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
