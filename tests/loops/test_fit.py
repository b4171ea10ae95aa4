"""The fit loop: the order of hooks as whole lists, every bound, every cadence."""

import datetime
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import Regressor, Scalar, arrays, quiet, targets

import nnx_fit as nf
from nnx_fit.callbacks.callback import Callback
from nnx_fit.data.prefetch import Prefetcher
from nnx_fit.loops.fit import FitLoop
from nnx_fit.loops.funnel import Funnel
from nnx_fit.loops.progress import Control, Progress
from nnx_fit.loops.validation_plan import ValidationPlan
from nnx_fit.metrics.capture import MetricTable
from nnx_fit.metrics.history import History
from nnx_fit.metrics.ledger import Ledger
from nnx_fit.options import make_options

HOOKS = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
# Checkpoint hooks belong to saving, not to the loop.
HOOKS = [name for name in HOOKS if "checkpoint" not in name]


def eager(**options):
    """What is tested here happens on the host, and uncompiled steps of such a small net are faster to have."""
    return quiet(jit=False, **options)


def noting(log, owner, hook):
    def note(self, *args):
        indices = [str(arg) for arg in args if isinstance(arg, int | str)]
        log.append(f"{owner}.{hook}" + (f"({', '.join(indices)})" if indices else ""))

    return note


def watcher(log, owner, phase="before"):
    """A callback that notes every hook."""
    return type(owner, (Callback,), {"phase": phase, **{hook: noting(log, owner, hook) for hook in HOOKS}})()


def watched(log, base=Scalar):
    """A module that notes every hook it has."""
    mine = [hook for hook in HOOKS if hook not in ("on_exception", "on_sanity_check_start", "on_sanity_check_end")]
    return type("Watched", (base,), {hook: noting(log, "module", hook) for hook in mine})()


def everybody(*hooks):
    return [f"{owner}.{hook}" for hook in hooks for owner in ("callback", "module", "decide", "save")]


def callbacks_only(*hooks):
    return [f"{owner}.{hook}" for hook in hooks for owner in ("callback", "decide", "save")]


def validation(batches):
    inner = [f"on_validation_batch_{point}({i}, 0)" for i in range(batches) for point in ("start", "end")]
    return everybody("on_validation_start", "on_validation_epoch_start", *inner) + everybody(
        "on_validation_epoch_end", "on_validation_end"
    )


def batch(index):
    return everybody(f"on_train_batch_start({index})", f"on_train_batch_end({index})")


def watching(log):
    # In the list the callbacks that act last stand first: their phase decides.
    return [watcher(log, "save", "save"), watcher(log, "decide", "decide"), watcher(log, "callback")]


def test_order_of_all_hooks_of_a_fit():
    log = []
    trainer = quiet(max_epochs=2, num_sanity_val_steps=1, callbacks=watching(log))
    trainer.fit(watched(log), targets(1, 2), targets(3, 4))
    epoch = [
        *everybody("on_train_epoch_start"),
        *batch(0),
        *batch(1),
        *validation(2),
        *everybody("on_train_epoch_end"),
    ]
    assert log == [
        *everybody("setup(fit)", "on_fit_start"),
        *callbacks_only("on_sanity_check_start"),
        *validation(1),
        *callbacks_only("on_sanity_check_end"),
        *everybody("on_train_start"),
        *epoch,
        *epoch,
        *everybody("on_train_end", "on_fit_end", "teardown(fit)"),
    ]


def test_order_of_hooks_with_validation_in_mid_epoch():
    log = []
    trainer = eager(max_epochs=1, val_check_interval=0.5, callbacks=watching(log))
    trainer.fit(watched(log), targets(1, 2), targets(3))
    assert log == [
        *everybody("setup(fit)", "on_fit_start", "on_train_start", "on_train_epoch_start"),
        *batch(0),
        *validation(1),
        *batch(1),
        *validation(1),
        *everybody("on_train_epoch_end", "on_train_end", "on_fit_end", "teardown(fit)"),
    ]


