"""A position that was saved in one process is taken in another."""

import grain
import numpy as np
import pytest

from nnx_fit.data.positions import decoded, encoded, here
from nnx_fit.data.prefetch import Prefetcher
from nnx_fit.errors import ConfigurationError


class Source:
    """As most are: without a `__repr__`, so that it is described by its address."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"x": np.float32(index)}


class OtherSource(Source):
    pass


def loader(source):
    sampler = grain.samplers.IndexSampler(20, num_epochs=1, shuffle=True, seed=0)
    return grain.DataLoader(data_source=source, sampler=sampler, operations=[grain.transforms.Batch(2)])


def values(batches):
    return [np.asarray(batch.numeric["x"]).tolist() for batch in batches]


def test_grain_loader_of_a_source_without_a_repr_continues_at_its_position(caplog):
    whole = values(Prefetcher(loader(Source()), lambda arrays: arrays))
    batches = Prefetcher(loader(first := Source()), lambda arrays: arrays)
    before = [np.asarray(next(batches).numeric["x"]).tolist() for _ in range(4)]
    second = Source()
    assert repr(first) != repr(second)  # as in another process
    again = Prefetcher(loader(second), lambda arrays: arrays, state=batches.get_state())
    assert again.resumed == "exact"
    assert before + values(again) == whole
    with pytest.raises(ConfigurationError, match=r"\(DataLoader\) did not take the position"):
        Prefetcher(loader(OtherSource()), lambda arrays: arrays, state=batches.get_state())


@pytest.mark.parametrize("state", [{"a": 1}, [1, 2], 5, None, b"\x00\xff", b"[]", b"5"])
def test_other_positions_stay_what_they_are(state):
    assert here(decoded(encoded(state, None)), object()) == state
