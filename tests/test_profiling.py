"""Trainer(profiler=...): the table adds up, the files are there, and a run without one has nothing of it."""

import pstats
import re

import nets
import pytest

import nnx_fit as nf
from nnx_fit.profiling import AdvancedProfile, Profile, SimpleProfile


class Steps(nf.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        pass


class Hooked(nets.Scalar):
    def on_train_epoch_end(self):
        pass

    def test_step(self, batch):
        self.log("test/target", batch["target"].mean())


def rows(text):
    """The table's rows: calls, mean in ms, total in s, share in %, by action."""
    lines = text.splitlines()
    assert re.split(r"  +", lines[0].strip()) == ["Action", "Calls", "Mean (ms)", "Total (s)", "Share"]
    found = {}
    for line in lines[1:]:
        name, *numbers = re.split(r"  +", line.strip().rstrip("%"))
        found[name] = [float(number) for number in numbers]
    return found


def fitted(tmp_path, **options):
    trainer = nets.quiet(max_epochs=2, jit=False, default_root_dir=tmp_path, callbacks=Steps(), **options)
    trainer.fit(Hooked(), nets.targets(1, 2, 3), nets.targets(1, 2))
    return trainer


@pytest.fixture
def said(capsys, caplog):
    """Everything that was printed so far, through logging where an earlier test has set that up."""
    return lambda: capsys.readouterr().out + "".join(f"{message}\n" for message in caplog.messages)


def test_simple_table_has_every_hook_step_and_wait_with_its_calls(tmp_path, said):
    trainer = fitted(tmp_path, profiler="simple")
    saved = (tmp_path / "profile-fit.txt").read_text()
    assert saved in said()
    table = rows(saved)
    # The call that finds the end of a pass is counted, too.
    asynchronous = {"module brought up to date", "loggers.log_metrics"}
    assert {name: numbers[0] for name, numbers in table.items() if name not in asynchronous} == {
        "fit": 1,
        "training_step": 6,
        "train_dataloader": 8,
        "validation_step": 4,
        "val_dataloader": 6,
        "Steps.on_train_batch_end": 6,
        "Hooked.on_train_epoch_end": 2,
    }
    for calls, mean, total, share in table.values():
        assert total == pytest.approx(calls * mean / 1e3, rel=3e-3, abs=1e-6)
        assert share == pytest.approx(100 * total / table["fit"][2], abs=0.2)
    parts = [total for name, (_, _, total, _) in table.items() if name != "fit"]
    assert parts == sorted(parts, reverse=True) and sum(parts) <= table["fit"][2]
    trainer.test(trainer.module, nets.targets(1))
    assert rows((tmp_path / "profile-test.txt").read_text())["test_step"][0] == 1


def test_simple_table_adds_up_by_its_clock():
    ticks = iter([0.0, 1.0, 1.5, 2.0, 4.0, 10.0])
    profile = SimpleProfile(lambda: next(ticks))
    with profile.of("fit", lambda: None):
        work = profile.timed("work", lambda x: x + 1)
        assert (work(1), work(2)) == (2, 3)
    assert rows(profile.table("fit", 10.0)) == {"fit": [1, 10000, 10, 100], "work": [2, 1250, 2.5, 25]}


def test_profiled_training_is_the_same_training(tmp_path):
    weights = [float(fitted(tmp_path, profiler=kind).module.w[...]) for kind in (None, "simple", "advanced")]
    assert weights[0] == weights[1] == weights[2]


def test_simple_table_follows_a_run_that_is_compiled_anew_and_one_that_continues(tmp_path):
    class Thaws(nf.Callback):
        def on_train_epoch_start(self, trainer, module):
            (module.unfreeze if trainer.current_epoch else module.freeze)("blocks")

    trainer = nets.quiet(max_epochs=2, default_root_dir=tmp_path, callbacks=Thaws(), profiler="simple")
    trainer.fit(nets.Regressor(depth=1, rngs=nf.seed_everything(0)), nets.loader())
    assert rows((tmp_path / "profile-fit.txt").read_text())["training_step"][0] == 8
    trainer.save_checkpoint(tmp_path / "saved")
    other = nets.quiet(max_epochs=3, default_root_dir=tmp_path, profiler="simple")
    other.fit(nets.Regressor(depth=1, rngs=nf.seed_everything(0)), nets.loader(), ckpt_path=tmp_path / "saved")
    assert rows((tmp_path / "profile-fit.txt").read_text())["training_step"][0] == 4


def test_an_error_is_raised_and_what_was_measured_is_kept(tmp_path):
    class Fails(nf.Callback):
        def on_train_epoch_end(self, trainer, module):
            raise RuntimeError("mine")

    trainer = nets.quiet(max_epochs=2, jit=False, default_root_dir=tmp_path, callbacks=Fails(), profiler="simple")
    with pytest.raises(RuntimeError, match=r"^mine$"):
        trainer.fit(nets.Scalar(), nets.targets(1, 2, 3))
    assert rows((tmp_path / "profile-fit.txt").read_text())["Fails.on_train_epoch_end"][0] == 1


def test_a_directory_that_cannot_be_written_takes_nothing_but_the_file(tmp_path, said):
    (tmp_path / "file").write_text("in the way")
    fitted(tmp_path / "file", profiler="simple")
    printed = said()
    assert "training_step" in printed and "could not be saved" in printed


def test_advanced_table_names_functions_and_pstats_reads_the_numbers(tmp_path, said):
    fitted(tmp_path, profiler="advanced")
    printed = (tmp_path / "profile-fit.txt").read_text()
    assert printed in said()
    assert "cumulative" in printed and "fit.py" in printed
    calls = pstats.Stats(str(tmp_path / "profile-fit.prof")).stats  # type: ignore[attr-defined]
    own = {name: count for (path, _, name), (count, *_) in calls.items() if path == __file__}
    assert own["on_train_batch_end"] == 6 and own["on_train_epoch_end"] == 2


def test_jax_and_a_callback_bring_a_tracer():
    trainer = nets.quiet(max_epochs=1, profiler="jax")
    assert [type(callback) for callback in trainer.callbacks] == [nf.ProfilerCallback]
    mine = nf.ProfilerCallback(start_step=1, num_steps=1)
    assert nets.quiet(max_epochs=1, profiler=mine).callbacks == [mine]
    assert nets.quiet(max_epochs=1, profiler="jax", callbacks=mine).callbacks == [mine]


def test_a_callback_given_as_profiler_leaves_its_trace(tmp_path):
    tracer = nf.ProfilerCallback(start_step=1, num_steps=1)
    trainer = nets.quiet(max_epochs=1, default_root_dir=tmp_path, profiler=tracer)
    trainer.fit(nets.Scalar(), nets.targets(1, 2, 3))
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_without_a_profiler_nothing_is_wrapped():
    def function():
        pass

    off = Profile()
    assert off.timed("action", function) is function
    assert off.steps("action", function) is function and off.batches("action", function) is function
    assert AdvancedProfile().timed("action", function) is function


def test_a_trial_run_prints_and_writes_nothing(tmp_path, said):
    fitted(tmp_path / "run", profiler="simple", fast_dev_run=True)
    assert "training_step" in said()
    assert not (tmp_path / "run").exists()
