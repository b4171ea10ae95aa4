"""ModelCheckpoint on sequences of metrics: what is on disk after each epoch, next to PyTorch Lightning on the same."""

import math
import signal

import nets
import numpy as np
import pytest
from flax import nnx
from scripted import ScriptedLoader, scripted_fit

import nnx_fit as nf
from nnx_fit.checkpoint.store import find_checkpoints, load_meta

NAN, INF = math.nan, math.inf


class Watch(nf.Callback):
    """Notes what is on disk as each epoch but the first begins, `last` and its like aside."""

    def __init__(self, directory):
        self.directory = directory
        self.seen = []

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch:
            self.seen.append(self.names())

    def names(self):
        found = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        return sorted(name for name in found if not name.startswith("last"))


def fit(tmp_path, values, options, *, batches=2, **trainer):
    checkpoint = nf.ModelCheckpoint(tmp_path / "c", async_save=False, **options)
    watch = Watch(tmp_path / "c")
    given = {"max_epochs": len(values), "jit": False, "enable_checkpointing": True, **trainer}
    scripted_fit(values, nets.quiet(callbacks=[watch, checkpoint], **given), batches=batches)
    return checkpoint, [*watch.seen, watch.names()]


def saved(*names):
    """`"0-2"` -> `epoch=0-step=2`."""
    return ["epoch={}-step={}".format(*name.split("-")) for name in names]


# PyTorch Lightning 2.6.6 on CPU: a module of one parameter, whose validation_step logs the next value of the sequence
# under "val/target"; ModelCheckpoint(directory, filename="{epoch}-{step}", **options), 2 training batches per epoch;
# os.listdir(directory) at each on_train_epoch_start but the first and after fit; best_model_path, best_model_score.
@pytest.mark.parametrize(
    ("values", "options", "expected", "best"),
    [
        ([3, 1, 2, 0.5, 4], {"save_top_k": 1}, [["0-2"], ["1-4"], ["1-4"], ["3-8"], ["3-8"]], ("3-8", 0.5)),
        (
            [3, 1, 2, 0.5, 4],
            {"save_top_k": 2},
            [["0-2"], ["0-2", "1-4"], ["1-4", "2-6"], ["1-4", "3-8"], ["1-4", "3-8"]],
            ("3-8", 0.5),
        ),
        ([3, 1, 0.5], {"save_top_k": -1}, [["0-2"], ["0-2", "1-4"], ["0-2", "1-4", "2-6"]], ("2-6", 0.5)),
        ([3, 1], {"save_top_k": 0}, [[], []], None),
        # A tie replaces nothing, and goes where there is room.
        ([2, 1, 1, 3, 1], {"save_top_k": 1}, [["0-2"], ["1-4"], ["1-4"], ["1-4"], ["1-4"]], ("1-4", 1)),
        (
            [2, 3, 3, 1, 3],
            {"save_top_k": 2, "mode": "max"},
            [["0-2"], ["0-2", "1-4"], ["1-4", "2-6"], ["1-4", "2-6"], ["1-4", "2-6"]],
            ("1-4", 3),
        ),
        # NaN is as bad as infinity, and goes where there is room.
        ([NAN, 3, NAN, 2, NAN], {"save_top_k": 1}, [["0-2"], ["1-4"], ["1-4"], ["3-8"], ["3-8"]], ("3-8", 2)),
        (
            [NAN, 3, NAN, 2, NAN],
            {"save_top_k": 3},
            [["0-2"], ["0-2", "1-4"], ["0-2", "1-4", "2-6"], ["1-4", "2-6", "3-8"], ["1-4", "2-6", "3-8"]],
            ("3-8", 2),
        ),
        ([NAN, NAN], {"save_top_k": 1}, [["0-2"], ["0-2"]], ("0-2", INF)),
        ([NAN, 3], {"save_top_k": 1, "mode": "max"}, [["0-2"], ["1-4"]], ("1-4", 3)),
        ([INF, 3, NAN], {"save_top_k": 2}, [["0-2"], ["0-2", "1-4"], ["0-2", "1-4"]], ("1-4", 3)),
        ([3, 1, 2, 1], {"save_top_k": -1, "every_n_epochs": 2}, [[], ["1-4"], ["1-4"], ["1-4", "3-8"]], ("1-4", 1)),
    ],
)
def test_best_by_a_validation_metric_are_those_lightning_keeps(tmp_path, values, options, expected, best):
    checkpoint, seen = fit(tmp_path, values, {"monitor": "val/target", **options})
    assert seen == [saved(*names) for names in expected]
    path = str(tmp_path / "c" / saved(best[0])[0]) if best else ""
    assert (checkpoint.best_model_path, checkpoint.best_model_score) == (path, best[1] if best else None)


