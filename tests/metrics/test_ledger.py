"""From `self.log` to History, the `*_metrics` views and loggers, against values worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.loggers.logger import Logger
from nnx_fit.metrics.capture import MetricTable, make_spec
from nnx_fit.metrics.history import History
from nnx_fit.metrics.ledger import Ledger


def eager(**options):
    """What happens on the host is the same for uncompiled steps, and those of so small a net come sooner."""
    return quiet(jit=False, **options)


class Logs(Scalar):
    """Logs what a test asks for in the training or validation step; the batch's mean target is `x`."""

    def __init__(self, train=(), val=()):
        super().__init__()
        self._train_calls, self._val_calls = tuple(train), tuple(val)

    def training_step(self, batch):
        for name, options in self._train_calls:
            self.log(name, batch["target"].mean(), **dict(options))
        return 0.5 * jnp.mean((self.w[...] - batch["target"]) ** 2)

    def validation_step(self, batch):
        for name, options in self._val_calls:
            self.log(name, batch["target"].mean(), **dict(options))


def call(name, **options):
    return name, tuple(options.items())


class Recorder(Logger):
    """Keeps every call it gets."""

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step):
        self.calls.append((step, dict(metrics)))


RAGGED = [
    {"target": np.full(4, 1.0, np.float32)},
    {"target": np.full(4, 3.0, np.float32)},
    {"target": np.full(2, 10.0, np.float32)},
]
MEAN = (4 * 1 + 4 * 3 + 2 * 10) / 10


def test_the_x_of_a_record_is_the_step_after_the_update_and_validation_shares_it():
    history = eager(max_epochs=2, log_every_n_steps=1).fit(Scalar(), targets(1, 2, 3), targets(5))
    assert [step for step, _ in history["loss"]] == [1, 2, 3, 4, 5, 6]
    assert history["val/target"] == [(3, 5.0), (6, 5.0)]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4]), (7, []), (0, [])])
def test_step_records_come_every_n_steps_counted_across_epochs(every, steps):
    history = eager(max_epochs=2, log_every_n_steps=every).fit(Scalar(), targets(1, 2, 3))
    assert [step for step, _ in history.get("loss", [])] == steps


def test_an_epoch_mean_is_weighted_by_batch_size_in_training_and_evaluation():
    module = Logs([call("x", on_epoch=True, on_step=False)], [call("v")])
    history = quiet(max_epochs=1).fit(module, RAGGED, RAGGED)
    assert history["x"] == [(3, pytest.approx(MEAN, rel=1e-6))]
    assert history["v"] == [(3, pytest.approx(MEAN, rel=1e-6))]


@pytest.mark.parametrize(("reduce", "expected"), [("mean", MEAN), ("sum", 14.0), ("min", 1.0), ("max", 10.0)])
def test_every_reduction_over_an_epoch(reduce, expected):
    module = Logs([call("x", on_epoch=True, reduce=reduce)], [call("v", reduce=reduce)])
    trainer = eager(max_epochs=1, log_every_n_steps=1)
    history = trainer.fit(module, RAGGED, RAGGED)
    assert history["x_epoch"] == [(3, pytest.approx(expected, rel=1e-6))]
    assert history["v"] == [(3, pytest.approx(expected, rel=1e-6))]
    assert [value for _, value in history["x_step"]] == [1, 3, 10]


def test_a_batch_size_given_with_the_value_is_its_weight():
    class Weighted(Logs):
        def validation_step(self, batch):
            self.log("traced", batch["target"].mean(), batch_size=(batch["target"] > 2).sum() + 1)
            self.log("fixed", batch["target"].mean(), batch_size=1)

    history = eager(max_epochs=1).fit(Weighted(), RAGGED, RAGGED)
    assert history["fixed"][0][1] == pytest.approx(14 / 3, rel=1e-6)
    assert history["traced"][0][1] == pytest.approx((1 * 1 + 5 * 3 + 3 * 10) / 9, rel=1e-6)


def test_a_method_of_the_module_gives_the_batch_size():
    class Sized(Logs):
        def batch_size(self, batch):
            return batch["count"].sum()

    batches = [
        {"target": np.float32([1, 1]), "count": np.int32([1, 2, 3])},
        {"target": np.float32([2, 2]), "count": np.int32([1, 0, 1])},
    ]
    history = eager(max_epochs=1).fit(Sized(val=[call("v")]), batches, batches)
    assert history["v"][0][1] == pytest.approx((6 * 1 + 2 * 2) / 8, rel=1e-6)


def test_several_values_of_one_name_in_a_step_are_reduced_within_it():
    class Often(Scalar):
        def training_step(self, batch):
            for value in (1.0, 2.0, 6.0):
                self.log("mean", value)
                self.log("sum", value, reduce="sum")
                self.log("max", value, reduce="max")
            return super().training_step(batch)

        def validation_step(self, batch):
            self.log("v", 1.0, batch_size=1)
            self.log("v", 4.0, batch_size=2)

    history = eager(max_epochs=1, log_every_n_steps=1).fit(Often(), targets(1), targets(1))
    assert (history["mean"], history["sum"], history["max"]) == ([(1, 3.0)], [(1, 9.0)], [(1, 6.0)])
    assert history["v"] == [(1, 3.0)]


