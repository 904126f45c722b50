"""TR-BERT in reading order: token selector, reduction loop, model, task models.

The layers are transformers' own `BertEmbeddings` and `BertLayer`, run on one (1, total tokens, hidden) tensor; what
is here is what drops tokens between them (Ye et al., NAACL 2021, section 3; thunlp/TR-BERT's AUTOBert classes).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertPreTrainedModel, BertSelfAttention
from transformers.utils import ModelOutput

from .configuration import TRBertConfig
from .errors import ConfigurationError, InputError
from .question_match import NEIGHBOUR_SCALES, SCALES, QuestionMatch, question_match
from .varlen import ATTENTION_NAME, HALF_PRECISION, VarlenBatch, first_tokens, varlen_attention

# On CPUs a layer runs on groups of whole sequences of about this many tokens: larger activations leave the caches, and
# those over 32 MB are mapped and unmapped by glibc at every operation.
LAYER_TOKENS = 1024
# In half precision their matrix products are oneDNN's, which compiles a kernel and lays the weights out anew for every
# number of rows it has not seen lately: larger groups, filled up with rows of zeros to a multiple. (240 documents of
# 20 Newsgroups, reduced 3×, 2 cores with AMX: 2.6 s in fp32, 3.5 s in bfloat16 without this, 1.6 s with it.)
HALF_LAYER_TOKENS = 4096
HALF_LAYER_MULTIPLE = 512

# Called at each reduction with its index, the keep logits (tokens entering,) and their cu_seqlens; returns the tokens
# that go on, bool (tokens entering,). The first token of a sequence goes on whatever it says, and so does one with the
# keep logit `CERTAIN`.
SelectionPolicy = Callable[[int, Tensor, Tensor], Tensor]
# The keep logit of tokens that are not for the selectors to judge (`TRBertConfig.question_layers`): finite, for it
# meets arithmetic, and with a probability that no threshold is above.
CERTAIN = 100.0


@dataclass
class Selection:
    """What one reduction saw and did.

    hidden: the states it judged, (tokens entering, hidden); match: of the same tokens with the question, for selectors
    that know it; logits: fp32 (tokens entering,); keep: bool, the same shape; fixed: bool, the same shape, tokens that
    go on whatever their logits; token_index: int64, the same shape, the tokens' places in the varlen batch, which is
    repeated end to end if there are several samples; cu_seqlens: int32 (sequences + 1,) of the tokens entering.
    """

    hidden: Tensor
    match: QuestionMatch | None
    logits: Tensor
    keep: Tensor
    fixed: Tensor
    token_index: Tensor
    cu_seqlens: Tensor


@dataclass
class TRBertModelOutput(ModelOutput):
    """last_hidden_state: (total tokens, hidden), or (batch, length, hidden) with zeros at masked positions for padded
    input; None if `token_states=False`. A skipped token's is the state it had when it left.
    cls_hidden_state: (sequences, hidden). pooler_output: (sequences, hidden).
    kept_tokens: one int64 (sequences,) a reduction layer, tokens alive after it.
    hidden_states: the input of every layer, (tokens alive, hidden) each, on request.
    selections: one `Selection` a reduction layer, on request.
    """

    last_hidden_state: Tensor | None = None
    cls_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None


@dataclass
class TRBertSequenceClassifierOutput(ModelOutput):
    """loss: (); logits: (sequences, labels); the others as in `TRBertModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None


@dataclass
class TRBertQuestionAnsweringOutput(ModelOutput):
    """loss: (); start_logits and end_logits: (total tokens,), or (batch, length) with the dtype's minimum at masked
    positions for padded input; the others as in `TRBertModelOutput`."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    selections: tuple[Selection, ...] | None = None


@dataclass
class TRBertMultipleChoiceOutput(ModelOutput):
    """loss: (); logits: (groups, choices); kept_tokens as in `TRBertModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    kept_tokens: tuple[Tensor, ...] | None = None