@pytest.mark.parametrize(
    ("options", "trainer", "expected"),
    [
        # As Lightning 2.6.6 has it:
        ({"save_top_k": 1}, {"max_epochs": 3}, [["0-4"], ["1-8"], ["2-12"]]),
        ({"save_top_k": -1, "every_n_train_steps": 3}, {"max_epochs": 2}, [["0-3"], ["0-3", "1-6"]]),
        (
            {"monitor": "loss", "save_top_k": 2, "every_n_train_steps": 2},
            {"max_epochs": 2},
            [["0-2", "0-4"], ["1-6", "1-8"]],
        ),
        (
            {"monitor": "val/target", "save_top_k": -1},
            {"max_epochs": 2, "val_check_interval": 0.5},
            [["0-2", "0-4"], ["0-2", "0-4", "1-6", "1-8"]],
        ),
        (
            {"monitor": "val/target", "save_top_k": -1, "save_on_train_epoch_end": True},
            {"max_epochs": 2, "val_check_interval": 0.5},
            [["0-4"], ["0-4", "1-8"]],
        ),
        (
            {"save_top_k": -1, "save_on_train_epoch_end": False},
            {"max_epochs": 2, "val_check_interval": 0.5},
            [["0-2", "0-4"], ["0-2", "0-4", "1-6", "1-8"]],
        ),
        (
            {"save_top_k": -1, "save_on_train_epoch_end": False},
            {"max_epochs": 4, "check_val_every_n_epoch": 2},
            [[], ["1-8"], ["1-8"], ["1-8", "3-16"]],
        ),
        # Otherwise on purpose. Without a monitor Lightning saves after the validations:
        (
            {"save_top_k": -1},
            {"max_epochs": 2, "val_check_interval": 0.5},
            [["0-4"], ["0-4", "1-8"]],
        ),
        # and by steps it takes the value of an older validation: [], [1-6].
        (
            {"monitor": "val/target", "save_top_k": -1, "every_n_train_steps": 3},
            {"max_epochs": 2},
            [["0-4"], ["0-4", "1-8"]],
        ),
    ],
)
def test_moments_of_saving(tmp_path, options, trainer, expected):
    _, seen = fit(tmp_path, [4, 3, 2, 1], options, batches=4, **trainer)
    assert seen == [saved(*names) for names in expected]


def test_metric_that_comes_with_the_second_validation_is_waited_for(tmp_path):
    options = {"monitor": "val/target", "save_top_k": -1, "save_on_train_epoch_end": True}
    _, seen = fit(tmp_path, [3, 2], options, max_epochs=4, check_val_every_n_epoch=2)
    assert seen == [[], saved("1-4"), saved("1-4", "2-6"), saved("1-4", "2-6", "3-8")]


@pytest.mark.parametrize(
    ("filename", "options", "names"),
    [
        ("{epoch}-{val/target:.2f}", {}, ["epoch=0-val_target=0.46", "epoch=1-val_target=0.10"]),
        ("{epoch:02d}-{step:04d}", {}, ["epoch=00-step=0002", "epoch=01-step=0004"]),
        # Lightning 2.6.6 gives the same names from here on.
        (
            "epoch={epoch:02d}-acc={val/target:.3f}",
            {"auto_insert_metric_name": False},
            ["epoch=00-acc=0.456", "epoch=01-acc=0.100"],
        ),
        ("best", {}, ["best", "best-v1"]),
        ("best", {"enable_version_counter": False}, ["best"]),
        ("best", {"enable_version_counter": False, "save_top_k": 1}, ["best"]),
    ],
)
def test_names(tmp_path, filename, options, names):
    given = {"monitor": "val/target", "filename": filename, "save_top_k": 2, **options}
    checkpoint, seen = fit(tmp_path, [0.456, 0.1], given)
    assert seen[-1] == names
    assert checkpoint.best_model_path == str(tmp_path / "c" / names[-1])
    assert checkpoint.best_model_score == pytest.approx(0.1)


