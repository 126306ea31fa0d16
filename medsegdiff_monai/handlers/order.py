"""The order in which the handlers of a training stand in its config, and why.

Ignite calls the handlers of an event in the order in which they were attached. What is not in ``ORDER`` may stand
anywhere. A training whose lists break it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["ORDER", "Rule", "out_of_order"]


class Rule(NamedTuple):
    """Two handlers, by the names of their classes, of which the first must stand before the second, and why."""

    first: str
    second: str
    why: str


ORDER = (
    # when a training starts
    Rule("WeightsLoader", "ModelEMA", "the average starts from the weights that are loaded"),
    Rule("ModelEMA", "TrainingCheckpoint", "a resumed training goes on with the average that it had"),
    Rule("GradientScaling", "TrainingCheckpoint", "a resumed training goes on with the scale that it had"),
    Rule("TrainingCheckpoint", "EarlyStopping", "a resumed training knows its best validation before it is judged"),
    # after each epoch
    Rule("LrScheduleHandler", "TrainingCheckpoint", "a checkpoint holds the learning rate of the next epoch"),
    Rule("ValidationHandler", "BestModelSaver", "it asks whether the validation of this epoch was the best"),
    Rule("ValidationHandler", "TrainingHistory", "it writes down the validation of this epoch"),
    Rule("BestModelSaver", "TrainingCheckpoint", "a training that is killed between both has lost no best weights"),
    Rule("TrainingHistory", "TrainingCheckpoint", "a training that is killed between both has lost no epoch"),
    Rule("TrainingHistory", "TrainingReport", "the report is made of the history"),
    # after each validation
    Rule("ClassMetrics", "StatsHandler", "the log shows the metrics of each class"),
    Rule("EnergyDistance", "StatsHandler", "the log shows this metric, too"),
    # after an error
    Rule("TrainingProgress", "StatsHandler", "the bar is closed, and errors are passed on without their frames"),
    Rule("PlainErrors", "StatsHandler", "errors are passed on without their frames"),
)


def out_of_order(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the order of the handlers of a training and its validation, in words.

    Args:
        config: content of ``train.json``; lists of handlers that are not written there are left alone.
    """
    for group in ("train", "validate"):
        part = config.get(group)
        handlers = part.get("handlers") if isinstance(part, Mapping) else None
        targets = [h.get("_target_") for h in handlers if isinstance(h, Mapping)] if isinstance(handlers, list) else []
        names = [str(target).rpartition(".")[2] for target in targets]
        for first, second, why in ORDER:
            if first in names and second in names and names.index(first) > names.index(second):
                yield f"{group}#handlers: {first} must stand before {second}: {why}."