class TokenSelector(nn.Module):
    """The paper's policy network (section 3.2): (tokens, hidden) → keep logits (tokens,), always in fp32, so that the
    choice of tokens does not hang on the precision the layers run in.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden_size, config.selector_size)
        self.linear_2 = nn.Linear(config.selector_size, 1)

    def start_afresh(self) -> None:
        """Every token goes on."""
        nn.init.constant_(self.linear_2.bias, 1.0)

    def forward(self, hidden: Tensor, match: QuestionMatch | None = None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear_2(F.gelu(self.linear_1(hidden.float()))).squeeze(-1)


class QuestionTokenSelector(nn.Module):
    """A selector that knows the question: (tokens, hidden) and their match → keep logits (tokens,), in fp32.

    It sees of a token how much of the question stands near it, with a learnt weight for each of its words, and whether
    it and its neighbours are of the kind that is asked for: a product of what the question asks with what they are,
    both learnt. A token's state by itself is not seen: selectors learn by heart what was answered with in training.
    (On the embeddings, of 866 questions about held-out paragraphs of SQuAD: the whole answer among the better half of
    the tokens for 70 of 100 with the paper's network beside how much of the question stands near, 87 without it, 91
    with the kind; behind layers 1 to 4 of a fine-tuned model, the network beside all this changes nothing.)
    """

    def __init__(self, config: TRBertConfig):
        super().__init__()
        features = len(SCALES) + len(NEIGHBOUR_SCALES)
        self.word_weight = nn.Linear(config.hidden_size, 1, bias=False)
        self.asks = nn.Linear(config.hidden_size, config.selector_size, bias=False)
        self.answers = nn.Linear(config.hidden_size, config.selector_size, bias=False)
        self.evidence = nn.Linear(features, 1)
        self.linear_1 = nn.Linear(features, config.selector_size)
        self.linear_2 = nn.Linear(config.selector_size, 1, bias=False)

    def start_afresh(self) -> None:
        """All words alike, and the nearer the better: a good choice to begin with."""
        nn.init.zeros_(self.word_weight.weight)
        nn.init.constant_(self.evidence.weight, 2.0)
        nn.init.constant_(self.evidence.bias, -3.0)  # few tokens are near an answer

    def forward(self, hidden: Tensor, match: QuestionMatch) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            words = self.word_weight(match.words.float()).squeeze(-1)
            coverage = match.coverage((words - words.detach().amax(1, keepdim=True)).exp())
            asked = match.asked_mean(self.asks(hidden))
            kind = match.around((self.answers(hidden) * asked[match.sequence]).sum(-1))
            features = torch.cat([coverage, kind], dim=1)
            return (self.evidence(features) + self.linear_2(F.gelu(self.linear_1(features)))).squeeze(-1)


class FusedSelfAttention(nn.Module):
    """BERT's self-attention with query, key and value as one matrix product, for inference."""

    def __init__(self, attention: BertSelfAttention):
        super().__init__()
        parts = (attention.query, attention.key, attention.value)
        self.weight = nn.Buffer(torch.cat([part.weight.detach() for part in parts]))
        self.bias = nn.Buffer(torch.cat([part.bias.detach() for part in parts]))
        self.heads: int = attention.num_attention_heads
        self.scaling: float = attention.scaling

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
        qkv = F.linear(hidden_states, self.weight, self.bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        output, _ = varlen_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            cu_seqlens=kwargs["cu_seqlens"],
            max_seqlen=kwargs["max_seqlen"],
        )
        return output.flatten(2), None


def fuse_for_inference(model: "TRBertPreTrainedModel") -> None:
    """Fuse the attention projections of every layer, in place. Such a model is for computing, not for saving."""
    for layer in model.base_model.encoder.layer:
        if not isinstance(layer.attention.self, FusedSelfAttention):
            layer.attention.self = FusedSelfAttention(layer.attention.self)
    model.eval().requires_grad_(False)