def test_one_name_for_all_keeps_the_best_where_lightning_keeps_the_latest(tmp_path):
    options = {"monitor": "val/target", "filename": "best", "enable_version_counter": False, "save_top_k": 2}
    checkpoint, seen = fit(tmp_path, [2, 1, 3], options)
    assert (seen[-1], checkpoint.best_model_score) == (["best"], 1.0)
    assert load_meta(tmp_path / "c" / "best")["global_step"] == 4


def test_every_checkpoint_is_reported_when_asked_for(tmp_path, capsys):
    fit(tmp_path, [2, 3], {"monitor": "val/target", "verbose": True})
    assert [line for line in capsys.readouterr().out.splitlines() if "ModelCheckpoint" in line] == [
        "ModelCheckpoint: saves epoch=0-step=2, val/target = 2",
        "ModelCheckpoint: step 4 is not among the best 1, val/target = 3",
    ]


def test_metric_of_the_training_epoch_is_waited_for_at_validations(tmp_path):
    class Mean(nets.Scalar):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.log("mean", loss, on_step=False, on_epoch=True)
            return loss

    checkpoint = nf.ModelCheckpoint(tmp_path, monitor="mean", save_top_k=-1, save_on_train_epoch_end=False)
    trainer = nets.quiet(
        max_epochs=2, jit=False, val_check_interval=0.5, enable_checkpointing=True, callbacks=checkpoint
    )
    trainer.fit(Mean(), nets.targets(*[0.5] * 4), ScriptedLoader([1, 1, 1, 1]))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"epoch=1-step=6", "epoch=1-step=8", "last"}


def test_a_save_that_waits_for_the_validation_waits_in_a_run_that_continues_as_well(tmp_path):
    def run(directory, *callbacks, **how):
        checkpoint = nf.ModelCheckpoint(
            directory, monitor="val/loss", every_n_train_steps=2, save_top_k=-1, save_last=False
        )
        trainer = nets.quiet(
            max_epochs=2, val_check_interval=3, callbacks=[*callbacks, checkpoint], enable_checkpointing=True
        )
        trainer.fit(nets.Regressor(rngs=nnx.Rngs(0)), nets.loader(), nets.loader(16), **how)
        return sorted(path.name for path in directory.iterdir())

    # Due at step 2 and waiting for the validation at 3, it is saved by somebody else and continued.
    whole = run(tmp_path / "whole", nets.SavesIn(tmp_path / "saved", "on_validation_batch_end", 1))
    assert run(tmp_path / "again", ckpt_path=tmp_path / "saved") == whole


def test_a_run_that_is_cut_off_more_often_than_it_updates_gets_on_all_the_same(tmp_path):
    """What a window has gathered is saved, also before the first update."""

    def run(directory, cut, **how):
        class Cut(nf.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                if trainer.total_batches == cut:
                    signal.raise_signal(signal.SIGTERM)

        module = nets.Regressor(rngs=nnx.Rngs(0))
        callbacks = [Cut(), nf.ModelCheckpoint(directory)]
        trainer = nets.quiet(max_epochs=1, accumulate_grad_batches=4, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, nets.loader(), **how)
        return trainer.total_batches, np.asarray(module.head.kernel[...]).tobytes()

    whole, directory = run(tmp_path / "whole", None), tmp_path / "cut"
    for cut, how in ((2, {}), (3, {"ckpt_path": "last"})):
        with pytest.raises(SystemExit):
            run(directory, cut, **how)
        assert load_meta(find_checkpoints(directory)[0])["progress"]["batches"] == cut
    assert run(directory, None, ckpt_path="last") == whole