def test_order_of_hooks_when_a_hook_raises():
    log = []

    class Fails(Scalar):
        def on_before(self):
            raise AssertionError

    module = watched(log, Fails)

    class Raises(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("in a hook")

    with pytest.raises(RuntimeError, match="in a hook"):
        eager(max_epochs=1, callbacks=[*watching(log), Raises()]).fit(module, targets(1, 2, 3), targets(3))
    assert log == [
        *everybody("setup(fit)", "on_fit_start", "on_train_start", "on_train_epoch_start"),
        *batch(0),
        *everybody("on_train_batch_start(1)"),
        "callback.on_train_batch_end(1)",
        *callbacks_only("on_exception"),
        *everybody("teardown(fit)"),
    ]


class Notes(Callback):
    """Notes (hook, global_step, current_epoch) where a test wants them."""

    def __init__(self, *hooks):
        self.seen = []
        for hook in hooks:
            setattr(self, hook, self._noting(hook))

    def _noting(self, hook):
        return lambda trainer, module, *args: self.seen.append((hook, trainer.global_step, trainer.current_epoch))

    def steps(self, hook):
        return [step for name, step, _ in self.seen if name == hook]


def validations(trainer_options, train=4, epochs=2, val=1):
    """The steps at which a fit validates."""
    notes = Notes("on_validation_start")
    trainer = eager(**{"max_epochs": epochs, **trainer_options}, callbacks=notes)
    trainer.fit(Scalar(), targets(*range(train)), targets(*range(val)))
    return notes.steps("on_validation_start")


def test_steps_and_epochs_as_hooks_see_them():
    notes = Notes("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end")
    also = Notes("on_validation_start", "on_train_epoch_end", "on_train_end", "on_fit_end")
    trainer = eager(max_epochs=2, callbacks=[notes, also])
    trainer.fit(Scalar(), targets(1, 2), targets(1))
    assert notes.seen == [
        ("on_train_start", 0, 0),
        ("on_train_epoch_start", 0, 0),
        ("on_train_batch_start", 0, 0),
        ("on_train_batch_end", 1, 0),
        ("on_train_batch_start", 1, 0),
        ("on_train_batch_end", 2, 0),
        ("on_train_epoch_start", 2, 1),
        ("on_train_batch_start", 2, 1),
        ("on_train_batch_end", 3, 1),
        ("on_train_batch_start", 3, 1),
        ("on_train_batch_end", 4, 1),
    ]
    assert also.seen == [
        ("on_validation_start", 2, 0),
        ("on_train_epoch_end", 2, 0),
        ("on_validation_start", 4, 1),
        ("on_train_epoch_end", 4, 1),
        ("on_train_end", 4, 2),
        ("on_fit_end", 4, 2),
    ]
    assert (trainer.global_step, trainer.current_epoch) == (4, 2)


def test_steps_and_epochs_as_a_step_sees_them():
    class Counts(Scalar):
        def training_step(self, batch, batch_idx):
            for name in ("global_step", "current_epoch"):
                self.log(name, getattr(self, name))
            self.log("batch_idx", batch_idx)
            return super().training_step(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val/step", self.global_step)
            self.log("val/epoch", self.current_epoch)
            self.log("val/batch", batch_idx, reduce="max")

    trainer = quiet(max_epochs=2, log_every_n_steps=1)
    history = trainer.fit(Counts(), targets(1, 2), targets(1, 2, 3))
    assert history["global_step"] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert history["current_epoch"] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert history["batch_idx"] == [(1, 0), (2, 1), (3, 0), (4, 1)]
    assert history["val/step"] == [(2, 2), (4, 4)] and history["val/epoch"] == [(2, 0), (4, 1)]
    assert history["val/batch"] == [(2, 2), (4, 2)]
    assert len(trainer.compilations) == 1


@pytest.mark.parametrize(
    ("options", "step", "epoch"),
    [
        ({"max_epochs": 2}, 6, 2),
        ({"max_epochs": 0}, 0, 0),
        ({"max_steps": 0}, 0, 0),
        ({"max_steps": 3}, 3, 1),
        ({"max_steps": 4}, 4, 1),
        ({"max_epochs": -1, "max_steps": 7}, 7, 2),
        ({"max_epochs": 1, "max_steps": 100}, 3, 1),
        ({"max_epochs": 5, "max_steps": 2}, 2, 0),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4, 2),
        ({"max_epochs": 2, "limit_train_batches": 99}, 6, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.67}, 4, 2),
        ({"max_epochs": 2, "limit_train_batches": 1}, 2, 2),
        ({"max_epochs": 2, "limit_train_batches": 1.0}, 6, 2),
        ({"max_epochs": 2, "limit_train_batches": 0}, 0, 0),
        ({"max_epochs": 2, "limit_train_batches": 0.0}, 0, 0),
    ],
)
def test_bounds(options, step, epoch):
    trainer = eager(**options)
    module = Scalar()
    trainer.fit(module, targets(2, 3, 4))
    assert (trainer.global_step, trainer.current_epoch) == (step, epoch)
    assert (float(module.w[...]) == 1.0) == (step == 0)


