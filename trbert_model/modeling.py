"""The TR-BERT encoder and model, without task heads, which are in `tasks`.

A `Backbone` provides the layers. This module runs the token selectors and their policy between them (Ye et al., NAACL
2021, section 3; thunlp/TR-BERT's AUTOBert classes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPreTrainedModel
from transformers.utils import ModelOutput, logging

from .backbones import BACKBONES
from .backbones.fused import FusedLayer, packs_weights
from .configuration import TRBertConfig
from .errors import ConfigurationError, InputError
from .reduction.policies import ThresholdPolicy
from .reduction.question import question_match
from .reduction.selectors import selector_class
from .reduction.state import Candidates, Selection, SelectionPolicy, TokenState
from .varlen import ATTENTION_NAME, VarlenBatch, first_tokens, positions_in, truncated

transformers_logger = logging.get_logger("transformers")


@dataclass
class TRBertModelOutput(ModelOutput):
    """Output of `TRBertModel`.

    Attributes:
        last_hidden_state: (total tokens, hidden), or (batch, length, hidden) with zeros at masked positions for padded
            input; None if `token_states=False`. A dropped token has the state that it had when it was dropped.
        cls_hidden_state: (sequences, hidden).
        pooler_output: (sequences, hidden).
        kept_tokens: for each reduction layer, the number of tokens kept, int64 (sequences,).
        hidden_states: the input of every layer that ran and the output of the last, each (kept tokens, hidden), on
            request.
        selections: one `Selection` per reduction layer, on request.
    """

    last_hidden_state: Tensor | None = None
    cls_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None


class TRBertEncoder(nn.Module):
    """A backbone's layers with a selector before each reduction layer."""

    def __init__(self, config: TRBertConfig):
        super().__init__()
        self.config, self.backbone = config, BACKBONES[config.backbone]
        self.layer = nn.ModuleList([self.backbone.layer(config, i) for i in range(config.num_hidden_layers)])
        self.selectors = nn.ModuleList([selector_class(config)(config) for _ in config.reduction_layers])

    def forward(
        self,
        state: TokenState,
        policy: SelectionPolicy | None,
        *,
        token_states: bool = True,
        output_hidden_states: bool = False,
        output_selections: bool = False,
    ) -> TRBertModelOutput:
        """Run the remaining layers from a state, with all tokens if there is no policy.

        The options are those of `TRBertModel.forward`.
        """
        reductions = {layer: i for i, layer in enumerate(self.config.reduction_layers)} if policy else {}
        kept_tokens: list[Tensor] = []
        hidden_states: list[Tensor] = []
        selections: list[Selection] = []
        while state.layer < len(self.layer):
            if policy and state.layer in reductions:
                candidates = self.candidates(state, reductions[state.layer])
                keep = policy(candidates) | candidates.fixed
                if output_selections:
                    selections.append(Selection(**vars(candidates), keep=keep))
                state = state.kept(keep, remember=token_states)
                del candidates, keep  # they hold the states of the dropped tokens
                kept_tokens.append(state.cu_seqlens.diff().long())
            if output_hidden_states:
                hidden_states.append(state.states)
            state = self.after_layer(state)
        return TRBertModelOutput(
            last_hidden_state=state.all_states() if token_states else None,
            cls_hidden_state=state.first_states(),
            kept_tokens=tuple(kept_tokens),
            hidden_states=(*hidden_states, state.states) if output_hidden_states else None,
            selections=tuple(selections) if output_selections else None,
        )

    def candidates(self, state: TokenState, reduction: int) -> Candidates:
        """The tokens of a state with their keep logits from the reduction's selector."""
        match = state.match.at(state.token_indices) if state.match is not None else None
        hidden = state.states
        logits = self.selectors[reduction](hidden, match)
        fixed = torch.zeros_like(logits, dtype=torch.bool)
        if match is not None and state.layer < self.config.question_layers:
            fixed |= match.asked
        fixed[first_tokens(state.cu_seqlens)] = True  # always keep [CLS], so that no sequence becomes empty
        return Candidates(
            reduction, hidden, logits, fixed, state.token_indices, state.positions, state.cu_seqlens, match
        )

    def after_layer(self, state: TokenState) -> TokenState:
        """Run one layer."""
        layer = self.layer[state.layer]
        if isinstance(layer, FusedLayer):
            return state.after(layer(state.hidden, state.cu_seqlens, state.max_seqlen, state.layout))
        return state.after(
            self.backbone.run_layer(layer, state.hidden, state.positions, state.cu_seqlens, state.max_seqlen)
        )


