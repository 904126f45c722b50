"""Distributed scoring of Parquet corpora with TR-BERT on Ray Data."""

from .commit import open_output
from .config import ScoreConfig
from .errors import PipelineError, ShardError, StorageError, UsageError
from .predict import TRBertPredictor
from .score import score

__all__ = [
    "PipelineError",
    "ScoreConfig",
    "ShardError",
    "StorageError",
    "TRBertPredictor",
    "UsageError",
    "open_output",
    "score",
]