@pytest.mark.parametrize("length_known", [True, False])
def test_max_steps_in_mid_epoch_validates_and_leaves_the_epoch_unfinished(length_known):
    notes = Notes("on_validation_start", "on_train_epoch_end")
    batches = targets(1, 2, 3)
    trainer = eager(max_steps=5, callbacks=notes)
    trainer.fit(Scalar(), batches if length_known else lambda: iter(batches), targets(1))
    assert notes.seen == [
        ("on_validation_start", 3, 0),
        ("on_train_epoch_end", 3, 0),
        ("on_validation_start", 5, 1),
        ("on_train_epoch_end", 5, 1),
    ]
    assert trainer.current_epoch == 1


def test_max_steps_at_the_last_batch_completes_the_epoch_also_where_its_length_is_unknown():
    batches = targets(1, 2, 3)
    for data in (batches, lambda: iter(batches)):
        trainer = eager(max_steps=3)
        trainer.fit(Scalar(), data, targets(1))
        assert trainer.current_epoch == 1 and trainer.history["val/target"] == [(3, 1.0)]


def test_a_final_validation_is_not_made_twice():
    assert validations({"max_steps": 2, "val_check_interval": 2}, train=4) == [2]
    assert validations({"max_steps": 3, "val_check_interval": 2}, train=4) == [2, 3]
    assert validations({"max_steps": 3, "check_val_every_n_epoch": 5}, train=4) == [3]


@pytest.mark.parametrize(
    ("options", "stop_at", "step", "epoch"),
    [
        ({}, 2, 2, 0),
        ({}, 3, 3, 1),
        ({}, 0, 0, 0),
        ({"min_epochs": 2}, 2, 6, 2),
        ({"min_epochs": 1}, 2, 3, 1),
        ({"min_epochs": 1}, 4, 4, 1),
        ({"min_steps": 5}, 2, 5, 1),
        ({"min_steps": 5, "min_epochs": 2}, 1, 6, 2),
        ({"min_steps": 8, "min_epochs": 1}, 1, 8, 2),
        ({"min_steps": 5, "max_steps": 5}, 1, 5, 1),
    ],
)
def test_should_stop_ends_at_the_step_but_not_before_the_minimum(options, stop_at, step, epoch):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.should_stop or trainer.global_step == stop_at

        def on_train_start(self, trainer, module):
            trainer.should_stop = stop_at == 0

    trainer = eager(**{"max_epochs": 4, **options}, callbacks=Stops())
    trainer.fit(Scalar(), targets(1, 2, 3), targets(1))
    assert (trainer.global_step, trainer.current_epoch) == (step, epoch)
    assert [s for s, _ in trainer.history.get("val/target", [])] == [s for s in range(1, step + 1) if s % 3 == 0] + (
        [step] if step % 3 else []
    )


