"""The search against a hand-written loop, the run after it against one given the rate, and its traces: none."""

from __future__ import annotations

import logging
import os
import signal

import jax
import nets
import numpy as np
import optax
import pytest
from flax import nnx
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nnx_fit as nf
from nnx_fit.callbacks.learning_rate_curve import rates_between


def values(module) -> list[np.ndarray]:
    """Everything a module holds: parameters, statistics, keys and counts of its random streams."""
    arrays = jax.tree.leaves(nnx.state(module))
    is_key = [jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) for array in arrays]
    return [np.asarray(jax.random.key_data(a) if key else a) for a, key in zip(arrays, is_key, strict=True)]


def assert_equal_runs(one, other):
    (history, module), (other_history, other_module) = one, other
    assert dict(history) == dict(other_history)
    for mine, theirs in zip(values(module), values(other_module), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def fitted(module, tmp_path, *, finder=None, loader=None, **options):
    """History and module after a fit; that of one parameter is eager, since it takes longer to compile than to run."""
    compiled = isinstance(module, Small)
    options = {"max_epochs": 2, "log_every_n_steps": 1, "default_root_dir": tmp_path, "jit": compiled} | options
    trainer = nets.quiet(callbacks=finder, **options)
    loader = nets.loader(shuffle=True) if loader is None else loader
    return trainer.fit(module, loader, loader), module


class Small(nf.FitModule):
    """Its numbers depend on everything: parameters, dropout, running statistics, and the order of the data."""

    def __init__(self, learning_rate: float, *, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)
        self.learning_rate = learning_rate

    def training_step(self, batch):
        loss = ((self.head(self.dropout(self.norm(batch["x"]))) - batch["y"]) ** 2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val/mean", self.head(self.norm(batch["x"])).mean())

    def configure_optimizers(self):
        return optax.sgd(self.learning_rate, momentum=0.9)


def small(learning_rate: float = 1e-2) -> Small:
    return Small(learning_rate, rngs=nnx.Rngs(0))


def search(**options) -> nf.LearningRateFinder:
    return nf.LearningRateFinder(**{"min_lr": 1e-4, "max_lr": 1.0, "num_training_steps": 24, **options})


class Unconfigured(nets.Scalar):
    """The optimizer is the Trainer's."""

    configure_optimizers = nf.FitModule.configure_optimizers


class Momentum(nets.Scalar):
    def configure_optimizers(self):
        return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(self.learning_rate, momentum=0.9))


@pytest.mark.parametrize(
    ("module", "setting", "mode"),
    [
        (Momentum, None, "exponential"),
        (Unconfigured, nf.OptimizerSpec(optax.adam, schedule=1e-3), "linear"),
        (Unconfigured, lambda steps: {"all": nf.OptimizerSpec(optax.rmsprop, schedule=1e-3)}, "linear"),
    ],
)
def test_losses_are_those_of_a_loop_by_hand(module, setting, mode, tmp_path):
    finder = search(mode=mode, max_lr=0.1, num_training_steps=30, update_attr=False)
    data = nets.targets(0.5, 0.2, -0.3)
    trainer = nets.quiet(max_epochs=1, optimizer=setting, callbacks=finder, default_root_dir=tmp_path)
    trainer.fit(module(start=1.5), data)
    rates = rates_between(1e-4, 0.1, 30, mode)

    def tx_of(schedule):
        if setting is None:
            return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(schedule, momentum=0.9))
        return (optax.rmsprop if callable(setting) else optax.adam)(schedule)

    tx = tx_of(lambda count: jax.numpy.asarray(rates, jax.numpy.float32)[count])
    w = jax.numpy.asarray(1.5)
    state, losses = tx.init(w), []
    for step in range(30):
        target = float(data[step % 3]["target"][0])
        loss, grad = jax.value_and_grad(lambda w, target=target: 0.5 * (w - target) ** 2)(w)
        losses.append(float(loss))
        updates, state = tx.update(grad, state, w)
        w = optax.apply_updates(w, updates)
    assert finder.results.lr == list(rates)
    np.testing.assert_allclose(finder.results.raw_loss, losses, rtol=1e-5)


