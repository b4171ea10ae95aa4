"""Metric objects in `self.log`: nnx.Metric and metrax metrics, against scikit-learn and NumPy over the whole data."""

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import metrax
import metrax.nnx
import numpy as np
import pytest
from flax import nnx
from measured import (
    ACCURACY,
    BATCH_ACCURACIES,
    BATCHES,
    LABELS,
    RUNNING,
    VALUES,
    Base,
    Measured,
    Multi,
    batches,
    close,
    logging,
    merged,
)
from nets import SavesIn, quiet
from sklearn import metrics as sk

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError


@pytest.mark.parametrize("jit", [True, False])
def test_the_value_of_a_loop_is_computed_from_all_batches_and_not_the_mean_of_theirs(jit):
    history = quiet(max_epochs=2, jit=jit).fit(Measured(on_step=False, on_epoch=True), BATCHES, BATCHES)
    assert np.mean(BATCH_ACCURACIES) != pytest.approx(ACCURACY, rel=1e-3), "the test could not tell"
    names = {"train/accuracy", "train/merged", "val/accuracy", "val/wrapped", "val/merged"}
    assert set(history) == names
    for name in names:
        assert history[name] == close([(3, ACCURACY), (6, ACCURACY)]), name


def test_metrics_that_are_no_mean_equal_scikit_learn():
    labels, scores = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1], np.int32), VALUES / VALUES.max()

    class Binary(Base):
        def __init__(self):
            super().__init__()
            self.precision, self.spread = metrax.nnx.Precision(), nnx.metrics.Welford()

        def validation_step(self, batch):
            scores = batch["values"]
            self.precision.update(predictions=scores > 0.3, labels=batch["labels"])
            self.spread.update(values=scores)
            self.log("precision", self.precision)
            self.log("spread", self.spread)
            self.log("recall", metrax.Recall.from_model_output(predictions=scores > 0.3, labels=batch["labels"]))
            self.log("rmse", metrax.RMSE.from_model_output(predictions=scores, labels=batch["labels"] * 1.0))

    (got,) = quiet().validate(Binary(), batches(labels=labels, values=scores))
    guess = scores > 0.3
    assert got == {
        "precision": pytest.approx(sk.precision_score(labels, guess), rel=1e-6),
        "recall": pytest.approx(sk.recall_score(labels, guess), rel=1e-6),
        "rmse": pytest.approx(np.sqrt(np.mean((scores - labels) ** 2)), rel=1e-6),
        "spread/mean": pytest.approx(scores.mean(), rel=1e-6),
        "spread/standard_deviation": pytest.approx(scores.std(), rel=1e-5),
        "spread/standard_error_of_mean": pytest.approx(scores.std() / np.sqrt(10), rel=1e-5),
    }


def test_the_step_value_is_what_the_object_computes_there():
    """An nnx.Metric has all batches of the epoch so far, a metrax metric is made from one batch."""
    trainer = quiet(max_epochs=2, log_every_n_steps=1)
    history = trainer.fit(Measured(), BATCHES)
    assert history["train/accuracy"] == close(zip(range(1, 7), RUNNING * 2, strict=True))
    assert history["train/merged"] == close(zip(range(1, 7), BATCH_ACCURACIES * 2, strict=True))
    assert trainer.callback_metrics["train/accuracy"] == pytest.approx(ACCURACY)
    assert trainer.compilations == [
        "first call",
        "batch['labels']: (4,) -> (2,); batch['logits']: (4, 3) -> (2, 3); batch['values']: (4,) -> (2,)",
    ]


def test_step_and_epoch_values_have_names_of_their_own():
    history = quiet(max_epochs=1, log_every_n_steps=2).fit(Measured(on_epoch=True), BATCHES)
    assert dict(history) == {
        "train/accuracy_step": close([(2, RUNNING[1])]),
        "train/accuracy_epoch": close([(3, ACCURACY)]),
        "train/merged_step": close([(2, BATCH_ACCURACIES[1])]),
        "train/merged_epoch": close([(3, ACCURACY)]),
    }