def test_should_stop_in_validation_ends_the_run_after_it():
    class Stops(Callback):
        def on_validation_end(self, trainer, module):
            trainer.should_stop, trainer.stop_reason = True, "enough"

    trainer = eager(max_epochs=3, val_check_interval=2, callbacks=Stops())
    trainer.fit(Scalar(), targets(1, 2, 3, 4), targets(1))
    assert (trainer.global_step, trainer.current_epoch, trainer.stop_reason) == (2, 0, "enough")


class CountingSteps:
    """A train program that only counts, for the loop's own arithmetic."""

    skipped = False

    def __init__(self):
        self.table = MetricTable()
        self.accumulators = None
        self.counters = []

    def run(self, batch, step, updates=True):
        return np.zeros((5, self.table.capacity), np.float32), None

    def set_counters(self, *counters):
        self.counters.append(counters)

    def reset_accumulators(self):
        pass


def run_loop(clock, plan=None, batches=3, **options):
    """Runs a bare `FitLoop`; returns its progress, control and counters."""
    progress, control, steps = Progress(), Control(), CountingSteps()
    defaults = dict.fromkeys(("min_epochs", "min_steps", "max_time", "max_epochs"))
    arguments = {name: f.default for name, f in nf.options.Options.__dataclass_fields__.items()} | defaults | options
    arguments["fast_dev_run"] = False
    FitLoop(
        make_options(**arguments),
        progress,
        control,
        Funnel(None, object(), [], lambda: None),
        Ledger(History(), lambda *_: None),
        steps,
        lambda: Prefetcher(targets(*range(batches)), lambda batch: batch),
        plan or ValidationPlan(None),
        clock=clock,
    ).run()
    return progress, control, steps


def ticking(seconds_per_look=1.0):
    now = [0.0]

    def clock():
        now[0] += seconds_per_look
        return now[0]

    return clock


@pytest.mark.parametrize(
    "max_time", ["00:00:00:05", {"seconds": 5}, datetime.timedelta(seconds=5)], ids=["text", "dict", "timedelta"]
)
def test_max_time_ends_the_run_at_a_step(max_time):
    """The clock is looked at once when the loop is made and once before each epoch and after each step."""
    progress, control, _ = run_loop(ticking(), max_time=max_time, batches=100)
    assert progress.global_step == 4
    assert control.should_stop and control.stop_reason == "max_time was reached"


def test_max_time_does_not_outrank_the_minimum_nor_replace_the_reason_to_stop():
    progress, _, _ = run_loop(ticking(), max_time={"seconds": 2}, min_steps=8, batches=100)
    assert progress.global_step == 8
    progress, _, _ = run_loop(ticking(), max_time={"seconds": 2}, min_epochs=2, batches=5)
    assert (progress.global_step, progress.epoch) == (10, 2)
    progress, control, _ = run_loop(ticking(), max_time={"seconds": 1000}, max_steps=7)
    assert progress.global_step == 7 and not control.should_stop


def test_the_program_is_told_where_the_run_is_at_each_epoch():
    _, _, steps = run_loop(ticking(), max_epochs=3, batches=2)
    assert steps.counters == [(0, 0, 0), (2, 1, 0), (4, 2, 0)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 8]),
        ({"val_check_interval": 0.5}, [2, 4, 6, 8]),
        ({"val_check_interval": 0.25}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"val_check_interval": 0.75}, [3, 7]),
        ({"val_check_interval": 0.01}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"val_check_interval": 1}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"val_check_interval": 3}, [3, 7]),
        ({"val_check_interval": 4}, [4, 8]),
        ({"val_check_interval": 1.0}, [4, 8]),
        ({"check_val_every_n_epoch": 2}, [8]),
        ({"check_val_every_n_epoch": 3}, []),
        ({"check_val_every_n_epoch": 2, "val_check_interval": 2}, [6, 8]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 6]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, [5]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 8}, [8]),
        ({"limit_val_batches": 0}, []),
        ({"limit_train_batches": 2, "val_check_interval": 0.5}, [1, 2, 3, 4]),
    ],
)
def test_when_validation_is_due(options, steps):
    assert validations(options) == steps