class TRBertPooler(nn.Module):
    """BERT's pooler, or DistilBERT's `pre_classifier`: the same layer with a different activation."""

    def __init__(self, config: TRBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = {"tanh": torch.tanh, "relu": torch.relu}[config.pooler_activation]

    def forward(self, cls_hidden_state: Tensor) -> Tensor:
        return self.activation(self.dense(cls_hidden_state))


class TRBertPreTrainedModel(BertPreTrainedModel):
    config: TRBertConfig
    config_class = TRBertConfig
    base_model_prefix = "bert"
    _keep_in_fp32_modules_strict = ["selectors"]
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    # Tensors in BERT checkpoints without a use here: pre-training heads, and buffers that were once saved.
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"cls\.", r"embeddings\.token_type_ids"]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # from_pretrained would choose sdpa, which silently ignores cu_seqlens and attends across sequences.
        if requested_attention not in (None, ATTENTION_NAME):
            raise ConfigurationError(
                f"attn_implementation={requested_attention!r}: TR-BERT computes on batches without padding and "
                f"supports only {ATTENTION_NAME!r}, which is the default; leave the argument out"
            )
        return ATTENTION_NAME

    def truncated_mask(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """The attention mask of a padded batch, cut to the model's positions.

        transformers' pipelines do not truncate unless they are asked to.
        """
        positions = self.config.usable_positions
        if input_ids is None or input_ids.shape[-1] <= positions:
            return attention_mask
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cut = truncated(mask, positions)
        if not torch.equal(cut, mask.bool()):
            transformers_logger.warning_once(
                f"Sequences of more than {positions} tokens are truncated. jobs/score.py and trbert_model.engine split "
                "them into windows instead."
            )
        return cut


class TRBertModel(TRBertPreTrainedModel):
    """An encoder with dynamic token reduction, without a task head."""

    def __init__(self, config: TRBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BACKBONES[config.backbone].embeddings(config)
        self.encoder = TRBertEncoder(config)
        self.pooler = TRBertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        state: TokenState | None = None,
        reduce: bool = True,
        selection_policy: SelectionPolicy | None = None,
        token_states: bool = True,
        output_hidden_states: bool = False,
        output_selections: bool = False,
    ) -> TRBertModelOutput:
        """Run the model on a padded batch, on a varlen batch if `cu_seqlens` is given, or from a `state`.

        Args:
            input_ids, attention_mask, token_type_ids: (batch, length), as for any transformers model; or, with
                `cu_seqlens` of shape (sequences + 1,), input_ids and token_type_ids of shape (total tokens,).
            position_ids: (total tokens,), with `cu_seqlens` only. Default: from 0 in each sequence. The RoBERTa
                backbone ignores them and always uses the default.
            max_seqlen: tokens of the longest sequence, with `cu_seqlens` only. Default: computed from `cu_seqlens`.
            state: from `before_reduction`, instead of all of the above.
            reduce: False runs the dense model.
            selection_policy: chooses the tokens to keep. Default: the thresholds in the configuration.
            token_states: False leaves out `last_hidden_state` and saves the cost of collecting dropped tokens.
            output_hidden_states, output_selections: fill these fields of the output.

        Raises:
            InputError: no input, an empty batch, an empty sequence in a padded batch, or a sequence longer than the
                model's positions.
        """
        padded_indices = None
        if state is None:
            if input_ids is None:
                raise InputError("a model needs input_ids, or the state to go on from")
            if cu_seqlens is None:
                batch, padded_indices = VarlenBatch.from_padded(
                    input_ids, attention_mask, token_type_ids, self.config.usable_positions
                )
            else:
                batch = _varlen_batch(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
            if batch.max_seqlen > self.config.usable_positions:
                raise InputError(
                    f"a sequence of {batch.max_seqlen} tokens is longer than the model's "
                    f"{self.config.usable_positions} positions: cut it into windows (trbert_model.engine does) or "
                    "truncate it"
                )
            state = self.begin(batch, reduce=reduce)
        output = self.encoder(
            state,
            (selection_policy or ThresholdPolicy(self.config.selector_thresholds)) if reduce else None,
            token_states=token_states,
            output_hidden_states=output_hidden_states,
            output_selections=output_selections,
        )
        if self.pooler is not None:
            output.pooler_output = self.pooler(output.cls_hidden_state)
        if padded_indices is not None and input_ids is not None and output.last_hidden_state is not None:
            output.last_hidden_state = _unpack(output.last_hidden_state, padded_indices, input_ids.shape, 0.0)
        return output

    def begin(self, batch: VarlenBatch, *, reduce: bool = True) -> TokenState:
        """Embed a batch; returns the state before layer 0."""
        hidden = self.encoder.backbone.embed(self.embeddings, batch)
        match = None
        if self.config.question_aware and reduce:
            words = self.embeddings.word_embeddings.weight
            match = question_match(batch.input_ids, batch.token_type_ids, batch.cu_seqlens, words)
        token_indices = torch.arange(len(hidden), device=hidden.device)
        positions = positions_in(batch.cu_seqlens, len(hidden))
        state = TokenState(0, hidden, token_indices, positions, batch.cu_seqlens, batch.max_seqlen, match)
        first = self.encoder.layer[0]
        if isinstance(first, FusedLayer) and hidden.device.type == "cpu":
            state = state.arranged(packed=first.packed)
        return state

    def before_reduction(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor
    ) -> TokenState:
        """Run a varlen batch up to the first reduction, to share this part between several selections."""
        state = self.begin(_varlen_batch(input_ids, token_type_ids, position_ids, cu_seqlens))
        while state.layer < self.config.reduction_layers[0]:
            state = self.encoder.after_layer(state)
        return state


def _varlen_batch(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
) -> VarlenBatch:
    if input_ids.dim() != 1 or len(cu_seqlens) < 2:
        raise InputError(
            f"a varlen batch needs input_ids of shape (total tokens,) and at least one sequence; got input_ids "
            f"{tuple(input_ids.shape)} and cu_seqlens {tuple(cu_seqlens.shape)}"
        )
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max())
    if position_ids is None:
        position_ids = positions_in(cu_seqlens, len(input_ids))
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    return VarlenBatch(input_ids, token_type_ids, position_ids, cu_seqlens.to(torch.int32), max_seqlen)


def _unpack(values: Tensor, indices: Tensor, shape: torch.Size, fill: float) -> Tensor:
    """Unpack (total tokens, ...) to (batch, length, ...), with `fill` at masked positions."""
    padded = values.new_full((shape[0] * shape[1], *values.shape[1:]), fill)
    return padded.index_copy(0, indices, values).unflatten(0, (shape[0], shape[1]))


def head_dropout(config: TRBertConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


def fuse_for_inference(model: "TRBertPreTrainedModel", *, packed: bool | None = None) -> None:
    """Fuse the model's layers in place. It can then compute, but not be trained, moved or saved.

    Args:
        packed: let oneDNN lay out the weights for itself. Default: where it is fast (`packs_weights`).
    """
    encoder = model.base_model.encoder
    packed = packs_weights(model.device, model.dtype) if packed is None else packed
    for i, layer in enumerate(encoder.layer):
        if not isinstance(layer, FusedLayer):
            encoder.layer[i] = encoder.backbone.fused(layer, packed=packed)
    model.eval().requires_grad_(False)
