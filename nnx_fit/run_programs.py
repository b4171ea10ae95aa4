"""`RunPrograms`: the compiled steps of a run, built from its module, and built anew when a hook changes it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from nnx_fit.callbacks.callback import Callback
from nnx_fit.errors import ConfigurationError, StateError
from nnx_fit.loops.evaluate import HOOK_STAGE
from nnx_fit.loops.funnel import Funnel, overrides
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.options import Options
from nnx_fit.programs.evaluate import EvalProgram
from nnx_fit.programs.live_optimizer import LiveOptimizer
from nnx_fit.programs.parts import report_uncovered, unknown_optimizer
from nnx_fit.programs.precision import PRECISIONS
from nnx_fit.programs.train import TrainProgram
from nnx_fit.programs.train_options import train_options
from nnx_fit.state import graph
from nnx_fit.state.blueprint import Blueprint
from nnx_fit.state.filters import with_edits_of
from nnx_fit.state.live import Live
from nnx_fit.state.peek import Peek
from nnx_fit.state.reads import matters
from nnx_fit.state.side_effects import warn_of_untoggled_modes

logger = logging.getLogger("nnx_fit")


class RunPrograms:
    """The programs of one verb.

    Args:
        module: The user's module.
        options: What was asked for.
        callbacks: Callbacks in list order.

    Attributes:
        live: The module's values, once `build` was called.
        train_program: The train program of a fit.
        trainable: NNX filter of what trains, `freeze` and `unfreeze` aside; `None` for the module's own.
    """

    funnel: Funnel

    def __init__(self, module: Any, options: Options, callbacks: Sequence[Callback]):
        self.module = module
        self.options = options
        self.precision = PRECISIONS[options.precision]
        self.callbacks = list(callbacks)
        self.live: Live | None = None
        self.train_program: TrainProgram | None = None
        self.trainable: Any = None
        self._blueprint: Blueprint | None = None
        self._eval_programs: dict[tuple[str, int], EvalProgram] = {}
        self._rebuilds = 0
        self._peek = Peek()
        self._reads: set[str] = set()

    @property
    def trains(self) -> Any:
        """NNX filter of what trains in the end."""
        own = self.module.trainable
        return own if self.trainable is None else with_edits_of(self.trainable, own)

    def build(self) -> Live:
        """Takes the module over as it is now: its layout, its values, and its graphdef in each mode."""
        if self.options.state_guard != "off":
            warn_of_untoggled_modes(self.module)
        self.precision.convert(self.module, self.trains)
        self._blueprint = Blueprint(self.module, self.trains)
        self.live = Live(self.module, self._blueprint.layout)
        return self.live

    def refresh(self) -> None:
        """Takes over what hooks changed of the module beyond its values: attributes, `trainable`, Variables.

        Programs are built for such things, so that they are built anew; the optimizer's state of what was trained
        before and still is stays. Costs nothing when no hook ran that could have changed the module.
        """
        if self.live is None or not self.funnel.looked:
            return
        self.funnel.looked = False
        self.live.show()
        old = self._of_programs
        if old.intact(self.trains):
            self.live.collect()
            return
        if [path for path, _ in graph.flatten(self.module)[1]] == [slot.path for slot in old.layout.slots]:
            # Refuses a value of another shape by name; one of another dtype is brought to the Variable's own.
            self.live.replace(self.live.collect())
        new = Blueprint(self.module, self.trains)
        changed = old.changed()
        unread = [path for path in changed if not matters(self.module, path, self._reads)]
        self._blueprint = new
        if len(unread) == len(changed) and not old.differs(new, unread):
            self._adopt(new)
            return
        what = old.describe(new)
        self._rebuilds += 1
        logger.log(
            logging.INFO if self._rebuilds < 3 else logging.WARNING,
            "A hook changed the module (%s): its steps are compiled again.%s",
            what,
            "" if self._rebuilds < 3 else " Fix: hold a number that changes often in an nnx.Variable.",
        )
        self.live = Live(self.module, new.layout)
        self._eval_programs.clear()
        if self.train_program is not None:
            self.train_program = self.train_program.rebuilt(
                new.graphdefs[True], self.live, f"a hook changed the module: {what}"
            )

    def refresh_in_epoch(self) -> None:
        """`refresh` between two batches, if anything changed that a step may depend on."""
        if not self.funnel.looked:
            return
        blueprint = self._of_programs
        changed, more = blueprint.newly_changed()
        traced = self.train_program is not None and self.train_program.traced
        if (
            more
            or blueprint.trainable != self.trains
            or any(not traced or matters(self.module, path, self._reads) for path in changed)
        ):
            self.refresh()

    def _adopt(self, blueprint: Blueprint) -> None:
        """Lets programs go on as they are; what they trace from now on has the attributes as they are now."""
        if self.train_program is not None:
            self.train_program.graphdef = blueprint.graphdefs[True]
        for program in self._eval_programs.values():
            program.graphdef = blueprint.graphdefs[False]

    @property
    def _of_programs(self) -> Blueprint:
        assert self._blueprint is not None, "build was not called"
        return self._blueprint

    def build_train_program(self, optimizers: Sequence[BoundOptimizer]) -> TrainProgram:
        """Builds the train program; the optimizers' states are made here."""
        assert self.live is not None
        options = train_options(
            self.options,
            self.module,
            outputs=self.funnel.takes_outputs("on_train_batch_end"),
            reads=self._reads,
            monitors=tuple(each.step_metrics for each in self.callbacks if overrides(each, "step_metrics", Callback)),
        )
        report_uncovered(self.module, self.live.layout, optimizers)
        graphdef = self._of_programs.graphdefs[True]
        self.train_program = TrainProgram(self.module, graphdef, self.live, optimizers, options)
        return self.train_program

    def optimizers(self, name: str | int | None = None) -> LiveOptimizer | list[LiveOptimizer]:
        """One optimizer by name; without a name the only one, or all of them.

        Raises:
            ConfigurationError: There is none yet, or none of that name.
        """
        if self.train_program is None:
            raise ConfigurationError(
                "There are no optimizers yet: they are built after on_fit_start. Fix: ask in on_train_start or later."
            )
        found = self.train_program.optimizers
        if name is None:
            return found[0] if len(found) == 1 else found
        named, name = {each.name: each for each in found}, str(name)
        if name not in named:
            raise unknown_optimizer(name, named)
        return named[name]

    def show(self) -> None:
        """Brings the module's Variables up to date.

        Raises:
            StateError: A step failed on the device and took them with it. Said once, so that the last hooks still run.
        """
        try:
            if self.live is not None:
                self.live.show()
        except StateError:
            self.live = None
            raise

    def peek(self, selector: Any) -> dict[str, Any]:
        """The live arrays of the Variables that a filter matches, by path; the next step donates them."""
        if self.live is None:
            return {}
        return self._peek(self.live, selector)

    def eval_program(self, stage: str, index: int, keep: bool) -> EvalProgram:
        """The program of an eval stage for one of its loaders.

        Args:
            stage: `"validate"`, `"test"` or `"predict"`.
            index: Index of the loader.
            keep: Whether the outputs are asked for, whatever the hooks.
        """
        if (stage, index) not in self._eval_programs:
            assert self.live is not None
            self._eval_programs[stage, index] = EvalProgram(
                stage,
                self.module,
                self._of_programs.graphdefs[False],
                self.live,
                dataloader_idx=index,
                outputs=keep or self.funnel.overridden(f"on_{HOOK_STAGE[stage]}_batch_end"),
                compiled=self.options.jit,
                guard=self.options.state_guard,  # type: ignore[arg-type]
                reads=self._reads,
                precision=self.precision,
            )
        return self._eval_programs[stage, index]
