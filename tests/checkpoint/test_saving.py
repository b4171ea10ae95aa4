"""A run that is saved anywhere and continued elsewhere equals the run that was never interrupted, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.callbacks.callback import Callback, keyed
from nnx_fit.checkpoint.store import load_arrays, load_meta
from nnx_fit.errors import CheckpointError, ConfigurationError


class Net(nf.FitModule):
    """All kinds of state, step and epoch metrics from the program, and host metrics of each kind."""

    def __init__(self, features: int = 3, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Variable(jnp.int32(0))
        self.epoch_ends = nnx.Variable(jnp.int32(0))

    def loss(self, batch):
        return (self.dropout(self.norm(self.linear(batch["x"]))) ** 2).mean()

    def training_step(self, batch):
        self.seen[...] += batch["x"].shape[0]
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, prog_bar=True)
        self.log("rows", batch["row"].sum())
        return loss

    def validation_step(self, batch):
        self.log("val", self.loss(batch))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("host/step", outputs["loss"])
        self.log("host/epoch", batch_idx, on_step=False, on_epoch=True, reduce="sum")

    def on_train_epoch_end(self):
        self.epoch_ends[...] += 1
        self.log("host/end", self.current_epoch)

    def configure_optimizers(self):
        return optax.adam(optax.linear_schedule(0.1, 0.01, 20))


ROWS = 10


def data():
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
    return nf.ArrayLoader({"x": x, "row": np.arange(ROWS)}, 4, shuffle=True, seed=5)


def validation_data():
    x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    return nf.ArrayLoader({"x": x}, 4)


class SavesIn(Callback):
    """Saves in one hook, at its n-th call."""

    def __init__(self, path, hook, call, phase="before"):
        self.calls = 0
        type(self).phase = phase

        def saving(trainer, module, *args):
            self.calls += 1
            if self.calls == call:
                trainer.save_checkpoint(path)

        setattr(self, hook, saving)


def saves_in(*args, phase="before"):
    return type("SavesIn", (SavesIn,), {})(*args, phase=phase)


def everything(module, trainer):
    """All that a run is: every array by path, the optimizer's state, history, metrics and counters."""

    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    arrays = {str(path): plain(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module))}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainer._run.train_program.optimizer_state):
        arrays[f"optimizer{jax.tree_util.keystr(path)}"] = leaf
    rest = {
        "history": dict(trainer.history),
        "callback_metrics": trainer.callback_metrics,
        "progress_bar_metrics": trainer.progress_bar_metrics,
        "logged_metrics": trainer.logged_metrics,
        "at": (trainer.global_step, trainer.current_epoch),
    }
    return {name: np.asarray(value) for name, value in arrays.items()}, rest


def run(seed=0, callbacks=(), ckpt_path=None, loader=data, **options):
    module = Net(rngs=nnx.Rngs(seed))
    trainer = quiet(**{"max_epochs": 3, "log_every_n_steps": 2, "jit": False, **options}, callbacks=list(callbacks))
    trainer.fit(module, loader(), validation_data(), ckpt_path=ckpt_path)
    return everything(module, trainer)


def check_equal(got, expected):
    assert got[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        np.testing.assert_array_equal(got[0][name], array, err_msg=name)
    assert got[1] == expected[1]


@pytest.fixture(scope="module")
def uninterrupted():
    runs = {}

    def of(**options):
        key = tuple(sorted(options.items()))
        if key not in runs:
            runs[key] = run(**options)
        return runs[key]

    return of


MID = {"val_check_interval": 2, "log_every_n_steps": 1}


@pytest.mark.parametrize(
    ("hook", "call", "options"),
    [
        ("on_train_batch_start", 1, {}),
        ("on_train_batch_start", 5, {}),
        ("on_validation_batch_end", 2, MID),
        ("on_validation_end", 2, MID),
        ("on_validation_start", 2, {}),
        ("on_validation_end", 2, {}),
        ("on_train_epoch_start", 1, {}),
        ("on_train_epoch_start", 2, {}),
        ("on_train_start", 1, {}),
    ],
)
def test_a_run_saved_in_any_hook_continues_as_if_nothing_had_happened(hook, call, options, tmp_path, uninterrupted):
    saver = saves_in(tmp_path / "cut", hook, call)
    check_equal(run(callbacks=[saver], **options), uninterrupted(**options))
    # Another seed: whatever is not restored will differ.
    check_equal(run(seed=1, ckpt_path=tmp_path / "cut", **options), uninterrupted(**options))


@pytest.mark.parametrize(
    ("hook", "call", "options"),
    [
        ("on_train_batch_end", 1, {}),
        ("on_train_batch_end", 4, {}),
        ("on_train_batch_end", 6, {}),
        ("on_train_batch_end", 5, MID),
        ("on_train_epoch_end", 1, {}),
        ("on_train_epoch_end", 2, MID),
        ("on_validation_end", 2, {}),
    ],
)
def test_a_callback_that_saves_after_the_module_loses_nothing_either(hook, call, options, tmp_path, uninterrupted):
    run(callbacks=[saves_in(tmp_path / "cut", hook, call, phase="save")], **options)
    check_equal(run(seed=1, ckpt_path=tmp_path / "cut", **options), uninterrupted(**options))


@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 4), ("on_train_batch_end", 6), ("on_train_epoch_end", 6)]
)
def test_a_module_that_saves_at_the_end_of_its_own_hook_loses_nothing_either(
    hook, step, tmp_path, monkeypatch, uninterrupted
):
    inherited = getattr(Net, hook)

    def saving(self, *args):
        inherited(self, *args)
        if self.global_step == step and not (tmp_path / "cut").exists():
            self.trainer.save_checkpoint(tmp_path / "cut")

    monkeypatch.setattr(Net, hook, saving)
    check_equal(run(), uninterrupted())
    check_equal(run(seed=1, ckpt_path=tmp_path / "cut"), uninterrupted())