def test_an_interval_longer_than_the_epoch_is_refused_unless_it_counts_across_epochs():
    with pytest.raises(nf.ConfigurationError, match=r"val_check_interval=5.*only 4.*check_val_every_n_epoch=None"):
        validations({"val_check_interval": 5})
    with pytest.raises(nf.ConfigurationError, match=r"val_check_interval=0.5.*no length"):
        eager(max_epochs=1, val_check_interval=0.5).fit(Scalar(), lambda: iter(targets(1)), targets(1))
    notes = Notes("on_validation_start")
    eager(max_epochs=2, val_check_interval=2, callbacks=notes).fit(Scalar(), lambda: iter(targets(1, 2, 3)), targets(1))
    assert notes.steps("on_validation_start") == [2, 5]


@pytest.mark.parametrize(
    ("limit", "batches"), [(1.0, 5), (3, 3), (9, 5), (0.5, 2), (0.2, 1), (0, None), (0.0, None), (1, 1)]
)
def test_validation_takes_its_limit_of_each_loader(limit, batches):
    notes = Notes("on_validation_batch_end")
    trainer = eager(max_epochs=1, limit_val_batches=limit, callbacks=notes)
    trainer.fit(Scalar(), targets(1), [targets(*range(5)), targets(*range(5))])
    assert len(notes.seen) == 2 * (batches or 0)
    assert trainer.num_val_batches == ([batches] * 2 if batches else [])
    assert trainer.validation_enabled is bool(batches)


@pytest.mark.parametrize(("count", "batches"), [(0, 0), (1, 1), (2, 2), (9, 3), (-1, 3)])
def test_the_sanity_check_runs_so_many_batches_and_leaves_no_trace(count, batches):
    seen = []

    class Looks(Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            module.log("hook", 1.0)
            if trainer.sanity_checking:
                seen.append(batch_idx)
                assert trainer.stage == "sanity" and not module.training

        def on_train_start(self, trainer, module):
            assert trainer.callback_metrics == trainer.logged_metrics == {} and dict(trainer.history) == {}
            assert not trainer.sanity_checking

    trainer = eager(max_epochs=1, num_sanity_val_steps=count, callbacks=Looks())
    history = trainer.fit(Scalar(), targets(1), targets(2, 3, 4))
    assert seen == list(range(batches))
    assert trainer.num_sanity_val_batches == [batches]
    assert history["val/target"] == [(1, 3.0)] and history["hook"] == [(1, 1.0)]


def noise():
    return nf.ArrayLoader(arrays(16, features=4), 8, shuffle=True)


def test_a_sanity_check_changes_nothing_in_the_training():
    states = []
    for count in (0, -1):
        module = Regressor(4, depth=1, rngs=nnx.Rngs(0))
        quiet(max_epochs=1, num_sanity_val_steps=count).fit(module, noise(), noise())
        states.append(jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngKey))))
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(one, other)


class Sees(Scalar):
    """Logs the sum of each batch, so that History tells which batches came."""

    def training_step(self, batch):
        self.log("sum", batch["target"].sum())
        return 0.5 * jnp.mean((self.w[...] - batch["target"]) ** 2)

    def validation_step(self, batch):
        self.log("val/sum", batch["target"].sum(), reduce="sum")


def shuffled(count=12, batch_size=2):
    return nf.ArrayLoader({"target": np.arange(1.0, count + 1, dtype=np.float32)}, batch_size, shuffle=True, seed=3)


