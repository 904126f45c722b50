"""The encoder families that TR-BERT supports. To add one, write a module like `roberta` and register it here."""

from .base import Backbone
from .bert import BertBackbone
from .modernbert import ModernBertBackbone
from .roberta import RobertaBackbone

BACKBONES: dict[str, Backbone] = {
    "bert": BertBackbone(),
    "roberta": RobertaBackbone(),
    "modernbert": ModernBertBackbone(),
}

__all__ = ["BACKBONES", "Backbone"]
