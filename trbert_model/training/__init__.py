"""Training a TR-BERT: `run.py` first."""

from .config import TrainingConfig
from .run import evaluate, train

__all__ = ["TrainingConfig", "evaluate", "train"]
