"""`Prefetcher`: order, limits, errors, positions and safety of what is placed ahead."""

from __future__ import annotations

import itertools
import json
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnx_fit.data.array_loader import ArrayLoader
from nnx_fit.data.prefetch import Prefetcher, default_place
from nnx_fit.errors import ConfigurationError

PLACE = default_place()


def values(batches) -> list[int]:
    return [int(np.asarray(batch.numeric["x"]).flat[0]) for batch in batches]


def items(n: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.full(2, i)} for i in range(n)]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_come_complete_and_in_order(depth):
    batches = Prefetcher(items(4), PLACE, depth)
    assert values(batches) == [0, 1, 2, 3]
    assert batches.batches == 4
    assert batches.exhausted
    assert list(batches) == []


@pytest.mark.parametrize(("depth", "ahead"), [(1, 0), (2, 1), (3, 2)])
def test_depth_is_how_far_it_reads_ahead(depth, ahead):
    pulled, placed = [], []

    def load():
        for item in items(6):
            pulled.append(1)
            yield item

    def place(batch):
        placed.append(1)
        return batch

    batches = Prefetcher(load, place, depth)
    assert not pulled
    for handed_out in range(1, 4):
        next(batches)
        assert len(pulled) == len(placed) == handed_out + ahead


@pytest.mark.parametrize("limit", [0, 1, 3, 10])
def test_no_batch_beyond_the_limit_is_asked_of_the_loader(limit):
    pulled = []

    def load():
        for item in items(5):
            pulled.append(1)
            yield item

    batches = Prefetcher(load, PLACE, limit=limit)
    assert len(list(batches)) == len(pulled) == min(limit, 5)
    assert batches.exhausted


def test_the_last_batch_is_known_as_such_when_it_is_handed_out():
    for limit in (None, 2):
        batches = Prefetcher(lambda: iter(items(3)), PLACE, limit=limit)
        ends = [batches.exhausted for _ in batches]
        assert ends == [False] * (len(ends) - 1) + [True]


