"""The encoder families that TR-BERT supports. To add one, write a module like `roberta` and register it here."""

from .base import Backbone
from .bert import BertBackbone
from .roberta import RobertaBackbone

BACKBONES: dict[str, Backbone] = {"bert": BertBackbone(), "roberta": RobertaBackbone()}

__all__ = ["BACKBONES", "Backbone"]
