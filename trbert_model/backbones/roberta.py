"""RoBERTa and XLM-R: BERT's layers under other names, with positions counted from behind the padding's."""

import re
from typing import Any

import torch
from torch import Tensor

from ..varlen import VarlenBatch, places_in
from .bert import BertBackbone


class RobertaBackbone(BertBackbone):
    """See `Backbone`.

    A question and its passage differ for the selectors only: these encoders have one token type. Positions are counted
    from a sequence's first token whatever stands in front of it, as transformers counts them.
    """

    names: tuple[str, ...] = ("roberta", "xlm-roberta")
    pair_separators = 2
    pad_token_id = 1
    ignored = re.compile(r"^(lm_head\.|bert\.embeddings\.(position_ids|token_type_ids)$)")

    def position_offset(self, pad_token_id: int) -> int:
        return pad_token_id + 1

    def embed(self, embeddings: Any, batch: VarlenBatch) -> Tensor:
        offset = self.position_offset(embeddings.word_embeddings.padding_idx)
        positions = places_in(batch.cu_seqlens, len(batch.input_ids)) + offset
        return embeddings(
            input_ids=batch.input_ids.unsqueeze(0),
            token_type_ids=torch.zeros_like(batch.token_type_ids).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
        ).squeeze(0)

    def tensor_name(self, name: str) -> str:
        name = super().tensor_name(name.removeprefix("roberta."))
        name = re.sub(r"^classifier\.dense\.", "bert.pooler.dense.", name)
        return re.sub(r"^classifier\.out_proj\.", "classifier.", name)
