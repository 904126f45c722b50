"""The question-answering head: start and end logits for every token."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...configuration import TRBertConfig
from ...exits.passing import ExitPass
from ...modeling import TRBertModel, TRBertPreTrainedModel
from ...reduction.state import Selection
from ...reduction.trace import Trace


@dataclass
class TRBertQuestionAnsweringOutput(ModelOutput):
    """Output of `TRBertForQuestionAnswering`.

    Attributes:
        loss: ().
        start_logits, end_logits: (total tokens,). For padded input (batch, length), with the dtype's minimum at masked
            positions.
        kept_tokens, hidden_states, selections, trace, exits: as in `TRBertModelOutput`.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None
    trace: Trace | None = None
    exits: ExitPass | None = None


class TRBertForQuestionAnswering(TRBertPreTrainedModel):
    """Predicts start and end logits for every token. A dropped token's logits come from the state it was dropped with.

    It is the same head as thunlp/TR-BERT's for TriviaQA, which is trained with one softmax over all windows of a
    document. Here all questions are trained and answered this way (`AnswerLosses`, `QuestionAnsweringTask`).

    `forward` takes `TRBertModel.forward`'s arguments, and `start_positions` and `end_positions`, int64 (sequences,):
    token indices in the sequence (for padded input, columns). Padded sequences that are too long are truncated.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__(config)
        self.bert = TRBertModel.for_tokens(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TRBertQuestionAnsweringOutput:
        if cu_seqlens is None:
            attention_mask = self.truncated_mask(input_ids, attention_mask)
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens=cu_seqlens,
            **{**kwargs, "token_states": True},
        )
        logits = self.qa_outputs(self.bert.token_features(output.last_hidden_state))
        if cu_seqlens is None and attention_mask is not None:
            logits = logits.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (
                _position_loss(start_logits, start_positions, cu_seqlens)
                + _position_loss(end_logits, end_positions, cu_seqlens)
            ) / 2
        return TRBertQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            kept_tokens=output.kept_tokens,
            hidden_states=output.hidden_states,
            selections=output.selections,
            trace=output.trace,
            exits=output.exits,
        )


def _position_loss(logits: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean cross-entropy; positions: int64 (sequences,), the correct token of each sequence."""
    if cu_seqlens is None:
        return F.cross_entropy(logits, positions)
    sequences = logits.split(cu_seqlens.diff().tolist())
    losses = [F.cross_entropy(sequence, position) for sequence, position in zip(sequences, positions)]
    return torch.stack(losses).mean()
