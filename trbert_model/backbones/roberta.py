"""RoBERTa and XLM-R: BERT's layers with other tensor names, and position ids that start after the padding's."""

import re
from typing import Any

import torch
from torch import Tensor

from ..varlen import VarlenBatch, positions_in
from .bert import BertBackbone


class RobertaBackbone(BertBackbone):
    """See `Backbone`.

    These encoders have one token type, so only the selectors use a batch's token types. Positions start at a sequence's
    first token, whatever padding precedes it, as in transformers. `position_ids` are ignored.
    """

    names: tuple[str, ...] = ("roberta", "xlm-roberta")
    pair_separators = 2
    pad_token_id = 1
    ignored = re.compile(r"^(lm_head\.|bert\.embeddings\.(position_ids|token_type_ids)$)")

    def position_offset(self, pad_token_id: int) -> int:
        return pad_token_id + 1

    def embed(self, embeddings: Any, batch: VarlenBatch) -> Tensor:
        offset = self.position_offset(embeddings.word_embeddings.padding_idx)
        positions = positions_in(batch.cu_seqlens, len(batch.input_ids)) + offset
        return embeddings(
            input_ids=batch.input_ids.unsqueeze(0),
            token_type_ids=torch.zeros_like(batch.token_type_ids).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
        ).squeeze(0)

    def tensor_name(self, name: str, raw: dict[str, Any]) -> str:
        name = super().tensor_name(name.removeprefix("roberta."), raw)
        name = re.sub(r"^classifier\.dense\.", "bert.pooler.dense.", name)
        return re.sub(r"^classifier\.out_proj\.", "classifier.", name)
