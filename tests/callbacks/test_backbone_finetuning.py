"""BackboneFinetuning: frozen before its epoch, trained from it on, and the optimizer's state goes on."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.callbacks.backbone_finetuning import BackboneFinetuning


class Two(nf.FitModule):
    """Two independent scalars under SGD on (w - target)^2 / 2 each."""

    def __init__(self, tx=None):
        self.backbone = nnx.Param(jnp.asarray(3.0))
        self.head = nnx.Param(jnp.asarray(1.0))
        self.tx = tx or optax.sgd(0.1)

    def training_step(self, batch):
        target = batch["target"].mean()
        return 0.5 * ((self.backbone[...] - target) ** 2 + (self.head[...] - target) ** 2)

    def configure_optimizers(self):
        return self.tx


class Noted(nf.Callback):
    """Both weights after each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, module):
        self.weights.append((float(module.backbone[...]), float(module.head[...])))


DATA = nets.targets(0.5, 0.5)


def sgd(start, steps, rate=0.1):
    """start after so many updates, in closed form."""
    return 0.5 + (start - 0.5) * (1 - rate) ** steps


def fit(finetuning, module, *, epochs=4, callbacks=(), ckpt_path=None, data=DATA, **options):
    trainer = nets.quiet(max_epochs=epochs, callbacks=[finetuning, *callbacks], **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def test_backbone_trains_from_its_epoch_on(capsys):
    noted, module = Noted(), Two()
    trainer = fit(BackboneFinetuning(2, verbose=True), module, callbacks=[noted])
    expected = [(sgd(3.0, max(0, 2 * epoch - 4)), sgd(1.0, 2 * epoch)) for epoch in (1, 2, 3, 4)]
    np.testing.assert_allclose(noted.weights, expected, rtol=1e-6)
    assert "backbone trains from epoch 2 on" in capsys.readouterr().out
    assert len(trainer.compilations) == 2 and "params now has backbone" in trainer.compilations[1]
    assert module.trainable is nnx.Param


def test_a_filter_is_a_backbone_too():
    noted = Noted()
    fit(BackboneFinetuning(3, nnx.PathContains("backbone")), Two(), callbacks=[noted])
    assert [weights[0] for weights in noted.weights] == [3.0, 3.0, 3.0, pytest.approx(sgd(3.0, 2))]


def test_optimizer_goes_on_where_it_was():
    """Momentum of the head equals the run without the callback; that of the backbone begins at its epoch."""

    def momentum(start, steps, rate=0.1, beta=0.9):
        weight, trace = start, 0.0
        for _ in range(steps):
            trace = weight - 0.5 + beta * trace
            weight -= rate * trace
        return weight

    noted = Noted()
    fit(BackboneFinetuning(2), Two(optax.sgd(0.1, 0.9)), callbacks=[noted])
    expected = [(momentum(3.0, max(0, 2 * epoch - 4)), momentum(1.0, 2 * epoch)) for epoch in (1, 2, 3, 4)]
    np.testing.assert_allclose(noted.weights, expected, rtol=1e-5)


def test_the_ramp_of_the_documentation_gives_the_backbone_a_rate_of_its_own():
    ramp = optax.join_schedules([optax.constant_schedule(0.0), optax.linear_schedule(0.0, 0.1, 4)], [4])

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "backbone" if path[0].key == "backbone" else "rest", params
        )

    tx = optax.multi_transform({"backbone": optax.sgd(ramp), "rest": optax.sgd(0.1)}, labels)
    noted = Noted()
    fit(BackboneFinetuning(2), Two(tx), callbacks=[noted])
    backbone = 0.5 + 2.5 * np.cumprod([1 - rate for rate in (0.0, 0.025, 0.05, 0.075)])
    expected = [(3.0, sgd(1.0, 2)), (3.0, sgd(1.0, 4)), (backbone[1], sgd(1.0, 6)), (backbone[3], sgd(1.0, 8))]
    np.testing.assert_allclose(noted.weights, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_train_batch_end", 3),
        ("on_train_epoch_end", 2),
        ("on_train_epoch_start", 3),
        ("on_train_batch_start", 5),
        ("on_train_batch_end", 5),
        ("on_train_epoch_end", 3),
    ],
)
def test_a_run_that_continues_is_in_the_phase_it_was_saved_in(hook, call, tmp_path):
    def run(ckpt_path=None, callbacks=()):
        noted, module = Noted(), Two(optax.adam(0.1))
        fit(BackboneFinetuning(2), module, callbacks=[*callbacks, noted], ckpt_path=ckpt_path)
        return noted.weights

    whole = run(callbacks=[nets.SavesIn(tmp_path / "cut", hook, call)])
    continued = run(ckpt_path=tmp_path / "cut")
    assert continued == whole[-len(continued) :]


