"""The interface between TR-BERT and a family of pre-trained encoders."""

import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor, nn

from ..varlen import VarlenBatch
from .fused import FusedLayer

if TYPE_CHECKING:
    from ..configuration import TRBertConfig
    from ..reduction.state import TokenState


class Backbone(Protocol):
    """A family of encoders: its layers on varlen batches, and the conversion of its checkpoints.

    Attributes:
        names: the `model_type`s of the transformers checkpoints that it reads.
        pair_separators: number of [SEP] tokens between a question and its passage.
        pad_token_id: the default for checkpoints without one.
        ignored: matches the converted names (`tensor_name`) of tensors that TR-BERT does not use: pre-training heads,
            and buffers that old checkpoints contain.
        lora_targets: regular expression for the names of the matrices that an adapter updates.
        token_table: name of the module with the token embeddings in `embeddings`.
        token_head: token-level heads apply the pooler to every token.
    """

    names: tuple[str, ...]
    pair_separators: int
    pad_token_id: int
    ignored: re.Pattern[str]
    lora_targets: str
    token_table: str
    token_head: bool

    def position_offset(self, pad_token_id: int) -> int:
        """Number of rows of the position table before the row of a sequence's first token."""

    def complete(self, config: "TRBertConfig") -> None:
        """Fill in the defaults of a new configuration's `layer_config`, and check it.

        Raises:
            ConfigurationError: the family's layers cannot be run with it.
        """

    def embeddings(self, config: "TRBertConfig") -> Any:
        """Create the module with the embedding tables."""

    def embed(self, embeddings: Any, batch: VarlenBatch) -> Tensor:
        """The embeddings of a batch, (total tokens, hidden)."""

    def layer(self, config: "TRBertConfig", index: int) -> nn.Module:
        """Create the module of a layer."""

    def final_norm(self, config: "TRBertConfig") -> nn.Module:
        """Create the module that normalises the last states of all tokens, also of those that left: (..., hidden)."""

    def pooler(self, config: "TRBertConfig") -> nn.Module:
        """Create the module between the encoder and a classifier: (..., hidden) → (..., hidden)."""

    def set_attention_dropout(self, layer: nn.Module, probability: float) -> None:
        """Change the dropout of a layer's attention weights."""

    def geometry(self, config: "TRBertConfig", state: "TokenState") -> Any:
        """What the layers need to know of the tokens' positions, computed once until tokens leave; None for nothing.

        A state's `layout` tells the rows that fused layers compute on.
        """

    def run_layer(
        self,
        layer: nn.Module,
        hidden: Tensor,
        geometry: Any,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        normalised: bool = True,
    ) -> Tensor:
        """Run a layer, (tokens, hidden) → (tokens, hidden).

        Args:
            geometry: from `geometry`.
            normalised: False leaves out the layer's last normalisation, `output_norm`.
        """

    def output_norm(self, layer: Any) -> nn.Module:
        """The normalisation at the end of a layer, fused or not."""

    def layer_flops(
        self, config: "TRBertConfig", layer: int, tokens: np.ndarray, keys: np.ndarray | None = None
    ) -> np.ndarray:
        """FLOPs of a layer on sequences with these numbers of tokens, (sequences,) → float64 (sequences,).

        Args:
            keys: (sequences,), tokens that are attended to, halted ones included. Default: `tokens`.
        """

    def fused(self, layer: nn.Module, *, packed: bool, halts: bool) -> FusedLayer:
        """The layer as inference computes it fastest; packed, halts: see `FusedLayer`."""

    def tensor_name(self, name: str, raw: dict[str, Any]) -> str:
        """Convert a checkpoint's tensor name to TR-BERT's (`bert.…` or a head's). Converted names are unchanged.

        Args:
            raw: the checkpoint's config.json, which names its class.
        """

    def config_fields(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """`TRBertConfig` fields from a checkpoint's config.json and its tensors by converted name.

        Adds embedding tables that the checkpoint lacks to `tensors`.
        """
