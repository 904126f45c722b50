"""The clock of early exits, skipped layers and halted words, compared with the FLOPs that they save.

    python -m benchmarks.early --model build/demo/model --corpus build/demo/corpus/held-out

Documents of the demo in ragged batches, through models of MiniLM-L6's and of BERT-base's shape with random weights. Who
leaves, skips or is halted is drawn at random with fixed shares, since only the clock is measured. The systems compute
the same blocks of documents in turns.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import described, held_out_texts, machine, repeated, save
from benchmarks.engine import forced_policy
from benchmarks.measure import matrix_product_peak, measure, total
from trbert_model import TRBertConfig, TRBertForSequenceClassification, TRBertForTokenClassification
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.exits.policies import NO_EXITS, Asked
from trbert_model.reduction.policies import keep_all

SHAPES: dict[str, dict[str, int]] = {
    "MiniLM-L6 shape": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "BERT-base shape": {},
}
KEPT = (0.5, 0.25)


class DrawnExits:
    """Lets a share leave at each exit, and skips a share of the gates, at random.

    Args:
        exits: share of those that are still there, one per exit.
        gates: share of the sequences at each gate.
    """

    def __init__(self, exits: Sequence[float] = (), gates: float = 0.0):
        self.exits, self.gates = exits, gates

    def asks(self, exit: int) -> bool:
        return bool(self.exits) and self.exits[exit] > 0

    def leaves(self, asked: Asked) -> Tensor:
        return torch.rand(len(asked.units)) < (self.exits[asked.exit] if self.exits else 0.0)

    def asks_gate(self, layer: int) -> bool:
        return self.gates > 0

    def skips(self, layer: int, probability: Tensor, sequences: Tensor) -> Tensor:
        return torch.rand(len(sequences)) < self.gates


def systems_of(depth: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: the kind of the model, and the policies; exits are after each layer but the last."""
    early = [0.0] * (depth - 1)
    leaving, halting = early.copy(), early.copy()
    for third, share in enumerate((0.4, 0.4)):
        leaving[(third + 1) * depth // 3 - 1] = share
    halting[depth // 6 - 1], halting[depth // 3 - 1] = 0.5, 0.5
    forced = forced_policy(KEPT)
    return {
        "documents leave": ("first", {"policy": keep_all, "exit_policy": DrawnExits(leaving)}),
        "documents leave, reduced": ("first", {"policy": forced, "exit_policy": DrawnExits(leaving)}),
        "a third of the layers skipped": ("gates", {"policy": keep_all, "exit_policy": DrawnExits(gates=1 / 3)}),
        "sentences leave": ("sentences", {"policy": keep_all, "exit_policy": DrawnExits(leaving)}),
        "words halted": ("words", {"policy": keep_all, "exit_policy": DrawnExits(halting)}),
        "words halted, reduced": ("words", {"policy": forced, "exit_policy": DrawnExits(halting)}),
        "reduced": ("first", {"policy": forced, "exit_policy": NO_EXITS}),
    }


def model_of(kind: str, shape: dict[str, int]) -> Any:
    depth = shape.get("num_hidden_layers", 12)
    layers = list(range(depth - 1))
    settings: dict[str, dict[str, Any]] = {
        "first": {"exits": {"head": "first", "layers": layers}},
        "gates": {"exits": {"head": "attention", "layers": [*layers, depth - 1], "answers_all": True}, "gates": {}},
        "sentences": {"exits": {"head": "words", "layers": layers}},
        "words": {"exits": {"head": "words", "layers": layers, "unit": "word", "window": 1}},
    }
    classes = {"sentences": TRBertForTokenClassification, "words": TRBertForTokenClassification}
    config = TRBertConfig(num_labels=5, **shape, **settings[kind])
    return classes.get(kind, TRBertForSequenceClassification)(config).eval()


def compare(shape: dict[str, int], tokenizer: Any, texts: list[str], block: int) -> dict[str, Any]:
    """Measure all systems on a shape, in fp32 and bf16."""
    runs: dict[str, Callable[[list[Any]], Any]] = {}
    dense_of: dict[str, str] = {}
    encoded: dict[str, list[Any]] = {}
    for dtype in ("float32", "bfloat16"):
        for kind in ("first", "gates", "sentences", "words"):
            engine = Engine(model_of(kind, shape), tokenizer, EngineOptions(device="cpu", dtype=dtype))
            task = engine.task.name
            if task not in encoded:
                encoded[task], _ = engine.task.encode_rows([(text,) for text in texts])
            dense = f"dense, {task}, {dtype}"
            runs.setdefault(dense, functools.partial(_score, engine, policy=keep_all))
            for system, (its_kind, policies) in systems_of(shape.get("num_hidden_layers", 12)).items():
                if its_kind == kind:
                    runs[f"{system}, {dtype}"] = functools.partial(_score, engine, **policies)
                    dense_of[f"{system}, {dtype}"] = dense
    documents = [dict(zip(encoded, of_tasks)) for of_tasks in zip(*encoded.values())]
    seconds, results, _ = measure(runs, documents, block, lambda: matrix_product_peak(TRBertConfig(**shape)))
    rows = {}
    for name, dense in dense_of.items():
        flops, speed = total(results[dense], "flops") / total(results[name], "flops"), seconds[dense] / seconds[name]
        rows[name] = {"seconds": seconds[name], "flops": flops, "time": speed, "ratio": speed / flops}
    return {"documents": len(texts), "seconds": seconds, "systems": rows}


def _score(engine: Engine, documents: list[dict[str, Any]], **policies: Any) -> Any:
    return engine.score([document[engine.task.name] for document in documents], **policies)


def markdown(result: dict[str, Any]) -> str:
    lines = ["| model | system | FLOPs over dense | time over dense | ratio |", "|---|---|---:|---:|---:|"]
    for shape, measured in result["shapes"].items():
        for name, row in measured["systems"].items():
            lines.append(f"| {shape} | {name} | {row['flops']:.2f}× | {row['time']:.2f}× | {row['ratio']:.2f} |")
    lines += ["", f"{described(result['machine'])}, torch {result['machine']['torch']}, {result['machine']['date']}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model directory, for its tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="the demo's held-out shards")
    parser.add_argument(
        "--documents", type=int, default=480, help="for MiniLM's shape; a sixth of them for BERT-base's"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    _, tokenizer = load_model(arguments.model)
    texts = repeated(held_out_texts(arguments.corpus), arguments.documents)
    shapes = {}
    for (name, shape), part in zip(SHAPES.items(), (1, 6)):
        shapes[name] = compare(shape, tokenizer, texts[: len(texts) // part], max(8, 120 // part))
    result = {"machine": machine(), "shapes": shapes}
    save("early", result, markdown(result))


if __name__ == "__main__":
    main()
