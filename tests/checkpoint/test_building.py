"""`FitModule.load_from_checkpoint`: the module that was saved comes back, or what of it is wanted."""

import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Regressor, loader, quiet

import nnx_fit as nf
from nnx_fit.checkpoint.checksums import sealed, unsealed
from nnx_fit.errors import CheckpointError, ConfigurationError


def bits(module):
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        value = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
        typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        found[".".join(map(str, path))] = np.asarray(jax.random.key_data(value) if typed else value)
    return found


def assert_same(one, other):
    one, other = bits(one), bits(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def save(path, module, **options):
    """Saves a module after an epoch of one batch, which is all that makes `Trainer.save_checkpoint` do so."""
    trainer = quiet(max_epochs=1, **options)
    trainer.fit(module, loader(16))
    return trainer.save_checkpoint(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    module = Regressor(depth=1, learning_rate=0.5, rngs=nnx.Rngs(5))
    trainer = quiet(max_epochs=1)
    trainer.fit(module, loader(32))
    trainer.save_checkpoint(directory / "all")
    trainer.save_checkpoint(directory / "weights", weights_only=True)
    return module, directory


@pytest.mark.parametrize("name", ["all", "weights"])
def test_arguments_and_values_of_every_role_come_back(trained, name):
    module, directory = trained
    loaded = Regressor.load_from_checkpoint(directory / name)
    assert_same(loaded, module)
    assert loaded.hparams == module.hparams == {"features": 8, "depth": 1, "learning_rate": 0.5}
    assert nnx.graphdef(loaded) == nnx.graphdef(module)
    assert loaded.blocks[0].dropout.rngs.count[...] == 2  # one for each batch


def test_a_loaded_module_trains_as_the_saved_one_does(trained):
    module, directory = trained
    modules = [nnx.clone(module), Regressor.load_from_checkpoint(str(directory / "weights"))]
    for each in modules:
        quiet(max_epochs=1).fit(each, loader(32))
    assert_same(*modules)


def test_nothing_is_initialised(trained, monkeypatch):
    _, directory = trained
    computed = []

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        computed.append(not isinstance(key, jax.core.Tracer))
        return jnp.zeros(shape, dtype)

    class Noted(Regressor):
        def __init__(self, features=8, depth=1, learning_rate=1e-2, *, rngs):
            super().__init__(features, depth, learning_rate, rngs=rngs)
            self.head = nnx.Linear(features, 1, kernel_init=init, rngs=rngs)

    Noted.load_from_checkpoint(directory / "all")
    assert computed == [False]


def test_overrides_take_the_place_of_what_was_saved(trained):
    module, directory = trained
    loaded = Regressor.load_from_checkpoint(directory / "all", learning_rate=0.25)
    assert loaded.learning_rate == loaded.hparams.learning_rate == 0.25
    assert_same(loaded, module)


def test_what_is_missing_stays_as_the_constructor_makes_it_and_both_are_said(trained, caplog):
    module, directory = trained
    loaded = Regressor.load_from_checkpoint(directory / "all", strict=False, depth=2, rngs=nnx.Rngs(7))
    fresh = Regressor(depth=2, rngs=nnx.Rngs(7))
    old, new, mine = bits(module), bits(fresh), bits(loaded)
    assert mine.keys() == new.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, old[name] if name in old else new[name], err_msg=name)
    said = caplog.records[-1].getMessage()
    missing = sorted(new.keys() - old.keys())
    assert f"{len(old)} of {len(new)} arrays loaded" in said and len(missing) == 7
    assert [line.split(":")[0].strip() for line in sorted(said.splitlines()[1:])] == missing


def test_a_shape_that_differs_is_not_loaded_and_an_error_where_all_is_wanted(trained, caplog):
    _, directory = trained

    class Wider(Regressor):
        def __init__(self, features=8, depth=1, learning_rate=1e-2, *, rngs):
            super().__init__(features, depth, learning_rate, rngs=rngs)
            self.head = nnx.Linear(features, 3, rngs=rngs)

    line = "head.kernel: float32(8, 1) in the checkpoint, float32(8, 3) here"
    with pytest.raises(CheckpointError) as caught:
        Wider.load_from_checkpoint(directory / "all")
    assert line in str(caught.value) and "of another module than Wider" in str(caught.value)
    loaded = Wider.load_from_checkpoint(directory / "all", strict=False)
    assert line in caplog.records[-1].getMessage() and loaded.head.kernel.shape == (8, 3)


class Renamed(nf.FitModule):
    def __init__(self, features=8, depth=1, learning_rate=1e-2, *, rngs):
        self.net = nnx.Dict(inner=Regressor(features, depth, learning_rate, rngs=rngs))


class Swapped(Regressor):
    def __init__(self, features=8, depth=1, learning_rate=1e-2, *, rngs):
        super().__init__(features, depth, learning_rate, rngs=rngs)
        self.top, self.layers = self.head, self.blocks
        del self.head, self.blocks


def test_paths_are_renamed_by_their_beginnings(trained):
    module, directory = trained
    deeper = Renamed.load_from_checkpoint(directory / "all", rename={"": "net.inner"})
    assert_same(deeper.net["inner"], module)
    assert type(deeper.net["inner"]) is Regressor and deeper.net["inner"].hparams == module.hparams
    other = Swapped.load_from_checkpoint(directory / "all", rename={"head": "top", "blocks": "layers"})
    np.testing.assert_array_equal(other.top.kernel[...], module.head.kernel[...])
    save(directory / "deeper", _Runs(deeper))
    back = Regressor.load_from_checkpoint(directory / "deeper", strict=False, depth=1, rename={"inner.net.inner": ""})
    assert_same(back, module)


class _Runs(nf.FitModule):
    """Trains nothing of what it holds."""

    def __init__(self, inner):
        self.inner, self.w = inner, nnx.Param(jnp.ones(()))
        self.trainable = nnx.PathContains("w")

    def training_step(self, batch):
        return self.w[...] ** 2

    def configure_optimizers(self):
        return optax.sgd(0.1)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"hea": "top"}, "hea is no path"),
        ({"head": "blocks.0.linear"}, "gives two arrays of .* the name blocks.0.linear.kernel"),
    ],
)
def test_renaming_what_is_not_there_or_onto_another_is_an_error(trained, rename, message):
    with pytest.raises(CheckpointError, match=message):
        Regressor.load_from_checkpoint(trained[1] / "all", rename=rename)