def test_the_run_that_follows_is_the_one_that_was_given_the_rate(tmp_path):
    finder = search()
    history, module = fitted(small(), tmp_path, finder=finder)
    assert finder.optimal_lr is not None
    assert (module.learning_rate, module.hparams.learning_rate) == (finder.optimal_lr, finder.optimal_lr)
    assert_equal_runs((history, module), fitted(small(finder.optimal_lr), tmp_path))


def test_a_search_that_only_looks_leaves_no_trace(tmp_path):
    one = fitted(small(), tmp_path, finder=search(update_attr=False))
    assert one[1].learning_rate == 1e-2
    assert_equal_runs(one, fitted(small(), tmp_path))


class Constant(nets.Scalar):
    def training_step(self, batch):
        return 0 * self.w[...] + 2.5


def test_a_constant_loss_is_reported_constant_and_suggests_nothing(tmp_path, caplog):
    finder = search()
    with caplog.at_level(logging.WARNING, "nnx_fit"):
        _, module = fitted(Constant(), tmp_path, finder=finder, loader=nets.targets(0.5))
    assert finder.results.loss == [2.5] * 24
    assert (finder.optimal_lr, module.learning_rate) == (None, 0.1)
    assert "the loss fell nowhere" in caplog.text


def test_the_search_ends_when_the_loss_explodes(tmp_path):
    finder = search(min_lr=0.1, max_lr=1e4, num_training_steps=100)
    fitted(nets.Scalar(), tmp_path, finder=finder, loader=nets.targets(0.5, 0.2))
    losses = finder.results.loss
    assert 2 < len(losses) < 100
    assert losses[-1] > 4 * min(losses) and losses[-2] <= 4 * min(losses[:-1])


def test_a_loss_that_is_no_longer_finite_ends_it_whatever_the_threshold(tmp_path):
    finder = search(min_lr=2.5, max_lr=1e30, num_training_steps=100, early_stop_threshold=None)
    fitted(nets.Scalar(), tmp_path, finder=finder, loader=nets.targets(0.5))
    assert not np.isfinite(finder.results.loss[-1]) and np.isfinite(finder.results.loss[:-1]).all()


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_window_of_accumulation_counts_by_its_mean(scheduled, tmp_path):
    finder = search(num_training_steps=12, update_attr=False)
    data = nets.targets(0.5, 0.2, -0.3, 0.9)
    callbacks = [finder, nf.GradientAccumulationScheduler({0: 2})] if scheduled else finder
    fitted(nets.Scalar(), tmp_path, finder=callbacks, loader=data, accumulate_grad_batches=1 if scheduled else 2)
    w, losses = 1.0, []
    for step, rate in enumerate(rates_between(1e-4, 1.0, 12, "exponential")):
        pair = [(0.5, 0.2), (-0.3, 0.9)][step % 2]
        losses.append(np.mean([0.5 * (w - target) ** 2 for target in pair]))
        w -= rate * np.mean([w - target for target in pair])
    np.testing.assert_allclose(finder.results.raw_loss, losses, rtol=1e-5)


def test_a_schedule_of_the_trainers_is_scaled_to_peak_at_the_suggestion(tmp_path):
    def schedule(steps, peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, 4, steps)

    def run(setting, finder=None):
        callbacks = [nf.LearningRateMonitor(), *([finder] if finder else [])]
        module = Unconfigured(start=3.0)
        options = {"optimizer": setting, "finder": callbacks, "loader": nets.targets(*[0.5, 0.2] * 5)}
        return fitted(module, tmp_path, **options)[0]["lr"]

    finder = search(max_lr=0.5)
    scaled = run(lambda steps: nf.OptimizerSpec(optax.sgd, schedule=schedule(steps, 1e-3)), finder)
    given = run(lambda steps: nf.OptimizerSpec(optax.sgd, schedule=schedule(steps, finder.optimal_lr)))
    assert len(given) == 20 and max(rate for _, rate in given) == pytest.approx(finder.optimal_lr)
    assert [step for step, _ in scaled] == [step for step, _ in given]
    np.testing.assert_allclose([rate for _, rate in scaled], [rate for _, rate in given], rtol=1e-5)


class Warm(nets.Scalar):
    """Computes with its rate, which is fine where the schedule is said separately."""

    def configure_optimizers(self):
        peak = self.learning_rate * 2
        return nf.OptimizerSpec(optax.sgd, schedule=optax.warmup_constant_schedule(0.0, peak, self.trainer.max_steps))


