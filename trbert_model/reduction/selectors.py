"""The paper's token selector, and the choice of a configuration's selector class."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .question import QuestionMatch, QuestionTokenSelector

if TYPE_CHECKING:
    from ..configuration import TRBertConfig


class TokenSelector(nn.Module):
    """The paper's policy network (section 3.2): (tokens, hidden) → keep logits (tokens,).

    It always computes in fp32, so that the selection of tokens is less sensitive to the precision of the layers.
    """

    def __init__(self, config: "TRBertConfig"):
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden_size, config.selector_size)
        self.linear_2 = nn.Linear(config.selector_size, 1)

    @staticmethod
    def flops(config: "TRBertConfig") -> int:
        """FLOPs per token."""
        return 2 * (config.hidden_size * config.selector_size + config.selector_size)

    def start_afresh(self) -> None:
        """Initialise the selector to keep every token."""
        nn.init.constant_(self.linear_2.bias, 1.0)

    def forward(self, hidden: Tensor, match: QuestionMatch | None = None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear_2(F.gelu(self.linear_1(hidden.float()))).squeeze(-1)


def selector_class(config: "TRBertConfig") -> type[TokenSelector] | type[QuestionTokenSelector]:
    return QuestionTokenSelector if config.question_aware else TokenSelector
