"""`Run`: everything one verb of the Trainer works with, built once, and what its module may ask about it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nnx_fit import scope
from nnx_fit.callbacks.callback import Callback
from nnx_fit.data.sources import Source
from nnx_fit.errors import StateError
from nnx_fit.loops.evaluate import HOOK_STAGE, EvalLoop, renamer
from nnx_fit.loops.funnel import Funnel
from nnx_fit.loops.progress import Control, Progress
from nnx_fit.metrics.ledger import Ledger
from nnx_fit.optimizers import BoundOptimizer
from nnx_fit.options import Options
from nnx_fit.programs.evaluate import EvalProgram
from nnx_fit.programs.precision import PRECISIONS
from nnx_fit.programs.train import TrainProgram
from nnx_fit.programs.train_options import TrainOptions
from nnx_fit.state import graph
from nnx_fit.state.blueprint import Blueprint
from nnx_fit.state.filters import with_edits_of
from nnx_fit.state.live import Live
from nnx_fit.state.modes import set_mode
from nnx_fit.state.peek import Peek
from nnx_fit.state.reads import matters
from nnx_fit.state.side_effects import warn_of_untoggled_modes

logger = logging.getLogger("nnx_fit")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an eval loop leaves.

    Attributes:
        programs: The program of each loader, with its metrics on the device.
        names: Suffix of each loader's metric names.
        logged: What host hooks logged.
    """

    programs: Sequence[Any]
    names: Sequence[str]
    logged: Mapping[str, float]


class Run:
    """The working set of one verb.

    Args:
        trainer: The Trainer, for callbacks.
        module: The user's module.
        verb: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        options: What was asked for.
        callbacks: Callbacks in list order.
        progress: Where the run is.
        control: Requests to stop.
        ledger: Takes metrics.

    Attributes:
        stage: What is going on: `"sanity"`, `"train"`, `"validate"`, `"test"`, `"predict"`, or `None`.
        funnel: Calls hooks.
        live: The module's values, once `build` was called.
        train_program: The train program of a fit.
        trainable: NNX filter of what trains, `freeze` and `unfreeze` aside; `None` for the module's own.
        batches: The pass over the training data that is under way.
        open: Whether the verb is under way.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        verb: str,
        options: Options,
        callbacks: Sequence[Callback],
        progress: Progress,
        control: Control,
        ledger: Ledger,
    ):
        self.trainer = trainer
        self.module = module
        self.verb = verb
        self.options = options
        self.precision = PRECISIONS[options.precision]
        self.callbacks = list(callbacks)
        self.progress = progress
        self.control = control
        self.ledger = ledger
        self.stage: str | None = None
        self.funnel = Funnel(trainer, module, callbacks, self.show)
        self.live: Live | None = None
        self.train_program: TrainProgram | None = None
        self.trainable: Any = None
        self.batches: Any = None
        self._blueprint: Blueprint | None = None
        self._eval_programs: dict[tuple[str, int], EvalProgram] = {}
        self._rebuilds = 0
        self._peek = Peek()
        self._reads: set[str] = set()
        self._validated: list[tuple[Any, str]] = []
        self.open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Ties the module to this run while the block runs and after it.

        A run that is under way, in whose hook this one was started, has its module back afterwards.
        """
        outer = scope.attach(self.module, self)
        if not isinstance(outer, Run) or not outer.open:
            outer = None  # and not kept alive, with all its arrays
        self.open = True
        try:
            yield
        finally:
            self.open = False
            if outer is not None:
                scope.attach(self.module, outer)

    @property
    def training(self) -> bool:
        """Whether the stage is the one that trains."""
        return self.stage == "train"

    @property
    def global_step(self) -> int:
        """Completed updates."""
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        """Completed epochs; inside an epoch, its index."""
        return self.progress.epoch

    @property
    def trains(self) -> Any:
        """NNX filter of what trains in the end."""
        own = self.module.trainable
        return own if self.trainable is None else with_edits_of(self.trainable, own)

    def log(self, name: str, value: Any, **options: Any) -> None:
        """`self.log` in a host hook."""
        defaults = self.funnel.log_defaults(name, options.get("on_step"))
        kind = "train" if self.stage == "train" else "eval"
        self.ledger.host[kind].log(name, value, defaults, **options)

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

    def build_train_program(self, optimizer: BoundOptimizer) -> TrainProgram:
        """Builds the train program; the optimizer's state is made here."""
        assert self.live is not None
        options = TrainOptions(
            compiled=self.options.jit,
            outputs=self.funnel.takes_outputs("on_train_batch_end"),
            detect_nonfinite=self.options.detect_nonfinite,
            guard=self.options.state_guard,  # type: ignore[arg-type]
            reads=self._reads,
            precision=self.precision,
            clip=self.options.gradient_clip_val,
            clip_algorithm=self.options.gradient_clip_algorithm,
            monitors=tuple(
                callback.step_metrics
                for callback in self.callbacks
                if type(callback).step_metrics is not Callback.step_metrics
            ),
        )
        self.train_program = TrainProgram(self.module, self._of_programs.graphdefs[True], self.live, optimizer, options)
        return self.train_program

    @contextmanager
    def staged(self, stage: str) -> Iterator[None]:
        """Makes a stage the current one and puts the live module into its mode while the block runs."""
        outer, self.stage = self.stage, stage
        saved = set_mode(self.module, stage == "train", self.module.eval_modules)
        try:
            yield
        finally:
            saved.restore()
            self.stage = outer

    def evaluate(
        self,
        stage: str,
        source: Source,
        *,
        sanity: int | None = None,
        keep: Callable[[int, Any], None] | None = None,
        recorded: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Runs one eval loop.

        Args:
            stage: `"validate"`, `"test"` or `"predict"`.
            source: The loaders.
            sanity: Number of batches of a sanity check, which records nothing.
            keep: Takes each batch's outputs, with the index of its loader.
            recorded: Called once everything is recorded, before the last hook.
        """

        def programs() -> list[EvalProgram]:
            self.refresh()  # the hooks that begin the loop may have changed the module
            return [self._eval_program(stage, index, keep is not None) for index in range(len(source.loaders))]

        loop = EvalLoop(
            stage,
            self.progress,
            self.control,
            self.funnel,
            self.ledger,
            programs,
            lambda index: source.open(index, limit=sanity),
            source.names,
        )
        with self.staged("sanity" if sanity is not None else stage):
            logged = loop.run(record=sanity is None, keep=keep, recorded=recorded)
        if stage == "validate":
            self._validated = [(program.table, name) for program, name in zip(loop.programs, source.names, strict=True)]
        return Evaluation(loop.programs, source.names, logged)

    @property
    def has_validated(self) -> bool:
        """Whether a validation, such as the sanity check, was traced."""
        return bool(self._validated)

    def all_metric_names(self) -> set[str] | None:
        """Every name under which a fit's metrics are recorded, once a step and a validation were traced.

        Returns:
            `None` where that cannot be known: host hooks of the user's may log whatever they like, at any time.
        """
        program = self.train_program
        if program is None or not program.traced or self.funnel.may_log():
            return None
        specs = [(spec, "") for spec in program.table.specs]
        specs += [(spec, name) for table, name in self._validated for spec in table.specs]
        found = {spec.name for spec, _ in specs}
        return found | {
            renamer(suffix)(name) for spec, suffix in specs for name in (spec.name, spec.step_name, spec.epoch_name)
        }

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

    def _eval_program(self, stage: str, index: int, keep: bool) -> EvalProgram:
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
