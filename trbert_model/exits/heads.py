"""The heads of exits and gates. They compute in fp32, like the selectors, so that precision decides less."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..reduction.state import TokenState
from ..varlen import first_tokens, sequence_attention

if TYPE_CHECKING:
    from ..configuration import TRBertConfig


class FirstTokenExit(nn.Module):
    """DeeBERT's exit: a pooler and a classifier on the first token's state."""

    def __init__(self, config: "TRBertConfig"):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, state: TokenState) -> Tensor:
        """The logits of each sequence, fp32 (sequences, labels)."""
        first = state.first_states()
        with torch.autocast(first.device.type, enabled=False):
            return self.classifier(self.dropout(torch.tanh(self.dense(first.float()))))

    @staticmethod
    def flops(config: "TRBertConfig", rows: np.ndarray) -> np.ndarray:
        """FLOPs of each sequence; rows: 1 for those that are asked."""
        return rows * 2.0 * (config.hidden_size**2 + config.hidden_size * config.num_labels)


class FirstTokenAttention(nn.Module):
    """Attention of a sequence's first token over all of its tokens, in a narrower space.

    Only the first token's row of SmartBERT's self-attention is used, so no other is computed.
    """

    def __init__(self, hidden: int, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.narrow = nn.Linear(hidden, size)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))

    def forward(self, state: TokenState) -> Tensor:
        """(sequences, size)."""
        narrow = torch.tanh(self.narrow(state.states.float()))
        cu_seqlens, heads, scaling = state.cu_seqlens, self.heads, (self.query.out_features / self.heads) ** -0.5
        query = self.query(narrow[first_tokens(cu_seqlens)]).unflatten(1, (heads, -1))
        # With one query a sequence, it and the result are projected instead of every token: q · W x = Wᵀq · x.
        # The key's bias adds the same to all of a sequence's scores, which changes no weight. It is read at the end
        # since data-parallel training expects a gradient of every parameter.
        query = torch.einsum("shd,hdx->hsx", query, self.key.weight.unflatten(0, (heads, -1)))
        tokens = narrow.expand(1, heads, -1, -1)
        one_each = torch.arange(len(cu_seqlens), dtype=torch.int32, device=cu_seqlens.device)
        seen = sequence_attention(query.unsqueeze(0), tokens, tokens, one_each, cu_seqlens, scaling)
        context = torch.einsum("shx,hdx->shd", seen.squeeze(0), self.value.weight.unflatten(0, (heads, -1)))
        return context.flatten(1) + self.value.bias + 0.0 * self.key.bias

    @staticmethod
    def flops(hidden: int, size: int, heads: int, tokens: np.ndarray, after: int) -> np.ndarray:
        """FLOPs of sequences with these numbers of tokens; after: multiply-adds after the attention."""
        own = 2.0 * tokens * (hidden * size + 2 * heads * size)
        return own + (tokens > 0) * 2.0 * (3 * size**2 + after)


class AttentionExit(nn.Module):
    """SmartBERT's exit."""

    def __init__(self, config: "TRBertConfig"):
        super().__init__()
        options = config.exit_options
        assert options is not None
        self.attention = FirstTokenAttention(config.hidden_size, options.size, options.heads)
        self.dense = nn.Linear(options.size, options.size)
        self.classifier = nn.Linear(options.size, config.num_labels)

    def forward(self, state: TokenState) -> Tensor:
        """The logits of each sequence, fp32 (sequences, labels)."""
        with torch.autocast(state.hidden.device.type, enabled=False):
            return self.classifier(torch.tanh(self.dense(self.attention(state))))

    @staticmethod
    def flops(config: "TRBertConfig", rows: np.ndarray) -> np.ndarray:
        """FLOPs of each sequence; rows: its tokens, 0 for those that are not asked."""
        options = config.exit_options
        assert options is not None
        after = options.size**2 + options.size * config.num_labels
        return FirstTokenAttention.flops(config.hidden_size, options.size, options.heads, rows, after)


class WordExit(nn.Module):
    """SENTEE's and TOKEE's exit: a linear classifier on the state of each word's first token."""

    def __init__(self, config: "TRBertConfig"):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, states: Tensor) -> Tensor:
        """(words, hidden) → fp32 (words, labels)."""
        with torch.autocast(states.device.type, enabled=False):
            return self.classifier(self.dropout(states.float()))

    @staticmethod
    def flops(config: "TRBertConfig", rows: np.ndarray) -> np.ndarray:
        """FLOPs of each sequence; rows: its words."""
        return 2.0 * rows * config.hidden_size * config.num_labels


class Gate(nn.Module):
    """SmartBERT's gate: the probability that a sequence can do without the layer."""

    def __init__(self, config: "TRBertConfig"):
        super().__init__()
        options = config.gate_options
        assert options is not None
        self.attention = FirstTokenAttention(config.hidden_size, options.size, options.heads)
        self.linear = nn.Linear(options.size, 1)

    def forward(self, state: TokenState) -> Tensor:
        """fp32 (sequences,)."""
        with torch.autocast(state.hidden.device.type, enabled=False):
            return torch.sigmoid(self.linear(self.attention(state))).squeeze(-1)

    @staticmethod
    def flops(config: "TRBertConfig", tokens: np.ndarray) -> np.ndarray:
        """FLOPs of sequences with these numbers of tokens."""
        options = config.gate_options
        assert options is not None
        return FirstTokenAttention.flops(config.hidden_size, options.size, options.heads, tokens, options.size)


ExitHead = type[FirstTokenExit] | type[AttentionExit] | type[WordExit]
EXIT_HEADS: dict[str, ExitHead] = {"first": FirstTokenExit, "attention": AttentionExit, "words": WordExit}
