"""EMAWeights: the average equals its closed form, is what validation sees, and leaves no trace in the training."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.ema_weights import EMAWeights
from nnx_fit.checkpoint.store import load_arrays


class Seen(nets.Scalar):
    """Validation and test log the weight that they run with."""

    def validation_step(self, batch):
        self.log("val/w", self.w[...])

    def test_step(self, batch):
        self.log("test/w", self.w[...])

    def predict_step(self, batch):
        return self.w[...] + 0 * batch["target"].mean()


VALIDATION = nets.targets(0.0)


def weights(steps, start=1.0, target=0.5, rate=0.1):
    """w after each number of updates, 0 first: w_k = target + (start - target) (1 - rate)^k."""
    return target + (start - target) * (1 - rate) ** np.arange(steps + 1)


def average(steps, decay, *, start_step=0, every=1):
    """The average after so many updates, unrolled: d^n w_0 + (1 - d) sum_i d^(n - i) w_i."""
    taken = weights(steps)[start_step::every]
    n = len(taken) - 1
    return decay**n * taken[0] + (1 - decay) * sum(decay ** (n - i) * taken[i] for i in range(1, n + 1))


def fitted(ema, module=None, *, epochs=3, batches=2, **options):
    module = module or Seen()
    trainer = nets.quiet(max_epochs=epochs, callbacks=ema, **options)
    trainer.fit(module, nets.targets(*[0.5] * batches), VALIDATION)
    return trainer, module


@pytest.mark.parametrize(
    "options", [{}, {"start_step": 2}, {"every_n_steps": 2}, {"start_step": 1, "every_n_steps": 3}], ids=str
)
@pytest.mark.parametrize("jit", [True, False])
def test_average_has_its_closed_form(options, jit):
    ema = EMAWeights(decay=0.8, **options)
    _, module = fitted(ema, jit=jit)
    expected = average(6, 0.8, start_step=options.get("start_step", 0), every=options.get("every_n_steps", 1))
    np.testing.assert_allclose(ema.weights["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(module.w[...], weights(6)[-1], rtol=1e-6)


def test_validation_sees_the_average_and_training_does_not():
    trainer, _ = fitted(EMAWeights(decay=0.8), log_every_n_steps=1)
    np.testing.assert_allclose(
        [value for _, value in trainer.history["val/w"]], [average(2 * n, 0.8) for n in (1, 2, 3)], rtol=1e-6
    )
    losses = [value for _, value in trainer.history["loss"]]
    np.testing.assert_allclose(losses, 0.5 * (weights(5) - 0.5) ** 2, rtol=1e-5)


def test_parameters_are_validated_before_it_begins_and_when_it_is_only_kept():
    trainer, _ = fitted(EMAWeights(decay=0.8, start_step=3), num_sanity_val_steps=1)
    expected = [weights(2)[-1], average(4, 0.8, start_step=3), average(6, 0.8, start_step=3)]
    np.testing.assert_allclose([value for _, value in trainer.history["val/w"]], expected, rtol=1e-6)
    trainer, _ = fitted(EMAWeights(decay=0.8, use_for_eval=False))
    np.testing.assert_allclose([value for _, value in trainer.history["val/w"]], weights(6)[2::2], rtol=1e-6)


def test_one_average_for_each_update_of_several_batches():
    ema = EMAWeights(decay=0.8)
    fitted(ema, batches=4, accumulate_grad_batches=2)
    np.testing.assert_allclose(ema.weights["w"], average(6, 0.8), rtol=1e-6)


def state_of(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey)))


@pytest.mark.parametrize("interval", [1.0, 2], ids=["epoch", "mid-epoch"])
def test_training_with_it_is_bit_identical_to_training_without(interval):
    def trained(callbacks):
        module = nets.Regressor(rngs=nnx.Rngs(0))
        trainer = nets.quiet(max_epochs=3, callbacks=callbacks, val_check_interval=interval)
        trainer.fit(module, nets.loader(), nets.loader(32))
        return state_of(module), jax.tree.leaves(trainer._run.train_program.optimizer_state)

    jax.tree.map(np.testing.assert_array_equal, trained([EMAWeights(decay=0.9)]), trained([]))


def test_hooks_after_it_see_the_parameters_again():
    seen = []

    class After(nf.Callback):
        def on_validation_epoch_end(self, trainer, module):
            seen.append(("validating", float(module.w[...])))

        def on_validation_end(self, trainer, module):
            seen.append(("after", float(module.w[...])))

    fitted([EMAWeights(decay=0.8), After()], epochs=1)
    assert seen == [
        ("validating", pytest.approx(average(2, 0.8), rel=1e-6)),
        ("after", pytest.approx(weights(2)[-1], rel=1e-6)),
    ]


def test_what_was_seen_in_a_validation_stays_valid():
    class Keeps(nf.Callback):
        def __init__(self):
            self.kept = []

        def on_validation_epoch_end(self, trainer, module):
            self.kept.append(module.w[...])

    fitted([EMAWeights(decay=0.8), keeps := Keeps()])
    np.testing.assert_allclose(keeps.kept, [average(2 * n, 0.8) for n in (1, 2, 3)], rtol=1e-6)


def test_parameters_are_back_after_an_error_in_validation(tmp_path):
    class Fails(nf.Callback):
        def on_validation_batch_end(self, *args):
            raise RuntimeError("no")

    saving = nf.ModelCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="no"):
        fitted([EMAWeights(decay=0.8), Fails(), saving], module := Seen(), epochs=1, enable_checkpointing=True)
    np.testing.assert_allclose(module.w[...], weights(2)[-1], rtol=1e-6)
    saved = load_arrays(saving.last_model_path)
    assert saved["params"]["w"] == np.asarray(module.w[...])
    np.testing.assert_allclose(saved["callback EMAWeights"]["average of w"], average(2, 0.8), rtol=1e-6)


@pytest.mark.parametrize("first", ["saving", "averaging"])
@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_train_batch_start", 4),
        ("on_train_batch_end", 5),
        ("on_validation_start", 2),
        ("on_validation_batch_end", 2),
        ("on_validation_end", 2),
        ("on_train_epoch_end", 2),
        ("on_train_start", 1),
    ],
)
def test_resume_gives_the_same_bits_wherever_it_was_saved(hook, call, first, tmp_path):
    def run(seed, saves=False, ckpt_path=None):
        module, ema = nets.Regressor(rngs=nnx.Rngs(seed)), EMAWeights(decay=0.9)
        saver = [nets.SavesIn(tmp_path / "cut", hook, call)] if saves else []
        trainer = nets.quiet(max_epochs=3, callbacks=[*saver, ema] if first == "saving" else [ema, *saver], jit=False)
        history = trainer.fit(module, nets.loader(shuffle=True), nets.loader(32), ckpt_path=ckpt_path)
        return state_of(module), ema.weights, dict(history)

    whole = run(0, saves=True)
    continued = run(1, ckpt_path=tmp_path / "cut")
    assert whole[2] == continued[2]
    jax.tree.map(np.testing.assert_array_equal, whole[:2], continued[:2])


def test_a_checkpoint_is_evaluated_by_its_average_and_left_with_its_parameters(tmp_path):
    saving = nf.ModelCheckpoint(tmp_path, save_top_k=0)
    fitted([EMAWeights(decay=0.8), saving], enable_checkpointing=True)
    module, ema = Seen(start=9.0), EMAWeights()
    trainer = nets.quiet(callbacks=ema)
    path = saving.last_model_path
    tested = trainer.test(module, VALIDATION, ckpt_path=path)[0]["test/w"]
    assert tested == pytest.approx(average(6, 0.8), rel=1e-6)
    assert trainer.validate(module, VALIDATION, ckpt_path=path)[0]["val/w"] == tested
    assert trainer.predict(module, VALIDATION, ckpt_path=path) == [np.float32(tested)]
    np.testing.assert_allclose(module.w[...], weights(6)[-1], rtol=1e-6)
    assert trainer.test(module, VALIDATION)[0]["test/w"] == pytest.approx(weights(6)[-1], rel=1e-6)
    ema.copy_to(module)
    assert trainer.test(module, VALIDATION)[0]["test/w"] == tested


def test_a_checkpoint_without_an_average_is_evaluated_as_it_is(tmp_path):
    saving = nf.ModelCheckpoint(tmp_path, save_top_k=0)
    fitted([saving], enable_checkpointing=True)
    trainer = nets.quiet(callbacks=EMAWeights())
    tested = trainer.test(Seen(9.0), VALIDATION, ckpt_path=saving.last_model_path)[0]["test/w"]
    assert tested == pytest.approx(weights(6)[-1], rel=1e-6)
    assert nets.quiet().test(Seen(9.0), VALIDATION, ckpt_path=saving.last_model_path)[0]["test/w"] == tested


def test_short_floats_are_averaged_in_full_precision():
    class Short(Seen):
        def __init__(self):
            super().__init__()
            self.w = nnx.Param(jnp.asarray(1.0, jnp.bfloat16))

        def on_validation_epoch_end(self):
            assert self.w[...].dtype == jnp.bfloat16

    ema = EMAWeights(decay=0.999)
    _, module = fitted(ema, Short(), epochs=1, batches=8)
    assert ema.weights["w"].dtype == jnp.float32 and 0.99 < ema.weights["w"] < 1
    assert module.w[...].dtype == jnp.bfloat16


def test_what_begins_to_train_joins_the_average():
    class Two(Seen):
        def __init__(self):
            super().__init__()
            self.late = nnx.Param(jnp.asarray(3.0))
            self.freeze("late")

        def training_step(self, batch):
            return super().training_step(batch) + 0.5 * (self.late[...] - 0.5) ** 2

        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.unfreeze("late")

    ema = EMAWeights(decay=0.8)
    fitted(ema, Two())
    late = weights(2, start=3.0)
    # It begins as it is after the first update that trains it.
    np.testing.assert_allclose(ema.weights["late"], 0.8 * late[1] + 0.2 * late[2], rtol=1e-6)
    np.testing.assert_allclose(ema.weights["w"], average(6, 0.8), rtol=1e-6)


def test_another_fit_starts_over_and_a_module_without_the_parameters_is_refused():
    ema = EMAWeights(decay=0.8)
    with pytest.raises(nf.ConfigurationError, match="no average has begun"):
        ema.copy_to(Seen())
    fitted(ema)
    fitted(ema)
    np.testing.assert_allclose(ema.weights["w"], average(6, 0.8), rtol=1e-6)
    with pytest.raises(nf.ConfigurationError, match=r"the module has no w(.|\n)*Fix: pass the module that was trained"):
        ema.copy_to(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def test_training_never_waits_for_it():
    """The outputs of the step stay on the device, and the steps between two averages do not call it."""
    calls = []

    class Counted(EMAWeights):
        on_train_batch_end = EMAWeights.on_train_batch_end

        def _take_in(self, live):
            calls.append(len(live))
            with jax.transfer_guard("disallow"):
                super()._take_in(live)

    module = nets.Regressor(rngs=nnx.Rngs(0))
    module.configure_optimizers = lambda: optax.sgd(0.1)
    trainer = nets.quiet(max_epochs=2, callbacks=Counted(every_n_steps=4))
    trainer.fit(module, nets.loader())
    assert calls == [8, 8, 8]
    assert not trainer._run.funnel.takes_outputs("on_train_batch_end")


def test_several_averages_of_which_one_is_evaluated():
    slow, fast = EMAWeights(decay=0.8), EMAWeights(decay=0.5, use_for_eval=False)
    trainer, _ = fitted([slow, fast])
    np.testing.assert_allclose([slow.weights["w"], fast.weights["w"]], [average(6, 0.8), average(6, 0.5)], rtol=1e-6)
    np.testing.assert_allclose(trainer.history["val/w"][-1][1], average(6, 0.8), rtol=1e-6)
    with pytest.raises(nf.ConfigurationError, match="2 EMAWeights have use_for_eval=True"):
        fitted([EMAWeights(), EMAWeights()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay=1\.0"),
        ({"decay": "high"}, "decay='high'"),
        ({"decay": True}, "decay=True"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        EMAWeights(**arguments)
