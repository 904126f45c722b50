"""TRBertConfig: BERT's configuration plus where and how tokens are dropped."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from .backbones import BACKBONES
from .errors import ConfigurationError
from .exits.options import ExitOptions, GateOptions


@strict
class TRBertConfig(BertConfig):
    r"""
    Configuration of a TR-BERT (Ye et al., NAACL 2021): a BERT with a token selector in front of some of its layers.

    Args:
        backbone (`str`): family of the layers: `"bert"` (also for DistilBERT), `"roberta"` (also for XLM-R) or
            `"modernbert"`.
        layer_config (`dict`, *optional*): what the layers have and BERT's don't, by the names of the backbone's own
            configuration in transformers: for ModernBERT `ModernBertConfig`'s.
        reduction_layers (`list[int]`, *optional*):
            Increasing zero-based layer indices. The selector of layer `i` decides from the input of layer `i` which
            tokens to keep; 0 selects on the embeddings. Default: the paper's `[1, num_hidden_layers // 2]`. An empty
            list gives a plain BERT.
        selector_size (`int`): width of the selectors' hidden layer.
        selector_thresholds (`list[float]`, *optional*): one per reduction layer; a token is kept if its keep
            probability is at least the threshold. A run may override them. Default: 0.5 everywhere, as in the
            original.
        question_aware (`bool`): selectors use the question, which is segment 0: how much of it occurs near each other
            token, and whether the token is of the kind it asks for (`QuestionTokenSelector`). Not in the original.
        question_layers (`int`, *optional*): with `question_aware`, selectors before this layer always keep the
            question's tokens; later ones judge them like others. Default: two thirds of the layers.
        classifier_pooling (`str`): what represents a sequence for a classifier: `"cls"`, the state of its first token,
            or `"mean"`, the mean of its tokens' states. The mean is over the tokens that no reduction dropped: the
            states of the others are those of an earlier layer, which the classifier did not learn to use.
        pooler_activation (`str`): `"tanh"` (BERT) or `"relu"` (DistilBERT's `pre_classifier`).
        exits (`dict`, *optional*): the fields of `ExitOptions`; without them nothing leaves before the last layer.
        gates (`dict`, *optional*): the fields of `GateOptions`; without them every layer is computed.
        text_pairs (`bool`): a classifier of pairs: segment 0 is a question (or claim, or premise), segment 1 the text.
        window_pooling (`str`): how a classifier joins the logits of a document's windows: `"mean"`, weighted by their
            tokens, or `"log-sum-exp"`, for which one window suffices that is sure.

    Raises:
        ConfigurationError: an unknown backbone, pooling or pooler activation, layers out of range or out of order,
            thresholds that do not match them, more question layers than layers, a decoder, or a chunked feed-forward
            (it does not work on batches without padding).
    """

    model_type = "trbert"

    backbone: str = "bert"
    layer_config: dict | None = None
    selector_size: int = 32
    if TYPE_CHECKING:  # never None once __post_init__ has run
        question_layers: int
        reduction_layers: list[int]
        selector_thresholds: list[float]
    else:
        reduction_layers: list[int] | None = None
        selector_thresholds: list[float] | None = None
        question_layers: int | None = None
    question_aware: bool = False
    classifier_pooling: str = "cls"
    pooler_activation: str = "tanh"
    exits: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    text_pairs: bool = False
    window_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.backbone not in BACKBONES:
            raise ConfigurationError(f"backbone {self.backbone!r} is none of {', '.join(BACKBONES)}")
        depth = self.num_hidden_layers
        if self.reduction_layers is None:
            self.reduction_layers = sorted({1, depth // 2} & set(range(depth)))
        layers = self.reduction_layers
        if any(not 0 <= layer < depth for layer in layers) or any(a >= b for a, b in zip(layers, layers[1:])):
            raise ConfigurationError(
                f"reduction_layers {layers} must be increasing indices from 0 to {depth - 1} "
                f"(the model has {depth} layers)"
            )
        if self.question_layers is None:
            self.question_layers = 2 * depth // 3
        if not 0 <= self.question_layers <= depth:
            raise ConfigurationError(
                f"question_layers {self.question_layers} must be from 0 to {depth} (the model has {depth} layers)"
            )
        if self.selector_thresholds is None:
            self.selector_thresholds = [0.5] * len(layers)
        if len(self.selector_thresholds) != len(layers):
            raise ConfigurationError(
                f"selector_thresholds {self.selector_thresholds} must hold one threshold for each of the "
                f"{len(layers)} reduction layers {layers}"
            )
        if self.pooler_activation not in ("tanh", "relu"):
            raise ConfigurationError(f"pooler_activation {self.pooler_activation!r} is neither 'tanh' nor 'relu'")
        if self.classifier_pooling not in ("cls", "mean"):
            raise ConfigurationError(f"classifier_pooling {self.classifier_pooling!r} is neither 'cls' nor 'mean'")
        if self.exit_options is not None:
            self.exit_options.check(depth)
        if self.is_decoder or self.add_cross_attention:
            raise ConfigurationError("TR-BERT is an encoder: is_decoder and add_cross_attention must be false")
        if self.chunk_size_feed_forward != 0:
            raise ConfigurationError("chunk_size_feed_forward must be 0: batches are not padded to its multiple")
        BACKBONES[self.backbone].complete(self)

    @property
    def exit_options(self) -> ExitOptions | None:
        return None if self.exits is None else ExitOptions(**self.exits)

    @property
    def gate_options(self) -> GateOptions | None:
        return None if self.gates is None else GateOptions(**self.gates)

    @property
    def usable_positions(self) -> int:
        """Maximum number of tokens in a sequence."""
        return self.max_position_embeddings - BACKBONES[self.backbone].position_offset(self.pad_token_id or 0)

    @property
    def pair_separators(self) -> int:
        """Number of [SEP] tokens between a question and its passage."""
        return BACKBONES[self.backbone].pair_separators


__all__ = ["TRBertConfig"]
