"""GradientMonitor: norms equal to those of gradients that are known, at the log points."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.gradient_monitor import GradientMonitor


class Linear(nf.FitModule):
    """The loss is a product of parameters and batch, so that the batch is the gradient."""

    def __init__(self):
        self.a = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        self.b = nnx.Param(jnp.zeros((2, 2)))
        self.c = nnx.Param(jnp.zeros((), jnp.bfloat16))

    def training_step(self, batch):
        parts = {"kernel": self.a.kernel[...], "bias": self.a.bias[...], "b": self.b[...], "c": self.c[...]}
        return sum(jnp.sum(parts[name] * batch[name]) for name in parts).astype(jnp.float32)

    def configure_optimizers(self):
        return optax.sgd(0.1)


def gradients(scale=1.0):
    """A batch, the gradients of one step."""
    batch = {
        "kernel": np.array([[3.0], [-4.0]]), "bias": np.array([12.0]), "b": np.array([[1.0, -2.0], [2.0, 0.0]]),
        "c": np.array(-8.0),
    }  # fmt: skip
    return {name: (array * scale).astype(np.float32) for name, array in batch.items()}


LAYERS = {"a": ("kernel", "bias"), "b": ("b",), "c": ("c",)}


def norm_of(batch, names, p):
    return np.linalg.norm(np.concatenate([batch[name].ravel() for name in names]).astype(np.float64), p)


def fit(monitors, batches=None, module=None, **options):
    trainer = nets.quiet(**{"max_epochs": 1, "log_every_n_steps": 1, "jit": False, **options}, callbacks=monitors)
    return trainer.fit(module or Linear(), batches or [gradients()])


@pytest.mark.parametrize("jit", [True, False])
def test_norms_are_those_of_the_gradients(jit):
    history = fit(GradientMonitor(per_layer=True), jit=jit)
    assert history["gradients/a/norm"] == [(1, 13.0)]  # 3, 4, 12
    assert history["gradients/b/norm"] == [(1, 3.0)]  # 1, 2, 2
    assert history["gradients/c/norm"] == [(1, 8.0)]
    assert history["grad_norm"] == [(1, pytest.approx(np.sqrt(13**2 + 3**2 + 8**2), rel=1e-6))]
    assert set(history) == {"grad_norm", "gradients/a/norm", "gradients/b/norm", "gradients/c/norm"}


@pytest.mark.parametrize(("p", "name"), [(1, "norm_1"), (3.5, "norm_3.5"), ("inf", "norm_inf"), (0.5, "norm_0.5")])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15], ids=["plain", "tiny", "huge"])
def test_other_norms_equal_numpys_and_are_named_for_it(p, name, scale):
    batch = gradients(scale)
    history = fit(GradientMonitor(p, per_layer=True), [batch])
    assert len(history) == 4
    assert history[f"grad_{name}"] == [(1, pytest.approx(norm_of(batch, batch, float(p)), rel=1e-2))]
    for layer in ("a", "b"):
        expected = norm_of(batch, LAYERS[layer], float(p))
        assert history[f"gradients/{layer}/{name}"] == [(1, pytest.approx(expected, rel=1e-5))]


def test_global_norm_alone_unless_layers_are_asked_for():
    assert set(fit(GradientMonitor())) == {"grad_norm"}


def test_several_norms_side_by_side():
    history = fit([GradientMonitor(), GradientMonitor(1), GradientMonitor(float("inf"))])
    values = {name: records[0][1] for name, records in history.items()}
    total = np.sqrt(13**2 + 3**2 + 8**2)
    assert values == pytest.approx({"grad_norm": total, "grad_norm_1": 32.0, "grad_norm_inf": 12.0}, rel=1e-6)


def test_norm_of_each_logged_step_goes_to_the_loggers():
    class Recorder(nf.Logger):
        def __init__(self):
            self.records = []

        def log_metrics(self, metrics, step):
            self.records.append((dict(metrics), step))

    recorder = Recorder()
    history = fit(
        GradientMonitor(), nets.targets(*[1.0] * 5), nets.Scalar(start=0.0, learning_rate=0.5), logger=recorder,
        log_every_n_steps=2,
    )  # fmt: skip
    # The distance from 1, which is the gradient, halves in each step.
    assert history["grad_norm"] == [(2, 0.5), (4, 0.125)]
    assert [(metrics["grad_norm"], step) for metrics, step in recorder.records] == [(0.5, 2), (0.125, 4)]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_measured_before_clipping(algorithm):
    batches, module = nets.targets(5.0, 5.0), nets.Scalar(start=0.0, learning_rate=1.0)
    history = fit(GradientMonitor(), batches, module, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)
    assert history["grad_norm"] == [(1, 5.0), (2, 4.0)]


def test_gradients_are_measured_after_the_users_own_hook():
    class Halved(nets.Scalar):
        def on_gradients(self, grads):
            return jax.tree.map(lambda g: g / 2, grads)

    history = fit(GradientMonitor(), nets.targets(4.0), Halved(start=0.0))
    assert history["grad_norm"] == [(1, 2.0)]


def test_gradients_of_a_window_are_its_mean():
    module = nets.Scalar(start=0.0, learning_rate=1.0)
    history = fit(GradientMonitor(), nets.targets(1.0, -3.0, 5.0), module, accumulate_grad_batches=2)
    # (1 - 3) / 2 = -1 takes the weight to -1; the last window has one batch, at a distance of 6.
    assert history["grad_norm"] == [(1, 1.0), (2, 6.0)]


def test_frozen_parameters_have_no_gradient():
    module = Linear()
    module.freeze("a", "c")
    assert fit(GradientMonitor(per_layer=True), module=module) == {
        "grad_norm": [(1, 3.0)], "gradients/b/norm": [(1, 3.0)],
    }  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("p", [1, 2, 3, "inf"])
def test_gradients_that_are_not_finite_show(value, p):
    history = fit(GradientMonitor(p), [gradients() | {"bias": np.array([value], np.float32)}])
    ((_, norm),) = history[GradientMonitor(p).names([])[0]]
    assert not np.isfinite(norm)


def test_gradients_of_zero_have_the_norm_zero():
    for p in (1, 2, 3, "inf"):
        history = fit(GradientMonitor(p), [gradients(0.0)])
        assert history[GradientMonitor(p).names([])[0]] == [(1, 0.0)]


class Silent(nf.Logger):
    """A logger, without which `VariableMonitor` logs nothing."""


@pytest.mark.parametrize("order", [1, -1])
def test_layers_are_left_to_a_variable_monitor_that_logs_them(order):
    variables, names = nf.VariableMonitor(every_n_steps=1, params=True), []

    class Noted(GradientMonitor):
        def step_metrics(self, view):
            metrics = super().step_metrics(view)
            names.extend(metrics)
            return metrics

    history = fit([Noted(per_layer=True), variables][::order], logger=Silent())
    assert names == ["grad_norm"]
    assert history["gradients/a/norm"] == [(1, 13.0)]
    assert history["grad_norm"] == [(1, pytest.approx(np.sqrt(13**2 + 3**2 + 8**2), rel=1e-6))]


@pytest.mark.parametrize(
    ("p", "variables", "options", "name"),
    [
        (2, {"params": False}, {"logger": Silent()}, "norm"),
        (2, {"params": True}, {}, "norm"),  # there is no logger
        (1, {"params": True}, {"logger": Silent()}, "norm_1"),
    ],
)
def test_layers_that_a_variable_monitor_does_not_log_are_logged(p, variables, options, name):
    monitors = [GradientMonitor(p, per_layer=True), nf.VariableMonitor(every_n_steps=1, **variables)]
    assert fit(monitors, **options)[f"gradients/a/{name}"] == [(1, norm_of(gradients(), LAYERS["a"], p))]


def test_monitoring_does_not_change_the_run():
    def trained(callbacks):
        module = nets.Regressor(rngs=nnx.Rngs(0))
        nets.quiet(max_epochs=2, callbacks=callbacks, log_every_n_steps=2).fit(module, nets.loader())
        return nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey)))

    jax.tree.map(np.testing.assert_array_equal, trained([]), trained([GradientMonitor(per_layer=True)]))


def test_host_has_nothing_to_do():
    hooks = {name for name in vars(GradientMonitor) if name.startswith("on_")}
    assert hooks == {"on_train_start"} and not GradientMonitor.reads_module


@pytest.mark.parametrize("norm_type", [0, -1, None, True, "two", float("nan")])
def test_wrong_norm_is_named(norm_type):
    with pytest.raises(nf.ConfigurationError, match=r"GradientMonitor\(norm_type=(.|\n)*Fix: pass 2"):
        GradientMonitor(norm_type)
