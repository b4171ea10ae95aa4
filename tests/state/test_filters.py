"""Filters: path prefixes, aliases, edits, and what makes a filter name a Variable type."""

from __future__ import annotations

import jax.numpy as jnp
import nets
import pytest
from flax import nnx

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError
from nnx_fit.state.filters import Edited, PathPrefix, hashable, matches

PARAM = nnx.Param(jnp.ones(1))
STAT = nnx.BatchStat(jnp.ones(1))


@pytest.mark.parametrize(
    ("prefix", "path", "matched"),
    [
        ("net", ("net", "kernel"), True),
        ("net.kernel", ("net", "kernel"), True),
        ("net", ("network", "kernel"), False),
        ("net.layers.1", ("net", "layers", 1, "kernel"), True),
        ("net.layers.1", ("net", "layers", 10, "kernel"), False),
        ("kernel", ("net", "kernel"), False),
    ],
)
def test_a_path_prefix_ends_at_a_dot(prefix, path, matched):
    assert PathPrefix(prefix)(path, PARAM) is matched


ALIASES = [("encoder", "kernel"), ("decoder", "kernel")]


@pytest.mark.parametrize(
    ("selector", "matched"),
    [
        (PathPrefix("encoder"), True),
        (PathPrefix("decoder"), True),
        (PathPrefix("other"), False),
        # Each part may hold through another alias, and a negation must hold for all of them.
        (nnx.All(PathPrefix("encoder"), PathPrefix("decoder")), True),
        (nnx.Not(PathPrefix("encoder")), False),
        (nnx.Not(PathPrefix("decoder")), False),
        (nnx.Not(PathPrefix("other")), True),
        (nnx.Any(PathPrefix("other"), PathPrefix("decoder")), True),
        (nnx.All(nnx.Param, nnx.Not(PathPrefix("decoder"))), False),
        ([PathPrefix("other"), nnx.BatchStat], False),
        (nnx.PathContains("decoder"), True),
        (..., True),
        (None, False),
        (False, False),
    ],
)
def test_a_tied_variable_is_matched_through_any_of_its_paths(selector, matched):
    assert matches(selector, ALIASES, PARAM) is matched


def test_the_last_edit_wins():
    edited = Edited(nnx.Param).edited(False, [PathPrefix("net")]).edited(True, [PathPrefix("net.head")])
    assert matches(edited, [("other",)], PARAM)
    assert not matches(edited, [("net", "body")], PARAM)
    assert matches(edited, [("net", "head", "kernel")], PARAM)
    assert not matches(edited.edited(False, [...]), [("net", "head", "kernel")], PARAM)


def test_an_edited_filter_works_in_nnx_itself():
    module = nets.Regressor(rngs=nnx.Rngs(0))
    frozen = Edited(nnx.Param, ((False, PathPrefix("blocks")),))
    assert list(nnx.state(module, frozen)) == ["head"]


@pytest.mark.parametrize(
    "selector", [[nnx.Param, "tag"], (nnx.Param, [nnx.BatchStat]), nnx.Param, nnx.Any(nnx.Param), ..., None]
)
def test_any_filter_becomes_hashable_and_means_the_same(selector):
    made = hashable(selector)
    hash(made)
    for value in (PARAM, STAT):
        assert matches(made, [("a",)], value) == matches(selector, [("a",)], value)


def test_equal_edits_are_equal_and_hash_alike():
    one = Edited(nnx.Param).edited(False, [PathPrefix("net")])
    other = Edited(nnx.Param).edited(False, [PathPrefix("net")])
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(("edit", "near"), [("freeze", "blocks.0.linaer"), ("unfreeze", "blocks.0.linea")])
def test_a_prefix_that_leads_nowhere_is_an_error_with_the_nearest_one(edit, near):
    module = nets.Regressor(rngs=nnx.Rngs(0))
    getattr(module, edit)(near)
    with pytest.raises(ConfigurationError, match=rf"'{near}'(.|\n)*Did you mean 'blocks.0.linear'\?"):
        nf.partition(module)


def test_a_prefix_may_name_a_layer_without_variables():
    class Plain(nf.FitModule):
        def __init__(self):
            self.net = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)

    module = Plain()
    module.freeze("net.layers.1")
    assert {row.role for row in nf.partition(module).rows} == {"params"}


def test_an_edited_filter_reads_as_it_was_written():
    edited = Edited(nnx.Param).edited(False, [...]).edited(True, [PathPrefix("head")])
    assert repr(edited) == "Param, then freeze(...), then unfreeze('head')"