def test_step_and_epoch_records_have_names_of_their_own_and_the_bare_name_is_the_latest():
    seen = {}

    class Looks(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen[trainer.global_step] = trainer.callback_metrics

        def on_train_epoch_end(self, trainer, module):
            seen["end"] = trainer.callback_metrics

    module = Logs([call("x", on_epoch=True)])
    trainer = eager(max_epochs=1, log_every_n_steps=2, callbacks=Looks())
    history = trainer.fit(module, RAGGED)
    mean = pytest.approx(MEAN, rel=1e-6)
    assert dict(history) == {"x_step": [(2, 3.0)], "x_epoch": [(3, mean)]}
    assert seen[1] == {"x_step": 1.0, "x": 1.0}
    assert seen[3] == {"x_step": 10.0, "x": 10.0}
    assert seen["end"] == {"x_step": 10.0, "x_epoch": mean, "x": mean}
    assert trainer.callback_metrics == seen["end"]


def test_callback_metrics_hold_the_latest_value_also_of_names_that_a_step_left_out():
    seen = []

    class ByShape(Scalar):
        def training_step(self, batch):
            size = batch["target"].shape[0]
            self.log(f"size/{size}", batch["target"].mean())
            return 0.5 * jnp.mean((self.w[...] - batch["target"]) ** 2)

    class Looks(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(trainer.callback_metrics)

    trainer = eager(max_epochs=2, log_every_n_steps=50, callbacks=Looks())
    trainer.fit(ByShape(), RAGGED)
    assert seen[:3] == [{"size/4": 1}, {"size/4": 3}, {"size/4": 3, "size/2": 10}]
    assert seen[3] == {"size/4": 1, "size/2": 10}
    assert trainer.callback_metrics == {"size/4": 3, "size/2": 10}


def test_what_a_batch_hook_logged_is_in_callback_metrics_between_log_points():
    seen = []

    class Hooked(Scalar):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("hook", batch_idx)
            seen.append(self.trainer.callback_metrics["hook"])

    history = eager(max_epochs=1, log_every_n_steps=2).fit(Hooked(), targets(1, 2, 3))
    assert seen == [0, 1, 2]
    assert history["hook"] == [(2, 1.0)]


def test_names_logged_for_some_batch_shapes_only_are_reduced_over_those():
    class ByShape(Scalar):
        def validation_step(self, batch):
            name = "full" if batch["target"].shape[0] == 4 else "rest"
            self.log(name, batch["target"].mean())

        def training_step(self, batch):
            name = "train/full" if batch["target"].shape[0] == 4 else "train/rest"
            self.log(name, batch["target"].mean(), on_epoch=True)
            return super().training_step(batch)

    history = quiet(max_epochs=2, log_every_n_steps=1).fit(ByShape(), RAGGED, RAGGED)
    assert history["full"] == [(3, 2.0), (6, 2.0)] and history["rest"] == [(3, 10.0), (6, 10.0)]
    assert history["train/full_step"] == [(1, 1.0), (2, 3.0), (4, 1.0), (5, 3.0)]
    assert history["train/full_epoch"] == [(3, 2.0), (6, 2.0)]
    assert history["train/rest_epoch"] == [(3, 10.0), (6, 10.0)]


@pytest.mark.parametrize("count", [32, 40])
def test_more_names_than_there_are_places_lose_nothing(count):
    class Many(Scalar):
        def training_step(self, batch):
            for index in range(count):
                self.log(f"t{index}", batch["target"].mean() + index, on_epoch=True)
            return super().training_step(batch)

        def validation_step(self, batch):
            for index in range(count):
                self.log(f"v{index}", batch["target"].mean() * index)

    history = quiet(max_epochs=1, log_every_n_steps=1).fit(Many(), targets(1, 3), targets(1, 3))
    assert [history[f"t{i}_step"] for i in range(count)] == [[(1, 1.0 + i), (2, 3.0 + i)] for i in range(count)]
    assert [history[f"t{i}_epoch"] for i in range(count)] == [[(2, 2.0 + i)] for i in range(count)]
    assert [history[f"v{i}"] for i in range(count)] == [[(2, 2.0 * i)] for i in range(count)]


def test_names_that_appear_late_grow_the_vectors_of_an_epoch_under_way():
    class Late(Scalar):
        def training_step(self, batch):
            for index in range(30):
                self.log(f"a{index}", batch["target"].mean(), on_epoch=True)
            if batch["target"].shape[0] == 2:
                for index in range(30):
                    self.log(f"b{index}", batch["target"].mean(), on_epoch=True)
            return super().training_step(batch)

        def validation_step(self, batch):
            for index in range(30 if batch["target"].shape[0] == 4 else 60):
                self.log(f"v{index}", batch["target"].mean())

    history = quiet(max_epochs=2, log_every_n_steps=1).fit(Late(), RAGGED, RAGGED)
    mean = pytest.approx(MEAN, rel=1e-6)
    assert history["a29_epoch"] == history["v29"] == [(3, mean), (6, mean)]
    assert history["b29_epoch"] == history["v59"] == [(3, 10.0), (6, 10.0)]
    assert history["a0_step"] == [(1, 1), (2, 3), (3, 10), (4, 1), (5, 3), (6, 10)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_are_recorded_as_they_are(bad):
    class Bad(Scalar):
        def training_step(self, batch):
            self.log("t", batch["target"].mean(), on_epoch=True)
            return (0.0 * self.w[...]).sum()

        def on_train_epoch_end(self):
            self.log("host", bad)

    history = quiet(max_epochs=1, log_every_n_steps=1).fit(Bad(), targets(1.0, bad), targets(bad, 2.0))
    assert repr(history["t_step"][1]) == repr((2, bad))
    assert repr(history["t_epoch"]) == repr(history["val/target"]) == repr(history["host"]) == repr([(2, bad)])


def test_loggers_get_each_record_once_in_order_and_without_those_meant_for_nobody():
    module = Logs([call("x", on_epoch=True), call("hidden", logger=False)], [call("v"), call("w", logger=False)])
    recorder = Recorder()
    trainer = eager(max_epochs=2, log_every_n_steps=2, logger=recorder)
    history = trainer.fit(module, targets(1, 3), targets(5))
    assert recorder.calls == [
        (2, {"x_step": 3.0}),
        (2, {"v": 5.0}),
        (2, {"x_epoch": 2.0}),
        (4, {"x_step": 3.0}),
        (4, {"v": 5.0}),
        (4, {"x_epoch": 2.0}),
    ]
    assert trainer.logged_metrics == {"x_step": 3.0, "v": 5.0, "x_epoch": 2.0}
    assert history["w"] == [(2, 5.0), (4, 5.0)] and trainer.callback_metrics["hidden"] == 3.0


def test_several_loaders_have_names_by_index_or_by_key():
    first, second = targets(1, 3), targets(5)
    trainer = eager(max_epochs=1)
    history = trainer.fit(Scalar(), targets(1), [first, second])
    assert history["val/target/dataloader_idx_0"] == [(1, 2.0)]
    assert history["val/target/dataloader_idx_1"] == [(1, 5.0)]
    assert trainer.callback_metrics["val/target/dataloader_idx_1"] == 5.0 and "val/target" not in history
    history = eager(max_epochs=1).fit(Scalar(), targets(1), {"clean": first, "noisy": second})
    assert history["val/target/clean"] == [(1, 2.0)] and history["val/target/noisy"] == [(1, 5.0)]


class Arriving:
    """A packed vector on its way: looking at it before it is ready is what must not happen."""

    def __init__(self, values):
        self.values, self.ready = values, False

    def is_ready(self):
        return self.ready

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        assert self.ready, "somebody waits for the device"
        return self.values


def test_nobody_but_who_asks_for_a_value_waits_for_the_device():
    table = MetricTable(2)
    table.place(make_spec("x", (True, False), prog_bar=True))
    published = []
    ledger = Ledger(History(), lambda metrics, step: published.append((step, metrics)))
    packed = [Arriving(np.array([[v, 0], [1, 0], [1, 0], [v, 0], [1, 0]], np.float32)) for v in (1, 2, 3)]
    for step, vector in enumerate(packed, start=1):
        ledger.step(table, vector)
        ledger.log_step(step)
        ledger.poll()
    assert ledger.progress_bar_metrics == {} and published == [] and ledger.pending
    packed[1].ready = True
    ledger.poll()
    assert ledger.progress_bar_metrics == {"x": 2.0}, "the newest that has arrived"
    assert published == [], "records keep their order"
    packed[0].ready = True
    ledger.poll()
    assert published == [(1, {"x": 1.0}), (2, {"x": 2.0})]
    packed[2].ready = True
    assert ledger.callback_metrics == {"x": 3.0}
    assert ledger.history["x"] == [(1, 1.0), (2, 2.0), (3, 3.0)] and not ledger.pending


def test_a_value_that_a_batch_hook_logs_from_the_device_is_not_waited_for():
    class Scalarish(Arriving):
        def __float__(self):
            assert self.ready, "somebody waits for the device"
            return 4.0

    ledger = Ledger(History(), lambda metrics, step: None)
    value = Scalarish(None)
    ledger.host["train"]._specs["x"] = make_spec("x", (True, False))
    ledger.host["train"]._step["x"] = value
    ledger.log_host_step(2)
    ledger.poll()
    assert ledger.pending and "x" not in ledger.history
    value.ready = True
    ledger.poll()
    assert ledger.history["x"] == [(2, 4.0)]
