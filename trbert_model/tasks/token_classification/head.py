"""The token classification head: predicts a tag for every token."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...configuration import TRBertConfig
from ...exits.passing import ExitPass
from ...exits.policies import NO_EXITS
from ...modeling import TRBertModel, TRBertPreTrainedModel, head_dropout
from ...reduction.state import Selection
from ...reduction.trace import Trace


@dataclass
class TRBertTokenClassifierOutput(ModelOutput):
    """Output of `TRBertForTokenClassification`.

    Attributes:
        loss: ().
        logits: (total tokens, labels). For padded input (batch, length, labels).
        kept_tokens, hidden_states, selections, trace, exits: as in `TRBertModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None
    trace: Trace | None = None
    exits: ExitPass | None = None


class TRBertForTokenClassification(TRBertPreTrainedModel):
    """Predicts logits of tags for every token. A dropped token's logits come from the state it was dropped with.

    `forward` takes `TRBertModel.forward`'s arguments, and `labels` as in transformers: int64, of the shape of the input
    ids, -100 for tokens that the loss leaves out. Padded sequences that are too long are truncated.

    With exits, a word has the logits of the exit that it left at. In padded batches nothing leaves early.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__(config)
        self.bert = TRBertModel.for_tokens(config)
        self.dropout = head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TRBertTokenClassifierOutput:
        if cu_seqlens is None:
            attention_mask = self.truncated_mask(input_ids, attention_mask)
            kwargs["exit_policy"] = NO_EXITS
        output = self.bert(input_ids, attention_mask, *args, cu_seqlens=cu_seqlens, **{**kwargs, "token_states": True})
        logits = self.classifier(self.dropout(self.bert.token_features(output.last_hidden_state)))
        if cu_seqlens is not None:
            logits = output.answered(logits)
        return TRBertTokenClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten()),
            logits=logits,
            kept_tokens=output.kept_tokens,
            hidden_states=output.hidden_states,
            selections=output.selections,
            trace=output.trace,
            exits=output.exits,
        )
