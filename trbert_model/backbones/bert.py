"""BERT, and DistilBERT as a BERT without token types.

The layers are transformers' `BertEmbeddings` and `BertLayer`, run on one (1, total tokens, hidden) tensor.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

from ..varlen import VarlenBatch
from .fused import FusedBertLayer, FusedLayer

if TYPE_CHECKING:
    from ..configuration import TRBertConfig
    from ..reduction.state import TokenState

# DistilBERT's names inside a layer → BERT's. The original TR-BERT's checkpoints use the names of either family.
_DISTILBERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
# DistilBERT's configuration fields → BERT's.
_DISTILBERT_FIELDS = {
    "n_heads": "num_attention_heads",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}


class BertPooler(nn.Module):
    """BERT's pooler, or DistilBERT's `pre_classifier`: the same layer with a different activation."""

    def __init__(self, config: "TRBertConfig"):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = {"tanh": torch.tanh, "relu": torch.relu}[config.pooler_activation]

    def forward(self, states: Tensor) -> Tensor:
        return self.activation(self.dense(states))


class BertBackbone:
    """See `Backbone`."""

    names: tuple[str, ...] = ("bert", "distilbert")
    pair_separators = 1
    pad_token_id = 0
    ignored = re.compile(r"^(cls\.|vocab_|bert\.embeddings\.(position_ids|token_type_ids)$)")
    lora_targets = r".*\.encoder\.layer\.\d+\..*(query|key|value|dense)"
    token_table = "word_embeddings"
    token_head = False

    def position_offset(self, pad_token_id: int) -> int:
        return 0

    def complete(self, config: "TRBertConfig") -> None:
        pass

    def embeddings(self, config: "TRBertConfig") -> Any:
        return BertEmbeddings(config)

    def embed(self, embeddings: Any, batch: VarlenBatch) -> Tensor:
        return embeddings(
            input_ids=batch.input_ids.unsqueeze(0),
            token_type_ids=batch.token_type_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
        ).squeeze(0)

    def layer(self, config: "TRBertConfig", index: int) -> nn.Module:
        return BertLayer(config, layer_idx=index)

    def final_norm(self, config: "TRBertConfig") -> nn.Module:
        return nn.Identity()

    def pooler(self, config: "TRBertConfig") -> nn.Module:
        return BertPooler(config)

    def set_attention_dropout(self, layer: Any, probability: float) -> None:
        layer.attention.self.dropout.p = probability

    def geometry(self, config: "TRBertConfig", state: "TokenState") -> None:
        return None

    def run_layer(
        self,
        layer: Any,
        hidden: Tensor,
        geometry: None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        normalised: bool = True,
    ) -> Tensor:
        hidden = hidden.unsqueeze(0)
        if normalised:
            return layer(hidden, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen).squeeze(0)
        hidden, _ = layer.attention(hidden, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        output = layer.output
        return (output.dropout(output.dense(layer.intermediate(hidden))) + hidden).squeeze(0)

    def output_norm(self, layer: Any) -> nn.Module:
        return layer.output_norm if isinstance(layer, FusedBertLayer) else layer.output.LayerNorm

    def layer_flops(
        self, config: "TRBertConfig", layer: int, tokens: np.ndarray, keys: np.ndarray | None = None
    ) -> np.ndarray:
        """FLOPs of a layer: projections 4·H²·n, feed-forward 2·H·I·n and attention 2·H·n² multiply-adds.

        Halted tokens need two of the projections, for their keys and values.
        """
        n = np.asarray(tokens, dtype=np.float64)
        k = n if keys is None else np.asarray(keys, dtype=np.float64)
        hidden, intermediate = config.hidden_size, config.intermediate_size
        return 2 * ((2 * hidden**2 + 2 * hidden * intermediate) * n + 2 * hidden**2 * k + 2 * hidden * n * k)

    def fused(self, layer: nn.Module, *, packed: bool, halts: bool) -> FusedLayer:
        return FusedBertLayer(layer, packed=packed, halts=halts)

    def tensor_name(self, name: str, raw: dict[str, Any]) -> str:
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = name.replace("distilbert.transformer.", "bert.encoder.").replace("distilbert.", "bert.")
        name = re.sub(r"^transformer\.layer\.", "bert.encoder.layer.", name)
        name = re.sub(r"^(embeddings|encoder|pooler)\.", r"bert.\1.", name)
        name = re.sub(r"^pre_classifier\.", "bert.pooler.dense.", name)
        name = re.sub(r"\.encoder\.(linear_[12])\.(\d+)\.", r".encoder.selectors.\2.\1.", name)
        if match := re.match(r"(bert\.encoder\.layer\.\d+\.)(.+)(\.(?:weight|bias))$", name):
            name = match[1] + _DISTILBERT_LAYER.get(match[2], match[2]) + match[3]
        return name

    def config_fields(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        words = tensors["bert.embeddings.word_embeddings.weight"]
        distilbert = raw.get("model_type") == "distilbert" or "dim" in raw
        if distilbert:
            # DistilBERT has no token types; zero embeddings for BERT's two are equivalent.
            tensors["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, words.shape[1])
            raw = raw | {_DISTILBERT_FIELDS[name]: value for name, value in raw.items() if name in _DISTILBERT_FIELDS}
            raw |= {"pooler_activation": "relu", "classifier_dropout": raw.get("seq_classif_dropout", 0.2)}
        return {
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "num_hidden_layers": 1 + max(int(m[1]) for m in map(re.compile(r".*\.layer\.(\d+)\.").match, tensors) if m),
            "num_attention_heads": raw.get("num_attention_heads", 12),
            "intermediate_size": tensors["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "max_position_embeddings": tensors["bert.embeddings.position_embeddings.weight"].shape[0],
            "type_vocab_size": tensors["bert.embeddings.token_type_embeddings.weight"].shape[0],
            "hidden_act": raw.get("hidden_act", "gelu"),
            "hidden_dropout_prob": raw.get("hidden_dropout_prob", 0.1),
            "attention_probs_dropout_prob": raw.get("attention_probs_dropout_prob", 0.1),
            "layer_norm_eps": raw.get("layer_norm_eps", 1e-12),
            "pad_token_id": raw.get("pad_token_id", self.pad_token_id),
            "classifier_dropout": raw.get("classifier_dropout"),
            "pooler_activation": raw.get("pooler_activation", "tanh"),
            "is_decoder": raw.get("is_decoder", False),
        }