def test_nothing_in_common_is_an_error_also_where_little_is_wanted(trained):
    with pytest.raises(
        CheckpointError, match=r"have nothing in common(.|\n)*blocks.0.*net.inner.blocks.0(.|\n)*rename"
    ):
        Renamed.load_from_checkpoint(trained[1] / "all", strict=False)


class Odd(nf.FitModule):
    """What cannot be traced, or not be seen in a trace: bare arrays, closures over arrays, constructors that look."""

    def __init__(self, kind: str, kernel: tuple[int, int] = (1, 1), *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 1, kernel, rngs=rngs)
        self.kernel = kernel
        if kind == "bare":
            self.bare = jax.random.normal(rngs(), (3,))
        elif kind == "closure":
            table = jnp.arange(3.0)
            self.function = lambda i: table[i]
        elif kind == "partial":
            self.function = functools.partial(jnp.take, jnp.arange(3.0))
        elif kind == "looks":
            self.norm = float(jnp.abs(self.conv.kernel[...]).sum())

    def training_step(self, batch):
        return (self.conv(batch["x"][..., None, None]) ** 2).mean()

    def configure_optimizers(self):
        return optax.sgd(0.1)


@pytest.mark.parametrize("kind", ["bare", "closure", "partial", "looks"])
def test_constructors_that_cannot_be_traced_are_run(kind, tmp_path):
    module = Odd(kind, (3, 5), rngs=nnx.Rngs(3))
    save(tmp_path / "c", module)
    loaded = Odd.load_from_checkpoint(tmp_path / "c")
    assert_same(loaded, module)
    assert loaded.kernel == (3, 5) and isinstance(loaded.kernel, tuple)
    if hasattr(loaded, "function"):
        assert float(loaded.function(2)) == 2.0


def test_parameters_kept_short_come_back_short(tmp_path):
    module = Regressor(depth=1, rngs=nnx.Rngs(5))
    save(tmp_path / "c", module, precision="bf16-true")
    loaded = Regressor.load_from_checkpoint(tmp_path / "c")
    assert loaded.head.kernel.dtype == jnp.bfloat16
    assert_same(loaded, module)


def test_a_checkpoint_runs_no_code_and_holds_no_class(trained):
    with pytest.raises(ConfigurationError, match=r"FitModule.load_from_checkpoint.*class of the module"):
        nf.FitModule.load_from_checkpoint(trained[1] / "all")


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    save(tmp_path / "c", Odd("", rngs=nnx.Rngs(0)))
    (tmp_path / "c" / "arrays" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="arrays/_METADATA is missing"):
        Odd.load_from_checkpoint(tmp_path / "c")


def test_all_is_well_is_said_as_well(trained, caplog):
    module, directory = trained
    with caplog.at_level(logging.INFO):
        Regressor.load_from_checkpoint(directory / "all")
    assert (
        caplog.records[-1].getMessage() == f"Regressor: all {len(bits(module))} arrays loaded from {directory / 'all'}."
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda meta: meta.pop("hparams"), "meta.hparams is missing"),
        (lambda meta: meta.update(precision="7"), "meta.precision is '7'"),
    ],
)
def test_document_that_describes_no_module_is_named(trained, tmp_path, change, says):
    path = shutil.copytree(trained[1] / "all", tmp_path / "odd")
    document = unsealed((path / "meta" / "meta.json").read_bytes())
    change(document["meta"])
    (path / "meta" / "meta.json").write_bytes(sealed(document))
    with pytest.raises(CheckpointError, match=f"odd is damaged:\n.*meta.json is not what was written .{says}"):
        Regressor.load_from_checkpoint(path)