def test_a_schedule_of_the_modules_is_made_anew_with_the_suggestion(tmp_path):
    finder = search(max_lr=0.5)
    module = Warm(start=3.0)
    options = {"loader": nets.targets(0.5, 0.2), "max_steps": 6, "max_epochs": -1}
    history, _ = fitted(module, tmp_path, finder=[finder, nf.LearningRateMonitor()], **options)
    assert module.learning_rate == finder.optimal_lr
    expected = [2 * finder.optimal_lr * step / 6 for step in range(6)]
    np.testing.assert_allclose([rate for _, rate in history["lr"]], expected, rtol=1e-6)


class Named(nets.Scalar):
    """Its rate is of another name, and of a part of it."""

    class Settings:
        rate = 0.1

    def __init__(self):
        super().__init__()
        self.settings = self.Settings()
        del self.learning_rate

    def configure_optimizers(self):
        return optax.sgd(self.settings.rate)


def test_the_attribute_can_be_named_by_a_dotted_path(tmp_path):
    finder = search(attr_name="settings.rate")
    _, module = fitted(Named(), tmp_path, finder=finder, loader=nets.targets(0.5))
    assert module.settings.rate == finder.optimal_lr


class Fixed(nets.Scalar):
    def configure_optimizers(self):
        return optax.sgd(0.1)


class FixedSpec(nets.Scalar):
    def configure_optimizers(self):
        return nf.OptimizerSpec(optax.sgd, schedule=0.1)


class Computing(nets.Scalar):
    def configure_optimizers(self):
        return optax.sgd(self.learning_rate * 2)


class Two(Small):
    def configure_optimizers(self):
        return [
            nf.OptimizerSpec(optax.sgd(self.learning_rate), trainable="head"),
            nf.OptimizerSpec(optax.sgd(self.learning_rate), trainable="norm"),
        ]


class Nameless(nets.Scalar):
    def __init__(self):
        super().__init__()
        del self.learning_rate


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Nameless, {}, "Nameless has no number named 'learning_rate' or 'lr'"),
        (nets.Scalar, {"attr_name": "rate"}, "Scalar has no number named 'rate'"),
        (Fixed, {}, "`module.learning_rate` has no effect on what Fixed.configure_optimizers gives"),
        (FixedSpec, {}, "`module.learning_rate` has no effect on what FixedSpec.configure_optimizers gives"),
        (Computing, {}, "Computing.configure_optimizers computes with `module.learning_rate`"),
        (lambda: Two(0.1, rngs=nnx.Rngs(0)), {}, "Two.configure_optimizers gives 2 optimizers"),
    ],
)
def test_a_rate_that_cannot_be_searched_is_an_error_that_says_why(module, options, message, tmp_path):
    made = module()
    loader = nets.loader() if isinstance(made, Two) else nets.targets(0.5)
    with pytest.raises(nf.ConfigurationError, match=message):
        fitted(made, tmp_path, finder=search(**options), loader=loader)
    assert not list(tmp_path.iterdir())


