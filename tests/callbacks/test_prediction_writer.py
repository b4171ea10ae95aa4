"""BasePredictionWriter: the files that a subclass writes hold what `predict` returns and NumPy says."""

import nets
import numpy as np
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.prediction_writer import BasePredictionWriter


class Linear(nf.FitModule):
    def __init__(self):
        self.w = nnx.Param(np.float32(3.0))

    def predict_step(self, batch):
        return {"y": self.w[...] * batch["x"], "size": batch["x"].shape[0]}


class Files(BasePredictionWriter):
    """Writes a file for each batch and one for all."""

    def __init__(self, directory, interval):
        super().__init__(interval)
        self.directory = directory
        self.kinds = set()
        self.calls = []

    def indices_of(self, batch):
        return batch["row"].tolist() if "row" in batch else None

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        assert trainer.module is module
        self.kinds.add(type(prediction["y"]))
        self.calls.append((dataloader_idx, batch_idx))
        np.testing.assert_array_equal(prediction["y"], 3 * np.asarray(batch["x"]))
        rows = -1 if batch_indices is None else batch_indices
        np.savez(self.directory / f"{dataloader_idx}-{batch_idx}.npz", y=prediction["y"], rows=rows)

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        self.calls.append("epoch")
        self.predictions, self.indices = predictions, batch_indices
        if isinstance(predictions[0], dict):
            np.save(self.directory / "all.npy", np.concatenate([one["y"] for one in predictions]))


X = np.arange(10, dtype=np.float32)


def rows(**options):
    return nf.ArrayLoader({"x": X, "row": np.arange(10)}, 4, **options)


def predict(tmp_path, interval, loaders, **options):
    writer = Files(tmp_path, interval)
    returned = nets.quiet(callbacks=writer, **options).predict(Linear(), loaders)
    return writer, returned


@pytest.mark.parametrize("jit", [True, False])
def test_each_batch_is_written_with_its_rows(tmp_path, jit):
    writer, returned = predict(tmp_path, "batch", rows(shuffle=True), jit=jit)
    assert writer.calls == [(0, 0), (0, 1), (0, 2)] and writer.kinds == {np.ndarray}
    files = [np.load(tmp_path / f"0-{i}.npz") for i in range(3)]
    order = np.concatenate([file["rows"] for file in files])
    assert sorted(order) == list(range(10)) and list(order) != list(range(10))
    np.testing.assert_array_equal(np.concatenate([file["y"] for file in files]), 3 * X[order])
    np.testing.assert_array_equal(files[2]["y"], returned[2]["y"])


def test_all_are_written_at_the_end(tmp_path):
    writer, returned = predict(tmp_path, "epoch", rows())
    assert writer.calls == ["epoch"]
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), 3 * X)
    assert writer.indices == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [one["size"] for one in writer.predictions] == [4, 4, 2] == [one["size"] for one in returned]
    assert all(type(one["y"]) is np.ndarray for one in writer.predictions)


def test_both_at_once(tmp_path):
    writer, _ = predict(tmp_path, "batch_and_epoch", rows())
    assert writer.calls == [(0, 0), (0, 1), (0, 2), "epoch"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0.npz", "0-1.npz", "0-2.npz", "all.npy"]


def test_several_loaders_have_lists_of_their_own(tmp_path):
    writer, returned = predict(tmp_path, "batch_and_epoch", [rows(), nf.ArrayLoader({"x": X + 1}, 5)])
    assert writer.calls == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), "epoch"]
    assert writer.indices == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], [None, None]]
    assert [len(one) for one in writer.predictions] == [3, 2] == [len(one) for one in returned]
    np.testing.assert_array_equal(writer.predictions[1][1]["y"], 3 * (X[5:] + 1))


def test_rows_are_unknown_by_default():
    seen = []

    class Plain(BasePredictionWriter):
        def write_on_batch_end(self, trainer, module, prediction, batch_indices, *rest):
            seen.append(batch_indices)

    nets.quiet(callbacks=Plain("batch")).predict(Linear(), rows())
    assert seen == [None, None, None]


def test_what_was_computed_before_an_error_is_written(tmp_path):
    def broken():
        yield {"x": X[:4]}
        yield {"x": X[4:8]}
        raise OSError("no more")

    class Loader:
        def __iter__(self):
            return broken()

    with pytest.raises(OSError, match="no more"):
        predict(tmp_path, "batch", Loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0.npz", "0-1.npz"]


def test_a_second_prediction_starts_over(tmp_path):
    writer = Files(tmp_path, "batch_and_epoch")
    trainer = nets.quiet(callbacks=writer)
    trainer.predict(Linear(), rows())
    trainer.predict(Linear(), rows(), ckpt_path=None)
    assert len(writer.predictions) == 3 and writer.calls.count("epoch") == 2


def test_a_writer_that_would_write_nothing_is_refused():
    class Half(BasePredictionWriter):
        def write_on_batch_end(self, *args):
            pass

    with pytest.raises(nf.ConfigurationError, match=r"'batch_and_epoch'(.|\n)*has no write_on_epoch_end"):
        nets.quiet(callbacks=Half("batch_and_epoch")).predict(Linear(), rows())
    with pytest.raises(nf.ConfigurationError, match="has no write_on_batch_end"):
        nets.quiet(callbacks=BasePredictionWriter()).predict(Linear(), rows())
    nets.quiet(callbacks=Half("batch")).predict(Linear(), rows())


def test_wrong_interval_is_named():
    with pytest.raises(nf.ConfigurationError, match=r"write_interval='step'(.|\n)*'batch_and_epoch'(.|\n)*Fix"):
        BasePredictionWriter("step")
