"""Several loggers at once."""

from nnx_fit.loggers.fan_out import FanOut
from nnx_fit.loggers.logger import Logger


class Notes(Logger):
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def continue_from(self, step):
        self.notes.append((self.name, "continue", step))

    def log_metrics(self, metrics, step):
        self.notes.append((self.name, metrics, step))

    def log_hyperparams(self, params):
        self.notes.append((self.name, params))

    def log_text(self, tag, text, step=0):
        self.notes.append((self.name, tag, text))

    def finalize(self, status):
        self.notes.append((self.name, status))


def test_every_record_reaches_every_logger_in_list_order():
    notes = []
    loggers = FanOut([Notes("a", notes), Notes("b", notes)])
    loggers.continue_from(3)
    loggers.log_hyperparams({"seed": 0})
    loggers.log_text("config", "x")
    loggers.log_metrics({"loss": 1.0}, 4)
    loggers.finalize("success")
    each = [("continue", 3), ({"seed": 0},), ("config", "x"), ({"loss": 1.0}, 4), ("success",)]
    assert notes == [(name, *note) for note in each for name in "ab"]


def test_ends_reach_every_logger_also_where_one_fails(caplog):
    class Ends(Logger):
        status = None

        def finalize(self, status):
            self.status = status
            raise ConnectionError("server gone")

    loggers = [Ends(), Ends()]
    FanOut(loggers).finalize("failed")
    assert [logger.status for logger in loggers] == ["failed", "failed"]
    assert caplog.text.count("server gone") == 2


def test_loggers_of_one_class_are_told_apart_and_one_alone_needs_no_number():
    def names(*loggers):
        return [logger.failures.name for logger in FanOut(loggers).loggers]

    assert names(Logger()) == ["Logger"]
    assert names(Logger(), Notes("a", []), Logger()) == [
        "Logger (number 1 of the loggers)",
        "Notes",
        "Logger (number 3 of the loggers)",
    ]
