"""What the dense model knows and the selectors are to learn: its logits, and how much each token matters to it.

Both are computed once for all windows of a corpus, by window and never by the order of training, so that later stages
and later runs that start from the same dense model share them.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configuration import TRBertConfig
from .varlen import first_tokens, model_inputs

logger = logging.getLogger(__name__)


class TeacherSignals:
    """The dense model's view of every window of a corpus.

    Args:
        logits: float32 (windows, labels).
        guide: float16 (layers, total tokens): of each token, at the input of each layer below `deep_layer`, its
            saliency over the highest one of its window.
        bounds: int64 (windows + 1,): window i's tokens are `bounds[i]:bounds[i + 1]` of `guide`.
    """

    def __init__(self, logits: Tensor, guide: Tensor, bounds: Tensor):
        self.logits, self.guide, self.bounds = logits, guide, bounds

    def of_windows(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits (windows, labels) and guide float32 (layers, tokens of these windows)."""
        parts = [self.guide[:, self.bounds[place] : self.bounds[place + 1]] for place in places]
        return self.logits[list(places)], torch.cat(parts, dim=1).float()

    @classmethod
    def load(cls, path: Path) -> "TeacherSignals":
        """What `save` wrote."""
        return cls(**load_file(path))

    def save(self, path: Path) -> None:
        """Write them whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"logits": self.logits, "guide": self.guide, "bounds": self.bounds}, partial)
        partial.rename(path)


def teacher_signals(
    model: Any,
    windows: Sequence[np.ndarray],
    labels: Sequence[int],
    tokens_per_batch: int = 4096,
) -> TeacherSignals:
    """Run the dense model, a TRBertForSequenceClassification or peft's wrapper around one, over labelled windows."""
    was_training = model.training
    model.eval()
    model.enable_input_require_grads()  # the guide's gradient must pass layers whose weights are all frozen
    device = next(model.parameters()).device
    logits, guides, start = [], [], 0
    while start < len(windows):
        end = start + 1
        tokens = len(windows[start])
        while end < len(windows) and tokens + len(windows[end]) <= tokens_per_batch:
            tokens += len(windows[end])
            end += 1
        inputs = model_inputs(windows[start:end], device)
        found, scores = guide(model, {**inputs, "labels": torch.tensor(labels[start:end], device=device)})
        lengths = inputs["cu_seqlens"].diff().tolist()
        # Over each window's highest: only the order counts, and raw saliencies would vanish in half precision.
        parts = [part / part.amax(1, keepdim=True).clamp(min=1e-30) for part in scores.cpu().split(lengths, dim=1)]
        guides.append(torch.cat(parts, dim=1).half())
        logits.append(found.float().cpu())
        if end * 10 // len(windows) > start * 10 // len(windows):
            logger.info("teacher: %d of %d windows", end, len(windows))
        start = end
    model.disable_input_require_grads()
    model.train(was_training)
    bounds = torch.tensor([0, *(len(window) for window in windows)]).cumsum(0)
    return TeacherSignals(torch.cat(logits), torch.cat(guides, dim=1), bounds)


def guide(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The dense model's logits and how much each token matters to its loss, fp32 (layers below `deep_layer`, tokens).

    abs⟨∂loss/∂h_d, h_d − h_i⟩ with h_k the input of layer k (thunlp/TR-BERT counts layer outputs from one, which is
    the same), d = `deep_layer`, for every layer i below it.
    """
    deep = deep_layer(model.config)
    with torch.enable_grad():
        output = model(**inputs, reduce=False, output_hidden_states=True)
        # A sum, so that a document's gradients don't depend on the batch's size.
        loss = output.loss * len(inputs["labels"])
        (gradient,) = torch.autograd.grad(loss, output.hidden_states[deep])
    states = output.hidden_states
    scores = [(gradient * (states[deep] - states[layer])).sum(-1).abs().float().detach() for layer in range(deep)]
    return output.logits.detach(), torch.stack(scores)


def deep_layer(config: TRBertConfig) -> int:
    """Where the guide's gradient is taken: three quarters up, but below the top, where only [CLS] has a gradient."""
    return min(math.ceil(config.num_hidden_layers * 3 / 4), config.num_hidden_layers - 1)


def top_tokens(scores: Tensor, cu_seqlens: Tensor, counts: Tensor) -> Tensor:
    """The `counts[i]` highest-scored tokens of each sequence i, the first token always among them: bool, as scores."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.clone()
    scores[first_tokens(cu_seqlens)] = torch.inf
    bounds = cu_seqlens.tolist()
    for start, end, count in zip(bounds, bounds[1:], counts.tolist()):
        chosen[start + scores[start:end].topk(min(count, end - start)).indices] = True
    return chosen


def signals_digest(model: Any, windows: Sequence[np.ndarray], labels: Sequence[int]) -> str:
    """What tells one dense model on one corpus from another."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if ".selectors." not in name:
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(np.asarray(labels, dtype=np.int64).tobytes())
    for window in windows:
        digest.update(np.asarray(window, dtype=np.int32).tobytes() + b";")
    return digest.hexdigest()[:16]
