"""Distributed scoring of Parquet corpora with TR-BERT on Ray Data.

The names below are imported when they are first used. Processes that only write results or run the ledger import this
package too; without torch and transformers they start faster and need less memory.
"""

from typing import TYPE_CHECKING

from trbert_model.lazy import lazy_names

if TYPE_CHECKING:
    from .commit import open_output
    from .config import ScoreConfig
    from .errors import OutputBusyError, PipelineError, ShardError, StorageError, UsageError
    from .predict import TRBertPredictor
    from .run import score

_MODULES = {
    "OutputBusyError": "errors",
    "PipelineError": "errors",
    "ScoreConfig": "config",
    "ShardError": "errors",
    "StorageError": "errors",
    "TRBertPredictor": "predict",
    "UsageError": "errors",
    "open_output": "commit",
    "score": "run",
}

__all__ = [
    "OutputBusyError",
    "PipelineError",
    "ScoreConfig",
    "ShardError",
    "StorageError",
    "TRBertPredictor",
    "UsageError",
    "open_output",
    "score",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
