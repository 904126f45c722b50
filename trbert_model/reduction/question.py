"""Question-aware selectors, which use how much of the question occurs near each token of the passage.

Before the upper layers, a token's state hardly shows whether the question is about it, but the words around it do
(docs/experiments.md, "Where answers stand").
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..varlen import positions_in, sequence_of

if TYPE_CHECKING:
    from ..configuration import TRBertConfig

# Distances, in tokens, at which the weight of a question's word is 1/e: a phrase, a sentence or two, a paragraph.
SCALES = (6.0, 24.0, 96.0)
# Distances at which the weight of a neighbouring token is 1/e (a name, a phrase), and the largest distance considered.
NEIGHBOUR_SCALES = (1.0, 4.0)
REACH = 12
# The cosine of two tokens' embeddings at which their likeness is 0; it rises linearly to 1 at a cosine of 1
# (docs/experiments.md, "Where answers stand").
LEAST_COSINE = 0.4


@dataclass
class QuestionMatch:
    """How near each token is to each word of its window's question. A question's words are its tokens.

    Attributes:
        near: fp32 (tokens, words, scales), the highest likeness · e^(−distance/scale) over the passage's positions.
            The likeness is 1 where the word itself occurs, less for similar words, and 0 for others.
        asked: bool (tokens,), whether the token is part of the question.
        sequence: int64 (tokens,), the index of the token's window.
        positions: int64 (tokens,), the token's position in its window.
        words: (sequences, words, hidden), the embeddings of the question's words.
        valid: bool (sequences, words), False for padding.
        longest: tokens of the longest window.
    """

    near: Tensor
    asked: Tensor
    sequence: Tensor
    positions: Tensor
    words: Tensor
    valid: Tensor
    longest: int

    def at(self, tokens: Tensor) -> "QuestionMatch":
        """The match of some tokens only; tokens: int64 indices (tokens,)."""
        return dataclasses.replace(
            self,
            near=self.near[tokens],
            asked=self.asked[tokens],
            sequence=self.sequence[tokens],
            positions=self.positions[tokens],
        )

    def repeated(self, times: int) -> "QuestionMatch":
        """The match of a batch repeated as by `TokenState.repeated`."""
        shifts = torch.arange(times, device=self.sequence.device) * len(self.valid)
        return QuestionMatch(
            near=self.near.repeat(times, 1, 1),
            asked=self.asked.repeat(times),
            sequence=(self.sequence + shifts[:, None]).flatten(),
            positions=self.positions.repeat(times),
            words=self.words.repeat(times, 1, 1),
            valid=self.valid.repeat(times, 1),
            longest=self.longest,
        )

    def coverage(self, weights: Tensor) -> Tensor:
        """The share of the question's words that occurs near each token, from 0 to 1, fp32 (tokens, scales).

        Args:
            weights: (sequences, words), the weight of each word.
        """
        weights = torch.where(self.valid, weights, 0.0).double()  # fp64, so that padding does not change the result
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
        return (weights[self.sequence].unsqueeze(-1) * self.near).sum(1).float()

    def asked_mean(self, values: Tensor) -> Tensor:
        """Mean over the question's tokens, dropped ones counted as 0: (tokens, size) → fp32 (sequences, size)."""
        sums = torch.zeros(len(self.valid), values.shape[1], dtype=torch.float64, device=values.device)
        sums = sums.index_add(0, self.sequence, values.double() * self.asked[:, None])
        return (sums / self.valid.sum(1, keepdim=True).clamp(min=1)).float()

    def around(self, values: Tensor) -> Tensor:
        """Sum the passage's values around each token, (tokens,) → fp32 (tokens, neighbour scales).

        Values are weighted by e^(−distance/scale) / (2 · scale). Dropped tokens count as 0.
        """
        padded = torch.zeros(len(self.valid), self.longest + 2 * REACH, dtype=torch.float64, device=values.device)
        values = values.masked_fill(self.asked, 0.0).double()
        padded = padded.index_put((self.sequence, self.positions + REACH), values)
        distance = torch.arange(-REACH, REACH + 1, device=values.device, dtype=torch.float64).abs()
        kernels = torch.stack([(-distance / scale).exp() / (2 * scale) for scale in NEIGHBOUR_SCALES], dim=1)
        return (padded.unfold(1, len(distance), 1)[self.sequence, self.positions] @ kernels).float()