class TRBertEncoder(nn.Module):
    """BERT's layers with a selector in front of each reduction layer."""

    def __init__(self, config: TRBertConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([BertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers)])
        selector = QuestionTokenSelector if config.question_aware else TokenSelector
        self.selectors = nn.ModuleList([selector(config) for _ in config.reduction_layers])

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        match: QuestionMatch | None = None,
        *,
        reduce: bool = True,
        selection_policy: SelectionPolicy | None = None,
        samples: int = 1,
        token_states: bool = True,
        output_hidden_states: bool = False,
        output_selections: bool = False,
    ) -> TRBertModelOutput:
        """hidden: (total tokens, hidden) with its cu_seqlens; match: of all tokens, for selectors that know the
        question; the options are `TRBertModel.forward`'s."""
        reductions = {layer: i for i, layer in enumerate(self.config.reduction_layers)} if reduce else {}
        policy = selection_policy or self.threshold_policy
        alive = torch.arange(hidden.shape[0], device=hidden.device)
        skipped: list[tuple[Tensor, Tensor]] = []
        kept_tokens: list[Tensor] = []
        hidden_states: list[Tensor] = []
        selections: list[Selection] = []

        for index, layer in enumerate(self.layer):
            if index in reductions:
                reduction = reductions[index]
                if reduction == 0 and samples > 1:
                    hidden, cu_seqlens = _repeated(hidden, cu_seqlens, samples)
                    alive = torch.arange(hidden.shape[0], device=hidden.device)
                    match = match.repeated(samples) if match is not None else None
                seen = match.at(alive) if match is not None else None
                logits = self.selectors[reduction](hidden, seen)
                fixed = torch.zeros_like(logits, dtype=torch.bool)
                if seen is not None and index < self.config.question_layers:
                    fixed |= seen.asked
                    logits = logits.masked_fill(seen.asked, CERTAIN)
                fixed[first_tokens(cu_seqlens)] = True  # [CLS] always stays, so a sequence never dies out
                keep = policy(reduction, logits, cu_seqlens) | fixed
                if output_selections:
                    selections.append(Selection(hidden, seen, logits, keep, fixed, alive, cu_seqlens))
                kept_before = F.pad(keep.cumsum(0), (1, 0))
                cu_seqlens = kept_before[cu_seqlens.long()].to(torch.int32)
                # The one device-to-host copy of a reduction; nonzero would add another.
                bounds = cu_seqlens.tolist()
                max_seqlen = max(end - start for start, end in zip(bounds, bounds[1:]))
                if bounds[-1] < hidden.shape[0]:
                    goes_on = torch.nonzero_static(keep, size=bounds[-1]).squeeze(1)
                    if token_states:
                        leaves = torch.nonzero_static(~keep, size=hidden.shape[0] - bounds[-1]).squeeze(1)
                        skipped.append((alive[leaves], hidden[leaves]))
                    hidden, alive = hidden[goes_on], alive[goes_on]
                kept_tokens.append(cu_seqlens.diff().long())
            if output_hidden_states:
                hidden_states.append(hidden)
            hidden = self._run_layer(layer, hidden, cu_seqlens, max_seqlen)
        if output_hidden_states:
            hidden_states.append(hidden)

        last = None
        if token_states:
            order = torch.cat([index for index, _ in skipped] + [alive])
            last = torch.cat([state for _, state in skipped] + [hidden])[order.argsort()] if skipped else hidden
        return TRBertModelOutput(
            last_hidden_state=last,
            cls_hidden_state=hidden.index_select(0, first_tokens(cu_seqlens)),
            kept_tokens=tuple(kept_tokens),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            selections=tuple(selections) if output_selections else None,
        )

    def _run_layer(self, layer: BertLayer, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """One layer on (tokens, hidden); on CPUs in inference, group by group of sequences."""
        half = not hidden.is_cuda and (hidden.dtype in HALF_PRECISION or torch.is_autocast_enabled("cpu"))

        def run(group: Tensor, lengths: Tensor) -> Tensor:
            rows, missing = group.shape[0], -group.shape[0] % HALF_LAYER_MULTIPLE if half else 0
            group = F.pad(group, (0, 0, 0, missing)) if missing else group
            output = layer(group.unsqueeze(0), cu_seqlens=lengths, max_seqlen=max_seqlen).squeeze(0)
            return output[:rows] if missing else output

        limit = HALF_LAYER_TOKENS if half else LAYER_TOKENS
        if self.training or hidden.is_cuda or hidden.shape[0] <= limit:
            return run(hidden, cu_seqlens)
        bounds, outputs, first = cu_seqlens.tolist(), [], 0
        for last in range(1, len(bounds)):
            if last == len(bounds) - 1 or bounds[last + 1] - bounds[first] > limit:
                group = hidden[bounds[first] : bounds[last]]
                outputs.append(run(group, cu_seqlens[first : last + 1] - bounds[first]))
                first = last
        return torch.cat(outputs)

    def threshold_policy(self, reduction: int, logits: Tensor, cu_seqlens: Tensor) -> Tensor:
        """What goes on if nothing else is said: tokens whose keep probability reaches the reduction's threshold."""
        return torch.sigmoid(logits) >= self.config.selector_thresholds[reduction]


def _repeated(hidden: Tensor, cu_seqlens: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """A varlen batch laid end to end with itself."""
    lengths = cu_seqlens.diff().repeat(times)
    return hidden.repeat(times, 1), F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


class TRBertPooler(nn.Module):
    """BERT's pooler, or DistilBERT's `pre_classifier`: the same layer under another activation."""

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
    # A plain BERT checkpoint has no selectors, and position_ids was a stored buffer once.
    _keys_to_ignore_on_load_unexpected = [r"position_ids", r"cls\.", r"embeddings\.token_type_ids"]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # from_pretrained would choose sdpa, which ignores cu_seqlens without a word and attends across sequences.
        if requested_attention not in (None, ATTENTION_NAME):
            raise ConfigurationError(
                f"attn_implementation={requested_attention!r}: TR-BERT computes on batches without padding and "
                f"supports only {ATTENTION_NAME!r}, which is the default; leave the argument out"
            )
        return ATTENTION_NAME


class TRBertModel(TRBertPreTrainedModel):
    """BERT with dynamic token reduction, without a task head."""

    def __init__(self, config: TRBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = TRBertEncoder(config)
        self.pooler = TRBertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        reduce: bool = True,
        selection_policy: SelectionPolicy | None = None,
        samples: int = 1,
        token_states: bool = True,
        output_hidden_states: bool = False,
        output_selections: bool = False,
    ) -> TRBertModelOutput:
        """Compute on a padded batch, or on a varlen batch when `cu_seqlens` is given.

        Args:
            input_ids, attention_mask, token_type_ids: (batch, length), as for any transformers model; or, with
                `cu_seqlens` of shape (sequences + 1,), input_ids and token_type_ids of shape (total tokens,).
            position_ids: (total tokens,), with `cu_seqlens` only. Default: from 0 in each sequence.
            max_seqlen: tokens of the longest sequence, with `cu_seqlens` only. Default: computed from it.
            reduce: False runs the dense model.
            selection_policy: chooses the tokens that go on instead of the thresholds.
            samples: with a selection policy that chooses at random: repeat the batch this often at the first
                reduction, so that the samples share what is before it. The output then has samples · sequences
                sequences, the whole batch after the whole batch. With `cu_seqlens` only.
            token_states: False leaves `last_hidden_state` out, and with it the cost of collecting skipped tokens.
            output_hidden_states, output_selections: fill these fields of the output.

        Raises:
            InputError: an empty batch or sequence, or one longer than the model's positions.
        """
        padded_indices = None
        if cu_seqlens is None:
            batch, padded_indices = VarlenBatch.from_padded(input_ids, attention_mask, token_type_ids)
        else:
            batch = self._varlen_batch(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
        longest = input_ids.shape[1] if padded_indices is not None else batch.max_seqlen
        if longest > self.config.max_position_embeddings:
            raise InputError(
                f"a sequence of {longest} tokens is longer than the model's {self.config.max_position_embeddings} "
                "positions: cut it into windows (trbert_model.engine does) or truncate it"
            )
        hidden = self.embeddings(
            input_ids=batch.input_ids.unsqueeze(0),
            token_type_ids=batch.token_type_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
        ).squeeze(0)
        match = None
        if self.config.question_aware and reduce:
            words = self.embeddings.word_embeddings.weight
            match = question_match(batch.input_ids, batch.token_type_ids, batch.cu_seqlens, words)
        output = self.encoder(
            hidden,
            batch.cu_seqlens,
            batch.max_seqlen,
            match,
            reduce=reduce,
            selection_policy=selection_policy,
            samples=samples,
            token_states=token_states,
            output_hidden_states=output_hidden_states,
            output_selections=output_selections,
        )
        if self.pooler is not None:
            output.pooler_output = self.pooler(output.cls_hidden_state)
        if padded_indices is not None and output.last_hidden_state is not None:
            output.last_hidden_state = _unpack(output.last_hidden_state, padded_indices, input_ids.shape, 0.0)
        return output

    @staticmethod
    def _varlen_batch(
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
    ) -> VarlenBatch:
        if input_ids.dim() != 1 or len(cu_seqlens) < 2:
            raise InputError(
                f"a varlen batch needs input_ids of shape (total tokens,) and at least one sequence; got input_ids "
                f"{tuple(input_ids.shape)} and cu_seqlens {tuple(cu_seqlens.shape)}"
            )
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        if position_ids is None:
            starts = first_tokens(cu_seqlens).repeat_interleave(cu_seqlens.diff().long())
            position_ids = torch.arange(len(input_ids), device=input_ids.device) - starts
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        return VarlenBatch(input_ids, token_type_ids, position_ids, cu_seqlens.to(torch.int32), max_seqlen)


def _unpack(values: Tensor, indices: Tensor, shape: torch.Size, fill: float) -> Tensor:
    """(total tokens, ...) back to (batch, length, ...), `fill` where nothing was."""
    padded = values.new_full((shape[0] * shape[1], *values.shape[1:]), fill)
    return padded.index_copy(0, indices, values).unflatten(0, (shape[0], shape[1]))


def _head_dropout(config: TRBertConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class TRBertForSequenceClassification(TRBertPreTrainedModel):
    """One label a sequence, from [CLS]. Multi-label and regression heads are refused.

    `forward` takes `labels`, int64 (sequences,), and `TRBertModel.forward`'s arguments.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__(config)
        if config.problem_type not in (None, "single_label_classification"):
            raise ConfigurationError(
                f"problem_type {config.problem_type!r} is not supported: TR-BERT's classification head gives each "
                "document exactly one label"
            )
        if config.num_labels < 2:
            raise ConfigurationError(
                f"num_labels {config.num_labels} makes this a regression head, which is not supported: "
                "classification needs at least two labels"
            )
        self.bert = TRBertModel(config)
        self.dropout = _head_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, *args, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs
    ) -> TRBertSequenceClassifierOutput:
        output = self.bert(input_ids, *args, **{**kwargs, "token_states": False})
        logits = self.classifier(self.dropout(output.pooler_output))
        return TRBertSequenceClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            pooler_output=output.pooler_output,
            kept_tokens=output.kept_tokens,
            hidden_states=output.hidden_states,
            selections=output.selections,
        )


class TRBertForQuestionAnswering(TRBertPreTrainedModel):
    """Start and end logits for every token; a skipped token answers from the state it left with.

    thunlp/TR-BERT's head for TriviaQA is the same one, trained with one softmax over all windows of a document, which
    is how every question is trained and answered here (`losses.AnswerLosses`, `tasks.question_answering`).

    `forward` takes `start_positions` and `end_positions`, int64 (sequences,), token indices within the sequence (the
    column, for padded input), and `TRBertModel.forward`'s arguments.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__(config)
        self.bert = TRBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> TRBertQuestionAnsweringOutput:
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            cu_seqlens=cu_seqlens,
            **{**kwargs, "token_states": True},
        )
        logits = self.qa_outputs(output.last_hidden_state)
        if cu_seqlens is None and attention_mask is not None:
            logits = logits.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (
                _position_loss(start_logits, start_positions, cu_seqlens)
                + _position_loss(end_logits, end_positions, cu_seqlens)
            ) / 2
        return TRBertQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            kept_tokens=output.kept_tokens,
            hidden_states=output.hidden_states,
            selections=output.selections,
        )


def _position_loss(logits: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean cross-entropy of one position a sequence."""
    if cu_seqlens is None:
        return F.cross_entropy(logits, positions)
    sequences = logits.split(cu_seqlens.diff().tolist())
    losses = [F.cross_entropy(sequence, position) for sequence, position in zip(sequences, positions)]
    return torch.stack(losses).mean()


class TRBertForMultipleChoice(TRBertPreTrainedModel):
    """One of several options, from the [CLS] of one row an option: thunlp/TR-BERT's head for RACE.

    The rows of a group begin with the same tokens ([CLS], article and question). These are judged together: each goes
    on in all rows of its group or in none, by the mean of its keep logits. An option's own tokens always go on.
    """

    def __init__(self, config: TRBertConfig):
        super().__init__(config)
        self.bert = TRBertModel(config)
        self.dropout = _head_dropout(config)
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
            shared_tokens: int64 (groups,), with how many tokens all rows of a group begin alike.
            cu_seqlens, num_choices: of a varlen batch whose rows are `num_choices` a group, group after group.
            labels: int64 (groups,), the right option.
            reduce, selection_policy: `TRBertModel.forward`'s.

        Raises:
            InputError: rows that do not make whole groups.
        """
        if cu_seqlens is None:
            num_choices = input_ids.shape[1]
            input_ids = input_ids.flatten(0, 1)
            attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
            token_type_ids = None if token_type_ids is None else token_type_ids.flatten(0, 1)
        rows = input_ids.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if not num_choices or rows != num_choices * len(shared_tokens):
            raise InputError(f"{rows} rows are not {len(shared_tokens)} groups of {num_choices} options")
        policy = GroupPolicy(selection_policy or self.bert.encoder.threshold_policy, shared_tokens, num_choices)
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            cu_seqlens=cu_seqlens,
            reduce=reduce,
            selection_policy=policy,
            token_states=False,
        )
        logits = self.classifier(self.dropout(output.pooler_output)).view(-1, num_choices)
        return TRBertMultipleChoiceOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            kept_tokens=output.kept_tokens,
        )


class GroupPolicy:
    """A policy for rows in groups that begin alike: what they share goes on in all rows of a group or in none, and
    the rest always. For one forward pass.

    Args:
        policy: judges the shared tokens by the mean of their keep logits over the group's rows.
        shared: int64 (groups,), tokens that the rows of a group begin with.
        choices: rows in a group.
    """

    def __init__(self, policy: SelectionPolicy, shared: Tensor, choices: int):
        self.policy, self.shared, self.choices = policy, shared, choices

    def __call__(self, reduction: int, logits: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths, groups = cu_seqlens.diff().long(), len(self.shared)
        row = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths)
        place = torch.arange(len(logits), device=logits.device) - first_tokens(cu_seqlens)[row]
        shared = place < self.shared[row // self.choices]
        first_slots = F.pad(self.shared.cumsum(0), (1, 0))
        slot = (first_slots[row // self.choices] + place)[shared]
        means = logits.new_zeros(int(first_slots[-1])).index_add_(0, slot, logits[shared]) / self.choices
        keep = self.policy(reduction, logits.masked_scatter(shared, means[slot]), cu_seqlens).clone()
        keep[first_tokens(cu_seqlens)] = True
        # A policy that draws at random may say something else in each row: the group's first row decides.
        first_row = (row % self.choices == 0)[shared]
        goes_on = torch.zeros(len(means), dtype=torch.bool, device=logits.device)
        goes_on[slot[first_row]] = keep[shared][first_row]
        owner = torch.arange(groups, device=logits.device).repeat_interleave(self.shared)
        self.shared = torch.zeros_like(self.shared).index_add_(0, owner, goes_on.long())
        keep[shared] = goes_on[slot]
        return keep | ~shared


AutoConfig.register("trbert", TRBertConfig)
AutoModel.register(TRBertConfig, TRBertModel)
AutoModelForSequenceClassification.register(TRBertConfig, TRBertForSequenceClassification)
AutoModelForMultipleChoice.register(TRBertConfig, TRBertForMultipleChoice)
AutoModelForQuestionAnswering.register(TRBertConfig, TRBertForQuestionAnswering)
