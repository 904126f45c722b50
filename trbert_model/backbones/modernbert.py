"""ModernBERT: rotary positions, and layers that attend to nearby positions only between those that attend to all.

The layers are transformers' `ModernBertEncoderLayer`, run on one (1, total tokens, hidden) tensor. Tokens keep the
positions that they had before any reduction: rotary angles and local windows are those of the dense model.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ModernBertConfig
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertEmbeddings,
    ModernBertEncoderLayer,
    ModernBertPredictionHead,
    ModernBertRotaryEmbedding,
)

from ..errors import ConfigurationError
from ..varlen import ATTENTION_NAME, HALF_PRECISION, VarlenBatch, varlen_attention
from .fused import PACKED_UNIT, SEGMENT_ROWS, FusedLayer, FusedLinear, Layout, Segment
from .local_attention import (
    BlockAttention,
    FlashWindows,
    Group,
    GroupedAttention,
    LocalAttention,
    block_size,
    position_masks,
)

if TYPE_CHECKING:
    from ..configuration import TRBertConfig
    from ..reduction.state import TokenState

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # transformers' names of the layer types
# Fields of ModernBertConfig that BertConfig has under other names, and those that it does not have.
_RENAMED = {
    "hidden_activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "attention_dropout": "attention_probs_dropout_prob",
}
_LAYER_FIELDS = (
    *("layer_types", "rope_parameters", "local_attention", "norm_bias", "attention_bias", "mlp_bias"),
    *("embedding_dropout", "mlp_dropout", "classifier_bias", "classifier_activation"),
)
_SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "initializer_range", "pad_token_id"),
)
# The defaults are ModernBERT's vocabulary's.
_NO_TOKENS = dict.fromkeys(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep"))


@dataclass(frozen=True)
class Geometry:
    """See `Backbone.geometry`. The rows are the tokens, or those of a layout.

    Attributes:
        rotary: by layer type, cosines and sines, (rows, head size) each.
        local: windows of the tokens; None with a layout.
        segments: with a layout, by layer type, the attention within each of its segments.
    """

    rotary: dict[str, tuple[Tensor, Tensor]]
    local: LocalAttention | None
    segments: dict[str, list[GroupedAttention]]


class ModernBertBackbone:
    """See `Backbone`.

    There are no token types, so only the selectors use a batch's. Positions start at a sequence's first token, whatever
    padding precedes it: only distances count. `position_ids` are ignored.

    The default for the first selector is layer 1, after a global layer. Layer 0 is allowed, but ModernBERT's embeddings
    contain no position, so that such a selector judges all occurrences of a token alike.
    """

    names: tuple[str, ...] = ("modernbert",)
    pair_separators = 1
    pad_token_id = 50283
    ignored = re.compile(r"^decoder\.")
    lora_targets = r".*\.encoder\.layer\.\d+\..*(Wqkv|Wi|Wo)"
    token_table = "tok_embeddings"
    token_head = True

    def position_offset(self, pad_token_id: int) -> int:
        return 0

    def complete(self, config: "TRBertConfig") -> None:
        own = own_config(config)
        kinds = {parameters["rope_type"] for parameters in own.rope_parameters.values()}
        if changing := kinds & {"dynamic", "longrope"}:
            raise ConfigurationError(
                f"rope_type {changing.pop()!r} is not supported: its rotary angles depend on a batch's longest sequence"
            )
        if config.exit_options is not None and config.exit_options.halts:
            raise ConfigurationError(
                "exits: ModernBERT's layers cannot halt single words (unit 'word'); let whole documents leave "
                "(unit 'sequence')"
            )
        config.layer_config = {name: getattr(own, name) for name in _LAYER_FIELDS}

    def embeddings(self, config: "TRBertConfig") -> Any:
        return ModernBertEmbeddings(own_config(config))

    def embed(self, embeddings: Any, batch: VarlenBatch) -> Tensor:
        return embeddings(batch.input_ids)

    def layer(self, config: "TRBertConfig", index: int) -> nn.Module:
        return ModernBertEncoderLayer(own_config(config), layer_idx=index)

    def final_norm(self, config: "TRBertConfig") -> nn.Module:
        own = own_config(config)
        return nn.LayerNorm(own.hidden_size, eps=own.norm_eps, bias=own.norm_bias)

    def pooler(self, config: "TRBertConfig") -> nn.Module:
        return ModernBertPredictionHead(own_config(config))

    def set_attention_dropout(self, layer: Any, probability: float) -> None:
        layer.attn.attention_dropout = probability

    def geometry(self, config: "TRBertConfig", state: "TokenState") -> Geometry:
        own, positions, layout, hidden = own_config(config), state.positions, state.layout, state.hidden
        rotary = _rotary(own, positions if layout is None else positions[layout.source], hidden.dtype)
        reach = own.sliding_window
        if layout is not None:
            return Geometry(rotary, None, _segments(layout, positions, reach, hidden.dtype))
        if hidden.device.type == "cpu":
            local: LocalAttention = GroupedAttention.local(positions, state.cu_seqlens, reach, hidden.dtype)
        elif state.complete and hidden.dtype in HALF_PRECISION:
            local = FlashWindows(state.cu_seqlens, state.max_seqlen, reach)
        else:
            local = BlockAttention.of(positions, state.cu_seqlens, reach)
        return Geometry(rotary, local, {})

    def run_layer(
        self,
        layer: Any,
        hidden: Tensor,
        geometry: Geometry,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        normalised: bool = True,
    ) -> Tensor:
        cos, sin = geometry.rotary[layer.attention_type]
        return layer(
            hidden.unsqueeze(0),
            position_embeddings=(cos.unsqueeze(0), sin.unsqueeze(0)),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            local=geometry.local if layer.attention_type == LOCAL else None,
        ).squeeze(0)

    def output_norm(self, layer: Any) -> nn.Module:
        return nn.Identity()  # layers normalise their inputs

    def layer_flops(
        self, config: "TRBertConfig", layer: int, tokens: np.ndarray, keys: np.ndarray | None = None
    ) -> np.ndarray:
        """FLOPs of a layer: projections 4·H²·n, feed-forward 3·H·I·n and attention 2·H·p multiply-adds.

        p is the number of pairs of tokens that attend to each other: n², and in local layers those that are at most
        half a window apart. After a reduction this counts tokens, not positions, and is therefore an upper bound.
        """
        own, n = config.layer_config or {}, np.asarray(tokens, dtype=np.float64)
        reach = n - 1
        if own["layer_types"][layer] == LOCAL:
            reach = np.minimum(own["local_attention"] // 2, reach)
        pairs = n * (2 * reach + 1) - reach * (reach + 1)
        hidden, intermediate = config.hidden_size, config.intermediate_size
        return 2 * ((4 * hidden**2 + 3 * hidden * intermediate) * n + 2 * hidden * pairs)

    def fused(self, layer: nn.Module, *, packed: bool, halts: bool) -> FusedLayer:
        return FusedModernBertLayer(layer, packed=packed)

    def tensor_name(self, name: str, raw: dict[str, Any]) -> str:
        name = re.sub(r"^(model\.)?(embeddings\.|layers\.|final_norm\.)", r"bert.\2", name)
        name = name.replace("bert.layers.", "bert.encoder.layer.")
        name = name.replace("bert.final_norm.", "bert.encoder.final_norm.")
        name = re.sub(r"^head\.", "bert.pooler.", name)
        # The class alone tells apart two labels of a text from a start and an end.
        answers = any("ForQuestionAnswering" in architecture for architecture in raw.get("architectures") or [])
        return re.sub(r"^classifier\.", "qa_outputs.", name) if answers else name

    def config_fields(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        words = tensors["bert.embeddings.tok_embeddings.weight"]
        kept = [*_RENAMED.values(), "layer_config", "classifier_pooling", "classifier_dropout", *_SHARED_FIELDS]
        if raw["model_type"] in self.names:
            own = ModernBertConfig.from_dict(_NO_TOKENS | raw)
            raw = {name: getattr(own, name) for name in (*_SHARED_FIELDS, "classifier_pooling", "classifier_dropout")}
            raw |= {bert: getattr(own, name) for name, bert in _RENAMED.items()}
            raw["layer_config"] = {name: getattr(own, name) for name in _LAYER_FIELDS}
        return {name: raw[name] for name in kept if name in raw} | {
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "num_hidden_layers": 1 + max(int(m[1]) for m in map(re.compile(r".*\.layer\.(\d+)\.").match, tensors) if m),
            "intermediate_size": tensors["bert.encoder.layer.0.mlp.Wo.weight"].shape[1],
        }


def own_config(config: "TRBertConfig") -> ModernBertConfig:
    """The configuration as transformers' modules read it."""
    return ModernBertConfig(
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        **{name: getattr(config, bert) for name, bert in _RENAMED.items()},
        **{name: value for name, value in _NO_TOKENS.items() if name != "pad_token_id"},
        **copy.deepcopy(config.layer_config or {}),
        attn_implementation=ATTENTION_NAME,
    )


