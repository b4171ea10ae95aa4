"""ProfilerCallback: the trace on disk holds exactly the updates of its window, whatever ends it."""

import warnings

import jax
import nets
import pytest

import nnx_fit as nf
from nnx_fit.callbacks.profiler import ProfilerCallback


def fit(profiler, *, batches=8, callbacks=(), **options):
    trainer = nets.quiet(max_epochs=1, callbacks=[profiler, *callbacks], **options)
    trainer.fit(nets.Scalar(), nets.targets(*[0.5] * batches))
    return trainer


def traced_steps(directory):
    """The numbers of the steps that are marked in the only trace below a directory, as JAX's own reader has them."""
    (path,) = directory.glob("plugins/profile/*/*.xplane.pb")
    found = []
    with warnings.catch_warnings():
        # The reader's own classes lack a module name, which Python 3.13 warns of and, as an error, is the end of it.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                found += [dict(event.stats)["step_num"] for event in line.events if event.name == "train"]
    return sorted(found)


@pytest.mark.parametrize(
    ("window", "options", "steps"),
    [
        ({"start_step": 3, "num_steps": 2}, {}, [4, 5]),
        ({"start_step": 0, "num_steps": 1}, {}, [1]),
        ({"start_step": 1, "num_steps": 2}, {"accumulate_grad_batches": 2}, [2, 3]),
    ],
    ids=["middle", "first", "accumulated"],
)
def test_trace_holds_the_updates_of_the_window(window, options, steps, tmp_path, capsys):
    fit(ProfilerCallback(**window, dirpath=tmp_path), **options)
    assert traced_steps(tmp_path) == steps
    assert f"{len(steps)} updates from step {steps[0]} on are in {tmp_path}" in capsys.readouterr().out


def test_it_begins_and_ends_where_it_says(tmp_path, monkeypatch):
    events = []

    class Watching(ProfilerCallback):
        def _start(self, trainer):
            super()._start(trainer)
            events.append(("start", trainer.global_step))

        def _stop(self, trainer):
            events.extend([("stop", trainer.global_step)] if self._running else [])
            super()._stop(trainer)

    fit(Watching(2, 3, tmp_path))
    assert events == [("start", 2), ("stop", 5)]


def test_it_is_written_where_tensorboard_looks(tmp_path):
    logger = nf.TensorBoardLogger(tmp_path / "board")
    trainer = nets.quiet(
        max_epochs=1, callbacks=ProfilerCallback(1, 1), logger=[nf.CSVLogger(tmp_path / "csv"), logger]
    )
    trainer.fit(nets.Scalar(), nets.targets(0.5, 0.5, 0.5))
    assert traced_steps(tmp_path / "board") == [2]
    assert list((tmp_path / "board").glob("events.out.tfevents.*"))
    assert ProfilerCallback().directory(nets.quiet(default_root_dir=tmp_path / "run")) == tmp_path / "run"


def test_an_error_in_the_window_leaves_a_trace_and_a_free_profiler(tmp_path):
    class Fails(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit(ProfilerCallback(2, 5, tmp_path / "a"), callbacks=[Fails()])
    # The callback has seen update 4 before the one that failed.
    assert traced_steps(tmp_path / "a")[:2] == [3, 4]
    fit(ProfilerCallback(1, 1, tmp_path / "b"))
    assert traced_steps(tmp_path / "b") == [2]


def test_a_window_longer_than_the_training_ends_with_it(tmp_path, capsys):
    fit(ProfilerCallback(6, 5, tmp_path))
    assert traced_steps(tmp_path)[:2] == [7, 8]
    assert "2 updates from step 7 on" in capsys.readouterr().out


def test_a_run_that_continues_records_what_is_left_of_the_window(tmp_path):
    trainer = nets.quiet(max_steps=4, max_epochs=1)
    trainer.fit(module := nets.Scalar(), nets.targets(*[0.5] * 8))
    trainer.save_checkpoint(tmp_path / "cut")
    for name, window in (("within", (2, 4)), ("past", (1, 3))):
        other = nets.quiet(max_epochs=1, callbacks=ProfilerCallback(*window, tmp_path / name))
        other.fit(module, nets.targets(*[0.5] * 8), ckpt_path=tmp_path / "cut")
    assert traced_steps(tmp_path / "within") == [5, 6]
    assert not (tmp_path / "past").exists()


def test_two_traces_at_once_are_refused(tmp_path):
    with pytest.raises(nf.ConfigurationError, match=r"start_step=2(.|\n)*Fix: let one of them end"):
        fit(ProfilerCallback(1, 4, tmp_path / "a"), callbacks=[ProfilerCallback(2, 1, tmp_path / "b")])
    assert traced_steps(tmp_path / "a")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"start_step": -1}, "start_step=-1"), ({"num_steps": 0}, "num_steps=0"), ({"num_steps": 1.5}, r"num_steps=1\.5")],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(nf.ConfigurationError, match=message):
        ProfilerCallback(**arguments)
