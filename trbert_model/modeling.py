"""The TR-BERT encoder and model, without task heads, which are in `tasks`.

A `Backbone` provides the layers. This module runs the token selectors and their policy between them (Ye et al., NAACL
2021, section 3; thunlp/TR-BERT's AUTOBert classes).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPreTrainedModel
from transformers.utils import ModelOutput, logging

from .backbones import BACKBONES
from .backbones.fused import FusedLayer, packs_weights
from .configuration import TRBertConfig
from .errors import ConfigurationError, InputError
from .exits.heads import EXIT_HEADS, Gate
from .exits.options import NO_SKIPPING
from .exits.passing import ExitPass, Words
from .exits.policies import NO_EXITS, ExitPolicy, ExitThresholds
from .reduction.policies import ThresholdPolicy
from .reduction.question import question_match
from .reduction.selectors import selector_class
from .reduction.state import Candidates, Selection, SelectionPolicy, TokenState
from .reduction.trace import Trace
from .varlen import ATTENTION_NAME, VarlenBatch, first_tokens, positions_in, sequence_of, sequence_sums, truncated

transformers_logger = logging.get_logger("transformers")


@dataclass
class TRBertModelOutput(ModelOutput):
    """Output of `TRBertModel`.

    Attributes:
        last_hidden_state: (total tokens, hidden), or (batch, length, hidden) with zeros at masked positions for padded
            input; None if `token_states=False`. A dropped token has the state that it had when it was dropped.
        cls_hidden_state: (sequences, hidden).
        pooled_state: (sequences, hidden), the pooler's input: see `TRBertConfig.classifier_pooling`.
        pooler_output: (sequences, hidden).
        kept_tokens: for each reduction layer, the number of tokens kept, int64 (sequences,); 0 for sequences that had
            left before.
        trace: how many tokens each layer computed.
        exits: what left early; None without exits.
        remaining: int64 (sequences that did not leave,), their indices: those of `cls_hidden_state`,
            `pooled_state` and `pooler_output`.
        hidden_states: the input of every layer that ran and the output of the last, each (kept tokens, hidden), on
            request.
        selections: one `Selection` per reduction layer, on request.
    """

    last_hidden_state: Tensor | None = None
    cls_hidden_state: Tensor | None = None
    pooled_state: Tensor | None = None
    pooler_output: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None
    trace: Trace | None = None
    exits: ExitPass | None = None
    remaining: Tensor | None = None

    def answered(self, logits: Tensor) -> Tensor:
        """The head's logits with those of the exits: of all sequences, from those of the remaining ones (labels last).

        For heads that classify words, of all tokens, from those of all tokens. With exits, in fp32 as these compute:
        rounded to half precision, differences of 1e-7 between batches could become as large as its steps.
        """
        if self.exits is None:
            return logits
        answers = self.exits.answers
        if self.exits.words is not None:
            return torch.where((self.exits.layers > 0)[:, None], answers, logits.float())
        assert self.remaining is not None
        return answers.index_copy(0, self.remaining, logits.float())


class TRBertEncoder(nn.Module):
    """A backbone's layers with a selector before each reduction layer."""

    def __init__(self, config: TRBertConfig):
        super().__init__()
        self.config, self.backbone = config, BACKBONES[config.backbone]
        self.layer = nn.ModuleList([self.backbone.layer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = self.backbone.final_norm(config)
        self.selectors = nn.ModuleList([selector_class(config)(config) for _ in config.reduction_layers])
        options = config.exit_options
        heads = [] if options is None else [EXIT_HEADS[options.head](config) for _ in options.layers]
        self.exits = nn.ModuleList(heads)
        self.gates = nn.ModuleList([Gate(config) for _ in self.layer] if config.gates is not None else [])

    def forward(
        self,
        state: TokenState,
        policy: SelectionPolicy | None,
        exit_policy: ExitPolicy | None = None,
        *,
        words: Tensor | None = None,
        token_states: bool = True,
        output_hidden_states: bool = False,
        output_selections: bool = False,
        output_exits: bool = False,
        output_layers: bool = False,
    ) -> TRBertModelOutput:
        """Run the remaining layers from a state: all tokens without a policy, all layers without an exit policy.

        The options are those of `TRBertModel.forward`.
        """
        reductions = {layer: i for i, layer in enumerate(self.config.reduction_layers)} if policy else {}
        hidden_states: list[Tensor] = []
        selections: list[Selection] = []
        trace = Trace(state, len(self.layer), tokens=output_layers)
        exits = self._exits(state, exit_policy, words, remember=token_states, record=output_exits)
        while state.layer < len(self.layer) and len(state.sequences):
            trace.enters(state)
            if policy and state.layer in reductions:
                candidates = self.candidates(state, reductions[state.layer])
                keep = policy(candidates) | candidates.fixed
                if output_selections:
                    selections.append(Selection(**vars(candidates), keep=keep))
                state = self._reduced(state, candidates, keep, remember=token_states)
                del candidates, keep  # they hold the states of the dropped tokens
            trace.reduced(state)
            if output_hidden_states:
                hidden_states.append(state.states)
            state = self._prepared(state)
            ran, mixed = self._running(state, exit_policy, trace)
            trace.computes(state, ran)
            before_norm = None
            if exits is not None and exits.keeps_before_norm(state.layer):
                before_norm = self._layer(state, normalised=False)
                norm = self.backbone.output_norm(self.layer[state.layer])
                state = self._after(state, norm(before_norm))
            else:
                before, state = state, self.after_layer(state, ran)
                if mixed is not None:
                    weights = mixed[sequence_of(state.cu_seqlens, len(state.token_indices))].unsqueeze(-1)
                    state = dataclasses.replace(state, hidden=torch.lerp(state.hidden, before.hidden, weights))
            if exits is not None:
                state = exits.after(state, before_norm, ran)
        first = self.final_norm(state.first_states())
        return TRBertModelOutput(
            last_hidden_state=self.final_norm(state.all_states()) if token_states else None,
            cls_hidden_state=first,
            pooled_state=first if self.config.classifier_pooling == "cls" else self._mean_states(state),
            kept_tokens=tuple(trace.present(layer) for layer in reductions),
            hidden_states=(*hidden_states, state.states) if output_hidden_states else None,
            selections=tuple(selections) if output_selections else None,
            trace=trace,
            exits=exits,
            remaining=state.sequences,
        )

    def candidates(self, state: TokenState, reduction: int) -> Candidates:
        """The tokens of a state, halted ones included, with their keep logits from the reduction's selector."""
        hidden, indices, positions, cu_seqlens = state.states, state.token_indices, state.positions, state.cu_seqlens
        if state.halted is not None:
            halted = state.halted
            indices = torch.cat([indices, halted.token_indices])
            order = indices.argsort()
            indices, hidden = indices[order], torch.cat([hidden, halted.hidden])[order]
            cu_seqlens = cu_seqlens + halted.cu_seqlens
            positions = state.all_positions[indices]
        match = state.match.at(indices) if state.match is not None else None
        logits = self.selectors[reduction](hidden, match)
        fixed = torch.zeros_like(logits, dtype=torch.bool)
        if match is not None and state.layer < self.config.question_layers:
            fixed |= match.asked
        fixed[first_tokens(cu_seqlens)] = True  # always keep [CLS], so that no sequence becomes empty
        return Candidates(reduction, hidden, logits, fixed, indices, positions, cu_seqlens, match)

    def _reduced(self, state: TokenState, candidates: Candidates, keep: Tensor, *, remember: bool) -> TokenState:
        if state.halted is None:
            return state.kept(keep, remember=remember)
        kept = torch.zeros(len(state.all_positions), dtype=torch.bool, device=keep.device)
        kept[candidates.token_indices] = keep
        return state.kept(kept[state.token_indices], remember=remember, halted=kept[state.halted.token_indices])

    def _exits(
        self, state: TokenState, policy: ExitPolicy | None, words: Tensor | None, *, remember: bool, record: bool
    ) -> ExitPass | None:
        options = self.config.exit_options
        if options is None or (policy is None and not options.answers_all and not record):
            return None
        places = None
        if options.head == "words":
            places = Words.of(words, state.cu_seqlens, len(state.token_indices), options.window)
        return ExitPass(self.config, self.exits, policy or NO_EXITS, state, places, remember=remember, record=record)

    def _running(
        self, state: TokenState, policy: ExitPolicy | None, trace: Trace
    ) -> tuple[Tensor | None, Tensor | None]:
        """The sequences that do not skip the next layer, bool (sequences,); None if all run.

        And, in training, the weights to mix the layer's input with its output, (sequences,).
        """
        if policy is None or not self.gates or not policy.asks_gate(state.layer):
            return None, None
        trace.gated.append(state.layer)
        skipped = policy.skips(state.layer, self.gates[state.layer](state), state.sequences)
        if skipped.is_floating_point():
            return None, skipped
        return (~skipped if bool(skipped.any()) else None), None

    def _mean_states(self, state: TokenState) -> Tensor:
        """The mean of the final states of each sequence's tokens, without dropped ones, (sequences, hidden)."""
        states = self.final_norm(state.states)
        sums = sequence_sums(states.float(), state.cu_seqlens)
        return (sums / state.cu_seqlens.diff()[:, None]).to(states.dtype)

    def _prepared(self, state: TokenState) -> TokenState:
        """The state with the backbone's geometry."""
        if state.geometry is not None:
            return state
        return dataclasses.replace(state, geometry=self.backbone.geometry(self.config, state))

    def after_layer(self, state: TokenState, ran: Tensor | None = None) -> TokenState:
        """Run one layer; ran: bool (sequences,), those that do not pass over it."""
        state = self._prepared(state)
        if ran is None:
            return self._after(state, self._layer(state))
        if not bool(ran.any()):
            return state.after(state.hidden)
        part = self._prepared(state.of_sequences(ran, remember=False))
        own = ran[sequence_of(state.cu_seqlens, len(state.token_indices))].nonzero().squeeze(1)
        rows = own if state.layout is None else state.layout.rows[own]
        done = self._after(part, self._layer(part))
        return state.after(state.hidden.index_copy(0, rows, done.states))

    def _layer(self, state: TokenState, *, normalised: bool = True) -> Tensor:
        """The output of the next layer, in the rows of `state.hidden`."""
        layer = self.layer[state.layer]
        if isinstance(layer, FusedLayer):
            return layer(state, normalised=normalised)
        hidden, cu_seqlens, active = state.hidden, state.cu_seqlens, None
        if state.halted is not None:  # transformers' layer has a query for every key
            indices = torch.cat([state.token_indices, state.halted.token_indices])
            order = indices.argsort()
            hidden = torch.cat([hidden, state.halted.hidden])[order]
            cu_seqlens = cu_seqlens + state.halted.cu_seqlens
            active = order.argsort()[: len(state.token_indices)]
        output = self.backbone.run_layer(
            layer, hidden, state.geometry, cu_seqlens, state.max_keys, normalised=normalised
        )
        return output if active is None else output[active]

    def _after(self, state: TokenState, hidden: Tensor) -> TokenState:
        """The state after the next layer, whose output is `hidden`."""
        options = self.config.exit_options
        if state.halted is None or options is None or options.kept == "after_norm":
            return state.after(hidden)
        norm = self.backbone.output_norm(self.layer[state.layer])
        return state.after(hidden, norm(state.halted.kept))


def exit_thresholds(config: TRBertConfig) -> ExitThresholds:
    """The policy of a configuration."""
    exits, gates = config.exit_options, config.gate_options
    return ExitThresholds(exits.thresholds if exits else (), gates.threshold if gates else NO_SKIPPING)


class TRBertPreTrainedModel(BertPreTrainedModel):
    config: TRBertConfig
    config_class = TRBertConfig
    base_model_prefix = "bert"
    _keep_in_fp32_modules_strict = ["selectors", "exits", "gates"]
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
        self.pooler = self.encoder.backbone.pooler(config) if add_pooling_layer else None
        self.post_init()

    @classmethod
    def for_tokens(cls, config: TRBertConfig) -> "TRBertModel":
        """The model below a head that reads `token_features`."""
        return cls(config, add_pooling_layer=BACKBONES[config.backbone].token_head)

    def token_features(self, states: Tensor) -> Tensor:
        """What a head for tokens reads of their last hidden states: with `Backbone.token_head` the pooler's output."""
        return self.pooler(states) if self.encoder.backbone.token_head and self.pooler is not None else states

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.embeddings, self.encoder.backbone.token_table)

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.embeddings, self.encoder.backbone.token_table, value)

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
        exit_policy: ExitPolicy | None = None,
        words: Tensor | None = None,
        token_states: bool = True,
        output_hidden_states: bool = False,
        output_selections: bool = False,
        output_exits: bool = False,
        output_layers: bool = False,
    ) -> TRBertModelOutput:
        """Run the model on a padded batch, on a varlen batch if `cu_seqlens` is given, or from a `state`.

        Args:
            input_ids, attention_mask, token_type_ids: (batch, length), as for any transformers model; or, with
                `cu_seqlens` of shape (sequences + 1,), input_ids and token_type_ids of shape (total tokens,).
            position_ids: (total tokens,), with `cu_seqlens` only. Default: from 0 in each sequence. The RoBERTa
                backbone ignores them and always uses the default.
            max_seqlen: tokens of the longest sequence, with `cu_seqlens` only. Default: computed from `cu_seqlens`.
            state: from `before_reduction`, instead of all of the above.
            reduce: False runs the dense model, all layers of it.
            selection_policy: chooses the tokens to keep. Default: the thresholds in the configuration.
            exit_policy: decides what leaves early and which layers are skipped. Default: as in the configuration.
            words: int64 (total tokens,), with `cu_seqlens` only: the index of each token's word in its sequence, -1 for
                tokens of no word, for exits that read words. Default: each token but a sequence's first and last.
            token_states: False leaves out `last_hidden_state` and saves the cost of collecting dropped tokens.
            output_hidden_states, output_selections: fill these fields of the output.
            output_exits: record the logits of all exits in `exits`.
            output_layers: count the layers that computed each token, in `trace`.

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
            (exit_policy or exit_thresholds(self.config)) if reduce else None,
            words=words,
            token_states=token_states,
            output_hidden_states=output_hidden_states,
            output_selections=output_selections,
            output_exits=output_exits,
            output_layers=output_layers,
        )
        if self.pooler is not None:
            output.pooler_output = self.pooler(output.pooled_state)
        if padded_indices is not None and input_ids is not None and output.last_hidden_state is not None:
            output.last_hidden_state = _unpack(output.last_hidden_state, padded_indices, input_ids.shape, 0.0)
        return output

    def begin(self, batch: VarlenBatch, *, reduce: bool = True) -> TokenState:
        """Embed a batch; returns the state before layer 0."""
        hidden = self.encoder.backbone.embed(self.embeddings, batch)
        match = None
        if self.config.question_aware and reduce:
            words: Any = self.get_input_embeddings().weight
            match = question_match(batch.input_ids, batch.token_type_ids, batch.cu_seqlens, words)
        token_indices = torch.arange(len(hidden), device=hidden.device)
        positions = positions_in(batch.cu_seqlens, len(hidden))
        state = TokenState(
            layer=0,
            hidden=hidden,
            token_indices=token_indices,
            positions=positions,
            all_positions=positions,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            max_keys=batch.max_seqlen,
            sequences=torch.arange(len(batch.cu_seqlens) - 1, device=hidden.device),
            match=match,
        )
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
    exits = model.config.exit_options
    halts = exits is not None and exits.halts
    for i, layer in enumerate(encoder.layer):
        if not isinstance(layer, FusedLayer):
            encoder.layer[i] = encoder.backbone.fused(layer, packed=packed, halts=halts)
    model.eval().requires_grad_(False)