def test_a_ready_optimizer_of_the_trainers_is_an_error_that_names_the_fix(tmp_path):
    with pytest.raises(nf.ConfigurationError, match=r"OptimizerSpec\(optax.adam, schedule=1e-3\) instead of"):
        fitted(Unconfigured(), tmp_path, finder=search(), loader=nets.targets(0.5), optimizer=optax.adam(1e-3))
    with pytest.raises(nf.ConfigurationError, match="leave attr_name out"):
        spec = nf.OptimizerSpec(optax.adam, schedule=1e-3)
        fitted(Unconfigured(), tmp_path, finder=search(attr_name="lr"), loader=nets.targets(0.5), optimizer=spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "log"}, 'expected "exponential" or "linear"'),
        ({"min_lr": 0.0}, "expected numbers above 0"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "the first below the second"),
        ({"early_stop_threshold": 0.5}, "expected a number above 1 or None"),
        ({"num_training_steps": 1}, r"num_training_steps=1\): expected a whole number, 2 or more"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        nf.LearningRateFinder(**options)


def test_the_curve_is_saved_and_its_picture_logged(tmp_path, capsys):
    finder = search()
    logger = nf.TensorBoardLogger(tmp_path)
    fitted(nets.Scalar(), tmp_path, finder=finder, loader=nets.targets(0.5), logger=logger)
    assert (tmp_path / "lr_find.csv").read_text().splitlines()[0] == "step,lr,raw_loss,loss"
    assert len((tmp_path / "lr_find.csv").read_text().splitlines()) == 1 + len(finder.results.lr)
    assert imread(tmp_path / "lr_find.png").ndim == 3
    events = EventAccumulator(str(logger.log_dir), size_guidance={"images": 0})
    events.Reload()
    assert len(list(logger.log_dir.glob("events*"))) == 1
    (image,) = events.Images("lr_find")
    assert (image.step, image.width > 300) == (0, True)
    assert f"LearningRateFinder: {finder.optimal_lr:.3g} after 24 steps" in capsys.readouterr().out


def test_a_run_that_continues_keeps_the_rate_and_searches_no_more(tmp_path):
    def run(module, finder, directory, **options):
        trainer = nf.Trainer(
            callbacks=[finder, nf.ModelCheckpoint(dirpath=directory)],
            default_root_dir=directory,
            **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
            | {"max_epochs": 4}
            | {name: value for name, value in options.items() if name != "ckpt_path"},
        )
        loader = nets.loader(shuffle=True)
        return trainer.fit(module, loader, loader, ckpt_path=options.get("ckpt_path")), module

    whole = run(small(), search(), tmp_path / "whole")
    run(small(), first := search(), tmp_path / "cut", max_epochs=2)
    (tmp_path / "cut" / "lr_find.csv").unlink()
    resumed = run(small(), second := search(), tmp_path / "cut", ckpt_path="last")
    assert not (tmp_path / "cut" / "lr_find.csv").exists()
    assert (second.optimal_lr, second.results.loss) == (first.optimal_lr, first.results.loss)
    assert resumed[1].learning_rate == first.optimal_lr
    assert_equal_runs(whole, resumed)


class Interrupting(nets.Scalar):
    """Sends its process a signal in the search, which is in its own trainer's hands."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.max_steps == 24 and self.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


class Ended(nf.Callback):
    """What ends a run."""

    def __init__(self):
        self.seen: list[str] = []

    def on_train_end(self, trainer, module):
        self.seen.append("on_train_end")  # of a training that did not begin

    def on_exception(self, trainer, module, exception):
        self.seen.append(type(exception).__name__)

    def teardown(self, trainer, module, stage):
        self.seen.append("teardown")


def test_ctrl_c_in_the_search_ends_the_run_in_order_and_saves_nothing(tmp_path):
    module, ended, finder = Interrupting(), Ended(), search()
    before = values(module)
    trainer = nf.Trainer(
        max_epochs=2, callbacks=[finder, ended], default_root_dir=tmp_path, enable_progress_bar=False, logger=False
    )
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(module, nets.targets(0.5))
    assert signal.getsignal(signal.SIGINT) is handler
    assert (trainer.interrupted, ended.seen) == (True, ["KeyboardInterrupt", "teardown"])
    assert (finder.results, module.learning_rate) == (None, 0.1)
    assert not any(tmp_path.rglob("*=*"))
    for mine, theirs in zip(values(module), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_updates_that_overflow_in_float16_are_tried_again_at_their_rate(tmp_path):
    finder = search(num_training_steps=12, max_lr=0.1)
    fitted(nets.Scalar(start=3.0), tmp_path, finder=finder, loader=nets.targets(0.5), precision="16-mixed")
    exact = search(num_training_steps=12, max_lr=0.1)
    fitted(nets.Scalar(start=3.0), tmp_path, finder=exact, loader=nets.targets(0.5))
    assert finder.results.lr == exact.results.lr
    np.testing.assert_allclose(finder.results.raw_loss, exact.results.raw_loss, rtol=5e-3)


def test_a_plateau_that_waits_for_validations_rests_during_the_search(tmp_path):
    def raw_losses(tx, monitor=None):
        finder = search(num_training_steps=30)
        spec = nf.OptimizerSpec(tx, schedule=0.1, monitor=monitor)
        fitted(Unconfigured(start=3.0), tmp_path, finder=finder, loader=nets.targets(0.5, 0.2), optimizer=spec)
        return finder.results.raw_loss

    def plateau(learning_rate):
        return optax.chain(optax.sgd(learning_rate), optax.contrib.reduce_on_plateau(patience=1))

    assert raw_losses(plateau, "val/target") == raw_losses(optax.sgd)
