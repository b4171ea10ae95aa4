"""What one step logs: several values of one name, metric objects, and what is refused."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from measured import BATCHES, VALUES, Base, logging, merged
from nets import quiet

from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics.capture import Capture, MetricTable, make_spec

STEP, EPOCH = (True, False), (False, True)


def capture(defaults=EPOCH, size=4):
    return Capture("validation_step", defaults, lambda: size)


def test_several_values_of_one_name_are_reduced_with_each_other():
    for reduce, expected in (("mean", (1 * 1 + 2 * 2 + 6 * 3) / 6), ("sum", 9), ("min", 1), ("max", 6)):
        taken = capture()
        for value, size in ((1.0, 1), (2.0, 2), (6.0, 3)):
            taken.log("x", value, reduce=reduce, batch_size=size)
        value, weight = taken.values()["x"]
        assert float(value) == pytest.approx(expected, rel=1e-6), reduce
        assert float(weight) == (6 if reduce == "mean" else 1)


def test_the_batch_size_is_asked_for_only_where_a_mean_over_the_epoch_needs_it():
    def unknown():
        raise AssertionError("asked")

    taken = Capture("training_step", STEP, unknown)
    taken.log("step", 1.0)
    taken.log("total", 1.0, on_epoch=True, reduce="sum")
    taken.log("given", 1.0, on_epoch=True, batch_size=7)
    assert float(taken.values()["given"][1]) == 7
    with pytest.raises(AssertionError, match="asked"):
        taken.log("mean", 1.0, on_epoch=True)


def test_one_name_with_different_options_is_refused_naming_the_option():
    taken = capture()
    taken.log("x", 1.0)
    with pytest.raises(ConfigurationError, match=r"'x'.*twice.*prog_bar=False and prog_bar=True"):
        taken.log("x", 1.0, prog_bar=True)
    table = MetricTable()
    table.place(make_spec("x", EPOCH))
    with pytest.raises(ConfigurationError, match=r"'x'.*on_step=False and on_step=True; on_epoch=True and on_epoch=Fa"):
        table.place(make_spec("x", STEP))


def test_a_hook_without_metrics_refuses_and_names_itself():
    with pytest.raises(ConfigurationError, match=r"'x'.*predict_step.*return the value"):
        Capture("predict_step", None, lambda: 1).log("x", 1.0)


def updated(self, batch):
    self.accuracy.update(logits=batch["logits"], labels=batch["labels"])
    return self.accuracy


def outside(self, batch):
    metric = nnx.metrics.Average()
    metric.update(values=batch["values"])
    return metric


def curve(self, batch):
    self.curve.update(predictions=batch["values"], labels=batch["labels"] > 0)
    return self.curve


def nested(self, batch):
    @nnx.jit
    def inner(module, batch):
        module.log("m", updated(module, batch))

    inner(self, batch)
    return 0.0


class Ifs(nnx.metrics.Average):
    def compute(self):
        return 1.0 if self.count[...] > 0 else 0.0


@nnx.dataclass
class Collects:
    """A metric that keeps all it was given."""

    values: jax.Array = nnx.data()

    def merge(self, other):
        return Collects(jnp.concatenate([self.values, other.values]))

    def compute(self):
        return self.values.mean()


jax.tree_util.register_dataclass(Collects, ["values"], [])


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (updated, {"reduce": "sum"}, r"'m', ..., reduce='sum'.*Accuracy, which itself.*\nFix: leave reduce out"),
        (lambda s, b: merged(b), {"batch_size": 4}, r"batch_size=4.*\nFix: leave batch_size out"),
        (lambda s, b: s.accuracy, {}, r"'m'.*Accuracy that validation_step did not update.*\nFix: call its `update"),
        (outside, {}, r"'m'.*Average that is no part of Logs.*\nFix: make it in the module's `__init__`"),
        (nested, {}, "'m'.*inside a transform within validation_step"),
        (
            curve,
            {},
            r"'m'.*AUCROC changes its shapes.*\nFix: of metrax, log the metric itself.*metrax.AUCROC.from",
        ),
        (lambda s, b: Collects(b["values"]), {}, r"'m'.*state of a Collects grows.*\nFix"),
    ],
    ids=["reduce", "batch_size", "not updated", "outside", "nested", "shapes", "growing"],
)
def test_a_mistake_is_named_with_its_fix(value, options, message):
    with pytest.raises(ConfigurationError, match=message):
        quiet().validate(logging(value=value, **options), BATCHES)


def test_a_metric_that_needs_python_values_is_named():
    module = logging(value=lambda self, batch: (self.ifs.update(values=batch["values"]), self.ifs)[1])
    module.ifs = Ifs()
    with pytest.raises(ConfigurationError, match=r"'m'.*Ifs\.compute\(\) needs values that a compiled step"):
        quiet().validate(module, BATCHES)


def test_a_metric_from_outside_of_the_module_is_refused_with_what_to_do():
    metric = nnx.metrics.Average()

    def updated(self, batch):
        metric.update(values=batch["values"])
        return metric

    with pytest.raises(Exception, match=r"(?s)different trace level.*no part of Logs.*Fix: make it an attribute"):
        quiet().validate(logging(value=updated), BATCHES)


def test_one_name_for_two_things_is_refused():
    class Twice(Base):
        def __init__(self, second):
            super().__init__()
            self.a, self.b = nnx.metrics.Average(), nnx.metrics.Average()
            self.second = second

        def validation_step(self, batch):
            for metric in (self.a, self.b):
                metric.update(values=batch["values"])
            self.log("x", self.a)
            self.log("x", {"value": 1.0, "metric": self.b}.get(self.second, self.a), prog_bar=self.second == "bar")

    with pytest.raises(ConfigurationError, match=r"'x'.*with a metric object and with a value"):
        quiet().validate(Twice("value"), BATCHES)
    with pytest.raises(ConfigurationError, match=r"'x'.*two metrics.*`a` of x \(\) and `b` of x \(\)"):
        quiet().validate(Twice("metric"), BATCHES)
    with pytest.raises(ConfigurationError, match=r"'x'.*twice.*prog_bar=False and prog_bar=True"):
        quiet().validate(Twice("bar"), BATCHES)
    (got,) = quiet().validate(Twice("same"), BATCHES)
    assert got == {"x": pytest.approx(VALUES.mean())}
