"""What host hooks log, against values worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from measured import ACCURACY, BATCH_ACCURACIES, BATCHES, VALUES, Base, Multi, close, merged
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError


def eager(**options):
    """What happens on the host is the same for uncompiled steps, and those of so small a net come sooner."""
    return quiet(jit=False, **options)


RAGGED = [
    {"target": np.full(4, 1.0, np.float32)},
    {"target": np.full(4, 3.0, np.float32)},
    {"target": np.full(2, 10.0, np.float32)},
]


MEAN = (4 * 1 + 4 * 3 + 2 * 10) / 10


def test_host_values_of_both_infinities_average_to_nan_without_a_warning():
    class Bad(Scalar):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("mean", (math.inf, -math.inf)[batch_idx], on_step=False, on_epoch=True)
            self.log("unweighted", 1.0, on_step=False, on_epoch=True, batch_size=0)

    history = eager(max_epochs=1).fit(Bad(), targets(1, 2))
    assert math.isnan(history["mean"][0][1]) and math.isnan(history["unweighted"][0][1])


TRAIN_HOOKS = {
    "on_train_start": [(3, 7.0)],
    "on_train_epoch_start": [(3, 7.0), (6, 7.0)],
    "on_train_batch_start": [(2, 7.0), (4, 7.0), (6, 7.0)],
    "on_train_batch_end": [(2, 7.0), (4, 7.0), (6, 7.0)],
    "on_train_epoch_end": [(3, 7.0), (6, 7.0)],
}


EVAL_HOOKS = {
    f"on_validation_{point}": [(3, 7.0), (6, 7.0)]
    for point in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end")
}


@pytest.mark.parametrize(("hook", "expected"), [*TRAIN_HOOKS.items(), *EVAL_HOOKS.items()])
@pytest.mark.parametrize("value", [7.0, np.float32(7), jnp.asarray([7])], ids=["float", "numpy", "jax"])
def test_host_hooks_record_by_their_defaults(hook, expected, value):
    module = type("Hooked", (Scalar,), {hook: lambda self, *args: self.log("hook", value)})()
    history = eager(max_epochs=2, log_every_n_steps=2).fit(module, targets(1, 2, 3), targets(1))
    assert history["hook"] == expected


def test_host_values_are_reduced_by_the_same_rules_as_those_of_a_step():
    class Hooked(Scalar):
        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            for reduce in ("mean", "sum", "min", "max"):
                self.log(reduce, float(batch["target"][0]), reduce=reduce, batch_size=len(batch["target"]))
            self.log("plain", float(batch["target"][0]))

    history = eager(max_epochs=1).fit(Hooked(), targets(1), RAGGED)
    got = {name: history[name][0][1] for name in ("mean", "sum", "min", "max", "plain")}
    assert got == {"mean": pytest.approx(MEAN), "sum": 14.0, "min": 1.0, "max": 10.0, "plain": pytest.approx(14 / 3)}


def test_a_callback_logs_through_the_module():
    class Adds(nf.Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log_dict({"a": 1.0, "b": 2.0}, prog_bar=True)

    trainer = eager(max_epochs=1, callbacks=Adds())
    history = trainer.fit(Scalar(), targets(1), targets(1))
    assert (history["a"], history["b"]) == ([(1, 1.0)], [(1, 2.0)])
    assert trainer.progress_bar_metrics == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_train_end", "on_fit_end", "teardown", "on_validation_end"]
)
def test_logging_where_no_epoch_is_under_way_names_the_hook(hook):
    module = type("Hooked", (Scalar,), {hook: lambda self, *args: self.log("x", 1.0)})()
    with pytest.raises(ConfigurationError, match=f"'x'.*in {hook}, where no step or epoch"):
        eager(max_epochs=1).fit(module, targets(1), targets(1))


def test_logging_in_configure_optimizers_or_after_the_run_is_outside_of_a_hook():
    class Early(Scalar):
        def configure_optimizers(self):
            self.log("x", 1.0)

    with pytest.raises(ConfigurationError, match=r"'x'.*outside of a hook"):
        eager(max_epochs=1).fit(Early(), targets(1))
    module = Scalar()
    with pytest.raises(ConfigurationError, match=r"'x'.*outside of a run"):
        module.log("x", 1.0)
    eager(max_epochs=1).fit(module, targets(1))
    with pytest.raises(ConfigurationError, match=r"'x'.*outside of a hook"):
        module.log("x", 1.0)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_epoch_end"])
def test_an_epoch_hook_has_no_step_to_log_for(hook):
    module = type("Hooked", (Scalar,), {hook: lambda self: self.log("x", 1.0, on_step=True)})()
    with pytest.raises(ConfigurationError, match=f"'x'.*on_step=True.*{hook}"):
        eager(max_epochs=1).fit(module, targets(1))


def test_a_host_value_is_as_exact_as_it_was_given():
    class Hooked(Scalar):
        def on_train_epoch_end(self):
            self.log("tokens", np.int64(2**53))
            self.log("rate", np.float64(0.1))

    history = eager(max_epochs=1).fit(Hooked(), targets(1))
    assert (history["tokens"], history["rate"]) == ([(1, 2.0**53)], [(1, 0.1)])


@pytest.mark.parametrize("value", [1j, np.complex64(1), jnp.complex64(1)])
def test_a_complex_number_is_refused_in_a_step_and_in_a_hook(value):
    class Step(Scalar):
        def validation_step(self, batch):
            self.log("x", value)

    hooked = type("Hooked", (Scalar,), {"on_validation_epoch_end": lambda self: self.log("x", value)})()
    for module in (Step(), hooked):
        with pytest.raises(ConfigurationError, match=r"'x'.*complex64.*not a real number"):
            eager(max_epochs=1).validate(module, targets(1))


def test_a_dict_of_values_that_is_none_is_refused():
    class Hooked(Scalar):
        def validation_step(self, batch):
            self.log_dict([("x", 1.0)])

    with pytest.raises(ConfigurationError, match=r"self.log_dict got a list.*dict of names and values"):
        eager(max_epochs=1).validate(Hooked(), targets(1))


def test_a_host_hook_refuses_what_a_step_refuses():
    class Vector(Scalar):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("x", jnp.zeros(3))

    class Twice(Scalar):
        def on_train_batch_start(self, batch, batch_idx):
            self.log("x", 1.0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("x", 1.0, prog_bar=True)

    with pytest.raises(ConfigurationError, match=r"'x'.*shape \(3,\)"):
        eager(max_epochs=1).fit(Vector(), targets(1))
    with pytest.raises(ConfigurationError, match=r"'x'.*twice.*prog_bar"):
        eager(max_epochs=1).fit(Twice(), targets(1))


def test_a_host_hook_logs_what_a_metric_computes_then():
    class Hooked(Multi):
        def validation_step(self, batch):
            self.metrics.update(logits=batch["logits"], labels=batch["labels"], values=batch["values"])

        def on_validation_epoch_end(self):
            self.log("val", self.metrics)
            self.log("merged", merged(BATCHES[0]))

    trainer = quiet(max_epochs=1)
    history = trainer.fit(Hooked(), BATCHES, BATCHES)
    assert dict(history) == {
        "val/accuracy": close([(3, ACCURACY)]),
        "val/mean": close([(3, VALUES.mean())]),
        "merged": close([(3, BATCH_ACCURACIES[0])]),
    }


def test_a_host_hook_merges_nothing_and_says_so():
    class Hooked(Base):
        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            self.log("m", merged(batch))

    with pytest.raises(ConfigurationError, match=r"'m'.*Accuracy for the second time.*nothing merges them"):
        quiet().validate(Hooked(), BATCHES)
