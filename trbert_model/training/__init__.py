"""Training a TR-BERT; start reading at `run.py`."""

from .config import TrainingConfig
from .run import evaluate, train

__all__ = ["TrainingConfig", "evaluate", "train"]
