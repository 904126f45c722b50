"""Checks on a GPU: parity with fp32 on the CPU, tolerance of bfloat16, throughput, and running out of memory.

    make gpu-check

The model is random, with BERT-base's shape and random selectors. The documents have 50 to 2,000 random tokens. Exits
with 1 if a check fails and with 2 if there is no GPU.
"""

import copy
import sys
import time

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.common import machine, save
from trbert_model import TRBertConfig, TRBertForSequenceClassification
from trbert_model.engine import Engine, EngineOptions
from trbert_model.tasks.base import DocumentResults


def random_model() -> TRBertForSequenceClassification:
    """A random BERT-base whose selectors' weights are large enough to give probabilities on both sides of 0.5."""
    torch.manual_seed(0)
    model = TRBertForSequenceClassification(TRBertConfig(num_labels=5)).eval()
    for selector in model.bert.encoder.selectors:
        torch.nn.init.normal_(selector.linear_1.weight, std=0.3)
        torch.nn.init.normal_(selector.linear_2.weight, std=0.3)
    return model


def any_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens only; the documents are token ids."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


def main() -> int:
    if not torch.cuda.is_available():
        print("error: no CUDA device here; gpu-check needs an NVIDIA GPU", file=sys.stderr)
        return 2
    model, tokenizer = random_model(), any_tokenizer()
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 30000, int(n)).astype(np.int32) for n in rng.integers(50, 2000, 2000)]
    few = documents[:64]

    def engine(device: str, dtype: str, tokens: int | None = None, *, reduce: bool = True) -> Engine:
        options = EngineOptions(device=device, dtype=dtype, max_tokens_per_batch=tokens, reduce=reduce)
        return Engine(copy.deepcopy(model), tokenizer, options)

    def difference(ours: DocumentResults, theirs: DocumentResults) -> float:
        return float(np.abs(ours.outputs - theirs.outputs).max())

    checks: dict[str, tuple[bool, str]] = {}
    cpu = engine("cpu", "float32", reduce=False).score(few)
    full = difference(engine("cuda", "float32", reduce=False).score(few), cpu)
    checks["fp32 on CUDA equals the CPU, dense"] = (full < 1e-3, f"largest logit difference {full:.1e}")
    half = difference(engine("cuda", "bfloat16", reduce=False).score(few), cpu)
    checks["bfloat16 is close to fp32, dense"] = (half < 0.05, f"largest logit difference {half:.1e}")

    small, large = engine("cuda", "bfloat16", 2048).score(few), engine("cuda", "bfloat16", 65536).score(few)
    same = float((small.kept_tokens == large.kept_tokens).all(axis=1).mean())
    detail = f"{100 * same:.1f}% of documents keep the same number of tokens"
    checks["batches of 2,048 and 65,536 tokens agree in bfloat16"] = (same >= 0.95, detail)

    speeds = {}
    for name, reduce in (("dense", False), ("reduced", True)):
        scorer = engine("cuda", "bfloat16", reduce=reduce)
        scorer.score(few)
        torch.cuda.synchronize()
        started = time.perf_counter()
        results = scorer.score(documents)
        seconds = time.perf_counter() - started
        speeds[name] = {
            "tokens_per_second": float(results.num_tokens.sum() / seconds),
            "tflops_per_second": float(results.flops.sum() / seconds / 1e12),
            "flops_speedup": float(results.dense_flops.sum() / results.flops.sum()),
        }

    baseline = engine("cuda", "bfloat16", 4096)
    expected = baseline.score(few)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + (3 << 28)) / total))
    scorer = engine("cuda", "bfloat16", 1 << 20)
    survived = scorer.score(few * 8)
    torch.cuda.set_per_process_memory_fraction(1.0)
    halved = scorer.statistics.halved_batches
    complete = np.array_equal(survived.num_tokens, np.tile(expected.num_tokens, 8))
    complete = complete and bool(np.isfinite(survived.outputs).all())
    detail = f"{halved} batches halved, every document scored: {complete}"
    checks["running out of memory halves and goes on"] = (halved > 0 and complete, detail)

    device = torch.cuda.get_device_name(0)
    result = {"machine": machine() | {"gpu": device}, "checks": checks, "speeds": speeds}
    lines = [f"| check on {device} | result | measured |", "|---|---|---|"]
    lines += [f"| {name} | {'passed' if good else 'FAILED'} | {detail} |" for name, (good, detail) in checks.items()]
    for name, speed in speeds.items():
        lines.append(
            f"| {name}, bfloat16 | {speed['tokens_per_second']:,.0f} tokens/s | "
            f"{speed['tflops_per_second']:.1f} TFLOP/s, {speed['flops_speedup']:.2f}x fewer FLOPs than dense |"
        )
    save("gpu_check", result, "\n".join(lines))
    return 0 if all(good for good, _ in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
