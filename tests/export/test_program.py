"""A saved program gives what `Trainer.predict` gives, bit for bit, where neither the class nor a Trainer is."""

from __future__ import annotations

import collections
import copy
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.state.guard import StateWarning

Scores = collections.namedtuple("Scores", ["logits", "best"])


class Flagged(nnx.Module):
    """A layer whose mode is an argument without a default, as most written models have it."""

    def __init__(self, features, *, rngs):
        self.norm = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x, train: bool):
        return self.norm(x, use_running_average=not train)


class Everything(nets.Regressor):
    """All kinds of state, a call flag, and outputs of every structure."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(depth=1, rngs=rngs)
        self.flagged = Flagged(8, rngs=rngs)

    def __call__(self, x):
        return super().__call__(self.flagged(x))

    def predict_step(self, batch):
        y = self(batch["x"])
        return {"y": y, "all": [(y > 0, None), Scores(y * 2, y.argmax(-1))]}


class Drawing(nets.Regressor):
    """Draws in prediction, and knows which batch it is at."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(depth=1, rngs=rngs)

    def predict_step(self, batch, batch_idx):
        dropped = nnx.Dropout(0.5, deterministic=False, rngs=self.blocks[0].dropout.rngs)(batch["x"])
        return dropped, batch_idx, self.global_step


@pytest.fixture(scope="module")
def everything():
    module = Everything(rngs=nnx.Rngs(params=0, dropout=1))
    nets.quiet(max_steps=3).fit(module, nets.loader())
    return module


def drawing():
    return Drawing(rngs=nnx.Rngs(params=0, dropout=1))


def predicted(module, loader, **options):
    return nets.quiet(max_epochs=1, **options).predict(module, loader)


def saved(module, tmp_path, example=None, **options):
    file = tmp_path / "program.safetensors"
    nf.export.save_program(module, file, nets.arrays(4) if example is None else example, **options)
    return nf.export.load_program(file)


