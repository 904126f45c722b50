"""The engine's speed compared with the FLOPs it saves and with transformers' BERT.

    python -m benchmarks.engine --model build/demo/model --corpus build/demo/corpus/held-out

There are two models: the demo's MiniLM on its held-out documents, repeated, and a random model of BERT-base's shape
with fixed kept fractions. Every system computes the same windows. The documents are processed in blocks, each block by
every system in turn, so that changes in the machine's speed affect all systems equally. The matrix-product peak (the
model's two feed-forward products, 2048 tokens) is also measured in every block, and its median is used. Timings exclude
tokenisation. They include sorting, for systems that sort, within each block.
"""

import argparse
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from benchmarks.common import held_out_texts, machine, repeated, save
from benchmarks.measure import forward_of, matrix_product_peak, measure, run_padded, total, transformers_bert
from trbert_model import TRBertConfig, TRBertForSequenceClassification
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.reduction.state import Candidates, SelectionPolicy
from trbert_model.varlen import positions_in

FORCED = ((0.5, 0.25), (0.3, 0.1), (0.1, 0.05))


def forced_policy(fractions: tuple[float, ...]) -> SelectionPolicy:
    """Keep these fractions of each sequence's original tokens, evenly spread over the remaining tokens."""
    previous = (1.0, *fractions)

    def policy(candidates: Candidates) -> torch.Tensor:
        positions = positions_in(candidates.cu_seqlens, len(candidates.logits))
        share = fractions[candidates.reduction] / previous[candidates.reduction]
        return torch.floor((positions + 1) * share) > torch.floor(positions * share)

    return policy


def compare(
    model: TRBertForSequenceClassification,
    tokenizer: Any,
    documents: list[np.ndarray],
    block: int,
    reductions: dict[str, SelectionPolicy | None],
    *,
    baselines: bool,
) -> dict[str, Any]:
    """Measure one model: dense, with each reduction, and in transformers' BERT."""
    bert = forward_of(transformers_bert(model, BertForSequenceClassification))
    dense = Engine(copy.deepcopy(model), tokenizer, EngineOptions(device="cpu", dtype="float32", reduce=False))

    def windows_of(docs: list[np.ndarray]) -> list[np.ndarray]:
        return [window.input_ids for document in docs for window in dense.task.windows(document)]

    systems: dict[str, Callable[[list[np.ndarray]], Any]] = {"dense": dense.score}
    for name, policy in reductions.items():
        engine = Engine(copy.deepcopy(model), tokenizer, EngineOptions(device="cpu", dtype="float32"))
        systems[name] = functools.partial(engine.score, policy=policy)
    for name in list(systems):
        half = EngineOptions(device="cpu", dtype="bfloat16", reduce=name in reductions)
        engine = Engine(copy.deepcopy(model), tokenizer, half)
        systems[f"{name}, bfloat16"] = functools.partial(engine.score, policy=reductions.get(name))
    ours = set(systems)
    if baselines:
        systems["padded 16, unsorted"] = lambda docs: run_padded(bert, windows_of(docs), 16, sort_by_length=False)
        systems["padded 16, sorted"] = lambda docs: run_padded(bert, windows_of(docs), 16, sort_by_length=True)
        systems["batch 1"] = lambda docs: run_padded(bert, windows_of(docs), 1, sort_by_length=False)
    seconds, results, peak = measure(systems, documents, block, lambda: matrix_product_peak(model.config))

    dense_flops = total(results["dense"], "flops")
    rows: dict[str, Any] = {}
    for name, spent in seconds.items():
        row: dict[str, Any] = {"seconds": spent, "documents_per_second": len(documents) / spent}
        row["speedup_over_dense"] = seconds["dense"] / spent
        if name in ours:
            flops = total(results[name], "flops")
            row["flops_speedup"] = dense_flops / flops
            dense_of_its_kind = seconds["dense, bfloat16" if name.endswith("bfloat16") else "dense"]
            row["wall_over_flops_speedup"] = dense_of_its_kind / spent / row["flops_speedup"]
            if not name.endswith("bfloat16"):  # the peak is measured in fp32
                row["share_of_peak"] = flops / spent / peak
        rows[name] = row
    reference = results.get("padded 16, sorted", [])
    logits = [result.outputs for result in results["dense"]]
    singles = [result.num_windows for result in results["dense"]]
    difference = max(
        (
            float(np.abs(ours[count == 1] - theirs[np.repeat(count == 1, count)]).max(initial=0))
            for ours, theirs, count in zip(logits, reference, singles)
        ),
        default=None,
    )
    return {
        "documents": len(documents),
        "tokens": int(total(results["dense"], "num_tokens")),
        "windows": int(total(results["dense"], "num_windows")),
        "peak_gflops_per_second": peak / 1e9,
        "largest_logit_difference_dense_to_transformers": difference,
        "systems": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for name, measured in result["models"].items():
        lines += [
            f"**{name}**, {measured['documents']:,} documents, {measured['tokens']:,} tokens; matrix-product peak "
            f"{measured['peak_gflops_per_second']:.0f} GFLOP/s",
            "",
            "| system | documents/s | wall-clock over dense | FLOPs over dense | ratio | share of peak |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for system, row in measured["systems"].items():
            ours = "flops_speedup" in row
            lines.append(
                f"| {system} | {row['documents_per_second']:.1f} | {row['speedup_over_dense']:.2f}× | "
                + (f"{row['flops_speedup']:.2f}× | {row['wall_over_flops_speedup']:.2f} | " if ours else "– | – | ")
                + (f"{row['share_of_peak']:.2f} |" if "share_of_peak" in row else "– |")
            )
        lines.append("")
    where = result["machine"]
    lines.append(
        f"{where['cores']} cores of {where['cpu']} ({', '.join(where['instructions'])}), {result['threads']} torch "
        f"threads, fp32 unless said otherwise, torch {where['torch']}, {where['date']}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="the demo's held-out shards")
    parser.add_argument("--documents", type=int, default=2000, help="for MiniLM")
    parser.add_argument("--base-documents", type=int, default=200, help="for the BERT-base shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    model, tokenizer = load_model(arguments.model)
    task = Engine(model, tokenizer, EngineOptions(device="cpu")).task
    documents, _ = task.encode_rows([(text,) for text in held_out_texts(arguments.corpus)])
    model, tokenizer = load_model(arguments.model)  # the engine above fused the first one
    minilm = compare(
        model, tokenizer, repeated(documents, arguments.documents), 250, {"reduced, as trained": None}, baselines=True
    )
    base = TRBertForSequenceClassification(TRBertConfig(num_labels=5)).eval()
    forced: dict[str, SelectionPolicy | None] = {f"reduced {a:g}/{b:g}": forced_policy((a, b)) for a, b in FORCED}
    base_result = compare(base, tokenizer, repeated(documents, arguments.base_documents), 40, forced, baselines=True)
    result = {
        "machine": machine(),
        "threads": arguments.threads,
        "models": {"MiniLM-L6, the demo's model": minilm, "BERT-base shape, random weights": base_result},
    }
    save("engine", result, markdown(result))


if __name__ == "__main__":
    main()
