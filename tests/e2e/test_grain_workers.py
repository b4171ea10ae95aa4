"""Grain with worker processes: a run is continued with the very next batch, and leaves no process behind."""

import multiprocessing

import grain
import numpy as np
import pytest
from flax import nnx
from nets import Regressor, SavesIn, arrays, quiet

DATA = arrays(40)
ELEMENTS = [{"x": x, "y": y} for x, y in zip(DATA["x"], DATA["y"], strict=True)]

LOADERS = {
    "DataLoader": lambda: grain.DataLoader(
        data_source=ELEMENTS,
        sampler=grain.samplers.IndexSampler(len(ELEMENTS), num_epochs=1, shuffle=True, seed=3),
        operations=[grain.transforms.Batch(8)],
        worker_count=2,
    ),
    "IterDataset": lambda: (
        grain.MapDataset.source(ELEMENTS)
        .seed(3)
        .shuffle()
        .to_iter_dataset()
        .batch(8)
        .mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=2))
    ),
}


def fit(kind, *callbacks, **how):
    module = Regressor(rngs=nnx.Rngs(0))
    history = quiet(max_epochs=2, log_every_n_steps=1, callbacks=[*callbacks]).fit(module, LOADERS[kind](), **how)
    return dict(history), np.asarray(module.head.kernel[...]).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_continues_with_the_next_batch_of_the_workers(tmp_path, kind):
    whole = fit(kind, SavesIn(tmp_path / "saved", "on_train_batch_end", 8))
    assert fit(kind, ckpt_path=tmp_path / "saved") == whole
    assert not multiprocessing.active_children()
