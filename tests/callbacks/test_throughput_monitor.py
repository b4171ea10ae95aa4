"""ThroughputMonitor: rates that follow from a clock which loaders, steps, validations and saves move."""

import types

import nets
import numpy as np
import pytest

import nnx_fit as nf
from nnx_fit.callbacks.throughput_monitor import ThroughputMonitor
from nnx_fit.data import prefetch

READ, STEP, VALIDATE, SAVE = 1.0, 4.0, 1000.0, 5000.0


@pytest.fixture
def clock(monkeypatch):
    """Stands still until somebody moves it; loaders are timed with it too."""
    ticking = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(prefetch, "time", types.SimpleNamespace(perf_counter=lambda: ticking.now))
    return ticking


class Slow:
    """A loader of batches for `nets.Scalar`, each of which takes some seconds to read."""

    def __init__(self, clock, sizes, seconds):
        self.clock, self.sizes, self.seconds = clock, sizes, seconds

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        for size in self.sizes:
            self.clock.now += self.seconds
            yield {"target": np.full(size, 0.5, np.float32)}


class Steps(nf.Callback):
    """Makes steps and saves take some seconds. Comes after the monitor in the list: in a step, and in a save."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.clock.now += STEP

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.clock.now += SAVE


def fit(clock, *, sizes=(2,) * 4, monitor=None, val=False, callbacks=(), module=None, **options):
    """One epoch of four batches, logged every two steps, unless told otherwise."""
    monitor = monitor or ThroughputMonitor(clock=lambda: clock.now)
    options = {"max_epochs": 1, "log_every_n_steps": 2, "jit": False, **options}
    trainer = nets.quiet(callbacks=[monitor, Steps(clock), *callbacks], **options)
    loaders = [Slow(clock, sizes, READ), Slow(clock, [2], VALIDATE) if val else None]
    trainer.fit(module or nets.Scalar(), *loaders)
    logged = {name: records for name, records in trainer.history.items() if name.startswith("throughput/")}
    return {name.removeprefix("throughput/"): records for name, records in logged.items()}


# Two batches are read before the first step; the loader is then always one ahead, and has nothing left to read at the
# end. Steps end at 1 + 1 + 4 = 6, 11, 16 and 20 seconds, of which 2, 3, 4 and 4 are in the loader.
ENDS, READS = [6.0, 11.0, 16.0, 20.0], [2.0, 3.0, 4.0, 4.0]


def test_rates_and_share_of_data(clock):
    assert fit(clock, sizes=(2, 2, 2, 6)) == {
        "steps_per_second": [(2, 2 / 11), (4, 4 / 20)],
        "batches_per_second": [(2, 2 / 11), (4, 4 / 20)],
        "samples_per_second": [(2, 4 / 11), (4, 12 / 20)],
        "data_wait": [(2, 3 / 11), (4, 4 / 20)],
        "compile_seconds": [(2, 0.0), (4, 0.0)],
        "compilations": [(2, 0.0), (4, 0.0)],
    }
    assert clock.now == ENDS[-1]


def test_rates_are_of_the_latest_batches(clock):
    monitor = ThroughputMonitor(1, clock=lambda: clock.now)
    logged = fit(clock, sizes=(2, 3, 5, 7), monitor=monitor, log_every_n_steps=1)
    spans = np.diff([0.0, *ENDS])
    assert [value for _, value in logged["batches_per_second"]] == pytest.approx(1 / spans)
    assert [value for _, value in logged["samples_per_second"]] == pytest.approx([2, 3, 5, 7] / spans)
    assert [value for _, value in logged["data_wait"]] == pytest.approx(np.diff([0.0, *READS]) / spans)


def test_each_pass_over_the_data_has_its_own_wait(clock):
    logged = fit(clock, max_epochs=3, log_every_n_steps=4)
    assert logged["data_wait"] == [(4, 4 / 20), (8, 8 / 40), (12, 12 / 60)]
    assert logged["steps_per_second"] == [(4, 0.2), (8, 0.2), (12, 0.2)]


def test_steps_are_updates(clock):
    logged = fit(clock, accumulate_grad_batches=2, log_every_n_steps=1)
    assert logged["steps_per_second"] == [(1, 1 / 11), (2, 2 / 20)]
    assert logged["batches_per_second"] == [(1, 2 / 11), (2, 4 / 20)]


@pytest.mark.parametrize(
    ("interval", "validations"), [(1, 8), (2, 4), (1.0, 2)], ids=["each batch", "every two", "each epoch"]
)
def test_time_of_validations_is_left_out(clock, interval, validations):
    logged = fit(clock, val=True, val_check_interval=interval, max_epochs=2, num_sanity_val_steps=1)
    assert clock.now == 40 + VALIDATE * (1 + validations)
    assert logged["batches_per_second"] == [(2, 2 / 11), (4, 4 / 20), (6, 6 / 31), (8, 8 / 40)]
    assert logged["data_wait"] == [(2, 3 / 11), (4, 4 / 20), (6, 7 / 31), (8, 8 / 40)]


def test_time_of_checkpoints_is_left_out(clock, tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, every_n_train_steps=1, async_save=False)
    logged = fit(clock, callbacks=[checkpoint], enable_checkpointing=True)
    assert clock.now == 20 + 5 * SAVE  # after each step, and `last`
    assert logged["batches_per_second"] == [(2, 2 / 11), (4, 4 / 20)]
    assert logged["data_wait"] == [(2, 3 / 11), (4, 4 / 20)]


def test_checkpoint_in_the_validation_is_left_out_once(clock, tmp_path):
    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="val/target", save_top_k=-1, async_save=False)
    options = {"callbacks": [checkpoint], "enable_checkpointing": True, "val": True, "val_check_interval": 2}
    logged = fit(clock, **options, max_epochs=2)
    assert clock.now >= 40 + 4 * VALIDATE + 4 * SAVE
    assert logged["batches_per_second"][-1] == (8, 8 / 40)


def test_checkpoint_in_the_midst_of_a_step_is_left_out(clock, tmp_path):
    class Saves(nf.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / str(batch_idx))

    logged = fit(clock, callbacks=[Saves()])
    assert clock.now == 20 + 4 * SAVE
    assert logged["batches_per_second"] == [(2, 2 / 11), (4, 4 / 20)]


def test_steps_that_are_compiled_are_apart(clock):
    logged = fit(clock, sizes=(2, 2, 2, 3), jit=True, log_every_n_steps=1)
    # The first and the last batch have new shapes; the others end after 5 and 10 seconds of their own.
    assert logged == {
        "steps_per_second": [(2, 1 / 5), (3, 2 / 10), (4, 2 / 10)],
        "batches_per_second": [(2, 1 / 5), (3, 2 / 10), (4, 2 / 10)],
        "samples_per_second": [(2, 2 / 5), (3, 4 / 10), (4, 4 / 10)],
        "data_wait": [(2, 1 / 5), (3, 2 / 10), (4, 2 / 10)],
        "compile_seconds": [(1, STEP), (2, STEP), (3, STEP), (4, 2 * STEP)],
        "compilations": [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)],
    }


def test_number_of_samples_may_be_the_users(clock):
    monitor = ThroughputMonitor(batch_size_fn=lambda batch: 10 * len(batch["target"]), clock=lambda: clock.now)
    assert fit(clock, monitor=monitor)["samples_per_second"] == [(2, 40 / 11), (4, 80 / 20)]


class Odd(nets.Scalar):
    """Takes batches whose leaves have no common leading axis."""

    def training_step(self, batch):
        return 0.5 * (self.w[...] - batch["target"].mean()) ** 2 + 0 * batch["more"].sum()


def test_batches_without_a_size_have_no_samples_per_second(clock):
    class More(Slow):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch | {"more": np.zeros(5, np.float32)}

    monitor = ThroughputMonitor(clock=lambda: clock.now)
    trainer = nets.quiet(max_epochs=1, log_every_n_steps=2, jit=False, callbacks=[monitor, Steps(clock)])
    history = trainer.fit(Odd(), More(clock, (2,) * 4, READ))
    assert "throughput/samples_per_second" not in history
    assert history["throughput/batches_per_second"] == [(2, 2 / 11), (4, 4 / 20)]


class Recorder(nf.Logger):
    def __init__(self):
        self.records = []

    def log_metrics(self, metrics, step):
        names = [name.removeprefix("throughput/") for name in metrics if name.startswith("throughput/")]
        if names:
            self.records.append((sorted(names), step))


def test_loggers_get_what_history_has(clock):
    recorder = Recorder()
    logged = fit(clock, logger=recorder)
    assert recorder.records == [(sorted(logged), 2), (sorted(logged), 4)]


class Listens(nf.Callback):
    """Has every batch hook called for everybody."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        pass


