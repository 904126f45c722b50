"""Timing of several systems on the same documents in turns, and the baselines."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertPreTrainedModel

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


def measure(
    systems: dict[str, Callable[[list[Any]], Any]],
    documents: list[Any],
    block: int,
    peak: Callable[[], float],
) -> tuple[dict[str, float], dict[str, list[Any]], float]:
    """Run every system on all documents, block by block in turn: its seconds and results, and the median peak."""
    seconds: dict[str, float] = defaultdict(float)
    results: dict[str, list[Any]] = defaultdict(list)
    for run in systems.values():
        run(documents[:4])  # warm-up
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
