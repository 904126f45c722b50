"""The dense model's signals for training the selectors: its outputs, and how much each token matters to it.

They are computed once per window of a corpus, independently of the order of training, so that later stages and later
runs with the same dense model can reuse them.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface

from ..configuration import TRBertConfig
from ..exits.policies import uncertainty
from ..labelled import EXTRA_INPUT
from ..losses import TaskLosses
from ..tasks.token_classification.losses import word_losses
from ..terminal import get_logger
from ..varlen import ATTENTION_NAME, varlen_attention

logger = get_logger(__name__)

_QUERIES = 512  # so many at once, since each has a weight for every token of its window
Compute = Callable[[Any, dict[str, Tensor], TaskLosses], tuple[Tensor, Tensor]]


class TeacherSignals:
    """The dense model's signals for all windows of a corpus.

    Args:
        targets: float32 (rows, columns), as from `TaskLosses.signals`.
        target_bounds: int64 (windows + 1,): window i's rows of `targets` are `target_bounds[i]:target_bounds[i + 1]`.
        guide: float16 (layers, total tokens): each token's saliency at the input of each layer below `deep_layer`,
            divided by its window's maximum; no layers for a task that does not use saliency.
        bounds: int64 (windows + 1,): window i's tokens in `guide` are `bounds[i]:bounds[i + 1]`.
    """

    def __init__(self, targets: Tensor, target_bounds: Tensor, guide: Tensor, bounds: Tensor):
        self.targets, self.target_bounds, self.guide, self.bounds = targets, target_bounds, guide, bounds

    def of_windows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Targets (rows of these windows, columns) and guide, float32 (layers, tokens of these windows)."""
        rows = [self.targets[self.target_bounds[index] : self.target_bounds[index + 1]] for index in indices]
        parts = [self.guide[:, self.bounds[index] : self.bounds[index + 1]] for index in indices]
        return torch.cat(rows), torch.cat(parts, dim=1).float()

    @classmethod
    def load(cls, path: Path) -> "TeacherSignals":
        """Load signals that `save` wrote."""
        return cls(**load_file(path))

    def save(self, path: Path) -> None:
        """Write the signals to a file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(vars(self), partial)
        partial.rename(path)


def teacher_signals(
    model: Any,
    dataset: Any,
    tokens_per_batch: int = 4096,
    *,
    autocast: torch.dtype | None = None,
    compute: "Compute | None" = None,
) -> TeacherSignals:
    """Run the dense model over all windows of a `labelled.WindowDataset`.

    Args:
        model: a task's model, or peft's wrapper.
        compute: computes signals and guide of a batch: `guide`, `attention_guide`, `outputs` or `exit_signals`.
            Default: `guide` for tasks that use saliency, otherwise `outputs`.
    """
    was_training, losses = model.training, dataset.losses
    if compute is None:
        compute = guide if losses.guided_by_saliency else outputs
    guided = compute is guide
    model.eval()
    if guided:
        model.enable_input_require_grads()  # the guide's gradient must pass through layers with frozen weights
    device = next(model.parameters()).device
    all_lengths = torch.tensor([len(window.input_ids) for window in dataset.windows])
    targets, guides, start = [], [], 0
    while start < len(all_lengths):
        end = start + 1
        while end < len(all_lengths) and int(all_lengths[start : end + 1].sum()) <= tokens_per_batch:
            end += 1
        # Each window is its own example: its signals must not depend on the windows it is drawn with in training.
        batch = dataset.collate([[index] for index in range(start, end)])
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            batch = {name: value.to(device) for name, value in batch.items()}
            signals, scores = compute(model, batch, losses)
        lengths = batch["cu_seqlens"].diff().tolist()
        # Divided by the window's maximum: only the order matters, and raw saliencies would underflow in fp16.
        parts = [part / part.amax(1, keepdim=True).clamp(min=1e-30) for part in scores.cpu().split(lengths, dim=1)]
        guides.append(torch.cat(parts, dim=1).half())
        targets.append(signals.float().cpu())
        if end * 10 // len(all_lengths) > start * 10 // len(all_lengths):
            logger.info("teacher: %d of %d windows", end, len(all_lengths))
        start = end
    if guided:
        model.disable_input_require_grads()
    model.train(was_training)
    bounds, target_bounds = (F.pad(counts.cumsum(0), (1, 0)) for counts in (all_lengths, losses.rows(all_lengths)))
    return TeacherSignals(torch.cat(targets), target_bounds, torch.cat(guides, dim=1), bounds)


def outputs(model: Any, batch: dict[str, Tensor], losses: TaskLosses) -> tuple[Tensor, Tensor]:
    """The dense model's outputs, and a guide without layers."""
    with torch.no_grad():
        signals = losses.signals(model(**inputs_of(batch), reduce=False))
    return signals, torch.empty(0, len(batch["input_ids"]))


