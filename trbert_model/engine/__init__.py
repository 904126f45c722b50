"""Documents in, one result a document out, in order: the one way to run a TR-BERT."""

from .options import EngineOptions
from .scoring import Engine, EngineStatistics, OutOfMemoryError

__all__ = ["Engine", "EngineOptions", "EngineStatistics", "OutOfMemoryError"]
