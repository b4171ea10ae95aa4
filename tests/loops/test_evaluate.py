"""The eval loops: the order of hooks as whole lists, what they return, and that they leave the module as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError
from nnx_fit.loops.evaluate import renamer

HOOKS = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
VERBS = {"validate": "validation", "test": "test", "predict": "predict"}


def eager(**options):
    """What happens on the host is the same for uncompiled steps, and those of so small a net come sooner."""
    return quiet(jit=False, **options)


class Evaluated(Scalar):
    """Has every eval step: logs the mean target, predicts w * target."""

    def test_step(self, batch):
        self.log("test/target", batch["target"].mean())

    def predict_step(self, batch):
        return {"scaled": self.w[...] * batch["target"], "first": batch["target"][0]}


def noting(log, owner, hook):
    def note(self, *args):
        indices = [str(arg) for arg in args if isinstance(arg, int | str)]
        log.append(f"{owner}.{hook}" + (f"({', '.join(indices)})" if indices else ""))

    return note


def watcher(log, owner, phase="before"):
    return type(owner, (Callback,), {"phase": phase, **{hook: noting(log, owner, hook) for hook in HOOKS}})()


def watched(log, base=Evaluated):
    mine = [hook for hook in HOOKS if hook not in ("on_exception", "on_sanity_check_start", "on_sanity_check_end")]
    return type("Watched", (base,), {hook: noting(log, "module", hook) for hook in mine})()


def everybody(*hooks):
    return [f"{owner}.{hook}" for hook in hooks for owner in ("callback", "module", "decide", "save")]


def watching(log):
    return [watcher(log, "save", "save"), watcher(log, "decide", "decide"), watcher(log, "callback")]


def batch_hooks(stage, index, loader):
    return [f"on_{stage}_batch_{point}({index}, {loader})" for point in ("start", "end")]


@pytest.mark.parametrize(("verb", "stage"), VERBS.items())
def test_order_of_all_hooks_over_two_loaders(verb, stage):
    log = []
    getattr(quiet(callbacks=watching(log)), verb)(watched(log), [targets(1, 2), targets(3)])
    assert log == everybody(
        f"setup({verb})",
        f"on_{stage}_start",
        f"on_{stage}_epoch_start",
        *batch_hooks(stage, 0, 0),
        *batch_hooks(stage, 1, 0),
        *batch_hooks(stage, 0, 1),
        f"on_{stage}_epoch_end",
        f"on_{stage}_end",
        f"teardown({verb})",
    )


@pytest.mark.parametrize(("verb", "stage"), VERBS.items())
def test_order_of_hooks_when_one_raises(verb, stage):
    log = []

    def fail(self, *args):
        raise RuntimeError("in a hook")

    module = type("Fails", (type(watched(log)),), {f"on_{stage}_epoch_start": fail})()
    with pytest.raises(RuntimeError, match="in a hook"):
        getattr(eager(callbacks=watching(log)), verb)(module, targets(1))
    assert log == [
        *everybody(f"setup({verb})", f"on_{stage}_start"),
        f"callback.on_{stage}_epoch_start",
        "callback.on_exception",
        "decide.on_exception",
        "save.on_exception",
        *everybody(f"teardown({verb})"),
    ]


@pytest.mark.parametrize(("verb", "name"), [("validate", "val/target"), ("test", "test/target")])
def test_the_result_is_one_dict_for_each_loader(verb, name):
    trainer = eager()
    run = getattr(trainer, verb)
    assert run(Evaluated(), targets(1, 3)) == [{name: 2.0}]
    assert run(Evaluated(), [targets(1, 3)]) == [{name: 2.0}]
    assert run(Evaluated(), [targets(1, 3), targets(7)]) == [
        {f"{name}/dataloader_idx_0": 2.0},
        {f"{name}/dataloader_idx_1": 7.0},
    ]
    assert run(Evaluated(), {"a": targets(1, 3), "b": targets(7)}) == [{f"{name}/a": 2.0}, {f"{name}/b": 7.0}]
    assert trainer.callback_metrics[f"{name}/b"] == 7.0


def test_results_weight_a_ragged_batch_by_its_size_and_include_what_hooks_logged():
    class Hooked(Evaluated):
        def on_test_epoch_end(self):
            self.log("hook", 4.0)

    ragged = [{"target": np.full(3, 1.0, np.float32)}, {"target": np.full(1, 5.0, np.float32)}]
    assert quiet().test(Hooked(), ragged) == [{"test/target": 2.0, "hook": 4.0}]
    assert eager().test(Hooked(), [ragged, targets(1)])[0] == {"test/target/dataloader_idx_0": 2.0, "hook": 4.0}


def test_a_step_is_told_its_batch_and_loader():
    class Told(Scalar):
        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("sum", 10 * dataloader_idx + batch_idx, reduce="sum")

        def predict_step(self, batch, batch_idx, dataloader_idx=7):
            return 10 * dataloader_idx + batch_idx

    loaders = [targets(1, 1, 1), targets(1, 1)]
    assert quiet().test(Told(), loaders) == [{"sum/dataloader_idx_0": 3.0}, {"sum/dataloader_idx_1": 21.0}]
    assert quiet().predict(Told(), loaders) == [[0, 1, 2], [10, 11]]


def test_predictions_are_host_arrays_by_batch():
    predictions = quiet().predict(Evaluated(), targets(2, 3))
    assert [type(leaf) for leaf in jax.tree.leaves(predictions)] == [np.ndarray] * 4
    np.testing.assert_array_equal(predictions[1]["scaled"], [3, 3])
    assert predictions[0]["first"] == 2


def test_predictions_of_several_loaders_are_lists_of_their_own():
    several = eager().predict(Evaluated(), [targets(2, 3), targets(4)])
    assert [[float(p["first"]) for p in loader] for loader in several] == [[2, 3], [4]]
    by_key = eager().predict(Evaluated(), {"a": targets(2), "b": targets(4)})
    assert [[float(p["first"]) for p in loader] for loader in by_key] == [[2], [4]]
    assert len(eager().predict(Evaluated(), [targets(2, 3)])) == 2


def test_the_default_predict_step_calls_the_module():
    class Doubles(Scalar):
        def __call__(self, batch):
            return 2 * batch["target"]

    np.testing.assert_array_equal(eager().predict(Doubles(), targets(2, 3)), [[4, 4], [6, 6]])


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (2, 2), (9, 3), (0.4, 1), (1.0, 3), (0, 0), (0.0, 0)])
def test_a_limit_is_a_count_or_a_fraction_and_zero_disables(limit, count):
    log = []
    trainer = eager(limit_predict_batches=limit, limit_test_batches=limit, callbacks=watching(log))
    assert len(trainer.predict(watched(log), targets(1, 2, 3))) == count
    assert trainer.num_predict_batches == [count]
    if not count:
        assert log == everybody("setup(predict)", "teardown(predict)")
    mean = [{"test/target": pytest.approx(sum(range(1, count + 1)) / count)}] if count else []
    assert trainer.test(Evaluated(), targets(1, 2, 3)) == mean


def test_outputs_of_a_step_reach_the_batch_end_hook_and_non_numeric_leaves_the_host_only():
    seen = []

    class Outputs(Evaluated):
        def test_step(self, batch):
            return {"double": 2 * batch["target"]}

        def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append((float(outputs["double"][0]), batch["name"]))

    batches = [{"target": np.ones(2, np.float32), "name": ["a", "b"]}]
    quiet().test(Outputs(), batches)
    assert seen == [(2.0, ["a", "b"])]


class Stateful(nf.FitModule):
    """All kinds of state that an evaluation must leave alone, and a mode that tells."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rngs = rngs

    def training_step(self, batch):
        return self.dropout(self.norm(batch["x"])).sum()

    def validation_step(self, batch):
        self.log("mean", self.dropout(self.norm(batch["x"])).mean())
        self.log("noise", self.rngs.params.normal())

    test_step = validation_step

    def predict_step(self, batch):
        return self.norm(batch["x"]), self.rngs.params.normal()


