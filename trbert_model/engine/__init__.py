"""The engine: runs a model over documents and returns one result per document, in order."""

from .options import EngineOptions
from .scoring import Engine, EngineStatistics, OutOfMemoryError

__all__ = ["Engine", "EngineOptions", "EngineStatistics", "OutOfMemoryError"]
