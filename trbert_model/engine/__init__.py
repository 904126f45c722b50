"""The engine: runs a model over documents and returns one result per document, in order.

The names below are imported when they are first used, so that the options can be used without torch.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .options import EngineOptions
    from .scoring import Engine, EngineStatistics, OutOfMemoryError

_MODULES = {
    "Engine": "scoring",
    "EngineOptions": "options",
    "EngineStatistics": "scoring",
    "OutOfMemoryError": "scoring",
}

__all__ = ["Engine", "EngineOptions", "EngineStatistics", "OutOfMemoryError"]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
