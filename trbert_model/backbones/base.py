"""What TR-BERT needs to know of a pre-trained encoder."""

import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor, nn

from ..varlen import VarlenBatch

if TYPE_CHECKING:
    from ..configuration import TRBertConfig


class Backbone(Protocol):
    """A family of encoders: its layers on varlen batches, and its checkpoints.

    names: the `model_type`s of the transformers checkpoints it reads; pair_separators: [SEP] tokens between a question
    and its passage; pad_token_id: of a checkpoint that names none; ignored: tensors of checkpoints, by their names
    here, that no TR-BERT has: pre-training heads and buffers that were stored once; lora_targets: the layers' matrices
    that an adapter updates.
    """

    names: tuple[str, ...]
    pair_separators: int
    pad_token_id: int
    ignored: re.Pattern[str]
    lora_targets: str

    def position_offset(self, pad_token_id: int) -> int:
        """Rows of the position table in front of a sequence's first token's."""

    def embeddings(self, config: "TRBertConfig") -> Any:
        """The module with the embedding tables, of words as `word_embeddings`."""

    def embed(self, embeddings: Any, batch: VarlenBatch) -> Tensor:
        """(total tokens, hidden)."""

    def layer(self, config: "TRBertConfig", index: int) -> nn.Module:
        """A layer's module."""

    def run_layer(
        self, layer: nn.Module, hidden: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """A layer on (tokens, hidden) with the tokens' positions in their sequences, int64 (tokens,). On CPUs there may
        be more rows than tokens."""

    def layer_flops(self, config: "TRBertConfig", tokens: np.ndarray) -> np.ndarray:
        """FLOPs of a layer on sequences of `tokens` tokens, (sequences,) → float64 (sequences,)."""

    def fuse(self, layer: nn.Module) -> None:
        """Put a layer, in place, into the form that inference computes fastest in."""

    def tensor_name(self, name: str) -> str:
        """The name here, `bert.…` or a head's, of a tensor of a checkpoint; of one with that name already the same."""

    def config_fields(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """`TRBertConfig`'s fields from a checkpoint's config.json and its tensors by their names here, to which it adds
        tables that the checkpoint does without."""