def exit_signals(model: Any, batch: dict[str, Tensor], losses: TaskLosses) -> tuple[Tensor, Tensor]:
    """What words look like at the exits of a model in which nothing leaves, and a guide without layers.

    Returns:
        fp32 (total tokens, 2 · exits + 1), for words at their first tokens: the uncertainty at each exit, and the loss
            at each exit and in the end.
    """
    with torch.no_grad():
        output = model(**inputs_of(batch), reduce=False, output_exits=True)
    exits, labels = output.exits.logits, batch["labels"]
    columns = [uncertainty(logits) for logits in exits]
    columns += [word_losses(logits, labels) for logits in (*exits, output.logits)]
    return torch.stack(columns, 1), torch.empty(0, len(labels))


def guide(model: Any, batch: dict[str, Tensor], losses: TaskLosses) -> tuple[Tensor, Tensor]:
    """The dense model's outputs, and each token's saliency: fp32 (layers below `deep_layer`, tokens).

    The saliency at layer i is abs⟨∂loss/∂h_d, h_d − h_i⟩, where h_k is the input of layer k and d = `deep_layer`.
    (thunlp/TR-BERT counts layer outputs from one, which is the same.) For an unlabelled document the loss is computed
    against the model's own prediction.
    """
    deep = deep_layer(model.config)
    with torch.enable_grad():
        output = model(**inputs_of(batch), reduce=False, output_hidden_states=True)
        loss = losses.labelled(output, losses.completed(batch, losses.signals(output)))
        # Not the mean, so that a document's gradients do not depend on the batch size.
        (gradient,) = torch.autograd.grad(loss.sum(), output.hidden_states[deep])
    states = output.hidden_states
    scores = [(gradient * (states[deep] - states[layer])).sum(-1).abs().float().detach() for layer in range(deep)]
    return losses.signals(output).detach(), torch.stack(scores)


def attention_guide(
    model: Any, batch: dict[str, Tensor], losses: TaskLosses, *, from_all: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The dense model's outputs, and the attention that each token gets in the last layer, mean over heads.

    Args:
        from_all: from all tokens, as ToP ranks them (Li et al., KDD 2023), not from [CLS] alone. Default: in models
            that pool the mean of all tokens. In others the two rank alike (docs/results.md, where to reduce).

    Returns:
        Signals as `guide`'s, and fp32 (layers below `deep_layer`, tokens), the same for all layers.
    """
    from_all = model.config.classifier_pooling == "mean" if from_all is None else from_all
    with torch.no_grad(), _observed_attention() as last:
        output = model(**inputs_of(batch), reduce=False)
        ((query, key, scaling),) = last
        bounds = batch["cu_seqlens"].tolist()
        received = []
        for start, end in zip(bounds, bounds[1:]):
            asking = query[0, :, start : end if from_all else start + 1]
            seen = key[0, :, start:end].transpose(1, 2) * scaling
            parts = [(part @ seen).float().softmax(-1).sum((0, 1)) for part in asking.split(_QUERIES, dim=1)]
            received.append(torch.stack(parts).sum(0) / asking[..., 0].numel())
    return losses.signals(output), torch.cat(received).expand(deep_layer(model.config), -1)


@contextlib.contextmanager
def _observed_attention() -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Query, key and scaling of the last layer that attends to whole sequences, once it is computed."""
    last: list[tuple[Tensor, Tensor, float]] = []

    def observe(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        if options.get("local") is None:
            last[:] = [(query, key, options["scaling"])]
        return varlen_attention(module, query, key, *rest, **options)

    AttentionInterface.register(ATTENTION_NAME, observe)
    try:
        yield last
    finally:
        AttentionInterface.register(ATTENTION_NAME, varlen_attention)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the model's arguments from a batch."""
    return tokens_of(batch) | extra_inputs_of(batch)


def tokens_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the arguments of every model, also of one without a head."""
    return {name: batch[name] for name in ("input_ids", "token_type_ids", "position_ids", "cu_seqlens")}


def extra_inputs_of(batch: dict[str, Tensor], repeats: int = 1) -> dict[str, Tensor]:
    """Select the arguments from the task's `extra_inputs`, for a batch that was repeated so many times."""
    extra = {name: value for name, value in batch.items() if name.startswith(EXTRA_INPUT)}
    return {name.removeprefix(EXTRA_INPUT): torch.cat([value] * repeats) for name, value in extra.items()}


def deep_layer(config: TRBertConfig) -> int:
    """The layer at whose input the guide's gradient is taken.

    Three quarters of the layers, but at most the last layer: of its output, only [CLS] has a gradient.
    """
    return min(math.ceil(config.num_hidden_layers * 3 / 4), config.num_hidden_layers - 1)


def signals_digest(model: Any, dataset: Any, *, autocast: torch.dtype | None = None, with_exits: bool = False) -> str:
    """A hash that identifies the signals of a dense model on a corpus, in one precision.

    Args:
        with_exits: the signals depend on the exits.
    """
    digest = hashlib.sha256(f"2;{autocast};".encode())  # 2: version of the file format
    exits = model.config.exit_options
    with_exits = with_exits or (exits is not None and exits.answers_all)
    unused = [".selectors.", ".gates."] + ([] if with_exits else [".exits."])
    for name, weight in sorted(model.state_dict().items()):
        if not any(part in name for part in unused):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    for index, window in enumerate(dataset.windows):
        digest.update(np.asarray(window.input_ids, dtype=np.int32).tobytes() + f";{dataset.target(index)};".encode())
    return digest.hexdigest()[:16]
