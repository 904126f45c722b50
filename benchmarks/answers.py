"""Question answering over long contexts: the engine's speed compared with transformers' `BertForQuestionAnswering`.

    python -m benchmarks.answers --model MODEL --questions test-1500.parquet test-6000.parquet

The model is one that `benchmarks.quality --runs squad` trained. Its thresholds come from its calibration table, or from
the one in --table (the run writes a table for long contexts to MODEL/dev-1500). All systems compute the same windows
with the same weights, block by block in turn: the engine, dense and reduced, and transformers' model in padded batches
of windows sorted by length. Several batch sizes are measured, and the fastest is used. Timings exclude tokenisation.
They include finding the spans for the engine, but not for the padded systems.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import BertForQuestionAnswering
from transformers.utils import logging as transformers_logging

from benchmarks.common import machine, save
from benchmarks.measure import matrix_product_peak, measure, total, transformers_bert
from trbert_model import TRBertForQuestionAnswering
from trbert_model.calibration.table import calibration_key, read_calibration
from trbert_model.checkpoints.files import model_digest
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.engine.options import DTYPES
from trbert_model.options import LabelledColumns
from trbert_model.tasks.base import DocumentResults
from trbert_model.tasks.question_answering.labelled import LabelledQuestions
from trbert_model.tasks.question_answering.task import EncodedQuestion, QuestionAnsweringTask

BATCHES = (1, 4, 8, 16, 32)


@torch.inference_mode()
def run_padded(
    bert: BertForQuestionAnswering, task: QuestionAnsweringTask, documents: list[EncodedQuestion], batch: int
) -> None:
    """Compute all windows in padded batches, sorted by length."""
    windows = sorted(
        (window for document in documents for window in task.windows(document)), key=lambda w: len(w.input_ids)
    )
    for start in range(0, len(windows), batch):
        chosen = windows[start : start + batch]
        shape = (len(chosen), len(chosen[-1].input_ids))
        ids, types, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        for row, window in enumerate(chosen):
            length = len(window.input_ids)
            ids[row, :length] = torch.from_numpy(window.input_ids)
            types[row, :length] = torch.from_numpy(window.token_type_ids)
            mask[row, :length] = 1
        bert(ids, token_type_ids=types, attention_mask=mask)


def some(corpus: LabelledQuestions, limit: int | None) -> LabelledQuestions:
    """At most `limit` questions, evenly spread over the corpus."""
    every = slice(None, None, -(-len(corpus.documents) // limit) if limit else None)
    return LabelledQuestions(
        corpus.documents[every], corpus.answers[every], corpus.starts[every], corpus.task, ids=corpus.ids[every]
    )


def compare(
    directory: Path,
    questions: Path,
    speedup: float,
    table_directory: Path,
    calibrated: str,
    block: int,
    limit: int | None,
) -> dict[str, Any]:
    model, tokenizer = load_model(directory)
    assert isinstance(model, TRBertForQuestionAnswering)
    bert = transformers_bert(model, BertForQuestionAnswering)
    key = calibration_key(model_digest(directory), calibrated, model.config.usable_positions)
    table = read_calibration(table_directory, key)
    if table is None:
        raise SystemExit(f"{table_directory}: no calibration table in {calibrated}; jobs/evaluate.py makes it")
    dense = Engine(copy.deepcopy(model), tokenizer, EngineOptions(dtype="float32", device="cpu", reduce=False))
    thresholds = table.pick(speedup=speedup).thresholds
    reduced = Engine(model, tokenizer, EngineOptions(dtype="float32", device="cpu", thresholds=thresholds))
    assert isinstance(dense.task, QuestionAnsweringTask)
    corpus = some(LabelledQuestions.read(str(questions), dense.task, LabelledColumns()), limit)
    documents = corpus.documents
    systems: dict[str, Any] = {"dense": dense.score, "reduced": reduced.score}
    for batch in BATCHES:
        systems[f"padded {batch}, sorted"] = lambda block, batch=batch: run_padded(bert, dense.task, block, batch)
    seconds, results, peak = measure(systems, documents, block, lambda: matrix_product_peak(model.config))
    best = min(value for name, value in seconds.items() if name.startswith("padded"))
    flops = total(results["dense"], "flops") / total(results["reduced"], "flops")
    return {
        "questions": len(documents),
        "windows": int(total(results["dense"], "num_windows")),
        "tokens": int(total(results["dense"], "num_tokens")),
        "peak_gflops_per_second": peak / 1e9,
        "flops_speedup": flops,
        "seconds": seconds,
        "metrics": {
            name: corpus.measure(DocumentResults.concatenate(results[name]))
            for name in systems
            if not name.startswith("padded")
        },
        "speedup_over_best_padded": {name: best / value for name, value in seconds.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for name, measured in result["corpora"].items():
        lines += [
            f"**{name}**, {measured['questions']:,} questions, {measured['windows']:,} windows, "
            f"{measured['tokens']:,} tokens; FLOPs of the reduced model {measured['flops_speedup']:.2f}× fewer",
            "",
            "| system | questions/s | over the best padded | F1 |",
            "|---|---:|---:|---:|",
        ]
        for system, spent in measured["seconds"].items():
            over = measured["speedup_over_best_padded"][system]
            metric = f"{100 * measured['metrics'][system]['f1']:.1f}" if system in measured["metrics"] else "as dense"
            lines.append(f"| {system} | {measured['questions'] / spent:.2f} | {over:.2f}× | {metric} |")
        lines.append("")
    where = result["machine"]
    lines.append(f"{where['cores']} cores of {where['cpu']}, fp32, torch {where['torch']}, {where['date']}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a question answering model with its table")
    parser.add_argument("--questions", type=Path, nargs="+", required=True, help="Parquet files of questions")
    parser.add_argument("--speedup", type=float, default=3.0, help="FLOPs speed-up to choose thresholds for")
    parser.add_argument("--table", type=Path, help="directory of the table to choose from (default: the model's)")
    parser.add_argument(
        "--calibrated", choices=list(DTYPES), default="float32", help="what its table was measured in (%(default)s)"
    )
    parser.add_argument("--limit", type=int, help="questions of each file, evenly chosen (default: all)")
    parser.add_argument("--block", type=int, default=10, help="questions each system computes in its turn")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    corpora = {
        path.stem: compare(
            arguments.model,
            path,
            arguments.speedup,
            arguments.table or arguments.model,
            arguments.calibrated,
            arguments.block,
            arguments.limit,
        )
        for path in arguments.questions
    }
    result = {"machine": machine(), "corpora": corpora}
    save("answers", result, markdown(result))


if __name__ == "__main__":
    main()
