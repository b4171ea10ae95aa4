"""`BackboneFinetuning`: trains the rest of a model first, and its backbone from an epoch on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flax import nnx

from nnx_fit.callbacks.arguments import whole_number
from nnx_fit.callbacks.callback import Callback
from nnx_fit.callbacks.terminal import say
from nnx_fit.errors import ConfigurationError
from nnx_fit.state import graph
from nnx_fit.state.filters import Edited, PathPrefix, hashable, matches
from nnx_fit.state.layout import Layout

if TYPE_CHECKING:
    from nnx_fit.module import FitModule
    from nnx_fit.trainer import Trainer


class BackboneFinetuning(Callback):
    """Freezes a backbone for the first epochs of a fit, then trains it with the rest.

    The step is compiled once more when the backbone is unfrozen. What the optimizer knows of the parameters that were
    trained before stays; for those that join it begins anew. The count of updates of a single optimizer goes on, so
    that Adam no longer corrects the bias of averages that begin at zero, and the first updates of the backbone are
    several times as long as usual: one more reason for an optimizer of its own (below). A run that continues is in the
    phase in which it was saved.

    The callback edits `module.trainable` as `module.freeze` does, and takes its edits back when it unfreezes and when
    the fit ends: what was frozen before stays frozen.

    Differences to Lightning: the learning rate of the backbone belongs to the optimizer, whose schedule is part of the
    compiled step, and is no argument here (`initial_denom_lr`, `lambda_func`, `backbone_initial_lr` there). Give the
    backbone an optimizer of its own, which rests while all that it trains is frozen; its schedule and Adam's count then
    begin with its first update:

        def configure_optimizers(self):
            return {
                "backbone": nf.OptimizerSpec(
                    optax.adam, schedule=optax.linear_schedule(1e-5, 1e-3, 1000), trainable="backbone"
                ),
                "head": nf.OptimizerSpec(optax.adam(1e-3), trainable="head"),
            }

    Args:
        unfreeze_backbone_at_epoch: Index of the epoch from whose beginning the backbone trains; epochs count from 0.
        backbone: What the backbone is: a dotted path prefix, or an NNX filter of its Variables.
        train_bn: Train the backbone's norm layers (those with running statistics, such as `nnx.BatchNorm`) from the
            first epoch on. `False`: their scale and bias stay frozen to the end, and they run in eval mode, with the
            running statistics that they came with.
        verbose: Say when the backbone is unfrozen.

    Raises:
        ConfigurationError: An argument is invalid, or there is nothing to freeze and unfreeze.

    Example:
        >>> import nnx_fit as nf
        >>> from nnx_fit.callbacks.backbone_finetuning import BackboneFinetuning
        >>> finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone="net.encoder", train_bn=False)
        >>> trainer = nf.Trainer(max_epochs=5, callbacks=finetuning, logger=False)
    """

    logs = False

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        backbone: Any = "backbone",
        *,
        train_bn: bool = True,
        verbose: bool = False,
    ):
        self.unfreeze_backbone_at_epoch = whole_number(
            "BackboneFinetuning", "unfreeze_backbone_at_epoch", unfreeze_backbone_at_epoch, least=1
        )
        if backbone is None or backbone == "":
            raise ConfigurationError(
                f"BackboneFinetuning(backbone={backbone!r}): expected a path or a filter. Fix: pass the name of the "
                'sub-module to freeze, such as "backbone".'
            )
        self.backbone = backbone
        self.train_bn = train_bn
        self.verbose = verbose
        self.unfrozen = False
        self._edit: tuple[bool, Any] | None = None
        self._norms: list[str] = []
        self._eval_modules: Any = _UNCHANGED
        self._rebuilding: tuple[Trainer, Any] | None = None

    def setup(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Freezes the backbone before a fit."""
        if stage != "fit":
            return
        self.unfrozen, self._rebuilding, self._edit = False, None, None
        selector = PathPrefix(self.backbone) if isinstance(self.backbone, str) else hashable(self.backbone)
        self._check(module, selector)
        self._norms = [graph.path_name(path) for path, node in graph.modules(module) if _is_norm(path, node, selector)]
        if not self.train_bn and self._norms:
            self._eval_modules = vars(module).get("eval_modules", _UNSET)
            module.eval_modules = (*module.eval_modules, *self._norms)
        self._freeze(module, selector)

    def on_load_checkpoint(self, trainer: Trainer, module: FitModule, checkpoint: Mapping[str, Any]) -> None:
        """Unfreezes the backbone if it was when the run was saved."""
        if self.unfrozen:
            self._unfreeze(module)

    def on_train_epoch_start(self, trainer: Trainer, module: FitModule) -> None:
        """Unfreezes the backbone when its epoch has come."""
        if self.unfrozen or trainer.current_epoch < self.unfreeze_backbone_at_epoch:
            return
        self._rebuilding = (trainer, trainer.layout)
        self._unfreeze(module)
        self.unfrozen = True
        if self.verbose:
            say(f"BackboneFinetuning: {_shown(self.backbone)} trains from epoch {trainer.current_epoch} on.")

    def teardown(self, trainer: Trainer, module: FitModule, stage: str) -> None:
        """Leaves `trainable` and `eval_modules` as they were."""
        if stage != "fit":
            return
        self._take_back(module)
        if self._eval_modules is _UNSET:
            graph.forget_attribute(module, "eval_modules")
        elif self._eval_modules is not _UNCHANGED:
            module.eval_modules = self._eval_modules
        self._eval_modules = _UNCHANGED

    def state_dict(self) -> dict[str, Any]:
        """Whether the backbone trains."""
        # In the hooks of the epoch's start the optimizer's state is still that of the frozen phase.
        still = self._rebuilding is not None and self._rebuilding[0].layout is self._rebuilding[1]
        return {"unfrozen": self.unfrozen and not still}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.unfrozen = bool(state["unfrozen"])

    def _check(self, module: FitModule, selector: Any) -> None:
        chosen = [slot for slot in Layout.of(module, selector).slots if slot.role == "params"]
        trained = {slot.path for slot in Layout.of(module, module.trainable).slots if slot.role == "params"}
        if not chosen:
            raise ConfigurationError(
                f"BackboneFinetuning(backbone={self.backbone!r}): {type(module).__name__} has no parameters there, so "
                "that nothing would be frozen.\nFix: pass one of its paths; "
                "`nnx_fit.partition(module).table()` shows them."
            )
        if not any(slot.path in trained for slot in chosen):
            raise ConfigurationError(
                f"BackboneFinetuning(backbone={self.backbone!r}): nothing there is trained even without it, so that "
                f"nothing would be unfrozen.\n`{type(module).__name__}.trainable` is {module.trainable!r}. "
                "Fix: leave the freezing to the callback."
            )

    def _freeze(self, module: FitModule, selector: Any) -> None:
        norms = nnx.Any(*map(PathPrefix, self._norms))
        if self.train_bn and self._norms:
            selector = nnx.All(selector, nnx.Not(norms))
        self._edit = (False, selector)
        module.freeze(selector)

    def _unfreeze(self, module: FitModule) -> None:
        self._take_back(module)
        if not self.train_bn and self._norms:
            norms = nnx.Any(*map(PathPrefix, self._norms))
            self._edit = (False, norms)
            module.freeze(norms)

    def _take_back(self, module: FitModule) -> None:
        """Removes the callback's own edit, and no other, from what trains."""
        edit, self._edit = self._edit, None
        if edit is None or not isinstance(module.trainable, Edited):
            return
        edits = list(module.trainable.edits)
        last = max((place for place, other in enumerate(edits) if other == edit), default=None)
        if last is not None:
            del edits[last]
            base = module.trainable.base
            module.trainable = Edited(base, tuple(edits)) if edits else base


_UNCHANGED, _UNSET = object(), object()


def _is_norm(path: graph.Path, node: Any, selector: Any) -> bool:
    """Whether a layer has running statistics of its own, and belongs to what a filter matches."""
    own = [(name, child) for name, child in graph.children(node) if isinstance(child, nnx.Variable)]
    if not any(isinstance(child, nnx.BatchStat) for _, child in own):
        return False
    return any(matches(selector, [(*path, name)], child) for name, child in own)


def _shown(backbone: Any) -> str:
    return backbone if isinstance(backbone, str) else repr(backbone)