def data(count=2):
    return [{"x": np.random.default_rng(i).normal(size=(4, 2)).astype(np.float32)} for i in range(count)]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_runs_in_eval_mode_and_leaves_state_rng_and_mode_as_they_were(verb, training):
    module = Stateful()
    module.train() if training else module.eval()
    before = jax.tree.map(jnp.copy, nnx.state(module))
    modes = []

    class Looks(Callback):
        def on_validation_batch_end(self, trainer, module, *args):
            modes.append((module.training, module.norm.use_running_average, module.dropout.deterministic))

        on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    trainer = quiet(callbacks=Looks())
    first = getattr(trainer, verb)(module, data())
    second = getattr(trainer, verb)(module, data())
    assert modes == [(False, True, True)] * 4
    assert (module.training, module.norm.use_running_average, module.dropout.deterministic) == (
        training,
        not training,
        not training,
    )
    jax.tree.map(np.testing.assert_array_equal, key_data(before), key_data(nnx.state(module)))
    # The streams advance from batch to batch, from the same start each time.
    jax.tree.map(np.testing.assert_array_equal, first, second)
    if verb == "predict":
        assert first[0][1] != first[1][1]
        np.testing.assert_allclose(first[0][0], data()[0]["x"] / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_random_streams_go_on_from_loader_to_loader():
    predictions = quiet().predict(Stateful(), [data(), data()])
    noise = [float(value) for loader in predictions for _, value in loader]
    assert len(set(noise)) == 4


def key_data(state):
    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.tree.map(plain, state)


class Records(nf.Logger):
    """Keeps what it is given."""

    def __init__(self):
        self.records = []

    def log_metrics(self, metrics, step):
        self.records.append((step, dict(metrics)))


def test_an_evaluation_inside_and_after_a_fit_records_at_the_step_of_the_fit():
    records = Records()
    trainer = eager(max_epochs=1, logger=records)
    module = Evaluated()
    history = trainer.fit(module, targets(1, 2), targets(3))
    assert trainer.test(module, targets(5)) == [{"test/target": 5.0}]
    assert history["val/target"] == [(2, 3.0)]
    assert (2, {"val/target": 3.0}) in records.records and (2, {"test/target": 5.0}) in records.records


@pytest.mark.parametrize("verb", VERBS)
def test_a_loader_that_turns_out_empty_is_refused(verb):
    with pytest.raises(ConfigurationError, match=r"yielded no batch.*\n.*data is not empty"):
        getattr(eager(), verb)(Evaluated(), lambda: iter([]))


@pytest.mark.parametrize("verb", VERBS)
def test_an_exception_in_a_step_or_loader_comes_out_as_it_is(verb):
    class BoomError(Exception):
        pass

    def step(self, batch):
        raise BoomError("step")

    def broken():
        yield targets(1)[0]
        raise BoomError("loader")

    fails = type("Fails", (Evaluated,), dict.fromkeys(("validation_step", "test_step", "predict_step"), step))
    module = fails()
    for jit in (True, False):
        with pytest.raises(BoomError, match="step"):
            getattr(quiet(jit=jit), verb)(module, targets(1))
    assert float(module.w[...]) == 1.0 and module.training
    module = Evaluated()
    with pytest.raises(BoomError, match="loader"):
        getattr(eager(), verb)(module, broken)
    assert float(module.w[...]) == 1.0 and module.training


def test_what_hooks_logged_in_one_evaluation_does_not_reach_the_next():
    class Once(Callback):
        fails = True

        def on_test_batch_end(self, trainer, module, *args):
            module.log("hook", 100.0 if self.fails else 1.0, prog_bar=self.fails)

        def on_test_epoch_end(self, trainer, module):
            if self.fails:
                self.fails = False
                raise RuntimeError

    trainer = eager(callbacks=Once())
    with pytest.raises(RuntimeError):
        trainer.test(Evaluated(), targets(1))
    assert trainer.test(Evaluated(), targets(1)) == [{"test/target": 1.0, "hook": 1.0}]


def test_metric_names_get_the_suffix_of_their_loader_if_any():
    assert renamer("")("a/b") == "a/b" and renamer("x")("a/b") == "a/b/x"
