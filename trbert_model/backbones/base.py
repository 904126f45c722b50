"""The interface between TR-BERT and a family of pre-trained encoders."""

import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor, nn

from ..varlen import VarlenBatch
from .fused import FusedLayer

if TYPE_CHECKING:
    from ..configuration import TRBertConfig


class Backbone(Protocol):
    """A family of encoders: its layers on varlen batches, and the conversion of its checkpoints.

    Attributes:
        names: the `model_type`s of the transformers checkpoints that it reads.
        pair_separators: number of [SEP] tokens between a question and its passage.
        pad_token_id: the default for checkpoints without one.
        ignored: matches the converted names (`tensor_name`) of tensors that TR-BERT does not use: pre-training heads,
            and buffers that old checkpoints contain.
        lora_targets: regular expression for the names of the matrices that an adapter updates.
    """

    names: tuple[str, ...]
    pair_separators: int
    pad_token_id: int
    ignored: re.Pattern[str]
    lora_targets: str

    def position_offset(self, pad_token_id: int) -> int:
        """Number of rows of the position table before the row of a sequence's first token."""

    def embeddings(self, config: "TRBertConfig") -> Any:
        """Create the module with the embedding tables; that of the tokens is its `word_embeddings`."""

    def embed(self, embeddings: Any, batch: VarlenBatch) -> Tensor:
        """The embeddings of a batch, (total tokens, hidden)."""

    def layer(self, config: "TRBertConfig", index: int) -> nn.Module:
        """Create the module of a layer."""

    def run_layer(
        self,
        layer: nn.Module,
        hidden: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        normalised: bool = True,
    ) -> Tensor:
        """Run a layer, (tokens, hidden) → (tokens, hidden).

        Args:
            positions: int64 (tokens,), each token's position in its sequence before any reduction.
            normalised: False leaves out the layer's last normalisation, `output_norm`.
        """

    def output_norm(self, layer: Any) -> nn.Module:
        """The normalisation at the end of a layer, fused or not."""

    def layer_flops(self, config: "TRBertConfig", tokens: np.ndarray, keys: np.ndarray | None = None) -> np.ndarray:
        """FLOPs of one layer on sequences with these numbers of tokens, (sequences,) → float64 (sequences,).

        Args:
            keys: (sequences,), tokens that are attended to, halted ones included. Default: `tokens`.
        """

    def fused(self, layer: nn.Module, *, packed: bool, halts: bool) -> FusedLayer:
        """The layer as inference computes it fastest; packed, halts: see `FusedLayer`."""

    def tensor_name(self, name: str) -> str:
        """Convert a checkpoint's tensor name to TR-BERT's (`bert.…` or a head's). Converted names are unchanged."""

    def config_fields(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """`TRBertConfig` fields from a checkpoint's config.json and its tensors by converted name.

        Adds embedding tables that the checkpoint lacks to `tensors`.
        """