@pytest.mark.parametrize(("overfit", "count"), [(2, 2), (0.34, 2), (1, 1), (1.0, 6), (99, 6)])
def test_overfit_batches_are_the_same_in_every_epoch_although_the_loader_shuffles(overfit, count):
    trainer = eager(max_epochs=3, overfit_batches=overfit, log_every_n_steps=1)
    history = trainer.fit(Sees(), shuffled(), shuffled())
    sums = [value for _, value in history["sum"]]
    assert len(sums) == 3 * count and trainer.num_training_batches == count
    assert sums[:count] == sums[count : 2 * count] == sums[2 * count :]
    expected = [batch["target"].sum() for batch in list(shuffled())[:count]]
    assert sums[:count] == expected
    assert [value for _, value in history["val/sum"]] == [sum(expected)] * 3


def test_overfit_batches_are_the_same_for_a_second_fit_with_the_same_loader():
    data = shuffled()
    first = eager(max_epochs=1, overfit_batches=2, log_every_n_steps=1).fit(Sees(), data)
    second = eager(max_epochs=1, overfit_batches=2, log_every_n_steps=1).fit(Sees(), data)
    assert first["sum"] == second["sum"]


def test_a_loader_that_shuffles_has_a_new_order_in_each_epoch_and_the_same_in_each_run():
    data = shuffled()
    runs = [eager(max_epochs=2, log_every_n_steps=1).fit(Sees(), data)["sum"] for _ in range(2)]
    sums = [value for _, value in runs[0]]
    assert runs[0] == runs[1] and sums[:6] != sums[6:]
    data.set_epoch(0)
    assert sums == [b["target"].sum() for _ in range(2) for b in data]


@pytest.mark.parametrize(("setting", "batches"), [(True, 1), (2, 2), (1, 1)])
def test_a_fast_dev_run_does_a_little_of_everything_and_writes_nothing(setting, batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes = Notes("on_validation_batch_end", "on_train_batch_end", "on_test_batch_end")

    class Tested(Scalar):
        def test_step(self, batch):
            self.log("t", batch["target"].mean())

    checkpoint, stop = nf.ModelCheckpoint(), nf.EarlyStopping("nobody logs this")
    trainer = nf.Trainer(
        fast_dev_run=setting,
        max_epochs=7,
        val_check_interval=3,
        callbacks=[notes, checkpoint, stop],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Tested()
    history = trainer.fit(module, targets(1, 2, 3), targets(1, 2, 3))
    trainer.test(module, targets(1, 2, 3))
    for hook in ("on_train_batch_end", "on_validation_batch_end", "on_test_batch_end"):
        assert len(notes.steps(hook)) == batches, hook
    assert trainer.loggers == [] and "val/target" in history
    assert list(tmp_path.iterdir()) == []


def test_barebones_trains_and_does_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes = Notes("on_validation_start", "on_sanity_check_start")
    trainer = nf.Trainer(max_epochs=2, barebones=True, log_every_n_steps=1, callbacks=notes)
    module = Scalar()
    history = trainer.fit(module, targets(2, 2, 2), targets(1))
    assert float(module.w[...]) == pytest.approx(2 - 0.9**6, rel=1e-6)
    assert trainer.callbacks == [notes] and trainer.loggers == []
    assert "loss" not in history and notes.steps("on_sanity_check_start") == []
    assert notes.steps("on_validation_start") == [3, 6]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1.0, 2, 50])
def test_a_loader_of_unknown_length_is_read_to_its_end_or_limit(limit):
    trainer = eager(max_epochs=2, limit_train_batches=limit)
    trainer.fit(Scalar(), lambda: iter(targets(1, 2, 3)))
    assert trainer.global_step == (4 if limit == 2 else 6)
    assert trainer.num_training_batches == (math.inf if limit == 1.0 else limit)
    assert trainer.current_epoch == 2


def test_a_fraction_of_an_unknown_length_is_refused():
    with pytest.raises(nf.ConfigurationError, match=r"limit_train_batches=0.5.*no length"):
        eager(max_epochs=1, limit_train_batches=0.5).fit(Scalar(), lambda: iter(targets(1)))
    with pytest.raises(nf.ConfigurationError, match=r"limit_val_batches=0.1.*none of 3"):
        eager(max_epochs=1, limit_val_batches=0.1).fit(Scalar(), targets(1), targets(1, 2, 3))