def test_a_compiled_run_continues_bit_for_bit_as_well(tmp_path):
    options = {"jit": True, "max_epochs": 2}
    expected = run(callbacks=[saves_in(tmp_path / "cut", "on_train_batch_end", 4, phase="save")], **options)
    check_equal(run(seed=1, ckpt_path=tmp_path / "cut", **options), expected)


def test_a_finished_run_continues_with_more_epochs(tmp_path, uninterrupted):
    run(callbacks=[saves_in(tmp_path / "end", "on_train_end", 1)], max_epochs=1)
    check_equal(run(seed=1, ckpt_path=tmp_path / "end"), uninterrupted())


def test_saving_after_the_fit_is_saving_its_end(tmp_path, uninterrupted):
    module, trainer = Net(rngs=nnx.Rngs(0)), quiet(max_epochs=1, log_every_n_steps=2, jit=False)
    trainer.fit(module, data(), validation_data())
    trainer.save_checkpoint(tmp_path / "end")
    check_equal(run(seed=1, ckpt_path=tmp_path / "end"), uninterrupted())


def test_an_error_in_a_batch_is_continued_from_with_that_very_batch(tmp_path, uninterrupted):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 4:
                raise OSError("for a moment")

        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(tmp_path / "cut")

    with pytest.raises(OSError, match="for a moment"):
        run(callbacks=[Fails()])
    check_equal(run(seed=1, ckpt_path=tmp_path / "cut"), uninterrupted())


class OwnOrder:
    """A loader whose order depends on how often it was started; its position is its own, and it has no `set_epoch`."""

    def __init__(self):
        self.passes, self.position = 0, 0

    def __len__(self):
        return 3

    def __iter__(self):
        if self.position in (0, 3):
            self.passes, self.position = self.passes + 1, 0
        while self.position < 3:
            self.position += 1
            x = np.full((4, 3), self.passes * 10 + self.position, np.float32) + np.eye(4, 3, dtype=np.float32)
            yield {"x": x, "row": np.full(4, self.passes * 10 + self.position)}

    def get_state(self):
        return {"passes": self.passes, "position": self.position}

    def set_state(self, state):
        self.passes, self.position = state["passes"], state["position"]


@pytest.mark.parametrize(
    ("hook", "call"), [("on_train_batch_end", 2), ("on_train_epoch_end", 2), ("on_train_epoch_start", 2)]
)
def test_a_loader_with_a_position_of_its_own_goes_on_between_epochs_too(hook, call, tmp_path):
    expected = run(callbacks=[saves_in(tmp_path / "cut", hook, call, phase="save")], loader=OwnOrder)
    rows = [value for _, value in expected[1]["history"]["rows"]]
    assert rows == [4 * r for r in (12, 21, 23, 32)]
    check_equal(run(seed=1, ckpt_path=tmp_path / "cut", loader=OwnOrder), expected)


def test_overfitting_on_shuffled_batches_continues_with_the_same_ones(tmp_path):
    options = {"overfit_batches": 2}
    shared = data()  # one loader for all runs: how often it was read must not matter
    saver = saves_in(tmp_path / "cut", "on_train_batch_end", 3, phase="save")
    expected = run(callbacks=[saver], loader=lambda: shared, **options)
    check_equal(run(seed=1, ckpt_path=tmp_path / "cut", loader=lambda: shared, **options), expected)


def test_a_continued_run_needs_no_sanity_check(tmp_path):
    calls = []

    class Notes(Callback):
        def on_sanity_check_start(self, trainer, module):
            calls.append(trainer.global_step)

    saver = saves_in(tmp_path / "cut", "on_train_batch_end", 2)
    run(callbacks=[saver, Notes()], num_sanity_val_steps=1)
    run(ckpt_path=tmp_path / "cut", callbacks=[Notes()], num_sanity_val_steps=1)
    assert calls == [0]