def _rotary(own: ModernBertConfig, positions: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """`Geometry.rotary`.

    The frequencies are those of a new module of transformers, not of one in the model: `model.to(dtype)` would round
    them.
    """
    module, rotary = ModernBertRotaryEmbedding(own), {}
    for kind in module.layer_types:
        frequencies = getattr(module, f"{kind}_inv_freq").to(positions.device)
        angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
        scaling = getattr(module, f"{kind}_attention_scaling")
        rotary[kind] = ((angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype))
    return rotary


def _segments(layout: Layout, positions: Tensor, reach: int, dtype: torch.dtype) -> dict[str, list[GroupedAttention]]:
    """The attention within a layout's segments by layer type; positions: (tokens,)."""
    # Padding rows are far from every token and from each other, so that each attends to itself alone.
    rows = -(2 * reach + 2) * torch.arange(1, len(layout.source) + 1)
    rows[layout.rows] = positions
    return {
        GLOBAL: [GroupedAttention(list(_global_groups(segment))) for segment in layout.segments],
        LOCAL: [GroupedAttention(list(_local_groups(segment, rows, reach, dtype))) for segment in layout.segments],
    }


def _global_groups(segment: Segment) -> Iterator[Group]:
    for _, sequences, length, mask, *_ in segment.classes:
        yield Group(sequences, length, (mask if mask is None else mask.expand(-1, 1, length, length),))


def _local_groups(segment: Segment, positions: Tensor, reach: int, dtype: torch.dtype) -> Iterator[Group]:
    for start, sequences, length, *_ in segment.classes:
        parts = positions[start : start + sequences * length].split(length)
        masks = [position_masks(part, reach, dtype) for part in parts]
        if length < 3 * block_size(reach):
            yield Group(sequences, length, (torch.cat([mask for (mask,) in masks]),))
        else:
            yield from (Group(1, length, each) for each in masks)


class FusedModernBertLayer(FusedLayer):
    """A ModernBERT layer for inference; layer: transformers' `ModernBertEncoderLayer`."""

    def __init__(self, layer: Any, *, packed: bool):
        super().__init__(packed=packed)
        self.attention_type: str = layer.attention_type
        self.head_dim: int = layer.attn.head_dim
        self.attention_norm, self.mlp_norm = layer.attn_norm, layer.mlp_norm
        self.qkv = FusedLinear(layer.attn.Wqkv, packed=packed)
        self.out = FusedLinear(layer.attn.Wo, packed=packed)
        up, gate = _halves(layer.mlp.Wi)
        self.up = FusedLinear(up, activation=layer.mlp.act, packed=packed)
        self.gate = FusedLinear(gate, packed=packed)
        self.down = FusedLinear(layer.mlp.Wo, packed=packed)

    def forward(self, state: "TokenState", *, normalised: bool = True) -> Tensor:
        geometry: Geometry = state.geometry
        hidden, scaling = state.hidden, self.head_dim**-0.5
        cos, sin = geometry.rotary[self.attention_type]
        if state.layout is None:
            query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in self._heads(hidden, cos, sin))
            context, _ = varlen_attention(
                self,
                *(query, key, value, None),
                cu_seqlens=state.cu_seqlens,
                max_seqlen=state.max_seqlen,
                scaling=scaling,
                local=geometry.local if self.attention_type == LOCAL else None,
            )
            return self._after_attention(context.flatten(2).squeeze(0), hidden)
        output = torch.empty_like(hidden)
        for segment, attention in zip(state.layout.segments, geometry.segments[self.attention_type]):
            rows, sizes = slice(segment.start, segment.start + segment.rows), _part_sizes(segment.rows)
            heads = self._heads_in_parts(hidden[rows], cos[rows], sin[rows], sizes)
            query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in heads)
            context = attention(query, key, value, scaling, 0.0).flatten(2).squeeze(0)
            for part, *inputs in zip(*(each.split(sizes) for each in (output[rows], context, hidden[rows]))):
                part.copy_(self._after_attention(*inputs))
        return output

    def _heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """Query and key turned by the rotary angles, and value, (rows, heads, head size) each."""
        query, key, value = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        # transformers repeats the angles for the second half of a head.
        cos, sin = (each.narrow(1, 0, self.head_dim // 2).unsqueeze(1) for each in (cos, sin))
        turned = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key)]
        for states, output in zip((query, key), turned):
            (first, second), (turned_first, turned_second) = states.chunk(2, -1), output.chunk(2, -1)
            torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
            torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
        return [*turned, value]

    def _heads_in_parts(self, hidden: Tensor, cos: Tensor, sin: Tensor, sizes: list[int]) -> list[Tensor]:
        if len(sizes) == 1:
            return self._heads(hidden, cos, sin)
        whole = [hidden.new_empty(len(hidden), hidden.shape[1] // self.head_dim, self.head_dim) for _ in range(3)]
        for states, c, s, *outputs in zip(*(each.split(sizes) for each in (hidden, cos, sin, *whole))):
            for output, part in zip(outputs, self._heads(states, c, s)):
                output.copy_(part)
        return whole

    def _after_attention(self, context: Tensor, hidden: Tensor) -> Tensor:
        hidden = self.out(context, residual=hidden)
        normed = self.mlp_norm(hidden)
        return self.down(self.up(normed).mul_(self.gate(normed)), residual=hidden)


def _part_sizes(rows: int) -> list[int]:
    """A segment's rows in similar parts of at most `SEGMENT_ROWS`: a single sequence may have many more rows."""
    units, parts = -(-rows // PACKED_UNIT), -(-rows // SEGMENT_ROWS)
    bounds = [units * part // parts * PACKED_UNIT for part in range(parts)]
    return [end - start for start, end in zip(bounds, [*bounds[1:], rows])]


def _halves(linear: Any) -> Iterator[Any]:
    """The two halves of a linear's outputs, as linears."""
    biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
    for weight, bias in zip(linear.weight.chunk(2), biases):
        yield SimpleNamespace(weight=weight, bias=bias)
