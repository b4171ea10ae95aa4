"""The funnel: who is called, in which order, and what is brought up to date before."""

import pytest

from nnx_fit.callbacks.callback import Callback, pausing
from nnx_fit.errors import ConfigurationError
from nnx_fit.hooks import ModuleHooks
from nnx_fit.loops.funnel import LOGGING_HOOKS, Funnel


def funnel_of(callbacks, module=None, show=lambda: None):
    return Funnel("trainer", ModuleHooks() if module is None else module, callbacks, show)


def named(log, name, hook="on_train_start", **attributes):
    """A callback that notes its name in one hook."""

    def note(self, *args):
        log.append((name, *args))
        return name

    return type("Named", (Callback,), {hook: note, **attributes})()


def noting_module(log, hook="on_train_start"):
    return type("Noting", (ModuleHooks,), {hook: lambda self, *args: log.append(("module", *args))})()


def test_callbacks_come_in_list_order_then_the_module_then_who_decides_then_who_saves():
    log = []
    callbacks = [
        named(log, "save", phase="save"),
        named(log, "first"),
        named(log, "decide 1", phase="decide"),
        named(log, "second"),
        named(log, "decide 2", phase="decide"),
    ]
    module = noting_module(log)
    results = funnel_of(callbacks, module).call("on_train_start")
    assert [entry[0] for entry in log] == ["first", "second", "module", "decide 1", "decide 2", "save"]
    assert results == ["first", "second", None, "decide 1", "decide 2", "save"]
    assert log[0] == ("first", "trainer", module) and log[2] == ("module",)


def test_phases_may_be_called_apart():
    log = []
    callbacks = [named(log, "save", phase="save"), named(log, "before"), named(log, "decide", phase="decide")]
    funnel = funnel_of(callbacks, noting_module(log))
    funnel.call("on_train_start", phases=("before",))
    assert [entry[0] for entry in log] == ["before", "module"]
    funnel.call("on_train_start", phases=("decide", "save"))
    assert [entry[0] for entry in log[2:]] == ["decide", "save"]


def test_arguments_follow_the_trainer_and_the_module():
    log = []
    module = noting_module(log, "on_train_batch_end")
    funnel_of([named(log, "callback", "on_train_batch_end")], module).call("on_train_batch_end", "out", "batch", 3)
    assert log == [("callback", "trainer", module, "out", "batch", 3), ("module", "out", "batch", 3)]


def test_only_hooks_with_a_listener_count_as_overridden():
    log = []
    funnel = funnel_of([named(log, "a")], noting_module(log, "on_train_end"))
    assert funnel.overridden("on_train_start") and funnel.overridden("on_train_end")
    assert not funnel.overridden("on_train_batch_end")
    assert funnel.call("on_train_batch_end", None, None, 0) == []
    assert not funnel_of([Callback()]).overridden("on_train_start")


def test_a_hook_set_on_the_instance_is_a_listener():
    log = []
    callback = Callback()
    callback.on_train_start = lambda trainer, module: log.append(trainer)
    module = ModuleHooks()
    module.on_train_start = lambda: log.append("module")
    funnel_of([callback], module).call("on_train_start")
    assert log == ["trainer", "module"]


def test_the_module_is_brought_up_to_date_for_those_alone_who_look_at_it():
    log = []
    blind = named(log, "blind", reads_module=False)
    funnel = funnel_of([blind], show=lambda: log.append("show"))
    funnel.call("on_train_start")
    assert [entry if entry == "show" else entry[0] for entry in log] == ["blind"]
    log.clear()
    funnel_of([named(log, "sees"), blind], noting_module(log), lambda: log.append("show")).call("on_train_start")
    order = [entry if entry == "show" else entry[0] for entry in log]
    assert order.index("show") < order.index("sees") and order[order.index("module") - 1] == "show"


def test_the_hook_under_way_is_known_also_around_a_nested_one_and_after_an_error():
    seen = []

    class Nested(Callback):
        def on_train_start(self, trainer, module):
            seen.append(funnel.hook)
            funnel.call("on_save_checkpoint", {})
            seen.append(funnel.hook)
            raise RuntimeError

        def on_save_checkpoint(self, trainer, module, checkpoint):
            seen.append(funnel.hook)

    funnel = funnel_of([Nested()])
    with pytest.raises(RuntimeError):
        funnel.call("on_train_start")
    assert seen == ["on_train_start", "on_save_checkpoint", "on_train_start"] and funnel.hook is None


def test_defaults_are_those_of_lightning():
    """`_LogFx` of Lightning's `_FxValidator`: (default on_step, default on_epoch) of each hook."""
    lightning = {
        "on_train_start": (False, True),
        "on_train_epoch_start": (False, True),
        "on_train_epoch_end": (False, True),
        "on_train_batch_start": (True, False),
        "on_train_batch_end": (True, False),
        "on_validation_start": (False, True),
        "on_validation_epoch_start": (False, True),
        "on_validation_epoch_end": (False, True),
        "on_validation_batch_start": (False, True),
        "on_validation_batch_end": (False, True),
    }
    ours = {hook: defaults for hook, defaults in LOGGING_HOOKS.items() if "test" not in hook}
    assert ours == lightning


def test_nothing_can_be_logged_outside_of_the_hooks_that_may():
    logged = []

    class Logs(Callback):
        def on_train_epoch_end(self, trainer, module):
            logged.append(funnel.log_defaults("x"))
            with pytest.raises(ConfigurationError, match=r"'x'.*on_step=True.*on_train_epoch_end"):
                funnel.log_defaults("x", on_step=True)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            logged.append(funnel.log_defaults("x", on_step=True))

        def on_train_end(self, trainer, module):
            funnel.log_defaults("x")

    funnel = funnel_of([Logs()])
    funnel.call("on_train_epoch_end")
    funnel.call("on_train_batch_end", None, None, 0)
    assert logged == [(False, True), (True, False)]
    with pytest.raises(ConfigurationError, match=r"'x'.*in on_train_end"):
        funnel.call("on_train_end")
    with pytest.raises(ConfigurationError, match=r"'x'.*outside of a hook"):
        funnel.log_defaults("x")


def test_a_hook_that_pauses_is_asked_for_again_where_it_wants_to_be_and_needs_no_outputs():
    class Pauses(Callback):
        @pausing
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            del self

    class Overrides(Pauses):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            del self

    early, late, overrides = Pauses(), Pauses(), Overrides()
    early.paused_until, late.paused_until, overrides.paused_until = 5, 9, 9
    hook = "on_train_batch_end"
    funnel = funnel_of([early, late])
    assert funnel.paused_until(hook) == 5 and not funnel.takes_outputs(hook)
    early.paused_until = 20
    assert funnel.paused_until(hook) == 9
    assert funnel_of([early, overrides]).paused_until(hook) == 0 and funnel_of([overrides]).takes_outputs(hook)
    module = noting_module([], hook)
    assert funnel_of([early], module).paused_until(hook) == 0 and funnel_of([early], module).takes_outputs(hook)
    assert funnel_of([]).paused_until(hook) > 10**12 and not funnel_of([]).takes_outputs(hook)
