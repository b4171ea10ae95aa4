"""Manual optimization: steps that differentiate and update by themselves, against sequences computed by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, loader, quiet, targets

import nnx_fit as nf

RATE = 0.1


class Duel(nf.FitModule):
    """Two numbers, each pulled by an optimizer of its own: a towards b, b away from it to twice its value."""

    automatic_optimization = False

    def __init__(self, a: float = 1.0, b: float = 3.0):
        self.a = nnx.Param(jnp.float32(a))
        self.b = nnx.Param(jnp.float32(b))
        self.calls = nnx.Variable(jnp.int32(0))

    def loss_a(self):
        self.calls[...] += 1
        loss = 0.5 * (self.a[...] - self.b[...]) ** 2
        self.log("loss_a", loss)
        return loss

    def loss_b(self):
        self.calls[...] += 1
        return 0.5 * (self.b[...] - 2 * self.a[...]) ** 2

    def training_step(self, batch):
        _, grads = self.value_and_grad(self.loss_a, optimizer="a")
        self.optimizers("a").update(grads)
        loss, grads = self.value_and_grad(self.loss_b, optimizer="b")
        self.optimizers("b").update(grads)
        self.log("loss_b", loss)
        return {"loss_b": loss, "a": self.a[...]}

    def configure_optimizers(self):
        return {name: nf.OptimizerSpec(optax.sgd(RATE), trainable=name) for name in ("a", "b")}


def duel_by_hand(steps, a=1.0, b=3.0):
    """(loss_a, loss_b, a, b) of each step: b sees the a that was just updated."""
    found = []
    for _ in range(steps):
        loss_a, a = 0.5 * (a - b) ** 2, a - RATE * (a - b)
        loss_b, b = 0.5 * (b - 2 * a) ** 2, b - RATE * (b - 2 * a)
        found.append((loss_a, loss_b, a, b))
    return found


def run(module, steps=4, **options):
    trainer = quiet(max_steps=steps, log_every_n_steps=1, **options)
    return trainer, trainer.fit(module, targets(*range(steps)))


def test_optimizers_take_turns_within_a_step():
    module = Duel()
    trainer, history = run(module)
    expected = duel_by_hand(4)
    np.testing.assert_allclose([value for _, value in history["loss_a"]], [row[0] for row in expected], rtol=1e-5)
    np.testing.assert_allclose([value for _, value in history["loss_b"]], [row[1] for row in expected], rtol=1e-5)
    np.testing.assert_allclose([module.a[...], module.b[...]], expected[-1][2:], rtol=1e-6)
    assert [step for step, _ in history["loss_a"]] == [1, 2, 3, 4]
    assert trainer.global_step == 4, "a training step counts once, whatever it updates"
    assert trainer.compilations == ["first call"]


def test_optimizers_in_a_list_go_by_their_place():
    class Listed(Duel):
        def training_step(self, batch):
            first, second = self.optimizers()
            first.update(self.value_and_grad(self.loss_a, optimizer=0)[1])
            second.update(self.value_and_grad(self.loss_b, optimizer=1)[1])

        def configure_optimizers(self):
            return list(super().configure_optimizers().values())

    module = Listed()
    trainer, _ = run(module)
    np.testing.assert_allclose([module.a[...], module.b[...]], duel_by_hand(4)[-1][2:], rtol=1e-6)
    assert [each.params for each in trainer.optimizers] == [["a"], ["b"]]
    assert module.optimizers(1).name == "1"


def test_what_a_differentiated_function_changes_beside_parameters_is_kept():
    module = Duel()
    run(module, steps=3)
    assert int(module.calls[...]) == 6


def test_a_step_without_compilation_does_the_same():
    compiled, eager = Duel(), Duel()
    run(compiled)
    run(eager, jit=False)
    np.testing.assert_allclose([compiled.a[...], compiled.b[...]], [eager.a[...], eager.b[...]], rtol=1e-6)


def test_outputs_reach_the_batch_hook_as_they_were_returned():
    seen = []

    class Watching(Duel):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(jax.tree.map(float, outputs))

    run(Watching(), steps=2)
    expected = duel_by_hand(2)
    for row, (_, loss_b, a, _) in zip(seen, expected, strict=True):
        assert row == pytest.approx({"loss_b": loss_b, "a": a}, rel=1e-6)


class ByHand(Regressor):
    """`Regressor` (BatchNorm, Dropout) that does itself what the Trainer does for it."""

    automatic_optimization = False

    def training_step(self, batch):
        def loss_of():
            loss = self.loss(batch)
            self.log("train/loss", loss)
            return loss

        loss, grads = self.value_and_grad(loss_of)
        self.optimizers().update(grads)
        return loss


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_one_optimizer_by_hand_trains_as_the_trainer_does(precision):
    """Statistics and random streams included: both see the same dropout masks and batch statistics."""
    modules = [Regressor(rngs=nnx.Rngs(0)), ByHand(rngs=nnx.Rngs(0))]
    histories = [
        quiet(max_epochs=2, log_every_n_steps=1, precision=precision).fit(module, loader(), loader())
        for module in modules
    ]
    for name in ("train/loss", "val/loss"):
        np.testing.assert_allclose(*([value for _, value in history[name]] for history in histories), rtol=1e-5)
    tolerance = 1e-5 if precision == "32" else 2e-2
    for one, other in zip(*(jax.tree.leaves(nnx.state(module)) for module in modules), strict=True):
        assert one.dtype == other.dtype
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_transforms_inside_the_differentiated_function_work():
    """`nnx.remat` and `nnx.jit` replace every value object; gradients and statistics are those without them."""

    class Wrapped(ByHand):
        def loss(self, batch):
            @nnx.jit
            def inner(self, x):
                return nnx.remat(lambda module, x: module(x))(self, x)

            return ((inner(self, batch["x"]) - batch["y"]) ** 2).mean()

    modules = [ByHand(rngs=nnx.Rngs(0)), Wrapped(rngs=nnx.Rngs(0))]
    for module in modules:
        quiet(max_steps=2).fit(module, loader())
    for one, other in zip(*(jax.tree.leaves(nnx.state(module, nnx.BatchStat)) for module in modules), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class EveryThird(Duel):
    """Updates `b` in every third step only; its schedule follows its own updates."""

    def training_step(self, batch):
        _, grads = self.value_and_grad(self.loss_a, optimizer="a")
        self.optimizers("a").update(grads)
        _, grads = self.value_and_grad(self.loss_b, optimizer="b")
        self.optimizers("b").update(grads, when=self.global_step % 3 == 2)

    def configure_optimizers(self):
        schedule = optax.exponential_decay(RATE, 1, 0.5)
        return {
            "a": nf.OptimizerSpec(optax.sgd(RATE), trainable="a"),
            "b": nf.OptimizerSpec(optax.sgd, schedule=schedule, trainable="b"),
        }


def test_an_update_may_depend_on_the_step():
    module = EveryThird()
    _, history = run(module, steps=7, callbacks=[nf.LearningRateMonitor()])
    a, b, rate = 1.0, 3.0, RATE
    for step in range(7):
        a -= RATE * (a - b)
        if step % 3 == 2:
            b, rate = b - rate * (b - 2 * a), rate / 2
    np.testing.assert_allclose([module.a[...], module.b[...]], [a, b], rtol=1e-6)
    applied = [value for _, value in history["lr-b"]]
    np.testing.assert_allclose(applied, [0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], rtol=1e-6)


def test_a_pair_brings_what_the_function_made_on_the_way():
    class Pairs(Duel):
        def training_step(self, batch):
            (loss, twice), grads = self.value_and_grad(
                lambda: (self.loss_a(), 2 * self.a[...]), optimizer="a", has_aux=True
            )
            self.optimizers("a").update(grads)
            return {"loss": loss, "twice": twice}

    seen = []
    module = Pairs()
    run(module, steps=1, callbacks=[nf.LambdaCallback(on_train_batch_end=lambda t, m, o, b, i: seen.append(o))])
    assert float(seen[0]["twice"]) == 2.0
    assert float(seen[0]["loss"]) == 2.0


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    class Adams(Duel):
        def configure_optimizers(self):
            return {name: nf.OptimizerSpec(optax.adam(RATE), trainable=name) for name in ("a", "b")}

    whole, first, second = Adams(), Adams(), Adams(5.0, 6.0)
    run(whole, steps=6)
    trainer = quiet(max_steps=3)
    trainer.fit(first, targets(*range(6)))
    trainer.save_checkpoint(tmp_path / "saved")
    quiet(max_steps=6).fit(second, targets(*range(6)), ckpt_path=tmp_path / "saved")
    assert [whole.a[...].tobytes(), whole.b[...].tobytes()] == [second.a[...].tobytes(), second.b[...].tobytes()]


def test_a_parameter_written_in_its_own_function_is_named():
    class Writing(Duel):
        def loss_a(self):
            self.a[...] = self.a[...] * 0.9
            return super().loss_a()

    with pytest.raises(nf.StateError, match="wrote 1 trained parameter by hand:\n    a"):
        run(Writing())


def test_parameters_may_be_written_between_the_updates():
    """As a Wasserstein critic's are: in manual optimization the step owns them."""

    class Clipped(Duel):
        def training_step(self, batch):
            super().training_step(batch)
            self.a[...] = jnp.clip(self.a[...], -1.0, 1.0)

    module = Clipped()
    run(module)
    assert float(module.a[...]) == 1.0


