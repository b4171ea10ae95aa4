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
from nnx_fit.loops.evaluate import HOOK_STAGE, EvalLoop, renamer
from nnx_fit.loops.funnel import Funnel
from nnx_fit.loops.progress import Control, Progress
from nnx_fit.metrics.ledger import Ledger
from nnx_fit.options import Options
from nnx_fit.profiling import Profile
from nnx_fit.programs.evaluate import EvalProgram
from nnx_fit.run_programs import RunPrograms
from nnx_fit.state.modes import set_mode

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


class Run(RunPrograms):
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
        profile: Measures hooks, steps and loaders.

    Attributes:
        stage: What is going on: `"sanity"`, `"train"`, `"validate"`, `"test"`, `"predict"`, or `None`.
        funnel: Calls hooks.
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
        profile: Profile,
    ):
        super().__init__(module, options, callbacks)
        self.trainer = trainer
        self.verb = verb
        self.progress = progress
        self.control = control
        self.ledger = ledger
        self.stage: str | None = None
        self.profile = profile
        show = profile.timed("module brought up to date", self.show)
        self.funnel = Funnel(trainer, module, callbacks, show, profile.timed)
        self.batches: Any = None
        self._validated: list[tuple[Any, str]] = []
        self._aside: Mapping[str, list[Any]] = {}
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

    def log(self, name: str, value: Any, **options: Any) -> None:
        """`self.log` in a host hook."""
        defaults = self.funnel.log_defaults(name, options.get("on_step"))
        kind = "train" if self.stage == "train" else "eval"
        self.ledger.host[kind].log(name, value, defaults, **options)

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
        program, layout = self.train_program, None if self.live is None else self.live.layout
        # An epoch that is under way goes on with what its own metrics hold, and an evaluation that does not come to its
        # end, and begins again in the run that continues, leaves nothing at all.
        training = {} if program is None else program.metrics()
        self._aside = {} if program is None else program.statistics()

        def all_recorded() -> None:
            self._aside = training
            if recorded is not None:
                recorded()

        step = f"{HOOK_STAGE[stage]}_step"

        def programs() -> list[EvalProgram]:
            self.refresh()  # the hooks that begin the loop may have changed the module
            found = [self.eval_program(stage, index, keep is not None) for index in range(len(source.loaders))]
            return [self.profile.steps(step, program) for program in found]

        def open_batches(index: int) -> Any:
            return self.profile.batches(f"{source.kind}_dataloader", source.open(index, limit=sanity))

        loop = EvalLoop(
            stage,
            self.progress,
            self.control,
            self.funnel,
            self.ledger,
            programs,
            open_batches,
            source.names,
        )
        try:
            with self.staged("sanity" if sanity is not None else stage):
                logged = loop.run(record=sanity is None, keep=keep, recorded=all_recorded)
        finally:
            before, self._aside = self._aside, {}
            if self.live is not None and self.live.layout is not layout:
                before = training  # hooks have changed what there is
            if before and self.train_program is not None:
                self.train_program.set_metrics(before)
        if stage == "validate":
            self._validated = [(program.table, name) for program, name in zip(loop.programs, source.names, strict=True)]
        return Evaluation(loop.programs, source.names, logged)

    def arrays_to_save(self) -> list[Any]:
        """The module's arrays as a run that continues needs them.

        That run validates from the beginning what was not validated to the end, with the statistics of then; and its
        epoch goes on with the metrics that training had reached.
        """
        assert self.live is not None
        arrays = list(self.live.collect())
        for slot in self.live.layout.slots:
            aside = self._aside.get(slot.name, ())
            if len(aside) == slot.stop - slot.start:
                arrays[slot.start : slot.stop] = aside
        return arrays

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
        specs = [(spec, "") for spec in program.table.recorded]
        specs += [(spec, name) for table, name in self._validated for spec in table.recorded]
        found = {spec.name for spec, _ in specs}
        return found | {
            renamer(suffix)(name) for spec, suffix in specs for name in (spec.name, spec.step_name, spec.epoch_name)
        }
