"""The multiple-choice head: selects one of several options, each in a sequence of its own."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...configuration import TRBertConfig
from ...errors import InputError
from ...modeling import TRBertModel, TRBertPreTrainedModel, head_dropout
from ...reduction.group import GroupPolicy
from ...reduction.policies import ThresholdPolicy
from ...reduction.state import SelectionPolicy


@dataclass
class TRBertMultipleChoiceOutput(ModelOutput):
    """Output of `TRBertForMultipleChoice`.

    Attributes:
        loss: ().
        logits: (groups, choices).
        kept_tokens: as in `TRBertModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None


class TRBertForMultipleChoice(TRBertPreTrainedModel):
    """Selects one of several options from the [CLS] of one row per option: thunlp/TR-BERT's head for RACE.

    The rows of a group begin with the same tokens ([CLS], article and question). Each shared token is kept in all rows
    of its group or in none, by the mean of its keep logits. The option's own tokens are always kept.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__(config)
        self.bert = TRBertModel(config)
        self.dropout = head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        shared_tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        num_choices: int | None = None,
        labels: Tensor | None = None,
        reduce: bool = True,
        selection_policy: SelectionPolicy | None = None,
        return_dict: bool | None = None,
    ) -> TRBertMultipleChoiceOutput:
        """Compute on (groups, choices, length) tensors, or on a varlen batch when `cu_seqlens` is given.

        Args:
            shared_tokens: int64 (groups,), number of tokens that all rows of a group begin with.
            cu_seqlens, num_choices: for a varlen batch, in which each group is `num_choices` consecutive rows.
            labels: int64 (groups,), the correct option.
            reduce, selection_policy: as in `TRBertModel.forward`.

        Raises:
            InputError: the rows do not form whole groups.
        """
        if cu_seqlens is None:
            num_choices = input_ids.shape[1]
            input_ids = input_ids.flatten(0, 1)
            attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
            token_type_ids = None if token_type_ids is None else token_type_ids.flatten(0, 1)
        rows = input_ids.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if not num_choices or rows != num_choices * len(shared_tokens):
            raise InputError(f"{rows} rows are not {len(shared_tokens)} groups of {num_choices} options")
        policy = selection_policy or ThresholdPolicy(self.config.selector_thresholds)
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            cu_seqlens=cu_seqlens,
            reduce=reduce,
            selection_policy=GroupPolicy(policy, shared_tokens, num_choices),
            token_states=False,
        )
        logits = self.classifier(self.dropout(output.pooler_output)).view(-1, num_choices)
        return TRBertMultipleChoiceOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            kept_tokens=output.kept_tokens,
        )