def test_bounds_and_counters_count_from_the_start_of_the_first_run(tmp_path):
    run(callbacks=[saves_in(tmp_path / "cut", "on_train_batch_end", 4)])
    _, rest = run(ckpt_path=tmp_path / "cut", max_steps=5)
    assert rest["at"] == (5, 1)
    _, rest = run(ckpt_path=tmp_path / "cut", max_epochs=1)
    assert rest["at"] == (4, 1)


@pytest.mark.parametrize("bound", [{"min_steps": 7}, {"min_epochs": 2}])
def test_a_stop_that_a_minimum_holds_back_comes_all_the_same(tmp_path, bound):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.should_stop, trainer.stop_reason = True, "enough"

    def fit(*callbacks, **how):
        trainer = quiet(max_epochs=5, callbacks=[*callbacks], **bound)
        trainer.fit(Scalar(), targets(*range(4)), **how)
        return trainer.global_step, trainer.stop_reason

    whole = fit(Stops(), saves_in(tmp_path / "saved", "on_train_batch_end", 5))
    assert whole[0] < 20 and fit(ckpt_path=tmp_path / "saved") == whole


def test_states_of_callbacks_data_module_and_user_come_back(tmp_path):
    class Counts(Callback):
        def __init__(self):
            self.count = 0

        def on_train_batch_end(self, *args):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    class Data(nf.DataModule):
        version = 1

        def train_dataloader(self):
            return targets(1, 2, 3)

        def state_dict(self):
            return {"version": self.version}

        def load_state_dict(self, state):
            self.version = state["version"]

    class Keeps(Scalar):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = [1, "two"]

        def on_load_checkpoint(self, checkpoint):
            self.loaded = tuple(checkpoint["mine"])

    datamodule = Data()
    datamodule.version = 7
    first, second = Counts(), Counts()
    quiet(max_epochs=1, jit=False, callbacks=[first, saves_in(tmp_path / "c", "on_train_batch_end", 2), second]).fit(
        Keeps(), datamodule=datamodule
    )
    module, datamodule = Keeps(), Data()
    first, second = Counts(), Counts()
    quiet(max_epochs=1, jit=False, callbacks=[first, second]).fit(
        module, datamodule=datamodule, ckpt_path=tmp_path / "c"
    )
    # The second had not yet counted the batch in whose hook the first saver came before it.
    assert (first.count, second.count) == (3, 2)
    assert datamodule.version == 7 and module.loaded == (1, "two")


def test_callbacks_of_one_class_are_told_apart():
    callbacks = [Callback(), nf.EarlyStopping("a"), Callback(), nf.EarlyStopping("b")]
    assert [name for name, _ in keyed(callbacks)] == ["Callback", "EarlyStopping", "Callback#2", "EarlyStopping#2"]


def test_a_checkpoint_holds_every_array_by_role_and_path(tmp_path):
    run(callbacks=[saves_in(tmp_path / "cut", "on_train_batch_end", 4)])
    arrays, meta = load_arrays(tmp_path / "cut"), load_meta(tmp_path / "cut")
    assert set(arrays["params"]) == {"linear.kernel", "norm.scale", "norm.bias"}
    assert set(arrays["stats"]) == {"norm.mean", "norm.var", "seen", "epoch_ends"}
    assert set(arrays["rngs"]) == {"dropout.rngs.count", "dropout.rngs.key"} and arrays["frozen"] == {}
    assert int(arrays["stats"]["seen"]) == 4 + 4 + 2 + 4
    assert (meta["global_step"], meta["epoch"], meta["progress"]["batch_idx"]) == (4, 1, 1)
    assert meta["module"] == "Net" and meta["hparams"] == {"features": 3} and meta["weights_only"] is False
    assert {"nnx_fit", "python", "jax", "flax", "optax", "orbax-checkpoint"} <= set(meta["versions"])
    assert "\n  max_epochs: 3\n" in meta["config"] and meta["precision"] == "32"


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluations_load_the_weights_and_nothing_else(verb, weights_only, tmp_path):
    class Evaluated(Scalar):
        def validation_step(self, batch):
            self.log("w", self.w[...])

        test_step = validation_step

        def predict_step(self, batch):
            return self.w[...]

    trained = Evaluated()
    trainer = quiet(max_epochs=1, jit=False)
    trainer.fit(trained, targets(2, 2))
    trainer.save_checkpoint(tmp_path / "w", weights_only=weights_only)
    module = Evaluated(start=100.0)
    fresh = quiet(jit=False)
    result = getattr(fresh, verb)(module, targets(1), ckpt_path=tmp_path / "w")
    w = pytest.approx(2 - 0.9**2, rel=1e-6)
    assert (float(result[0]) if verb == "predict" else result[0]["w"]) == w
    assert float(module.w[...]) == w and fresh.global_step == 0


