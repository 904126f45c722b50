"""The available tasks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .base import Task
from .classification.task import ClassificationTask
from .question_answering.task import QuestionAnsweringTask
from .token_classification.task import TokenClassificationTask

if TYPE_CHECKING:
    from ..configuration import TRBertConfig
    from ..modeling import TRBertPreTrainedModel

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (ClassificationTask, QuestionAnsweringTask, TokenClassificationTask)
}

# What a checkpoint can be converted to: also models that only the library runs, with this head or without one.
MULTIPLE_CHOICE, NO_TASK = "multiple-choice", "none"
KINDS = (*TASKS, MULTIPLE_CHOICE, NO_TASK)


def task_named(name: str) -> type[Task]:
    """The task with this name.

    Raises:
        ConfigurationError: no task has this name.
    """
    if name not in TASKS:
        raise ConfigurationError(f"task {name!r} is none of {', '.join(TASKS)}")
    return TASKS[name]


def task_of(config: "TRBertConfig") -> type[Task]:
    """The task of a saved model, from the architecture in its configuration.

    Raises:
        ConfigurationError: no task has this architecture.
    """
    return _task_among(config.architectures or [])


def task_of_model(model: "TRBertPreTrainedModel") -> type[Task]:
    """The task of a model with a head.

    Raises:
        ConfigurationError: no task has this architecture.
    """
    return _task_among([type(model).__name__])


def _task_among(architectures: Sequence[str]) -> type[Task]:
    for task in TASKS.values():
        if task.architecture in architectures:
            return task
    known = ", ".join(task.architecture for task in TASKS.values())
    raise ConfigurationError(
        f"its architecture is {architectures or None}, none of {known}; "
        "convert it with jobs/convert.py or train it with jobs/train.py"
    )
