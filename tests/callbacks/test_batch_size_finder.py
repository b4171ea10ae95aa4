"""Batch sizes found where memory really ends: a step asks for terabytes from a certain size on."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import nnx_fit as nf


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Each trial collects its garbage, which takes time with all that the tests before have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def memory_for(batch, room: int):
    """Zero, from an array of a few bytes, or of 17 TB where a batch has more than `room` rows."""
    side = 1 + ((batch["x"].shape[0] - 1) // room) * 2**21
    column = batch["x"].mean() * jnp.arange(side, dtype=jnp.float32)[:, None]
    return (column @ column.T @ column).sum()


class Hungry(nf.FitModule):
    """A line that runs out of memory in training and in evaluation, each with room for so many rows."""

    def __init__(self, room: int = 12, eval_room: int = 10**6, batch_size: int | None = None):
        self.w = nnx.Param(jnp.ones(8))
        self.room, self.eval_room = room, eval_room
        if batch_size is not None:
            self.batch_size = batch_size

    def training_step(self, batch):
        loss = ((batch["x"] @ self.w[...] - batch["y"][:, 0]) ** 2).mean() + memory_for(batch, self.room)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val", memory_for(batch, self.eval_room))

    def test_step(self, batch):
        self.log("test", memory_for(batch, self.eval_room))

    def predict_step(self, batch):
        return batch["x"][:, 0] + memory_for(batch, self.eval_room)

    def configure_optimizers(self):
        import optax

        return optax.sgd(0.01)


class OwnData(Hungry):
    """Makes its loaders itself."""

    def train_dataloader(self):
        return nets.loader(100, self.batch_size)


class Data(nf.DataModule):
    def __init__(self, batch_size: int = 7, count: int = 100):
        self.batch_size, self.count = batch_size, count
        self.calls: list[str] = []

    def setup(self, stage):
        self.calls.append("setup")

    def teardown(self, stage):
        self.calls.append("teardown")

    def train_dataloader(self):
        self.kept = nets.loader(self.count, self.batch_size, shuffle=True)  # a cache that trials must not fill
        return self.kept

    def predict_dataloader(self):
        return nets.loader(self.count, self.batch_size)


def search(tmp_path, finder, module, *data, jit=False, **options):
    """A fit after a search; eager where nothing depends on compiled steps, which take longer to compile than to run."""
    trainer = nets.quiet(callbacks=finder, default_root_dir=tmp_path, max_epochs=1, log_every_n_steps=1, jit=jit)
    history = trainer.fit(module, *data, **options)
    return trainer, history


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 8),
        ({"mode": "binsearch", "init_val": 8, "margin": 0.25}, 9),
        ({"init_val": 32}, 8),
    ],
)
def test_the_size_is_the_largest_that_fits_into_memory(options, expected, tmp_path):
    finder, loader = nf.BatchSizeFinder(**options), nets.loader(100)
    trainer, _ = search(tmp_path, finder, Hungry(), loader, jit=True)
    assert (finder.optimal_batch_size, loader.batch_size) == (expected, expected)
    assert trainer.global_step == -(-100 // expected)


def test_the_run_that_follows_is_the_one_that_was_given_the_size(tmp_path):
    module, data, finder = Hungry(), Data(), nf.BatchSizeFinder(init_val=8)
    _, history = search(tmp_path, finder, module, datamodule=data, jit=True)
    assert (data.batch_size, data.kept.batch_size, data.calls) == (8, 8, ["setup", "teardown"])
    given = Hungry()
    _, expected = search(tmp_path, None, given, datamodule=Data(batch_size=8), jit=True)
    assert history["loss"] == expected["loss"] and len(history["loss"]) == 13
    np.testing.assert_array_equal(module.w[...], given.w[...])


def test_a_module_that_makes_its_loaders_has_the_size(tmp_path):
    module = OwnData(batch_size=3)
    search(tmp_path, nf.BatchSizeFinder(init_val=8), module)
    assert module.batch_size == 8


def test_a_size_that_module_and_data_module_both_have_is_set_in_both(tmp_path):
    module, data = OwnData(batch_size=3), Data()
    search(tmp_path, nf.BatchSizeFinder(init_val=8), module, datamodule=data)
    assert (module.batch_size, data.batch_size) == (8, 8)


def test_validation_within_the_fit_has_to_fit_too(tmp_path):
    class Both(Data):
        def val_dataloader(self):
            return nets.loader(self.count, self.batch_size)

    data = Both()
    search(tmp_path, nf.BatchSizeFinder(init_val=16), Hungry(room=50, eval_room=20), datamodule=data)
    assert data.batch_size == 16


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_has_a_size_of_its_own(verb, tmp_path):
    loader = nets.loader(100)
    trainer = nets.quiet(callbacks=nf.BatchSizeFinder(init_val=32), default_root_dir=tmp_path, max_epochs=1)
    result = getattr(trainer, verb)(Hungry(room=3, eval_room=40), loader)
    assert loader.batch_size == 32
    if verb == "predict":
        assert [len(batch) for batch in result] == [32, 32, 32, 4]


def test_a_test_after_a_fit_keeps_the_size_of_the_fit(tmp_path):
    finder, loader = nf.BatchSizeFinder(init_val=8), nets.loader(100)
    trainer, _ = search(tmp_path, finder, module := Hungry(), loader)
    evaluated = nets.loader(100, 5)
    trainer.test(module, evaluated)
    assert (finder.optimal_batch_size, loader.batch_size, evaluated.batch_size) == (8, 8, 5)


def test_the_data_module_is_asked_when_predicting(tmp_path):
    data = Data()
    trainer = nets.quiet(callbacks=nf.BatchSizeFinder(init_val=8), default_root_dir=tmp_path, max_epochs=1)
    assert len(trainer.predict(Hungry(eval_room=20), datamodule=data)) == 7
    assert data.batch_size == 16


@pytest.mark.parametrize("options", [{"init_val": 16}, {"mode": "binsearch", "init_val": 32}, {"init_val": 300}])
def test_no_size_is_larger_than_the_data(options, tmp_path):
    loader = nets.loader(50)
    search(tmp_path, nf.BatchSizeFinder(**options), Hungry(room=10**6), loader)
    assert loader.batch_size == 50


class Sliced:
    """A loader that says how many batches it has, and not of how many rows."""

    def __init__(self, count: int, batch_size: int):
        self.arrays, self.count, self.batch_size = nets.arrays(count), count, batch_size

    def __len__(self):
        return -(-self.count // self.batch_size)

    def __iter__(self):
        for start in range(0, self.count, self.batch_size):
            yield {name: array[start : start + self.batch_size] for name, array in self.arrays.items()}


def test_a_loader_that_has_one_batch_left_has_no_more_rows(tmp_path):
    class Streamed(Data):
        def train_dataloader(self):
            return Sliced(self.count, self.batch_size)

    data = Streamed(count=50)
    search(tmp_path, nf.BatchSizeFinder(init_val=20), Hungry(room=10**6), datamodule=data)
    assert data.batch_size == 50


def test_the_largest_value_bounds_the_search(tmp_path):
    loader = nets.loader(100)
    search(tmp_path, nf.BatchSizeFinder(init_val=12, max_val=20), Hungry(room=10**6), loader)
    assert loader.batch_size == 20


@pytest.fixture
def no_collection():
    """Garbage stays, unless somebody collects it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_trials_leave_nothing_in_memory(tmp_path):
    class Counting(nf.Callback):
        def on_fit_start(self, trainer, module):
            self.arrays = len(jax.live_arrays())

    counts = []
    for finder in (None, nf.BatchSizeFinder(init_val=8)):
        counting, loader = Counting(), nets.loader(100, 8)
        gc.collect()
        before = len(jax.live_arrays())
        search(tmp_path, [counting, *([finder] if finder else [])], Hungry(), loader)
        counts.append(counting.arrays - before)
    assert counts[0] == counts[1]


