"""Training a TR-BERT; start reading at `run.py`.

The names below are imported when they are first used, so that the options can be used without torch.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .run import evaluate, train

_MODULES = {"TrainingConfig": "config", "evaluate": "run", "train": "run"}

__all__ = ["TrainingConfig", "evaluate", "train"]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