def test_in_a_window_of_accumulation_a_running_value_is_the_last_and_a_batchs_own_the_mean():
    trainer = quiet(max_epochs=1, log_every_n_steps=1, accumulate_grad_batches=2)
    history = trainer.fit(Measured(on_epoch=True), BATCHES)
    assert history["train/accuracy_step"] == close([(1, RUNNING[1]), (2, RUNNING[2])])
    assert history["train/merged_step"] == close([(1, np.mean(BATCH_ACCURACIES[:2])), (2, BATCH_ACCURACIES[2])])
    assert history["train/accuracy_epoch"] == history["train/merged_epoch"] == close([(2, ACCURACY)])


class Shared(Base):
    """One metric in training and in validation, which other frameworks ask you not to do."""

    def __init__(self):
        super().__init__()
        self.mean = nnx.metrics.Average()

    def training_step(self, batch):
        self.mean.update(values=batch["values"])
        self.log("train", self.mean, on_step=False, on_epoch=True)
        return super().training_step(batch)

    def validation_step(self, batch):
        self.mean.update(values=batch["values"])
        self.log("val", self.mean)


def test_a_metric_of_both_loops_starts_over_and_is_not_mixed_up():
    other = [{**batch, "values": batch["values"] + 100} for batch in BATCHES]
    module = Shared()
    module.mean.update(values=jnp.full(7, 1e3))  # from before the fit
    seen = []

    class Looks(nf.Callback):
        def on_validation_epoch_end(self, trainer, module):
            seen.append(float(module.mean.compute()))

    trainer = quiet(max_epochs=2, val_check_interval=2, num_sanity_val_steps=1, callbacks=Looks())
    history = trainer.fit(module, BATCHES, other)
    assert history["train"] == close([(3, VALUES.mean()), (6, VALUES.mean())])
    assert history["val"] == close([(2, VALUES.mean() + 100), (5, VALUES.mean() + 100)])
    assert seen[1:] == [pytest.approx(VALUES.mean() + 100)] * 2
    assert float(module.mean.compute()) == pytest.approx(VALUES.mean())


def test_each_of_several_loaders_has_a_value_of_its_own():
    halves = {"clean": BATCHES[:2], "noisy": BATCHES[2:]}
    expected = {"clean": RUNNING[1], "noisy": BATCH_ACCURACIES[2]}
    for loaders, names in ((list(halves.values()), ["dataloader_idx_0", "dataloader_idx_1"]), (halves, list(halves))):
        trainer = quiet(max_epochs=1)
        history = trainer.fit(Measured(), BATCHES, loaders)
        for name, value in zip(names, expected.values(), strict=True):
            for metric in ("accuracy", "wrapped", "merged"):
                assert history[f"val/{metric}/{name}"] == close([(3, value)])
                assert trainer.callback_metrics[f"val/{metric}/{name}"] == pytest.approx(value)


def test_an_eval_batch_has_its_record_where_it_is_asked_for():
    class Both(Base):
        def validation_step(self, batch):
            self.log("v", batch["values"].sum(), on_step=True, on_epoch=True, reduce="sum")
            self.log("merged", merged(batch), on_step=True)

    history = quiet(max_epochs=1, num_sanity_val_steps=2).fit(Both(), BATCHES, {"a": BATCHES, "b": BATCHES[:1]})
    sums = [b["values"].sum() for b in BATCHES]
    assert history["v_step/a"] == close([(3, value) for value in sums])
    assert history["v_epoch/a"] == close([(3, sum(sums))])
    assert history["v_step/b"] == close([(3, sums[0])])
    assert history["merged_step/a"] == close([(3, value) for value in BATCH_ACCURACIES])
    assert history["merged_epoch/a"] == close([(3, ACCURACY)])


def test_the_parts_of_several_metrics_have_names_of_their_own_and_may_be_logged_again():
    trainer = quiet(max_epochs=1)
    history = trainer.fit(Multi(), BATCHES, BATCHES)
    for name in ("val/accuracy", "again/accuracy", "accuracy", "mine"):
        assert history[name] == close([(3, ACCURACY)]), name
    for name in ("val/mean", "again/mean", "mean"):
        assert history[name] == close([(3, VALUES.mean())]), name
    assert trainer.progress_bar_metrics == {
        "val/accuracy": history["accuracy"][0][1],
        "val/mean": history["mean"][0][1],
    }