def question_match(
    input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, word_embeddings: Tensor
) -> QuestionMatch:
    """Match the question of each window in a varlen batch with the window's passage, token by token.

    Args:
        input_ids: (total tokens,).
        token_type_ids: (total tokens,), 0 in the question, then 1 in the passage.
        cu_seqlens: (sequences + 1,).
        word_embeddings: (vocabulary, hidden).
    """
    device, lengths = input_ids.device, cu_seqlens.diff().long()
    sequence, positions = sequence_of(cu_seqlens, len(input_ids)), positions_in(cu_seqlens, len(input_ids))
    in_question = token_type_ids == 0
    counts = torch.zeros_like(lengths).index_add_(0, sequence, in_question.long())
    longest, most_words = int(lengths.max()), int(counts.max())
    padded = torch.full((len(lengths), longest), -1, device=device, dtype=input_ids.dtype)
    padded[sequence, positions] = input_ids
    passage = torch.zeros_like(padded, dtype=torch.bool)
    passage[sequence, positions] = ~in_question
    valid = torch.arange(most_words, device=device) < counts[:, None]
    words = padded[:, :most_words]
    states = word_embeddings.detach()[padded.clamp(min=0)].float()
    likeness = _likeness(words, padded, states) * (passage.unsqueeze(1) & valid.unsqueeze(2))
    columns, strength = torch.arange(longest, device=device, dtype=torch.float32), likeness.log()
    near = []
    for scale in SCALES:
        ramp = columns / scale
        left = (strength + ramp).cummax(2).values - ramp
        right = (strength - ramp).flip(2).cummax(2).values.flip(2) + ramp
        near.append(torch.maximum(left, right)[sequence, :, positions])
    embedded = states[:, :most_words]
    return QuestionMatch(torch.stack(near, 2).exp(), in_question, sequence, positions, embedded, valid, longest)


def _likeness(words: Tensor, tokens: Tensor, states: Tensor) -> Tensor:
    """The likeness of each sequence's words and tokens, from 0 to 1, fp32 (sequences, words, tokens).

    Args:
        words: int64 (sequences, words), the ids of the question's words.
        tokens: int64 (sequences, tokens), the ids of all tokens; the words are the first of them.
        states: fp32 (sequences, tokens, hidden), the tokens' embeddings.
    """
    with torch.autocast(states.device.type, enabled=False):
        lengths = states.norm(dim=2).clamp(min=1e-12)
        cosine = states[:, : words.shape[1]] @ states.transpose(1, 2)
        cosine = cosine / lengths[:, : words.shape[1], None] / lengths[:, None]
    alike = ((cosine - LEAST_COSINE) / (1 - LEAST_COSINE)).clamp(0, 1)
    return torch.where(words.unsqueeze(2) == tokens.unsqueeze(1), 1.0, alike)


class QuestionTokenSelector(nn.Module):
    """A question-aware selector: (tokens, hidden) and their match → keep logits (tokens,), in fp32.

    Its features are how much of the question occurs near a token, with a learned weight for each word, and whether the
    token and its neighbours are of the kind that the question asks for: the dot product of learned projections of the
    question and of each token. A token's state by itself is not a feature, because selectors would memorise the answers
    seen in training.
    """

    def __init__(self, config: "TRBertConfig"):
        super().__init__()
        features = len(SCALES) + len(NEIGHBOUR_SCALES)
        self.word_weight = nn.Linear(config.hidden_size, 1, bias=False)
        self.asks = nn.Linear(config.hidden_size, config.selector_size, bias=False)
        self.answers = nn.Linear(config.hidden_size, config.selector_size, bias=False)
        self.evidence = nn.Linear(features, 1)
        self.linear_1 = nn.Linear(features, config.selector_size)
        self.linear_2 = nn.Linear(config.selector_size, 1, bias=False)

    @staticmethod
    def flops(config: "TRBertConfig") -> int:
        """FLOPs per token, without its comparison with the question's words (2·H·words, under 0.1% of a MiniLM-L6)."""
        hidden, size, features = config.hidden_size, config.selector_size, len(SCALES) + len(NEIGHBOUR_SCALES)
        kind = 2 * hidden * size + size + (2 * REACH + 1) * len(NEIGHBOUR_SCALES)
        return 2 * (kind + features + features * size + size)

    def start_afresh(self) -> None:
        """Initialise the selector with equal word weights and higher logits for tokens near the question's words."""
        nn.init.zeros_(self.word_weight.weight)
        nn.init.constant_(self.evidence.weight, 2.0)
        nn.init.constant_(self.evidence.bias, -3.0)  # few tokens are near an answer

    def forward(self, hidden: Tensor, match: QuestionMatch) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            words = self.word_weight(match.words.float()).squeeze(-1)
            coverage = match.coverage((words - words.detach().amax(1, keepdim=True)).exp())
            asked = match.asked_mean(self.asks(hidden))
            kind = match.around((self.answers(hidden) * asked[match.sequence]).sum(-1))
            features = torch.cat([coverage, kind], dim=1)
            return (self.evidence(features) + self.linear_2(F.gelu(self.linear_1(features)))).squeeze(-1)
