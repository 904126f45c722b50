"""The classification head: predicts labels or numbers from a sequence's first token."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...configuration import TRBertConfig
from ...exits.passing import ExitPass
from ...modeling import TRBertModel, TRBertPreTrainedModel, head_dropout
from ...reduction.state import Selection
from ...reduction.trace import Trace
from .losses import losses_of


@dataclass
class TRBertSequenceClassifierOutput(ModelOutput):
    """Output of `TRBertForSequenceClassification`.

    Attributes:
        loss: ().
        logits: (sequences, labels).
        pooler_output, kept_tokens, hidden_states, selections, trace, exits: as in `TRBertModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None
    trace: Trace | None = None
    exits: ExitPass | None = None


class TRBertForSequenceClassification(TRBertPreTrainedModel):
    """Predicts labels or numbers from a sequence's first token, as `config.problem_type` says (as in transformers).

    `forward` takes `TRBertModel.forward`'s arguments, and `labels` as in transformers: int64 (sequences,), one label
    each, or float (sequences, labels), 1 for each label of the sequence, or numbers. Padded sequences that are too long
    are truncated.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__(config)
        self.losses = losses_of(config)
        exits = config.exit_options
        answers_all = exits is not None and exits.answers_all
        self.bert = TRBertModel(config, add_pooling_layer=not answers_all)
        self.dropout = head_dropout(config)
        self.classifier = None if answers_all else nn.Linear(config.hidden_size, config.num_labels)
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
    ) -> TRBertSequenceClassifierOutput:
        if cu_seqlens is None:
            attention_mask = self.truncated_mask(input_ids, attention_mask)
        output = self.bert(input_ids, attention_mask, *args, cu_seqlens=cu_seqlens, **{**kwargs, "token_states": False})
        if self.classifier is None:
            logits = output.exits.answers
        else:
            logits = output.answered(self.classifier(self.dropout(output.pooler_output)))
        return TRBertSequenceClassifierOutput(
            loss=None if labels is None else self.losses.to_labels(logits, labels).mean(),
            logits=logits,
            pooler_output=output.pooler_output,
            kept_tokens=output.kept_tokens,
            trace=output.trace,
            exits=output.exits,
            hidden_states=output.hidden_states,
            selections=output.selections,
        )