def step(body):
    """A `Duel` whose training step is a function."""
    return type("Duel", (Duel,), {"training_step": lambda self, batch: body(self)})()


def update_within(self):
    def loss():
        self.optimizers("a").update(None)
        return self.loss_a()

    self.value_and_grad(loss, optimizer="a")


def scanned(self):
    def body(carry, _):
        _, grads = self.value_and_grad(self.loss_a, optimizer="a")
        self.optimizers("a").update(grads)
        return carry, None

    jax.lax.scan(body, 0, None, length=2)


def grads_of_the_other(self):
    _, grads = self.value_and_grad(self.loss_a, optimizer="a")
    self.optimizers("b").update(grads)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda self: self.loss_a(), "updated nothing, although `automatic_optimization = False`"),
        (scanned, r"value_and_grad was called inside a transform within training_step(.|\n)*a Python loop"),
        (update_within, "inside the function of self.value_and_grad"),
        (grads_of_the_other, r"something else than what that optimizer trains\.\nFix: .*optimizer='b'"),
        (lambda self: self.value_and_grad(self.loss_a), "several optimizers .'a', 'b'.. Fix: say which"),
        (lambda self: self.optimizers("c"), "no optimizer 'c'. There are: 'a', 'b'"),
        (lambda self: self.value_and_grad(lambda: None, optimizer="a"), "value_and_grad returned nothing"),
        (lambda self: self.value_and_grad(lambda: self.b[...], optimizer="a"), "does not depend on any trained"),
        (
            lambda self: self.value_and_grad(lambda: self.value_and_grad(self.loss_b, optimizer="b")[0], optimizer="a"),
            "inside the function of another one",
        ),
    ],
)
def test_mistakes_in_the_step_are_named(body, says):
    with pytest.raises(nf.ConfigurationError, match=says):
        run(step(body))


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"accumulate_grad_batches": 2}, "optax.MultiSteps"),
        ({"gradient_clip_val": 1.0}, "optax.clip_by_global_norm"),
        ({"precision": "16-mixed"}, "bf16-mixed"),
    ],
)
def test_options_that_belong_to_the_trainers_own_updates_are_refused(options, fix):
    with pytest.raises(nf.ConfigurationError, match=f"automatic_optimization = False(.|\n)*Fix: .*{fix}"):
        run(Duel(), **options)


