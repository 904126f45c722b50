"""Timing of several systems on the same documents in turns, and the baselines."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, BertPreTrainedModel

from trbert_model import TRBertConfig
from trbert_model.modeling import TRBertPreTrainedModel


def matrix_product_peak(config: TRBertConfig) -> float:
    """FLOP/s of a layer's two feed-forward products alone, in fp32 on the CPU; the median of several runs."""
    hidden, intermediate, tokens = config.hidden_size, config.intermediate_size, 2048
    narrow, wide = torch.randn(tokens, hidden), torch.randn(tokens, intermediate)
    up, down = torch.randn(intermediate, hidden), torch.randn(hidden, intermediate)
    times = []
    for _ in range(24):
        started = time.perf_counter()
        torch.nn.functional.linear(narrow, up)
        torch.nn.functional.linear(wide, down)
        times.append(time.perf_counter() - started)
    return 4 * tokens * hidden * intermediate / float(np.median(times))


def transformers_bert(model: TRBertPreTrainedModel, bert_class: type[BertPreTrainedModel]) -> Any:
    """transformers' BERT with the same weights and SDPA attention."""
    config = BertConfig(
        **{name: getattr(model.config, name) for name in BertConfig().to_dict() if hasattr(model.config, name)}
        | {"architectures": None, "attn_implementation": "sdpa", "model_type": "bert"}
    )
    bert = bert_class(config).eval()
    bert.load_state_dict({name: value for name, value in model.state_dict().items() if ".selectors." not in name})
    return bert


# Logits (sequences, labels) of padded token ids, int64 (sequences, tokens), and their mask of ones and zeros.
Forward = Callable[[np.ndarray, np.ndarray], np.ndarray]


def forward_of(bert: BertForSequenceClassification) -> Forward:
    """The logits of transformers' BERT."""

    @torch.inference_mode()
    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return bert(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.float().numpy()

    return forward


def run_padded(forward: Forward, windows: list[np.ndarray], batch: int, *, sort_by_length: bool) -> np.ndarray:
    """Compute padded batches, of windows sorted by length on request. Logits (windows, labels) in input order."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i])) if sort_by_length else list(range(len(windows)))
    logits = []
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids = np.zeros((len(chosen), max(len(windows[i]) for i in chosen)), np.int64)
        for row, i in enumerate(chosen):
            ids[row, : len(windows[i])] = windows[i]
        logits.append(forward(ids, (ids > 0).astype(np.int64)))
    return np.concatenate(logits)[np.argsort(order)]


def measure(
    systems: dict[str, Callable[[list[Any]], Any]],
    documents: list[Any],
    block: int,
    peak: Callable[[], float],
    warm_up: list[Any] | None = None,
) -> tuple[dict[str, float], dict[str, list[Any]], float]:
    """Run every system on all documents, block by block in turn: its seconds and results, and the median peak.

    Each system runs the `warm_up` documents first, without timing. Default: the first four.
    """
    seconds: dict[str, float] = defaultdict(float)
    results: dict[str, list[Any]] = defaultdict(list)
    for run in systems.values():
        run(documents[:4] if warm_up is None else warm_up)
    peaks, names = [], list(systems)
    for number, start in enumerate(range(0, len(documents), block)):
        peaks.append(peak())
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            results[name].append(systems[name](documents[start : start + block]))
            seconds[name] += time.perf_counter() - started
        print(f"  {min(start + block, len(documents))} of {len(documents)} documents", file=sys.stderr, flush=True)
    return dict(seconds), dict(results), float(np.median(peaks))


def total(results: list[Any], field: str) -> float:
    return float(sum(getattr(result, field).sum() for result in results))
