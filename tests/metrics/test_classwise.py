"""Class-wise metrics against scikit-learn, in History and as pictures in a real TensorBoard file."""

import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import quiet
from sklearn import metrics as sk

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError
from nnx_fit.metrics import ClassMetrics, ConfusionMatrix, figures

RNG = np.random.default_rng(1)
NAMES = ("cat", "dog", "emu")
LOGITS = RNG.normal(size=(10, 3)).astype(np.float32)
LABELS = RNG.integers(0, 2, 10).astype(np.int32)  # there is no emu, though it is predicted
PREDICTED = LOGITS.argmax(-1)
PARTS = [slice(0, 4), slice(4, 8), slice(8, 10)]
BATCHES = [{"logits": LOGITS[part], "labels": LABELS[part]} for part in PARTS]
CONFUSION = sk.confusion_matrix(LABELS, PREDICTED, labels=[0, 1, 2])


def filled(metric):
    for batch in BATCHES:
        metric.update(**batch)
    return metric


@pytest.mark.parametrize(
    ("normalize", "sklearn"), [(None, None), ("true", "true"), ("predicted", "pred"), ("all",) * 2]
)
def test_the_matrix_is_that_of_scikit_learn(normalize, sklearn):
    got = filled(ConfusionMatrix(3, normalize=normalize)).compute()
    expected = sk.confusion_matrix(LABELS, PREDICTED, labels=[0, 1, 2], normalize=sklearn)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_metrics_of_each_class_are_those_of_scikit_learn():
    got = filled(ClassMetrics(3, ["precision", "recall", "f1", "iou", "support"])).compute()
    scores = sk.precision_recall_fscore_support(LABELS, PREDICTED, labels=[0, 1, 2], zero_division=0)
    for kind, expected in zip(("precision", "recall", "f1", "support"), scores, strict=True):
        np.testing.assert_allclose(got[kind], expected, rtol=1e-6, err_msg=kind)
    expected = sk.jaccard_score(LABELS, PREDICTED, labels=[0, 1, 2], average=None, zero_division=0)
    np.testing.assert_allclose(got["iou"], expected, rtol=1e-6)


