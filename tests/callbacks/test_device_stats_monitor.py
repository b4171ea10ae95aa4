"""DeviceStatsMonitor: what it logs equals what the system says, at the log points."""

import resource
import sys
import types
from typing import NamedTuple

import jax
import nets
import numpy as np
import pytest

import nnx_fit as nf
from nnx_fit.callbacks import device_stats_monitor
from nnx_fit.callbacks.device_stats_monitor import DeviceStatsMonitor

UNIT = 1 if sys.platform == "darwin" else 1024
HOST = {"host/peak_bytes", "host/cpu_use"} | ({"host/bytes"} if sys.platform == "linux" else set())


def fit(monitor, steps=4, **options):
    """Four steps, logged every two, unless told otherwise; returns all that is no metric of the module."""
    options = {"max_epochs": 1, "log_every_n_steps": 2, "jit": False, **options}
    history = nets.quiet(callbacks=monitor, **options).fit(nets.Scalar(), nets.targets(*[0.5] * steps))
    return {name: records for name, records in history.items() if name != "loss"}


@pytest.fixture
def usage(monkeypatch):
    """What the system says of the process: one more second of CPU time, and 100 units of memory, each time."""
    asked = types.SimpleNamespace(count=0)

    def getrusage(who):
        assert who == resource.RUSAGE_SELF
        asked.count += 1
        return types.SimpleNamespace(
            ru_utime=0.75 * asked.count, ru_stime=0.25 * asked.count, ru_maxrss=100 * asked.count
        )

    monkeypatch.setattr(resource, "getrusage", getrusage)
    return asked


def of_device(monkeypatch, stats):
    monkeypatch.setattr(device_stats_monitor, "_memory", stats)


def test_host_stands_in_for_a_cpu():
    before = resource.getrusage(resource.RUSAGE_SELF)
    logged = fit(DeviceStatsMonitor())
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert set(logged) == HOST
    assert all([step for step, _ in records] == [2, 4] for records in logged.values())
    peaks = [value for _, value in logged["host/peak_bytes"]]
    assert before.ru_maxrss * UNIT <= peaks[0] <= peaks[1] <= after.ru_maxrss * UNIT
    if sys.platform == "linux":
        assert all(0 < value <= after.ru_maxrss * UNIT * 1.01 for _, value in logged["host/bytes"])


def test_cpu_use_is_the_share_of_the_time_since_the_last_record(usage):
    times = iter([10.0, 14.0, 14.5])
    logged = fit(DeviceStatsMonitor(clock=lambda: next(times)))
    assert logged["host/cpu_use"] == [(2, 0.25), (4, 2.0)]  # 1 second in 4, and in 0.5
    assert logged["host/peak_bytes"] == [(2, 200.0 * UNIT), (4, 300.0 * UNIT)]


def test_memory_that_is_taken_shows():
    if sys.platform != "linux":
        pytest.skip("only Linux tells of the memory that is in use")
    kept = []

    class Takes(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                kept.append(np.ones(200 * 2**20, np.uint8))

    ((_, before), (_, after)) = fit([Takes(), DeviceStatsMonitor()])["host/bytes"]
    assert 190 * 2**20 < after - before < 260 * 2**20


def test_every_number_that_a_device_has_is_logged(monkeypatch):
    asked = []

    def memory(device):
        asked.append(device)
        return {"bytes_in_use": 5 * len(asked), "bytes_limit": 1000}

    of_device(monkeypatch, memory)
    assert fit(DeviceStatsMonitor()) == {
        "device/bytes_in_use": [(2, 5.0), (4, 10.0)], "device/bytes_limit": [(2, 1000.0), (4, 1000.0)],
    }  # fmt: skip
    assert asked == [jax.devices()[0]] * 2


def test_devices_are_told_apart(monkeypatch):
    class Device(NamedTuple):
        id: int

    class Array:
        def devices(self):
            return {Device(1), Device(0)}

    of_device(monkeypatch, lambda device: {"bytes_in_use": 7 + device.id})
    monkeypatch.setattr(nf.Trainer, "peek", lambda self, selector: {"w": Array()})
    assert fit(DeviceStatsMonitor()) == {
        "device_0/bytes_in_use": [(2, 7.0), (4, 7.0)], "device_1/bytes_in_use": [(2, 8.0), (4, 8.0)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cpu_stats", "stats", "expected"),
    [
        (None, {}, HOST),
        (None, {"bytes_in_use": 1}, {"device/bytes_in_use"}),
        (True, {"bytes_in_use": 1}, HOST | {"device/bytes_in_use"}),
        (True, {}, HOST),
        (False, {"bytes_in_use": 1}, {"device/bytes_in_use"}),
        (False, {}, set()),
    ],
)
def test_statistics_of_the_host_on_request(monkeypatch, cpu_stats, stats, expected):
    of_device(monkeypatch, lambda device: stats)
    assert set(fit(DeviceStatsMonitor(cpu_stats))) == expected


class Listens(nf.Callback):
    """Has every batch hook called for everybody."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        pass


def test_each_step_is_recorded_once_under_accumulation(usage):
    logged = fit([DeviceStatsMonitor(), Listens()], steps=8, accumulate_grad_batches=2)
    assert [step for step, _ in logged["host/peak_bytes"]] == [2, 4]
    assert usage.count == 3  # at the beginning, and at the two records


def test_loggers_get_what_history_has():
    class Recorder(nf.Logger):
        def __init__(self):
            self.records = []

        def log_metrics(self, metrics, step):
            if set(metrics) - {"loss"}:
                self.records.append((set(metrics), step))

    recorder = Recorder()
    fit(DeviceStatsMonitor(), logger=recorder)
    assert recorder.records == [(HOST, 2), (HOST, 4)]


def test_without_log_points_nothing_is_asked(usage):
    assert fit(DeviceStatsMonitor(), log_every_n_steps=0) == {}
    assert usage.count == 1


def test_resumed_run_goes_on_with_the_log_points(tmp_path):
    trainer = nets.quiet(max_epochs=1, jit=False)
    trainer.fit(nets.Scalar(), nets.targets(*[0.5] * 4))
    trainer.save_checkpoint(tmp_path / "cut")
    trainer = nets.quiet(max_epochs=2, jit=False, log_every_n_steps=2, callbacks=DeviceStatsMonitor())
    history = trainer.fit(nets.Scalar(), nets.targets(*[0.5] * 4), ckpt_path=tmp_path / "cut")
    assert [step for step, _ in history["host/peak_bytes"]] == [6, 8]


def test_system_without_the_module_has_no_statistics_of_the_host(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert fit(DeviceStatsMonitor()) == {}
    with pytest.raises(nf.ConfigurationError, match=r"cpu_stats=True(.|\n)*Fix: leave it at None"):
        DeviceStatsMonitor(cpu_stats=True)


@pytest.mark.parametrize("value", ["yes", 1, 0])
def test_wrong_argument_is_named(value):
    with pytest.raises(nf.ConfigurationError, match=r"DeviceStatsMonitor\(cpu_stats=(.|\n)*Fix: pass one"):
        DeviceStatsMonitor(cpu_stats=value)