def test_accumulation_that_a_callback_asks_for_is_refused():
    with pytest.raises(nf.ConfigurationError, match=r"optax\.MultiSteps"):
        run(Duel(), callbacks=[nf.GradientAccumulationScheduler({0: 2})])


def test_a_module_that_has_on_gradients_is_told_where_to_do_it():
    class Both(Duel):
        def on_gradients(self, grads):
            return grads

    with pytest.raises(nf.ConfigurationError, match=r"Both\.on_gradients has no place"):
        run(Both())


def test_the_methods_are_refused_where_the_trainer_updates():
    class Automatic(Duel):
        automatic_optimization = True

        def training_step(self, batch):
            return self.value_and_grad(self.loss_a, optimizer="a")[0]

    with pytest.raises(nf.ConfigurationError, match=r"value_and_grad was called in training_step(.|\n)*Fix: set"):
        run(Automatic())
    with pytest.raises(nf.ConfigurationError, match="outside of a step"):
        Duel().value_and_grad(lambda: 0.0)
    with pytest.raises(nf.ConfigurationError, match="no Trainer runs this module"):
        Duel().optimizers("a")


def test_gradients_that_are_not_finite_are_named():
    class Infinite(Duel):
        def loss_a(self):
            return super().loss_a() + jnp.log(self.a[...] - 1.0)

    with pytest.raises(nf.NonFiniteError, match=r"Step 1: .*gradient of `a`"):
        run(Infinite(), detect_nonfinite=True)


def test_monitors_see_what_the_step_did():
    _, history = run(Duel(), steps=2, callbacks=[nf.GradientMonitor()])
    rows = duel_by_hand(2)
    gradients = [(1.0 - 3.0, 3.0 - 2 * rows[0][2])]
    gradients.append((rows[0][2] - rows[0][3], rows[0][3] - 2 * rows[1][2]))
    np.testing.assert_allclose(
        [value for _, value in history["grad_norm"]], [np.hypot(*pair) for pair in gradients], rtol=1e-5
    )
