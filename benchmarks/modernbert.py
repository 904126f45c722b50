"""ModernBERT at several lengths, dense and reduced, compared with transformers' own.

    python -m benchmarks.modernbert

The model has ModernBERT-base's shape and random weights, so only speed is measured; the reductions keep fixed fractions
of each document's tokens. Documents have half as many tokens as the length in question up to as many, and each is one
window. They are processed in blocks, each block by every system in turn, so that changes in the machine's speed affect
all systems equally. transformers' batches are padded, in the given order or sorted by length within a block, and have
as many tokens as ours.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import ModernBertConfig, ModernBertForSequenceClassification
from transformers.utils import logging as transformers_logging

from benchmarks.common import described, machine, save
from benchmarks.engine import forced_policy
from benchmarks.measure import Forward, forward_of, measure, run_padded, total
from trbert_model import convert_checkpoint
from trbert_model.engine import Engine, EngineOptions
from trbert_model.tasks.base import DocumentResults
from trbert_model.tasks.text import BareTokenizer

VOCABULARY, PAD, CLS, SEP, FIRST_WORD = 50368, 0, 1, 2, 3
# Fractions kept by the reductions before layer 1 and before the middle layer.
KEPT = ((0.5, 0.25), (0.3, 0.15), (0.15, 0.075))
DTYPES = ("float32", "bfloat16")
BATCH_TOKENS = 16384


def models(layers: int) -> tuple[dict[str, ModernBertForSequenceClassification], dict[tuple[str, bool], Engine]]:
    """transformers' model by dtype, and engines with the same weights by dtype and whether they reduce."""
    torch.manual_seed(0)
    ids = {"pad_token_id": PAD, "cls_token_id": CLS, "sep_token_id": SEP, "bos_token_id": CLS, "eos_token_id": SEP}
    theirs = ModernBertForSequenceClassification(
        ModernBertConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, attn_implementation="sdpa", **ids)
    ).eval()
    tokenizer: Any = BareTokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({}, "")), CLS, SEP)
    engines = {}
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        for dtype in DTYPES:
            for reduce in (False, True):
                options = EngineOptions(
                    device="cpu", dtype=dtype, reduce=reduce, stride=0, max_tokens_per_batch=BATCH_TOKENS
                )
                engines[dtype, reduce] = Engine(convert_checkpoint(directory), tokenizer, options)
        half = ModernBertForSequenceClassification.from_pretrained(directory, dtype=torch.bfloat16).eval()
    return {"float32": theirs, "bfloat16": half}, engines


def compare(theirs: dict[str, Any], engines: dict[tuple[str, bool], Engine], length: int, tokens: int) -> list[dict]:
    """Measure all systems on random documents of up to `length` tokens, `tokens` in all."""
    generator, documents = np.random.default_rng(0), list[np.ndarray]()
    while sum(len(document) + 2 for document in documents) < tokens:
        size = int(generator.integers(length // 2, length + 1)) - 2
        documents.append(generator.integers(FIRST_WORD, VOCABULARY, size).astype(np.int32))
    batch = max(1, BATCH_TOKENS // length)

    def windows(documents: list[np.ndarray]) -> list[np.ndarray]:
        return [np.concatenate([[CLS], document, [SEP]]) for document in documents]

    def padded(forward: Forward, sort: bool, documents: list[np.ndarray]) -> np.ndarray:
        return run_padded(forward, windows(documents), batch, sort_by_length=sort)

    systems: dict[str, Callable[[list[np.ndarray]], Any]] = {}
    for dtype in DTYPES:
        forward = forward_of(theirs[dtype])
        for name, sort in (("padded", False), ("sorted", True)):
            systems[f"transformers {name}, {dtype}"] = functools.partial(padded, forward, sort)
        systems[f"dense, {dtype}"] = engines[dtype, False].score
        for kept in KEPT:
            policy = forced_policy(kept)
            score = functools.partial(engines[dtype, True].score, policy=policy)
            systems[f"kept {kept[0]:g}, {dtype}"] = score
    seconds, results, _ = measure(systems, documents, 2 * batch, lambda: 0.0, documents[:1])
    expected = np.concatenate(results["transformers padded, float32"])
    dense = total(results["dense, float32"], "flops")
    rows = []
    for name in systems:
        system, dtype = name.split(", ")
        row = {"length": length, "system": system, "dtype": dtype, "seconds": seconds[name]}
        row |= {"documents": len(documents), "tokens": sum(len(document) + 2 for document in documents)}
        row["over_padded"] = seconds[f"transformers padded, {dtype}"] / seconds[name]
        row["over_sorted"] = seconds[f"transformers sorted, {dtype}"] / seconds[name]
        if not system.startswith("transformers"):
            row["over_dense"] = seconds[f"dense, {dtype}"] / seconds[name]
            row["flops_speedup"] = dense / total(results[name], "flops")
        if system == "dense":
            logits = DocumentResults.concatenate(results[name]).outputs
            row["logit_difference"] = float(np.abs(logits - expected).max())
        rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    reduced = [f"kept {kept[0]:g}" for kept in KEPT]
    lines = [
        f"| tokens | dtype | dense over padded | dense over sorted | {' | '.join(reduced)} |",
        f"|---:|---|---:|---:|{'---:|' * len(reduced)}",
    ]
    found = {(row["length"], row["dtype"], row["system"]): row for row in result["rows"]}
    for length, dtype in dict.fromkeys(key[:2] for key in found):
        dense = found[length, dtype, "dense"]
        cells = [f"{length:,}", dtype, f"{dense['over_padded']:.2f}×", f"{dense['over_sorted']:.2f}×"]
        for name in reduced:
            row = found[length, dtype, name]
            cells.append(f"{row['over_dense']:.2f}× of {row['flops_speedup']:.2f}×")
        lines.append(f"| {' | '.join(cells)} |")
    where = result["machine"]
    lines += [
        "",
        f"{result['layers']} layers; torch {where['torch']} with {result['threads']} threads, "
        f"transformers {where['transformers']}, {described(where)}, {where['date']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="most tokens of a document")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens at each length")
    parser.add_argument("--layers", type=int, default=22, help="fewer for a trial")
    parser.add_argument("--name", default="modernbert", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    theirs, engines = models(arguments.layers)
    rows: list[dict] = []
    for length in arguments.lengths:  # saved one by one: 8,192 tokens take far longer than all the others
        rows += compare(theirs, engines, length, arguments.tokens)
        result = {"machine": machine(), "threads": torch.get_num_threads(), "layers": arguments.layers, "rows": rows}
        save(arguments.name, result, markdown(result))


if __name__ == "__main__":
    main()