def test_a_loader_that_reuses_its_buffers_gives_every_batch_its_own_values():
    # Aligned to 64 bytes, where JAX takes a NumPy buffer without copying it.
    raw = np.empty(4 * 4096 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    buffer = raw[start : start + 4 * 4096].view(np.float32)

    def load():
        for i in range(8):
            buffer[:] = i
            yield {"x": buffer}
        buffer[:] = -1

    program = jax.jit(lambda batch, w: batch["x"].max() + 0 * (w @ w).sum())
    w = jnp.ones((300, 300))
    kept, results = [], []
    for batch in Prefetcher(load, PLACE, 3):
        kept.append(batch)
        results.append(program(batch.numeric, w))
    assert [float(result) for result in results] == list(range(8))
    assert values(kept) == list(range(8))


def test_placed_arrays_are_read_only_and_have_the_dtype_of_the_program():
    (batch,) = Prefetcher([{"x": np.arange(3.0), "n": 2, "j": jnp.ones(3)}], PLACE)
    assert batch.full is batch.numeric
    assert batch.full["x"].dtype == jnp.asarray(1.0).dtype
    assert batch.full["n"].dtype == jnp.asarray(1).dtype
    assert isinstance(batch.full["j"], jax.Array)
    with pytest.raises(ValueError, match="read-only"):
        batch.full["x"][0] = 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_array_loaders_batches_do_not_follow_later_writes_into_its_arrays(shuffle):
    x = np.arange(8, dtype=np.float32)
    batches = Prefetcher(ArrayLoader({"x": x, "n": np.arange(8)}, 2, shuffle=shuffle), PLACE)
    batch = next(batches)
    before = batch.numeric["x"].tolist()
    assert batch.full is batch.numeric
    x[:] = -1
    assert batch.numeric["x"].tolist() == before
    with pytest.raises(ValueError, match="read-only"):
        batch.full["x"][0] = 1


def test_an_array_loader_with_text_keeps_it_for_the_host():
    loader = ArrayLoader({"x": np.arange(4.0), "text": np.array(["a", "b", "c", "d"])}, 2)
    first, second = Prefetcher(loader, PLACE)
    assert first.full["text"].tolist() == ["a", "b"] and second.numeric["x"].tolist() == [2, 3]
    assert len(jax.tree.leaves(first.numeric)) == 1


def test_leaves_that_are_not_numeric_reach_the_host():
    (batch,) = Prefetcher([{"x": np.arange(3), "text": "a"}], PLACE)
    assert batch.full["text"] == "a"
    assert len(jax.tree.leaves(batch.numeric)) == 1


@pytest.mark.parametrize("depth", [1, 3])
def test_an_error_of_the_loader_comes_at_its_batch_after_the_earlier_ones(depth):
    def load():
        yield from items(2)
        raise RuntimeError("disk gone")

    batches = Prefetcher(load, PLACE, depth)
    assert values(itertools.islice(batches, 2)) == [0, 1]
    assert not batches.exhausted
    with pytest.raises(RuntimeError, match="disk gone") as caught:
        next(batches)
    assert caught.traceback[-1].name == "load"
    assert list(batches) == []


def test_a_bad_batch_is_an_error_at_its_place():
    batches = Prefetcher([{"x": np.zeros(2)}, {"x": "text"}], PLACE)
    next(batches)
    with pytest.raises(ConfigurationError, match="at least one numeric array"):
        next(batches)


def test_an_interrupt_is_not_held_back():
    def load():
        yield from items(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(Prefetcher(load, PLACE, 2))


def test_close_ends_the_generator_and_keeps_the_position():
    closed = []

    def load():
        try:
            yield from items(5)
        finally:
            closed.append(True)

    batches = Prefetcher(load, PLACE)
    next(batches)
    state = batches.get_state()
    batches.close()
    batches.close()
    assert closed == [True]
    assert not batches.exhausted
    assert batches.get_state() == state
    assert list(batches) == []


def test_close_leaves_a_loader_open_that_is_its_own_iterator():
    class File:
        closed = False

        def __iter__(self):
            return self

        def __next__(self):
            return np.zeros(1)

        def close(self):
            self.closed = True

    loader = File()
    batches = Prefetcher(loader, PLACE)
    next(batches)
    batches.close()
    assert not loader.closed


def test_time_spent_in_the_loader_is_counted():
    batches = Prefetcher(items(3), PLACE)
    list(batches)
    assert batches.wait_seconds > 0


TENSOR: Any = torch.arange(23)
ELEMENTS: Any = [{"x": np.int64(i)} for i in range(23)]


class Stateful:
    """The protocol on the loader alone, with the very dict that it goes on changing."""

    def __init__(self):
        self.state = {"position": 0, "passes": 0}

    def __iter__(self):
        while self.state["position"] < 8:
            self.state["position"] += 1
            yield {"x": np.full(1, self.state["position"] + 100 * self.state["passes"])}
        self.state["position"] = 0
        self.state["passes"] += 1

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = dict(state)


LOADERS = {
    "ArrayLoader": lambda: ArrayLoader({"x": np.arange(23)}, 3, shuffle=True, seed=5),
    "Stateful": Stateful,
    "grain map": lambda: grain.MapDataset.source(ELEMENTS).seed(1).shuffle().batch(3),
    "grain iter": lambda: grain.MapDataset.source(ELEMENTS).seed(1).shuffle().to_iter_dataset().batch(3),
    "grain loader": lambda: grain.DataLoader(
        data_source=ELEMENTS,
        sampler=grain.samplers.IndexSampler(23, num_epochs=1, shuffle=True, seed=0),
        operations=[grain.transforms.Batch(3)],
    ),
    "torch": lambda: [
        {"x": x}
        for x in torch.utils.data.DataLoader(
            TENSOR, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0)
        )
    ],
    "list": lambda: items(8),
}


@pytest.mark.parametrize("limit", [None, 6])
@pytest.mark.parametrize("taken", [0, 1, 5, 6, 8])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_pass_continues_after_the_batch_handed_out_last(kind, taken, limit):
    build = LOADERS[kind]
    loader = build()
    batches = Prefetcher(loader, PLACE, 3, limit=limit)
    taken = len(values(itertools.islice(batches, taken)))
    state = json.loads(json.dumps(batches.get_state()))
    assert state["batches"] == taken
    if kind == "Stateful" and (limit or taken):
        # What it read ahead is lost to its next pass, which no reader of it could prevent: this pass is what counts.
        rest = [values(batches)]
    else:
        rest = [values(batches), values(Prefetcher(loader, PLACE))]

    resumed = build()
    again = Prefetcher(resumed, PLACE, 3, limit=limit, state=state)
    assert again.get_state() == state
    assert again.resumed == ("exact" if kind not in ("torch", "list") or taken == (limit or 8) else "replayed")
    assert [values(again), *([values(Prefetcher(resumed, PLACE))] if len(rest) > 1 else [])] == rest
    assert again.batches == (limit or 8)


def test_the_position_of_a_finished_pass_leads_to_the_next_one():
    loader, resumed = Stateful(), Stateful()
    batches = Prefetcher(loader, PLACE)
    list(batches)
    assert list(Prefetcher(resumed, PLACE, state=batches.get_state())) == []
    assert values(Prefetcher(resumed, PLACE)) == values(Prefetcher(loader, PLACE)) == list(range(101, 109))


def test_a_loader_with_a_position_is_not_read_from_its_start():
    pulled = []

    class Recording(Stateful):
        def __iter__(self):
            for item in super().__iter__():
                pulled.append(int(item["x"][0]))
                yield item

    batches = Prefetcher(Recording(), PLACE)
    values(itertools.islice(batches, 3))
    pulled.clear()
    assert values(Prefetcher(Recording(), PLACE, state=batches.get_state())) == pulled == [4, 5, 6, 7, 8]


def test_a_limit_counts_the_batches_before_the_resume():
    batches = Prefetcher(items(8), PLACE)
    values(itertools.islice(batches, 3))
    assert values(Prefetcher(items(8), PLACE, limit=5, state=batches.get_state())) == [3, 4]
    assert values(Prefetcher(items(8), PLACE, limit=2, state=batches.get_state())) == []


@pytest.mark.parametrize(("kind", "says"), [("list", True), ("ArrayLoader", False), ("grain map", False)])
def test_what_is_read_again_is_said_of_loaders_without_a_position(kind, says, caplog):
    batches = Prefetcher(LOADERS[kind](), PLACE)
    caplog.set_level("INFO", "nnx_fit")
    for taken, again in ((3, "the first 3 batches of the epoch are read again."), (8, "the next epoch is a new pass.")):
        values(itertools.islice(batches, taken - batches.batches))
        caplog.clear()
        Prefetcher(LOADERS[kind](), PLACE, state=batches.get_state())
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == says
        assert not says or said[0].startswith(f"The loader (list) has no saved position: {again}")


def test_a_replay_that_ends_early_is_an_error():
    batches = Prefetcher(items(8), PLACE)
    values(itertools.islice(batches, 5))
    with pytest.raises(ConfigurationError, match="cannot be brought back to batch 5 of its pass: it ended after 4"):
        Prefetcher(items(4), PLACE, state=batches.get_state())


def test_a_position_that_the_loader_refuses_names_the_loader():
    def build(n):
        sampler = grain.samplers.IndexSampler(n, num_epochs=1, shuffle=False, seed=0)
        return grain.DataLoader(data_source=ELEMENTS, sampler=sampler, operations=[grain.transforms.Batch(2)])

    batches = Prefetcher(build(20), PLACE)
    next(batches)
    with pytest.raises(ConfigurationError, match=r"(?s)\(DataLoader\) did not take the position.*Sampler"):
        Prefetcher(build(10), PLACE, state=batches.get_state())


def test_a_position_that_cannot_be_saved_names_the_loader():
    class Odd(Stateful):
        def get_state(self):
            return {"handle": object}

    batches = Prefetcher(Odd(), PLACE)
    next(batches)
    with pytest.raises(ConfigurationError, match=r"\(Odd\) cannot be saved"):
        batches.get_state()


@pytest.mark.parametrize("device", ["cpu", jax.local_devices()[0]], ids=["platform", "device"])
def test_the_default_device_of_jax_is_respected(device):
    with jax.default_device(device):
        place = default_place()
    np.testing.assert_array_equal(place([np.zeros(2)])[0], [0, 0])