def test_weights_alone_are_no_run_to_continue(tmp_path):
    trainer = quiet(max_epochs=1, jit=False)
    trainer.fit(Scalar(), targets(2))
    trainer.save_checkpoint(tmp_path / "w", weights_only=True)
    assert "optimizer" not in load_arrays(tmp_path / "w")
    module = Scalar(start=5.0)
    with pytest.raises(CheckpointError, match="weights only"):
        quiet(max_epochs=1, jit=False).fit(module, targets(2), ckpt_path=tmp_path / "w")
    assert float(module.w[...]) == 5.0


@pytest.fixture
def checkpoint(tmp_path):
    run(callbacks=[saves_in(tmp_path / "net", "on_train_batch_end", 2)])
    return tmp_path / "net"


class Renamed(Net):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.linear1 = self.linear
        del self.linear

    def loss(self, batch):
        return (self.norm(self.linear1(batch["x"])) ** 2).mean()


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Renamed(rngs=nnx.Rngs(1)), r"linear1.kernel: not in the checkpoint \(it has linear.kernel\)"),
        (lambda: Net(2, rngs=nnx.Rngs(1)), r"linear.kernel: float32\(3, 3\) in the checkpoint, float32\(2, 2\) here"),
        (lambda: Scalar(5.0), "w: not in the checkpoint\n.*only in the checkpoint"),
    ],
)
def test_the_checkpoint_of_another_module_names_the_paths_and_changes_nothing(verb, other, message, checkpoint):
    module = other()
    before = nnx.to_flat_state(nnx.state(module))
    before = {path: leaf[...] for path, leaf in before}
    width = 2 if "features" in module.hparams and module.hparams.features == 2 else 3
    batches = [{"x": np.ones((4, width), np.float32), "row": np.arange(4), "target": np.ones(4, np.float32)}]
    with pytest.raises(CheckpointError, match=f"(?s)of another module.*{message}.*Nothing was loaded") as caught:
        if verb == "fit":
            quiet(max_epochs=9, jit=False).fit(module, batches, ckpt_path=checkpoint)
        else:
            quiet(jit=False).validate(module, batches, ckpt_path=checkpoint)
    assert str(checkpoint) in str(caught.value)
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        assert leaf[...] is before[path], path


def test_the_checkpoint_of_another_optimizer_names_its_parts_and_changes_nothing(checkpoint):
    class OtherOptimizer(Net):
        def configure_optimizers(self):
            return optax.sgd(0.1, momentum=0.9)

    module = OtherOptimizer(rngs=nnx.Rngs(1))
    kernel = module.linear.kernel[...]
    with pytest.raises(CheckpointError, match=r"(?s)of another optimizer.*trace.*Nothing was loaded"):
        quiet(max_epochs=9, jit=False).fit(module, data(), ckpt_path=checkpoint)
    assert module.linear.kernel[...] is kernel


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_path_without_a_checkpoint_is_named(verb, tmp_path):
    module = Scalar()
    with pytest.raises(CheckpointError, match="nowhere"):
        getattr(quiet(max_epochs=1, jit=False), verb)(module, targets(1), ckpt_path=tmp_path / "nowhere")
    assert float(module.w[...]) == 1.0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "message"), [("best", "no ModelCheckpoint with a monitor"), ("last", "needs a ModelCheckpoint")]
)
def test_best_and_last_need_a_callback_that_saves(word, message):
    with pytest.raises(ConfigurationError, match=message):
        quiet(max_epochs=1, jit=False).fit(Scalar(), targets(1), ckpt_path=word)


def test_a_loader_of_other_data_is_refused_before_anything_is_trained(checkpoint):
    module = Net(rngs=nnx.Rngs(1))
    other = nf.ArrayLoader({"x": np.ones((8, 3), np.float32), "row": np.arange(8)}, 4, shuffle=True, seed=5)
    with pytest.raises(ConfigurationError, match="rows was 10 and is 8"):
        quiet(max_epochs=9, jit=False).fit(module, other, ckpt_path=checkpoint)


def test_nothing_can_be_saved_before_there_is_a_run(tmp_path):
    with pytest.raises(ConfigurationError, match="nothing to save"):
        quiet(max_epochs=1).save_checkpoint(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_hook_that_adds_what_is_not_plain_is_named_and_leaves_no_file(tmp_path):
    class Adds(Scalar):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["array"] = jnp.ones(3)

    trainer = quiet(max_epochs=1, jit=False)
    trainer.fit(Adds(), targets(1))
    with pytest.raises(CheckpointError, match=r"not JSON.*\n.*on_save_checkpoint"):
        trainer.save_checkpoint(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