def test_callbacks_may_monitor_a_metric_object_and_a_wrong_name_shows_at_the_first_step():
    quiet(max_epochs=1, callbacks=nf.EarlyStopping("val/accuracy", mode="max")).fit(Measured(), BATCHES, BATCHES)
    stop = nf.EarlyStopping("val/acuracy", mode="max")
    with pytest.raises(ConfigurationError, match=r"val/acuracy.*val/accuracy"):
        quiet(max_epochs=1, callbacks=stop, num_sanity_val_steps=1).fit(Measured(), BATCHES, BATCHES)


class Saving(nf.Callback):
    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [4, 6], ids=["in mid-epoch", "after its last batch"])
def test_a_run_that_continues_records_the_same_values_to_the_bit(tmp_path, at):
    module = Measured(on_epoch=True)
    whole = quiet(max_epochs=3, log_every_n_steps=1, callbacks=Saving(tmp_path / "saved", at))
    expected = whole.fit(module, BATCHES)
    resumed, continued = quiet(max_epochs=3, log_every_n_steps=1), Measured(on_epoch=True)
    history = resumed.fit(continued, BATCHES, ckpt_path=tmp_path / "saved")
    assert dict(history) == dict(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(module), nnx.state(continued)))


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"])
def test_what_is_saved_in_a_validation_has_the_metrics_that_training_had_reached(tmp_path, hook):
    options = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 0}
    expected = quiet(**options).fit(Shared(), BATCHES, BATCHES)
    quiet(callbacks=SavesIn(tmp_path / "saved", hook, 2), **options).fit(Shared(), BATCHES, BATCHES)
    assert dict(quiet(**options).fit(Shared(), BATCHES, BATCHES, ckpt_path=tmp_path / "saved")) == dict(expected)


@flax.struct.dataclass
class Collection(clu.metrics.Collection):
    accuracy: clu.metrics.Accuracy
    loss: clu.metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]


def test_what_metrax_has_for_curves_and_collections_is_merged_over_the_loop():
    class Curves(Base):
        def validation_step(self, batch):
            self.log("auc", auc(batch["values"], batch["labels"]))
            arrays = {"logits": batch["logits"], "labels": batch["labels"], "loss": batch["values"]}
            self.log("all", Collection.single_from_model_output(**arrays))

    def auc(values, labels):
        return metrax.AUCROC.from_model_output(predictions=jax.nn.sigmoid(values - 2), labels=labels > 0)

    (got,) = quiet().validate(Curves(), BATCHES)
    assert got == {
        "auc": pytest.approx(float(auc(VALUES, LABELS).compute()), rel=1e-6),
        "all/accuracy": pytest.approx(ACCURACY),
        "all/loss": pytest.approx(VALUES.mean()),
    }
    # metrax takes 200 thresholds, scikit-learn every one that matters.
    assert got["auc"] == pytest.approx(sk.roc_auc_score(LABELS > 0, VALUES), abs=0.02)


def test_a_merged_metric_logged_several_times_in_a_step_is_merged_within_it():
    def halves(self, batch):
        first, second = ({key: value[part] for key, value in batch.items()} for part in (slice(1), slice(1, None)))
        self.log("m", merged(first))
        return merged(second)

    (got,) = quiet().validate(logging(value=halves), BATCHES)
    assert got == {"m": pytest.approx(ACCURACY)}


def test_a_metric_in_the_function_of_a_manual_step_is_carried_out_of_it():
    class Manual(Base):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.mean = nnx.metrics.Average()

        def training_step(self, batch):
            def loss():
                self.mean.update(values=batch["values"])
                self.log("mean", self.mean, on_step=False, on_epoch=True)
                self.log("merged", merged(batch), on_step=False, on_epoch=True)
                return (self.w[...] ** 2) * batch["values"].mean()

            _, grads = self.value_and_grad(loss)
            self.optimizers().update(grads)

    history = quiet(max_epochs=2).fit(Manual(), BATCHES)
    assert history["mean"] == close([(3, VALUES.mean()), (6, VALUES.mean())])
    assert history["merged"] == close([(3, ACCURACY), (6, ACCURACY)])