def test_what_is_masked_or_no_class_is_not_counted():
    labels = np.array([[0, 1, 255], [2, 1, 0]], np.uint8)
    guess = np.array([[0, 2, 1], [2, 7, 1]], np.int8)
    metric = ConfusionMatrix(3)
    metric.update(labels=labels, predictions=guess, mask=np.array([[True], [True]]) & (guess != 1), other=None)
    np.testing.assert_array_equal(metric.compute(), [[1, 0, 0], [0, 0, 1], [0, 0, 1]])
    metric.reset()
    assert not np.asarray(metric.compute()).any()
    wide = ConfusionMatrix(200)
    wide.update(labels=np.uint8([199]), predictions=np.uint8([198]))
    assert wide.compute()[199, 198] == 1, "the number of a cell does not fit into the labels' dtype"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConfusionMatrix(1), r"ConfusionMatrix\(num_classes=1\): expected"),
        (lambda: ConfusionMatrix(3, normalize="rows"), "normalize='rows'.*'true', 'predicted', 'all'"),
        (lambda: ConfusionMatrix(3, class_names=["a"]), "expected 3 names"),
        (lambda: ClassMetrics(3, "recall"), r"kinds='recall'.*a list with some of 'precision'"),
        (lambda: ClassMetrics(3, ["sharpness"]), "sharpness"),
        (lambda: ConfusionMatrix(3).update(labels=LABELS), "pass either logits= or predictions="),
        (lambda: ConfusionMatrix(4).update(labels=LABELS, logits=LOGITS), r"logits of shape \(10, 3\).*4 classes"),
        (lambda: ConfusionMatrix(3).update(labels=LABELS[:2], predictions=PREDICTED), r"\(10,\).*labels of shape \(2,"),
        (lambda: ConfusionMatrix(3).update(labels=LABELS * 1.0, predictions=PREDICTED), "labels are float.*whole"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


class Classifier(nf.FitModule):
    """Logs a matrix, vectors of named classes, and a vector of the user's own metric."""

    def __init__(self, class_names=NAMES, kinds=("precision", "recall"), **options):
        self.w = nnx.Param(jnp.ones(()))
        self.class_names = class_names
        self.confusion, self.each = ConfusionMatrix(3), ClassMetrics(3, kinds)
        self.options = tuple(options.items())

    def training_step(self, batch):
        self.each.update(**batch)
        if self.options:
            self.log("train", self.each, **dict(self.options))
        return self.w[...] ** 2

    def validation_step(self, batch):
        self.confusion.update(**batch)
        self.each.update(**batch)
        self.log("val/confusion", self.confusion)
        self.log("val", self.each)

    def configure_optimizers(self):
        return optax.sgd(0.1)


SCORES = dict(zip(("precision", "recall"), sk.precision_recall_fscore_support(
    LABELS, PREDICTED, labels=[0, 1, 2], zero_division=0), strict=False))  # fmt: skip
EACH = {f"{kind}/{name}": scores[i] for kind, scores in SCORES.items() for i, name in enumerate(NAMES)}


def test_each_number_is_in_history_and_those_of_a_matrix_only_there():
    trainer = quiet(max_epochs=2)
    history = trainer.fit(Classifier(on_step=False, on_epoch=True), BATCHES, BATCHES)
    for name, value in EACH.items():
        for stage in ("train", "val"):
            expected = [(3, pytest.approx(value, rel=1e-6)), (6, pytest.approx(value, rel=1e-6))]
            assert history[f"{stage}/{name}"] == expected, name
    cells = {f"val/confusion/{a}/{b}": CONFUSION[i, j] for i, a in enumerate(NAMES) for j, b in enumerate(NAMES)}
    assert {name: history[name] for name in cells} == {name: [(3, n), (6, n)] for name, n in cells.items()}
    assert set(trainer.callback_metrics) == {f"{stage}/{name}" for name in EACH for stage in ("train", "val")}
    (got,) = quiet().validate(Classifier(), BATCHES)
    assert set(got) == {f"val/{name}" for name in EACH}


def test_classes_without_names_of_their_number_are_numbered():
    history = quiet(max_epochs=1).fit(Classifier(class_names=("a", "b")), BATCHES, {"x": BATCHES})
    assert [name for name in history if "recall" in name] == [f"val/recall/{i}/x" for i in range(3)]


def test_a_vector_has_no_value_of_a_step():
    with pytest.raises(ConfigurationError, match=r"'train/precision'.*\(3,\).*once in a loop.*\nFix: pass on_step=Fal"):
        quiet(max_epochs=1).fit(Classifier(prog_bar=True), BATCHES)


class Pictures(nf.CSVLogger):
    """Keeps the pictures it gets."""

    def __init__(self, path):
        super().__init__(path)
        self.images = {}

    def log_image(self, tag, image, step):
        self.images[tag, step] = image


def test_loggers_get_a_picture_of_each_and_the_numbers_of_vectors(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, kept = nf.TensorBoardLogger(tmp_path), Pictures(tmp_path / "csv")
    quiet(max_epochs=2, logger=[board, kept]).fit(Classifier(), BATCHES, BATCHES)
    events = EventAccumulator(str(Path(board.log_dir)), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = {"val/confusion", "val/precision", "val/recall"}
    assert set(events.Tags()["images"]) == tags
    assert {tag: [event.step for event in events.Images(tag)] for tag in tags} == {tag: [3, 6] for tag in tags}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("val")} == {f"val/{name}" for name in EACH}
    assert set(kept.images) == {(tag, step) for tag in tags for step in (3, 6)}
    for image in kept.images.values():
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3 and image.std() > 10


def test_without_matplotlib_the_numbers_are_recorded_and_it_is_said_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    figures._can_draw.cache_clear()
    logger = Pictures(tmp_path)
    try:
        with caplog.at_level(logging.WARNING, "nnx_fit"):
            history = quiet(max_epochs=2, logger=logger).fit(Classifier(), BATCHES, BATCHES)
    finally:
        figures._can_draw.cache_clear()
    assert caplog.text.count("matplotlib is missing. Fix: pip install 'nnx-fit[plots]'") == 1
    assert logger.images == {} and history["val/recall/cat"]


def test_a_large_result_is_shown_and_not_recorded_number_by_number(tmp_path):
    class Large(Classifier):
        def __init__(self):
            super().__init__()
            self.confusion = ConfusionMatrix(40)

        def validation_step(self, batch):
            self.confusion.update(labels=batch["labels"], predictions=batch["logits"].argmax(-1))
            self.log("val/confusion", self.confusion)

    logger = Pictures(tmp_path)
    history = quiet(max_epochs=1, logger=logger).fit(Large(), BATCHES, BATCHES)
    assert not [name for name in history if "confusion" in name] and ("val/confusion", 3) in logger.images


def test_a_run_that_continues_keeps_the_matrix_of_its_epoch(tmp_path):
    class Saves(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "saved")

    options = {"on_step": False, "on_epoch": True}
    expected = quiet(max_epochs=3, callbacks=Saves()).fit(Classifier(**options), BATCHES)
    history = quiet(max_epochs=3).fit(Classifier(**options), BATCHES, ckpt_path=tmp_path / "saved")
    assert dict(history) == dict(expected)


def test_a_host_hook_logs_vectors_and_matrices_too(tmp_path):
    class Hooked(Classifier):
        def validation_step(self, batch):
            self.confusion.update(**batch)

        def on_validation_epoch_end(self):
            self.log("confusion", self.confusion)

    logger = Pictures(tmp_path)
    history = quiet(max_epochs=1, logger=logger).fit(Hooked(), BATCHES, BATCHES)
    assert history["confusion/dog/cat"] == [(3, CONFUSION[1, 0])]
    assert set(logger.images) == {("confusion", 3)}
