"""When a finder searches, and when it takes what was found before."""

from __future__ import annotations

import nets
import pytest

from nnx_fit.callbacks.finder import Finder, GivenData


class Noting(Finder):
    """Notes what it is asked to do."""

    def __init__(self):
        self.seen: list[object] = []

    def find(self, trainer, module, data):
        self.seen.append("find")

    def adopt(self, trainer, module, data):
        self.seen.append("adopt")

    def load_state_dict(self, state):
        self.seen.append(dict(state))


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (None, ["find"]),
        ({"value": 3}, [{"value": 3}, "adopt"]),
        ({}, []),  # the run that is continued had no finder
    ],
)
def test_a_run_that_begins_searches_and_one_that_continues_does_not(saved, expected):
    finder = Noting()
    finder.ask(nets.quiet(max_epochs=1), nets.Scalar(), GivenData("fit"), saved)
    assert finder.seen == expected


@pytest.mark.parametrize("saved", [None, {"value": 3}])
def test_fast_dev_run_leaves_everything_as_it_is(saved):
    finder = Noting()
    finder.ask(nets.quiet(fast_dev_run=True), nets.Scalar(), GivenData("fit"), saved)
    assert finder.seen == []


def test_finders_are_asked_in_list_order_after_setup_and_before_the_loaders():
    class Telling(nets.Scalar):
        def setup(self, stage):
            first.seen.append("setup")

        def train_dataloader(self):
            first.seen.append("loader")
            return nets.targets(0.5)

        def configure_optimizers(self):
            first.seen.append("optimizer")
            return super().configure_optimizers()

    first = Noting()
    second = Noting()
    second.seen = first.seen
    second.find = lambda *_: first.seen.append("find second")
    nets.quiet(max_epochs=1, callbacks=[first, second]).fit(Telling())
    assert first.seen == ["setup", "find", "find second", "loader", "optimizer"]