class Broken(Hungry):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        raise RuntimeError("not a matter of memory")


def test_other_errors_end_the_run_and_the_size_is_as_it_was(tmp_path):
    loader = nets.loader(100, 7)
    with pytest.raises(RuntimeError, match="not a matter of memory"):
        search(tmp_path, nf.BatchSizeFinder(), Broken(), loader)
    assert loader.batch_size == 7


def test_a_host_that_runs_out_of_memory_counts_as_well(tmp_path):
    class Fetching(Data):
        def train_dataloader(self):
            if self.batch_size > 20:
                np.ones((2**40, self.batch_size))
            return nets.loader(self.count, self.batch_size)

    data = Fetching()
    search(tmp_path, nf.BatchSizeFinder("binsearch", init_val=16, margin=0), Hungry(room=10**6), datamodule=data)
    assert data.batch_size == 20


def test_a_size_that_nobody_uses_is_an_error(tmp_path):
    class Deaf(Data):
        def setup(self, stage):
            self.loader = nets.loader(self.count, self.batch_size)

        def train_dataloader(self):
            return self.loader

    with pytest.raises(nf.ConfigurationError, match=r"have 7 rows with datamodule.batch_size = 2 and with 4"):
        search(tmp_path, nf.BatchSizeFinder(), Hungry(), datamodule=Deaf())


