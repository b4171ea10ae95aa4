"""Event files, read back with TensorBoard's own record reader."""

import contextlib

import pytest
from full_disk import file_size_limit

from nnx_fit.loggers.event_file import EventFile, drop_ending

pytest.importorskip("tensorboard")


def records(path):
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader, found = PyRecordReader_New(str(path)), []
    with contextlib.suppress(errors.OutOfRangeError):
        while True:
            reader.GetNext()
            found.append(reader.record())
    return found


def test_records_come_back_as_they_were_written(tmp_path):
    file = EventFile(tmp_path / "e", [b"head"])
    file.write(b"")
    file.write(b"x" * 100_000)
    assert records(tmp_path / "e") == [b"head", b"", b"x" * 100_000]  # before it is closed
    file.sync()
    file.close()


def test_a_file_that_exists_is_never_truncated(tmp_path):
    (tmp_path / "e").write_text("there")
    with pytest.raises(FileExistsError):
        EventFile(tmp_path / "e", [])
    assert (tmp_path / "e").read_text() == "there"


def test_a_record_that_was_written_in_part_is_taken_back(tmp_path):
    file = EventFile(tmp_path / "e", [b"first"])
    with file_size_limit((tmp_path / "e").stat().st_size + 30), pytest.raises(OSError, match="too large"):
        file.write(b"second" * 10)
    file.write(b"3")
    file.close()
    assert records(tmp_path / "e") == [b"first", b"3"]
    assert (tmp_path / "e").stat().st_size == 2 * 16 + len(b"first3")  # 16 bytes of frame for each


def test_a_removed_file_is_an_error_and_not_silence(tmp_path):
    file = EventFile(tmp_path / "e", [])
    (tmp_path / "e").unlink()
    with pytest.raises(FileNotFoundError, match="removed"):
        file.write(b"lost")
    file.close()


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ([b"a", b"the end"], [b"a"]),
        ([b"the end", b"a"], [b"the end", b"a"]),
        ([b"the end"], []),
        ([], []),
    ],
)
def test_only_a_marked_last_record_is_dropped(tmp_path, written, left):
    EventFile(tmp_path / "e", written).close()
    drop_ending(tmp_path / "e", b"end")
    assert records(tmp_path / "e") == left


def test_an_unfinished_record_at_the_end_is_left_alone(tmp_path):
    EventFile(tmp_path / "e", [b"a", b"b"]).close()
    content = (tmp_path / "e").read_bytes()[:-3]
    (tmp_path / "e").write_bytes(content)
    drop_ending(tmp_path / "e", b"b")
    assert (tmp_path / "e").read_bytes() == content