def test_a_run_that_ended_frozen_continues(tmp_path):
    noted = Noted()
    trainer = fit(BackboneFinetuning(2), Two(optax.adam(0.1)), epochs=2)
    trainer.save_checkpoint(tmp_path / "cut")
    fit(BackboneFinetuning(2), Two(optax.adam(0.1)), callbacks=[noted], ckpt_path=tmp_path / "cut")
    whole = Noted()
    fit(BackboneFinetuning(2), Two(optax.adam(0.1)), callbacks=[whole])
    assert noted.weights == whole.weights[2:]


class Normed(nf.FitModule):
    def __init__(self, *, rngs):
        self.backbone = nets.Block(4, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(4, 1, rngs=rngs), nnx.BatchNorm(1, rngs=rngs))

    def training_step(self, batch):
        return ((self.head(self.backbone(batch["x"])) - batch["y"]) ** 2).mean()

    def configure_optimizers(self):
        return optax.sgd(0.1)


class Moved(nf.Callback):
    """Names of what moved in each epoch, and whether the backbone's norm layer was in eval mode."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer, module):
        self.before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
        self.eval_mode = module.backbone.norm.use_running_average

    def on_train_epoch_end(self, trainer, module):
        after = nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat)))
        pairs = zip(jax.tree.leaves_with_path(self.before), jax.tree.leaves(after), strict=True)
        moved = {
            jax.tree_util.keystr(path, simple=True, separator=".") for (path, old), new in pairs if (old != new).any()
        }
        self.epochs.append((sorted(name for name in moved if name.startswith("backbone")), self.eval_mode))


AFFINE, STATISTICS = ["backbone.norm.bias", "backbone.norm.scale"], ["backbone.norm.mean", "backbone.norm.var"]


@pytest.mark.parametrize(
    ("train_bn", "frozen", "unfrozen", "in_eval"),
    [
        (True, sorted(AFFINE + STATISTICS), sorted(["backbone.linear.kernel", *AFFINE, *STATISTICS]), False),
        (False, [], ["backbone.linear.kernel"], True),
    ],
)
def test_norm_layers_of_the_backbone(train_bn, frozen, unfrozen, in_eval):
    moved, module = Moved(), Normed(rngs=nnx.Rngs(0))
    finetuning = BackboneFinetuning(1, train_bn=train_bn)
    fit(finetuning, module, epochs=2, callbacks=[moved], data=nf.ArrayLoader(nets.arrays(64, 4), 16))
    assert moved.epochs == [(frozen, in_eval), (unfrozen, in_eval)]
    assert module.trainable is nnx.Param and "eval_modules" not in vars(module)
    assert np.asarray(module.head.layers[1].mean[...]) != 0


def test_what_the_user_froze_stays_frozen():
    module = Normed(rngs=nnx.Rngs(0))
    module.freeze("backbone.linear")
    before, moved = module.trainable, Moved()
    for _ in range(2):
        fit(BackboneFinetuning(1), module, epochs=2, callbacks=[moved], data=nf.ArrayLoader(nets.arrays(64, 4), 16))
    assert all("backbone.linear.kernel" not in names for names, _ in moved.epochs)
    assert module.trainable == before


def test_a_fit_that_ends_early_leaves_the_module_as_it_was():
    module = Two()

    class Fails(nf.Callback):
        def on_train_epoch_end(self, trainer, module):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit(BackboneFinetuning(2), module, callbacks=[Fails()])
    assert module.trainable is nnx.Param
    fit(BackboneFinetuning(2), module, epochs=1)
    assert module.trainable is nnx.Param and float(module.backbone[...]) == 3.0


def test_nothing_to_freeze_or_unfreeze_is_refused():
    with pytest.raises(nf.ConfigurationError, match=r"backbone='bakbone'(.|\n)*has no parameters there(.|\n)*Fix"):
        fit(BackboneFinetuning(2, "bakbone"), Two())
    module = Two()
    module.freeze("backbone")
    with pytest.raises(nf.ConfigurationError, match=r"nothing there is trained even without it(.|\n)*Fix"):
        fit(BackboneFinetuning(2), module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unfreeze_backbone_at_epoch": 0}, "unfreeze_backbone_at_epoch=0"),
        ({"unfreeze_backbone_at_epoch": 1.5}, r"unfreeze_backbone_at_epoch=1\.5"),
        ({"backbone": ""}, "backbone=''"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        BackboneFinetuning(**arguments)
