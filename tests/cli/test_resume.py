"""`nnx-fit resume RUN_DIR` and `resume=auto`: what a run that was cut off, or is finished, comes to."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnx_fit.checkpoint.store import find_checkpoints, load_arrays
from nnx_fit.cli import main, resume

WORDS = [
    "experiment=mine",
    "logger=both",
    "~callbacks.variable_monitor",
    "callbacks.model_checkpoint.async_save=false",
    "trainer.num_sanity_val_steps=0",
]

CLASSES = """

class Wide(Line):
    def __init__(self, width: int = 1, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,)))


class Dying(Line):  # after an update, where the environment says so
    def on_train_batch_end(self, outputs, batch, batch_idx):
        import os
        import signal

        if str(self.global_step) == os.environ.get("DIES_AT"):
            os.kill(os.getpid(), signal.SIGKILL)


class FromFile(Points):
    def setup(self, stage):
        from pathlib import Path

        self.count = int(Path("count.txt").read_text())
"""


@pytest.fixture
def project(project_folder: Path) -> Path:
    with (project_folder / "tiny.py").open("a") as file:
        file.write(CLASSES)
    (project_folder / "count.txt").write_text("12")
    return project_folder


def start(*words: str) -> None:
    assert main.run([*WORDS, *words]) == 0


def final_arrays(run: Path) -> dict[str, dict[str, np.ndarray]]:
    arrays = load_arrays(find_checkpoints(run / "checkpoints")[0])
    return {group: {name: np.asarray(_plain(a)) for name, a in found.items()} for group, found in arrays.items()}


def _plain(array):
    import jax
    import jax.numpy as jnp

    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def epochs(run: Path) -> int:
    """How far a run got."""
    from nnx_fit.checkpoint.directories import load_meta

    return load_meta(find_checkpoints(run / "checkpoints")[0])["epoch"]


@pytest.mark.slow
def test_killed_run_ends_like_one_that_was_not(
    project: Path, command: Callable[..., "subprocess.CompletedProcess[str]"], monkeypatch, capsys
) -> None:
    words = [*WORDS, "model._target_=tiny.Dying", "data._target_=tiny.FromFile", "trainer.max_epochs=3"]
    killed = command(*words, "name=killed", DIES_AT="5")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main.run([*words, "name=whole"]) == 0
    assert "test/loss" not in (project / "outputs/killed/metrics.csv").read_text()

    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    capsys.readouterr()
    assert main.run(["resume", "../outputs/killed/"]) == 0, capsys.readouterr().err
    assert Path.cwd() == project / "elsewhere"
    said = capsys.readouterr().out.splitlines()
    assert f"Run directory: {project}/outputs/killed" in said
    assert f"Dashboards:    tensorboard --logdir {project}/outputs/killed" in said
    assert any("Continuing from" in line and line.endswith("at step 3.") for line in said)

    run, whole = project / "outputs/killed", project / "outputs/whole"
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert scalars(run, "train/loss") == scalars(whole, "train/loss")
    assert scalars(run, "test/loss") == scalars(whole, "test/loss")
    mine, theirs = final_arrays(run), final_arrays(whole)
    assert mine.keys() == theirs.keys()
    for group in theirs:
        assert mine[group].keys() == theirs[group].keys()
        for name in theirs[group]:
            np.testing.assert_array_equal(mine[group][name], theirs[group][name], err_msg=name)
    assert (run / ".hydra" / "resumed-1" / "config.yaml").is_file()
    assert list((project / "elsewhere").iterdir()) == []


@pytest.mark.slow
def test_finished_run_has_nothing_to_do_until_a_bound_is_raised(project: Path, capsys) -> None:
    words = ["model._target_=tiny.Wide", "name=done"]
    start(*words)
    run = project / "outputs/done"
    first_metrics = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  test/loss")]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name not in ("run.log", "lock")}
    for again in (["resume", "outputs/done"], [*WORDS, *words, "resume=auto"]):
        assert main.run(again) == 0
        said = capsys.readouterr().out.splitlines()
        assert "outputs/done is finished: trainer.max_epochs=2 is reached, at step 4." in said
        assert "To train on, raise it: nnx-fit resume outputs/done trainer.max_epochs=..." in said
        assert [line for line in said if line.startswith("  test/loss")] == first_metrics
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name not in ("run.log", "lock")}
    assert {path for path in after if path.suffix != ".part"} == set(before)
    assert all(after[path] == before[path] for path in before if path.is_file())

    # Another model is refused, and is not what the run is continued with next time.
    params = final_arrays(run)["params"]
    assert main.run(["resume", "outputs/done", "model.width=2", "trainer.max_epochs=3"]) == 1
    assert "weight: float32(1,) in the checkpoint, float32(2,) here" in capsys.readouterr().err
    assert not (run / ".hydra/resumed-1").exists()
    assert final_arrays(run)["params"] == params

    assert main.run(["resume", "outputs/done", "trainer.max_epochs=3"]) == 0
    assert "is finished" not in capsys.readouterr().out
    assert epochs(run) == 3
    assert [step for step, _ in scalars(run, "train/loss")] == [1, 2, 3, 4, 5, 6]
    # What the run was last continued with is what it continues with.
    assert main.run(["resume", "outputs/done"]) == 0
    assert "trainer.max_epochs=3 is reached, at step 6." in capsys.readouterr().out


@pytest.mark.slow
def test_run_that_was_stopped_early_stays_so_until_it_is_asked_otherwise(project: Path, capsys) -> None:
    words = [*WORDS, "callbacks=monitored", "name=early", "callbacks.early_stopping.stopping_threshold=100"]
    assert main.run([*words, "resume=auto", "test_after_fit=false"]) == 0
    assert epochs(project / "outputs/early") == 1
    capsys.readouterr()
    # The test that was left out is made up for, and no epoch is added to the one there is.
    for tests in (True, False):
        assert main.run([*words, "resume=auto"]) == 0
        said = capsys.readouterr().out
        assert "outputs/early is finished: EarlyStopping" in said
        assert "To train on, change that: nnx-fit resume outputs/early key=value" in said
        assert epochs(project / "outputs/early") == 1
        assert scalars(project / "outputs/early", "test/loss")[0][0] == 2, tests
    assert len(scalars(project / "outputs/early", "test/loss")) == 1
    assert main.run(["resume", "outputs/early", "callbacks.early_stopping.stopping_threshold=null"]) == 0
    assert epochs(project / "outputs/early") == 2


@pytest.mark.slow
def test_run_without_a_checkpoint_is_begun_anew_by_the_same_command_only(project: Path, capsys) -> None:
    start("name=cut", "logger.tensorboard.name=curves")
    run = project / "outputs/cut"
    shutil.rmtree(run / "curves/version_0/checkpoints")
    (run / ".hydra" / "outcome.json").unlink()
    capsys.readouterr()
    assert main.run(["resume", "outputs/cut"]) == 1
    said = capsys.readouterr().err
    assert "CheckpointError: outputs/cut/curves/version_0/checkpoints holds no complete checkpoint" in said
    assert "Start it anew: nnx-fit experiment=mine logger=both" in said
    assert not (run / ".hydra" / "resumed-1").exists()
    assert main.run([*WORDS, "name=cut", "logger.tensorboard.name=curves", "resume=auto"]) == 0
    assert [path.name for path in (run / "curves").iterdir()] == ["version_0"]
    # The record of the first life, which nothing is continued from, is not doubled.
    assert [step for step, _ in scalars(run / "curves/version_0", "train/loss")] == [1, 2, 3, 4]
    rows = (run / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4", "4"]  # the test has a row of its own


@pytest.mark.slow
def test_checkpoint_that_a_run_started_from_is_taken_again_while_it_has_none_of_its_own(project: Path) -> None:
    start("name=first", "test_after_fit=false")
    origin = find_checkpoints(project / "outputs/first/checkpoints")[0].relative_to(project)
    words = ["name=second", f"ckpt_path={origin}", "trainer.max_epochs=3", "test_after_fit=false"]
    start(*words)
    run = project / "outputs/second"
    shutil.rmtree(run / "checkpoints")
    (run / ".hydra" / "outcome.json").unlink()
    start(*words, "resume=auto")
    assert [step for step, _ in scalars(run, "train/loss")] == [5, 6]
    assert epochs(run) == 3


@pytest.mark.slow
def test_sweep_continues_job_by_job_and_mixes_none(project: Path, capsys) -> None:
    words = ["-m", *WORDS, "name=both", "resume=auto", "test_after_fit=false"]
    rates = "optimizer.learning_rate="
    assert main.run([*words, f"{rates}0.01"]) == 0
    runs = [project / "multirun/both" / number for number in "01"]
    assert [run.is_dir() for run in runs] == [True, False]
    capsys.readouterr()
    assert main.run([*words, f"{rates}0.01,0.1"]) == 0
    assert capsys.readouterr().out.count("is finished") == 1
    assert epochs(runs[1]) == 2
    assert main.run([*words, f"{rates}0.2,0.1"]) == 1
    said = capsys.readouterr().err
    assert f"multirun/both/0 was started with {rates}0.01, and job 0 of this sweep has {rates}0.2." in said
    assert main.run(["resume", "multirun/both/1", "trainer.max_epochs=3"]) == 0
    assert epochs(runs[1]) == 3
    assert OmegaConf.load(runs[1] / ".hydra/resumed-1/config.yaml").optimizer.learning_rate == 0.1


@pytest.mark.slow
def test_run_may_have_moved_from_a_folder_that_is_gone(project: Path, capsys, monkeypatch) -> None:
    start("name=old")
    new = project.with_name(f"{project.name}-new")
    shutil.copytree(project, new)
    shutil.rmtree(project)
    monkeypatch.chdir(new)
    capsys.readouterr()
    assert main.run(["resume", "outputs/old", "trainer.max_epochs=3"]) == 0
    said = capsys.readouterr()
    assert f"The folder {project}, where this run was started, is gone" in said.err
    assert "Run directory: outputs/old" in said.out.splitlines()
    assert epochs(new / "outputs/old") == 3
    assert [step for step, _ in scalars(new / "outputs/old", "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert not project.exists()


@pytest.fixture
def recorded(folder: Path) -> Path:
    """What there is of runs before anything is trained."""
    for name in ("outputs/a", "multirun/b/0", "multirun/b/1"):
        (folder / name / ".hydra").mkdir(parents=True)
        (folder / name / ".hydra" / "config.yaml").write_text("seed: 5\n")
    (folder / "outputs/a/checkpoints/last").mkdir(parents=True)
    (folder / "outputs/empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resume", "resume needs the directory of a run: nnx-fit resume outputs/..."),
        ("resume trainer.max_epochs=3", "resume needs the directory of a run"),
        ("resume outputs/missing", "resume outputs/missing: there is no such directory."),
        ("resume outputs/empy", "there is no such directory. Did you mean empty?"),
        ("resume outputs/empty", "resume outputs/empty: this is no run's directory"),
        ("resume outputs/a/checkpoints/last", "this lies in a run's directory. Write nnx-fit resume outputs/a"),
        ("resume multirun/b", "holds several runs. Resume one of them: multirun/b/0, multirun/b/1"),
        ("resume outputs/a name=b", "name=b: not with resume, since the run stays in its directory."),
        ("resume outputs/a ckpt_path=x", "ckpt_path=x: not with resume"),
        ("resume outputs/a experiment=digits", "experiment=digits: not with resume"),
        ("resume outputs/a -m seed=1,2", "resume -m: a run is continued by itself"),
        ("resume outputs/a trainer.max_epoch=3", "Did you mean trainer.max_epochs?"),
        ("resume outputs/a trainer.max_epochs=x", "trainer.max_epochs=x: expected int or null."),
    ],
)
def test_mistakes_are_named_before_anything_is_built(
    recorded: Path, fails: Callable[[str], str], line: str, message: str
) -> None:
    before = sorted(recorded.rglob("*"))
    assert message in fails(line)
    assert sorted(recorded.rglob("*")) == before


def test_config_is_the_last_one_that_the_run_was_started_with(recorded: Path, capsys) -> None:
    for number, seed in ((2, 7), (10, 9)):
        later = recorded / f"outputs/a/.hydra/resumed-{number}"
        later.mkdir()
        (later / "config.yaml").write_text(f"seed: {seed}\nname: mine\n")
    (recorded / "outputs/a/.hydra/resumed-11").mkdir()  # killed before it had one
    assert main.run(["resume", "outputs/a", "--cfg", "job", "trainer.max_epochs=8"]) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert (cfg.seed, cfg.name, cfg.trainer.max_epochs) == (9, "mine", 8)


def started_in(place: Path, run: Path, **hydra: object) -> None:
    """Records where a run was started."""
    runtime = {"cwd": str(place), "output_dir": str(run)}
    OmegaConf.save(OmegaConf.create({"hydra": {"runtime": runtime, **hydra}}), run / ".hydra/hydra.yaml")


def test_settings_of_the_process_are_those_of_the_first_start(recorded: Path, capsys, monkeypatch) -> None:
    run, there = recorded / "outputs/a", recorded / "there"
    started_in(recorded, run, job={"chdir": True, "env_set": {"MY_FLAG": "1"}, "num": 3})
    there.mkdir()
    monkeypatch.chdir(there)
    assert main.run(["resume", "../outputs/a", "--cfg", "hydra"]) == 0
    said = capsys.readouterr()
    assert said.err == f"Continued in {recorded}, where this run was started: Python modules are imported from there.\n"
    cfg = OmegaConf.create(said.out).hydra
    assert (cfg.job.chdir, cfg.job.env_set) == (True, {"MY_FLAG": "1"})
    assert (cfg.run.dir, cfg.output_subdir) == (str(run), None)
    assert os.getcwd() == str(there)


@pytest.mark.parametrize("place", ["theirs", "outputs/a", "outputs/a/code"])
def test_nothing_is_imported_from_a_folder_that_only_the_run_itself_names(
    recorded: Path, fails: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run, theirs = recorded / "outputs/a", recorded / place
    theirs.mkdir(exist_ok=True)
    started_in(theirs, run)
    paths = list(sys.path)
    said = fails("resume outputs/a")
    assert f"resume outputs/a: this run was started in {theirs}, which it does not lie in." in said
    assert f"If that is what you want: cd {theirs} && nnx-fit resume {run}" in said
    assert set(sys.path) == set(paths)
    monkeypatch.chdir(theirs)
    assert resume.working_directory(run) == theirs


def test_run_of_a_copied_project_is_continued_in_the_copy(recorded: Path, monkeypatch, capsys) -> None:
    started_in(recorded, recorded / "outputs/a")
    copy = recorded.with_name(f"{recorded.name}-copy")
    shutil.copytree(recorded, copy)
    monkeypatch.chdir(copy)
    assert resume.working_directory(copy / "outputs/a") == copy
    assert f"was started in {recorded}, and is continued in {copy}" in capsys.readouterr().err


@pytest.mark.slow
def test_damaged_checkpoints_are_not_started_over(project: Path, capsys) -> None:
    start("name=hurt", "test_after_fit=false")
    run = project / "outputs/hurt"
    (run / ".hydra" / "outcome.json").write_text("")  # as after a power cut
    curve = scalars(run, "train/loss")
    checkpoints = sorted(path for path in (run / "checkpoints").iterdir())
    manifests = {path: (path / "arrays/manifest.ocdbt").read_bytes() for path in checkpoints}
    for path in checkpoints:
        (path / "arrays/manifest.ocdbt").write_bytes(manifests[path][:10])
    anew = {
        "resume outputs/hurt": "or start it anew: nnx-fit experiment=mine logger=both",
        f"{' '.join(WORDS)} name=hurt resume=auto": "or remove outputs/hurt/checkpoints: the same command then starts",
    }
    for line, how in anew.items():
        capsys.readouterr()
        assert main.run([*line.split(), "trainer.max_epochs=3"]) == 1
        said = capsys.readouterr()
        names = ", ".join(path.name for path in checkpoints)
        assert "CheckpointError: outputs/hurt/checkpoints holds no checkpoint to continue from, since each" in said.err
        assert f"each of them is damaged: {names}." in said.err and how in said.err
        assert all((said.out + said.err).count(f"{path} is damaged:") == 1 for path in checkpoints)
        assert scalars(run, "train/loss") == curve
        assert not (run / ".hydra/resumed-1").exists()
    # With the newest one back, that is where it goes on; what is damaged is said once.
    for path in checkpoints:
        (path / "arrays/manifest.ocdbt").write_bytes(manifests[path])
    assert main.run(["resume", "outputs/hurt", "trainer.max_epochs=3"]) == 0
    assert [step for step, _ in scalars(run, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_completion_and_help_work_behind_resume(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COMP_LINE", "nnx-fit resume outputs/a optimizer=s")
    assert main.run(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["optimizer=sgd"]
    with pytest.raises(SystemExit) as ending:
        main.run(["resume", "--help"])
    assert not ending.value.code
    assert "nnx-fit resume RUN_DIR [key=value ...]" in capsys.readouterr().out
