"""The encoders whose layers a TR-BERT can have. A new one is a file like `roberta` and a line here."""

from .base import Backbone
from .bert import BertBackbone
from .roberta import RobertaBackbone

BACKBONES: dict[str, Backbone] = {"bert": BertBackbone(), "roberta": RobertaBackbone()}

__all__ = ["BACKBONES", "Backbone"]