def test_without_log_points_nothing_is_measured(clock):
    reads = []
    monitor = ThroughputMonitor(clock=lambda: reads.append(clock.now) or clock.now)
    assert fit(clock, log_every_n_steps=0, val=True, monitor=monitor, callbacks=[Listens()]) == {}
    assert len(reads) == 1


def test_resumed_run_counts_from_where_it_continues(clock, tmp_path):
    trainer = nets.quiet(max_epochs=1, jit=False)
    trainer.fit(nets.Scalar(), nets.targets(*[0.5] * 4))
    trainer.save_checkpoint(tmp_path / "cut")
    monitor = ThroughputMonitor(clock=lambda: clock.now)
    trainer = nets.quiet(max_epochs=2, jit=False, log_every_n_steps=2, callbacks=[monitor, Steps(clock)])
    history = trainer.fit(nets.Scalar(), Slow(clock, (2,) * 4, READ), ckpt_path=tmp_path / "cut")
    assert history["throughput/steps_per_second"] == [(6, 2 / 11), (8, 4 / 20)]


def test_another_fit_starts_over(clock):
    monitor = ThroughputMonitor(clock=lambda: clock.now)
    first = fit(clock, monitor=monitor)
    clock.now = 0.0
    assert fit(clock, monitor=monitor) == first


def test_evaluation_after_the_fit_is_no_concern(clock):
    monitor = ThroughputMonitor(clock=lambda: clock.now)
    trainer = nets.quiet(max_epochs=1, jit=False, callbacks=[monitor])
    trainer.fit(nets.Scalar(), nets.targets(0.5))
    assert trainer.validate(trainer.module, nets.targets(0.5)) == [{"val/target": 0.5}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 1.5}, "window=1.5"),
        ({"batch_size_fn": 8}, r"batch_size_fn=8\)(.|\n)*Fix: pass one"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        ThroughputMonitor(**arguments)