def test_no_batch_is_asked_for_beyond_the_limit():
    asked = []

    def batches():
        for index in range(5):
            asked.append(index)
            yield targets(1)[0]

    eager(max_epochs=1, limit_train_batches=2).fit(Scalar(), batches)
    assert asked == [0, 1]


def test_minus_one_from_a_batch_start_hook_skips_the_rest_of_the_epoch():
    class Skips(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    notes = Notes("on_train_batch_end", "on_validation_start", "on_train_epoch_end")
    trainer = eager(max_epochs=2, callbacks=[Skips(), notes])
    trainer.fit(Scalar(), targets(1, 2, 3), targets(1))
    assert notes.seen == [
        ("on_train_batch_end", 1, 0),
        ("on_validation_start", 1, 0),
        ("on_train_epoch_end", 1, 0),
        ("on_train_batch_end", 2, 1),
        ("on_validation_start", 2, 1),
        ("on_train_epoch_end", 2, 1),
    ]
    assert trainer.current_epoch == 2


def test_what_a_batch_start_hook_returns_may_be_anything_else():
    class Returns(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            return batch["target"]

    trainer = eager(max_epochs=1, callbacks=Returns())
    trainer.fit(Scalar(), targets(1, 2))
    assert trainer.global_step == 2


def test_fitting_twice_starts_a_new_run_from_the_trained_module():
    module, trainer = Scalar(), eager(max_epochs=2, log_every_n_steps=1)
    first = trainer.fit(module, targets(2, 2))
    between = float(module.w[...])
    second = trainer.fit(module, targets(2, 2))
    assert between == pytest.approx(2 - 0.9**4, rel=1e-6)
    assert float(module.w[...]) == pytest.approx(2 - 0.9**8, rel=1e-6)
    assert (trainer.global_step, trainer.current_epoch) == (4, 2)
    assert first is not second and trainer.history is second
    assert [step for step, _ in first["loss"]] == [step for step, _ in second["loss"]] == [1, 2, 3, 4]
    assert second["loss"][0][1] == pytest.approx(0.5 * (2 - between) ** 2, rel=1e-5)


def test_a_stop_request_does_not_outlive_its_fit():
    class Once(Callback):
        stops = True

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop, self.stops = self.stops, False

    trainer = eager(max_epochs=1, callbacks=Once())
    trainer.fit(Scalar(), targets(1, 2, 3))
    assert trainer.global_step == 1
    trainer.fit(Scalar(), targets(1, 2, 3))
    assert trainer.global_step == 3 and not trainer.should_stop


def test_eager_steps_equal_compiled_ones():
    results = []
    for jit in (True, False):
        module = Regressor(4, depth=1, rngs=nnx.Rngs(0))
        history = quiet(max_epochs=2, jit=jit, log_every_n_steps=1).fit(module, noise(), noise())
        results.append((nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))), dict(history)))
    (compiled, compiled_history), (eagerly, eager_history) = results
    assert jax.tree.structure(compiled) == jax.tree.structure(eagerly)
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(eagerly), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert list(compiled_history) == list(eager_history)
    for name, records in compiled_history.items():
        np.testing.assert_allclose(records, eager_history[name], rtol=1e-4, err_msg=name)


def test_training_equals_a_hand_loop():
    """SGD on (w - t)^2 / 2: w <- w - 0.1 (w - t)."""
    module, w, losses = Scalar(), 1.0, []
    history = quiet(max_epochs=2, log_every_n_steps=1).fit(module, targets(3, -1, 4))
    for step, target in enumerate([3, -1, 4] * 2, start=1):
        losses.append((step, pytest.approx(0.5 * (w - target) ** 2, rel=1e-5)))
        w -= 0.1 * (w - target)
    assert history["loss"] == losses
    assert float(module.w[...]) == pytest.approx(w, rel=1e-6)
