"""`logger.experiment`: tensorboardX's own calls, in the logger's own file."""

import numpy as np
import pytest

from nnx_fit.loggers.tensorboard import TensorBoardLogger

pytest.importorskip("tensorboard")


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_records_of_both_kinds_of_call_are_in_one_file_in_order(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    writer = logger.experiment
    assert logger.experiment is writer
    writer.add_scalar("b", 2.0, 2)
    writer.flush()
    writer.close()
    logger.log_metrics({"a": 3.0}, 3)
    writer.add_text("note", "hello", np.int64(4))
    with writer.use_metadata(global_step=5):
        writer.add_scalar("b", 6.0)
    logger.finalize("success")
    assert len(list(tmp_path.iterdir())) == 1
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(1, 1.0), (3, 3.0)]
    assert [(e.step, e.value) for e in events.Scalars("b")] == [(2, 2.0), (5, 6.0)]
    assert events.Tensors("note/text_summary")[0].step == 4


def test_asking_for_it_writes_nothing(tmp_path):
    logger = TensorBoardLogger(tmp_path / "run")
    assert logger.experiment.logdir == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failing_record_through_it_does_not_end_the_run(tmp_path, caplog):
    import shutil

    from nnx_fit.loggers.fan_out import FanOut

    logger = TensorBoardLogger(tmp_path / "run")
    FanOut([logger])
    logger.experiment.add_scalar("a", 1.0, 1)
    shutil.rmtree(tmp_path / "run")
    logger.experiment.add_scalar("a", 2.0, 2)
    logger.experiment.add_scalar("a", 3.0, 3)
    logger.finalize("success")
    assert caplog.text.count("TensorBoardLogger failed") == 1
    assert [e.step for e in read(tmp_path / "run").Scalars("a")] == [3]