def test_a_size_that_is_nowhere_is_an_error_that_says_where_it_may_be(tmp_path):
    with pytest.raises(nf.ConfigurationError, match="batch size of a list cannot be changed"):
        search(tmp_path, nf.BatchSizeFinder(), Hungry(), list(nets.loader(100)))
    with pytest.raises(nf.ConfigurationError, match="neither Hungry nor its data module has a number named 'rows'"):
        search(tmp_path, nf.BatchSizeFinder(batch_arg_name="rows"), Hungry(), datamodule=Data())


def test_nothing_that_fits_is_an_error(tmp_path):
    class Starving(Hungry):
        def training_step(self, batch):
            return super().training_step(batch) + memory_for({"x": jnp.ones((2, 1))}, 1)

    with pytest.raises(nf.ConfigurationError, match="No batch size fits into memory"):
        search(tmp_path, nf.BatchSizeFinder(), Starving(), nets.loader(100))


def test_a_run_that_continues_keeps_its_size(tmp_path):
    def run(room, epochs, **options):
        data, finder = Data(), nf.BatchSizeFinder(init_val=8)
        checkpoints = nf.ModelCheckpoint(dirpath=tmp_path)
        trainer = nets.quiet(callbacks=[finder, checkpoints], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(Hungry(room), datamodule=data, **options)
        return finder.optimal_batch_size, data.batch_size, trainer.global_step

    assert run(12, 1) == (8, 8, 13)
    assert run(40, 2, ckpt_path="last") == (8, 8, 26)  # there would be room for more by now


def test_fast_dev_run_searches_nothing(tmp_path):
    finder, loader = nf.BatchSizeFinder(), nets.loader(100, 4)
    nets.quiet(callbacks=finder, fast_dev_run=True).fit(Hungry(), loader)
    assert (finder.optimal_batch_size, loader.batch_size) == (None, 4)


def test_what_was_found_is_said(tmp_path, capsys):
    search(tmp_path, nf.BatchSizeFinder(init_val=8), Hungry(), nets.loader(100))
    search(tmp_path, nf.BatchSizeFinder(init_val=32), Hungry(room=10**6), nets.loader(50))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BatchSizeFinder")]
    assert said == [
        "BatchSizeFinder: loader.batch_size = 8 (16 is too large).",
        "BatchSizeFinder: loader.batch_size = 50 (the data is no longer).",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "linear"}, 'expected "power" or "binsearch"'),
        ({"margin": 1.0}, "expected a share"),
        ({"init_val": 0}, r"init_val=0\): expected a whole number"),
        ({"max_val": 0}, r"max_val=0\): expected a whole number"),
        ({"steps_per_trial": 0}, r"steps_per_trial=0\): expected a whole number"),
        ({"max_trials": 0}, r"max_trials=0\): expected a whole number"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        nf.BatchSizeFinder(**options)
