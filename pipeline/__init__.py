"""Distributed scoring of Parquet corpora with TR-BERT on Ray Data.

The names below are imported when they are first used: a process that only writes results or keeps the ledger imports
this package too, and starts in a fraction of the time and memory without torch and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