def assert_same_bits(left, right):
    """Named tuples of one name and fields are the same, whichever class they are of."""
    left, right = jax.tree.leaves_with_path(left), jax.tree.leaves_with_path(right)
    assert [jax.tree_util.keystr(path) for path, _ in left] == [jax.tree_util.keystr(path) for path, _ in right]
    for (path, one), (_, other) in zip(left, right, strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype, path
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_it_runs_without_the_class_and_without_flax_as_the_trainer_does(everything, tmp_path):
    module = everything
    nf.export.save_program(module, tmp_path / "program.safetensors", nets.arrays(4))
    np.savez(tmp_path / "data.npz", **nets.arrays(7))
    script = """
        import sys
        import numpy as np
        import nnx_fit as nf
        program = nf.export.load_program("program.safetensors")
        x = np.load("data.npz")["x"]
        found = {}
        for size in (1, 3, 7):
            y = program({"x": x[:size]})
            found |= {f"y{size}": y["y"], f"best{size}": y["all"][1].best}
        np.savez("found.npz", **found)
        print([name for name in ("flax", "optax", "orbax", "test_program", "nets") if name in sys.modules])
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    found = np.load(tmp_path / "found.npz")
    for size in (1, 3, 7):
        (expected,) = predicted(module, [{name: a[:size] for name, a in nets.arrays(7).items()}])
        np.testing.assert_array_equal(found[f"y{size}"], expected["y"])
        np.testing.assert_array_equal(found[f"best{size}"], expected["all"][1].best)


def test_predictions_over_a_loader_are_the_trainers(everything, tmp_path):
    module = everything
    program = saved(module, tmp_path)
    loader = nf.ArrayLoader(nets.arrays(50), 16)  # the last batch has 2 examples
    assert_same_bits(program.predict(loader), predicted(module, loader))


def test_the_module_is_left_as_it_was(tmp_path):
    module = drawing()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module)))
    module.train()
    saved(module, tmp_path, precision="bf16-true").predict([nets.arrays(4)])
    assert module.training and not module.blocks[0].dropout.deterministic
    assert all(
        (jax.random.key_data(a) == jax.random.key_data(b)).all()
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        else a.dtype == b.dtype and (a == b).all()
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.to_pure_dict(nnx.state(module))), strict=True)
    )


def test_random_streams_go_from_batch_to_batch_as_in_a_prediction(tmp_path):
    module = drawing()
    program = saved(module, tmp_path)
    loader = nf.ArrayLoader(nets.arrays(12), 4)
    found = program.predict(loader)
    assert_same_bits(found, predicted(module, loader))
    assert not (found[0][0] == found[1][0]).all()
    assert_same_bits(program.predict(loader), found)  # and starts over each time
    first = next(iter(loader))
    assert_same_bits(program(first), found[0])
    assert_same_bits(program(first), found[0])


class Counting(nf.FitModule):
    """A cache that a predict step writes."""

    def __init__(self):
        self.seen = nnx.Cache(jnp.zeros((), jnp.int32))

    def predict_step(self, batch):
        self.seen[...] += batch.shape[0]
        return batch + self.seen[...]


def test_caches_go_from_batch_to_batch(tmp_path):
    batches = [np.zeros(2, np.float32), np.zeros(3, np.float32)]
    program = saved(Counting(), tmp_path, batches[0])
    assert_same_bits(program.predict(batches), [np.full(2, 2, np.float32), np.full(3, 5, np.float32)])
    assert_same_bits(program.predict(batches), predicted(Counting(), batches))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_is_the_trainers(precision, everything, tmp_path):
    module = copy.deepcopy(everything)  # the Trainer makes its parameters short
    program = saved(module, tmp_path, precision=precision)
    loader = nf.ArrayLoader(nets.arrays(10), 5)
    found = program.predict(loader)
    assert_same_bits(found, predicted(module, loader, precision=precision))
    assert (found[0]["y"] != predicted(everything, loader)[0]["y"]).any()


class Convolutional(nf.FitModule):
    """Images of a size of their own, mean over space."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return x.reshape(x.shape[0], -1).mean(-1)


def test_convolutions_take_any_batch_size(tmp_path):
    images = np.random.default_rng(0).normal(size=(5, 6, 6, 1)).astype(np.float32)
    module = Convolutional(rngs=nnx.Rngs(0))
    program = saved(module, tmp_path, images[:2])
    loader = [images[:1], images, images[:3]]
    assert_same_bits(program.predict(loader), predicted(module, loader))


class Unrolled(nf.FitModule):
    """Takes the batch apart with Python, which needs its size."""

    def predict_step(self, batch):
        return jnp.stack([batch["x"][i] * i for i in range(len(batch["x"]))])


def test_a_step_that_needs_the_size_says_so_and_runs_with_one(tmp_path):
    with pytest.raises(nf.ConfigurationError, match=r"for any batch size .*(?s:.)*batch_size=4"):
        saved(Unrolled(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    program = saved(Unrolled(), tmp_path, batch_size=6)
    assert program.batch_size == 6
    assert_same_bits(program.predict([nets.arrays(6)]), predicted(Unrolled(), [nets.arrays(6)]))
    with pytest.raises(nf.ConfigurationError, match=r"batch\['x'\]: float32\[6, 8\]: got float32\[5, 8\]"):
        program(nets.arrays(5))


def test_a_mistake_in_the_step_is_shown_as_it_is(tmp_path):
    class Wrong(nf.FitModule):
        def predict_step(self, batch):
            return batch["x"] @ jnp.ones((3, 3))

    with pytest.raises(TypeError, match="dot_general"):
        saved(Wrong(), tmp_path)


def test_the_guard_is_on_watch(tmp_path):
    class Leaking(nets.Regressor):
        def predict_step(self, batch):
            return self.blocks[0].norm(batch["x"], use_running_average=False)

    module = Leaking(rngs=nnx.Rngs(0))
    with pytest.raises(nf.StateError, match=r"predict_step changed(?s:.)*blocks\.0\.norm\.mean"):
        saved(module, tmp_path)
    with pytest.warns(StateWarning, match=r"blocks\.0\.norm\.mean") as warned:
        program = saved(module, tmp_path, state_guard="warn")
    assert len(warned) == 1
    assert_same_bits(program.predict([nets.arrays(4)] * 2), predicted(module, [nets.arrays(4)] * 2, state_guard="off"))


class Adversarial(nf.FitModule):
    """Two parts of which prediction needs one."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.generator = nnx.Linear(2, 3, rngs=rngs)
        self.discriminator = nnx.Linear(3, 1, rngs=rngs)

    def predict_step(self, batch):
        return self.generator(batch["noise"])


def test_it_holds_and_takes_only_what_the_step_looks_at(tmp_path):
    batch = {"label": np.zeros((4, 1), np.int32), "noise": np.ones((4, 2), np.float32), "file": ["a", "b", "c", "d"]}
    module = Adversarial(rngs=nnx.Rngs(0))
    program = saved(module, tmp_path, batch)
    assert [str(each) for each in program.inputs] == ["batch['noise']: float32[batch, 2]"]
    assert_same_bits(program({"noise": batch["noise"]}), predicted(module, [batch])[0])
    assert_same_bits(program(batch), program({"noise": batch["noise"]}))
    other = Adversarial(rngs=nnx.Rngs(1))
    loaded = nf.export.load_weights(other, tmp_path / "program.safetensors", strict=False).loaded
    assert set(loaded) == {"generator.bias", "generator.kernel"}
    np.testing.assert_array_equal(other.generator.kernel[...], module.generator.kernel[...])


def test_a_step_that_looks_only_at_the_size_takes_any(tmp_path):
    class Zeros(nf.FitModule):
        def predict_step(self, batch):
            return jnp.zeros(batch["x"].shape[0])

    program = saved(Zeros(), tmp_path)
    assert program({"x": np.ones((3, 8), np.float32)}).shape == (3,)


def test_what_calls_python_cannot_be_saved(tmp_path):
    class Printing(nf.FitModule):
        def predict_step(self, batch):
            jax.debug.print("{}", batch["x"].sum())
            return batch["x"]

    with pytest.raises(nf.ConfigurationError, match=r"calls no Python(?s:.)*Fix: leave such calls out"):
        saved(Printing(), tmp_path)


def test_what_nobody_could_put_together_without_its_class_is_refused(tmp_path):
    class Opaque:
        pass

    jax.tree_util.register_pytree_node(Opaque, lambda _: ((jnp.ones(2),), None), lambda *_: Opaque())

    class Returning(nf.FitModule):
        def predict_step(self, batch):
            return {"y": Opaque()}

    with pytest.raises(nf.ConfigurationError, match=r"What predict_step returns holds a .*Opaque"):
        saved(Returning(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "any"}, "batch_size='any'"),
        ({"platforms": "cpu"}, "platforms='cpu'"),
        ({"platforms": ["gpu"]}, r"platforms=\['gpu'\].*'cuda'"),
        ({"precision": "bf16"}, "precision='bf16'.*'bf16-mixed'"),
    ],
)
def test_arguments_are_checked(options, message, tmp_path):
    with pytest.raises(nf.ConfigurationError, match=message):
        saved(nets.Regressor(rngs=nnx.Rngs(0)), tmp_path, **options)


def test_it_takes_a_fit_module(tmp_path):
    with pytest.raises(nf.ConfigurationError, match="Linear, which has no predict_step"):
        nf.export.save_program(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tmp_path / "x", np.ones((1, 1)))  # type: ignore[arg-type]
