"""The speed beside other ways to run the same classifier, for the engine alone and for whole jobs.

    python -m benchmarks.peers --model build/demo/model --corpus build/demo/corpus/held-out

ONNX Runtime and OpenVINO come with the extra `peers`.

Engines: every system computes the same windows of the held-out documents. The documents are processed in blocks, each
block by every system in turn, and no document is computed twice: others are used for the warm-up. Timings exclude
tokenisation. They include sorting, for systems that sort, within each block.

Whole jobs: transformers' pipeline in Ray Data's `map_batches` (`benchmarks/ray_pipeline.py`) and `jobs/score.py` read
the documents from Parquet shards and write Parquet, each in a process of its own, with one actor. The pipeline
truncates documents to one window. `jobs/score.py` is measured with whole documents, and with the same first windows.
"""

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from transformers import BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from benchmarks.common import described, held_out_texts, machine, save, write_shards
from benchmarks.measure import Forward, forward_of, matrix_product_peak, measure, run_padded, transformers_bert
from jobs.command import run_command
from pipeline import open_output
from trbert_model import TRBertForSequenceClassification
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.errors import ConfigurationError, InputError, TRBertError

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, SHARD_DOCUMENTS = 16, 100
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
BATCHES = {"padded 16 unsorted": (16, False), "padded 16 sorted": (16, True), "batch 1": (1, False)}
PEERS = {
    "transformers fp32": ("padded 16 unsorted", "padded 16 sorted", "batch 1"),
    "transformers bf16": ("padded 16 unsorted", "padded 16 sorted", "batch 1"),
    "ONNX Runtime fp32": ("padded 16 sorted", "batch 1"),
    "ONNX Runtime int8": ("padded 16 sorted", "batch 1"),
    "OpenVINO bf16": ("padded 16 sorted", "batch 1"),
}
OURS = {f"ours {kind} {dtype}": (kind == "reduced", dtype) for dtype in DTYPES for kind in ("dense", "reduced")}
SYSTEMS = [*(f"{peer}, {batches}" for peer, several in PEERS.items() for batches in several), *OURS]
REFERENCE = "transformers fp32, padded 16 unsorted"
PACKAGES = {"ONNX Runtime": ("onnx", "onnxruntime"), "OpenVINO": ("onnx", "openvino")}
OVERFLOW = {"windows": "whole documents", "truncate": "first windows"}

CACHED_SHAPES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def chosen(beginnings: list[str]) -> list[str]:
    """The systems whose names begin with one of these, and the reference.

    Raises:
        ConfigurationError: no system's name begins with one of these, or a package is missing.
    """
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in SYSTEMS):
            raise ConfigurationError(f"--systems {beginning!r}: no name begins like this; there are {SYSTEMS}")
    names = [name for name in SYSTEMS if name == REFERENCE or name.startswith(tuple(beginnings))]
    missing = {package for package in packages(names) if find_spec(package) is None}
    if missing:
        raise ConfigurationError(
            f"{', '.join(sorted(missing))} not installed; pip install --constraint constraints.txt --editable "
            "'.[peers]', or choose other --systems (transformers, ours)"
        )
    return names


def packages(names: list[str]) -> list[str]:
    """The packages of the extra that these systems need."""
    needed = {
        package for start, needs in PACKAGES.items() if any(n.startswith(start) for n in names) for package in needs
    }
    return sorted(needed)


class _WithMask(torch.nn.Module):
    """A BERT that gets an additive mask, which leaves less in the exported graph than transformers' own masks."""

    def __init__(self, bert: BertForSequenceClassification):
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        additive = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        return self.bert(ids, attention_mask=additive).logits


def export(model: TRBertForSequenceClassification, path: Path) -> None:
    """Write the dense model in the ONNX format, with inputs `ids` and `mask`."""
    bert = transformers_bert(model, BertForSequenceClassification)
    bert.set_attn_implementation("eager")  # the runtimes fuse its plain products better than what SDPA is exported as
    ids, mask = torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)
    free = {0: "sequences", 1: "tokens"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about this exporter's age; the new one needs another package
        torch.onnx.export(
            _WithMask(bert).eval(),
            (ids, mask),
            str(path),
            input_names=["ids", "mask"],
            output_names=["logits"],
            dynamic_axes={"ids": free, "mask": free},
            dynamo=False,
        )


def onnx_runtime(path: Path, threads: int) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})[0]


def quantized(path: Path) -> Path:
    """The model with int8 weights, and activations quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    quantize_dynamic(path, target, weight_type=QuantType.QInt8)
    return target


def openvino(path: Path, threads: int) -> Forward:
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    request = Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda ids, mask: request.infer({"ids": ids, "mask": mask})[0].copy()


def forward_by(peer: str, model: TRBertForSequenceClassification, exported: Path, threads: int) -> Forward:
    """The dense model as a peer runs it; `exported`: where the ONNX file is, or is to be."""
    if peer.startswith("transformers"):
        bert = transformers_bert(model, BertForSequenceClassification)
        return forward_of(bert.to(getattr(torch, DTYPES[peer.split()[-1]])))
    if not exported.exists():
        export(model, exported)
    if peer.startswith("OpenVINO"):
        return openvino(exported, threads)
    return onnx_runtime(quantized(exported) if peer.endswith("int8") else exported, threads)


def score_ours(engine: Engine, documents: list[np.ndarray]) -> np.ndarray:
    """The documents' logits (documents, labels)."""
    return engine.score(documents).outputs


def score_padded(
    forward: Forward, task: Any, batch: int, sort_by_length: bool, documents: list[np.ndarray]
) -> np.ndarray:
    """The documents' logits (documents, labels), from padded batches of their windows."""
    windows = [list(task.windows(document)) for document in documents]
    ids = [window.input_ids for several in windows for window in several]
    logits = iter(run_padded(forward, ids, batch, sort_by_length=sort_by_length))
    return task.gathered(
        [
            task.combine(document, several, [next(logits) for _ in several])
            for document, several in zip(documents, windows)
        ]
    )


def engines(
    model: TRBertForSequenceClassification,
    tokenizer: Any,
    texts: list[str],
    names: list[str],
    *,
    warm_up: int,
    block: int,
    threads: int,
) -> dict[str, Any]:
    """Measure the systems on these texts, of which the last `warm_up` are for the warm-up only."""

    def engine(reduce: bool, dtype: str) -> Engine:
        options = EngineOptions(device="cpu", reduce=reduce, dtype=DTYPES[dtype])
        return Engine(copy.deepcopy(model), tokenizer, options)

    task: Any = engine(False, "fp32").task
    documents, _ = task.encode_rows([(text,) for text in texts])
    systems: dict[str, Callable[[list[np.ndarray]], np.ndarray]] = {}
    with TemporaryDirectory() as temporary:
        peers = dict.fromkeys(name.split(", ")[0] for name in names if name not in OURS)
        forwards = {peer: forward_by(peer, model, Path(temporary) / "dense.onnx", threads) for peer in peers}
        for name in names:
            if name in OURS:
                systems[name] = functools.partial(score_ours, engine(*OURS[name]))
            else:
                peer, batches = name.split(", ")
                systems[name] = functools.partial(score_padded, forwards[peer], task, *BATCHES[batches])
        measured, warm = documents[: len(documents) - warm_up], documents[len(documents) - warm_up :]
        seconds, results, peak = measure(systems, measured, block, lambda: matrix_product_peak(model.config), warm)
    logits = {name: np.concatenate(of_blocks) for name, of_blocks in results.items()}
    reference = logits[REFERENCE]
    windows = [len(window.input_ids) for document in measured for window in task.windows(document)]
    return {
        "documents": len(measured),
        "block": block,
        "windows": len(windows),
        "tokens": sum(windows),
        "peak_gflops_per_second": peak / 1e9,
        "systems": {
            name: {
                "seconds": seconds[name],
                "documents_per_second": len(measured) / seconds[name],
                "speedup": seconds[REFERENCE] / seconds[name],
                "agreement": float((logits[name].argmax(1) == reference.argmax(1)).mean()),
                "largest_logit_difference": float(np.abs(logits[name] - reference).max()),
            }
            for name in names
        },
    }


def timed(command: list[str]) -> tuple[float, str]:
    """A command's seconds and what it prints.

    Raises:
        TRBertError: it fails; with the last line that it prints on stderr.
    """
    # Nothing is looked up on a hub, and each process has its own oneDNN default and its own Ray.
    left_out = (CACHED_SHAPES, "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise TRBertError(f"{' '.join(command)} ended with exit code {done.returncode}: {' '.join(last)}")
    return seconds, done.stdout


def whole_jobs(
    directory: Path, model: TRBertForSequenceClassification, tokenizer: Any, texts: list[str], threads: int
) -> dict[str, Any]:
    """Measure jobs from Parquet to Parquet; `directory`: of the model."""
    rows: dict[str, dict[str, Any]] = {}
    labels: dict[str, dict[str, str]] = {}
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        ids = [f"{number:06d}" for number in range(len(texts))]
        write_shards(place / "in", pa.table({"id": ids, "text": texts}), SHARD_DOCUMENTS)
        transformers_bert(model, BertForSequenceClassification).save_pretrained(place / "bert")
        tokenizer.save_pretrained(place / "bert")

        for short, dtype in DTYPES.items():
            name, output = f"transformers pipeline {short}", place / f"pipeline-{short}"
            paths = [str(path) for path in (place / "bert", place / "in", output)]
            whole, printed = timed(["-m", "benchmarks.ray_pipeline", *paths, dtype, str(threads)])
            table = pa.dataset.dataset(output, format="parquet").to_table()
            scoring = max(table["ended"].to_pylist()) - min(table["started"].to_pylist())
            rows[name] = {"whole": whole, "running": float(printed.split()[-1]), "scoring": scoring}
            labels[name] = dict(zip(table["id"].to_pylist(), table["label"].to_pylist()))

        for overflow in ("windows", "truncate"):
            for short, dtype in DTYPES.items():
                name, output = f"jobs/score.py {short}, {OVERFLOW[overflow]}", place / f"ours-{overflow}-{short}"
                settings = f"--id-column id --dtype {dtype} --overflow {overflow} --num-actors 1".split()
                settings += ["--threads-per-actor", str(threads), "--gpus-per-actor", "0"]
                paths = ["--input", str(place / "in"), "--output", str(output), "--model", str(directory.resolve())]
                whole, _ = timed(["jobs/score.py", *paths, *settings])
                report = json.loads(next((output / "_runs").glob("*.json")).read_text())
                spent = report["seconds"]
                rows[name] = {
                    "whole": whole,
                    "running": spent["wall"],
                    "scoring": spent["steady_state"],
                    "report": spent,
                }
                table = open_output(str(output)).to_table()
                labels[name] = dict(zip(table["id"].to_pylist(), table["label"].to_pylist()))
    first = next(iter(rows))
    for name, row in rows.items():
        row["speedup"] = rows[first]["whole"] / row["whole"]
        row["agreement"] = float(np.mean([labels[name].get(number) == labels[first][number] for number in ids]))
    return {"documents": len(texts), "systems": rows}


def markdown(result: dict[str, Any]) -> str:
    measured, where = result["engines"], result["machine"]
    lines = [
        f"{measured['documents']:,} documents, each computed once, in blocks of {measured['block']}; "
        f"{measured['tokens']:,} tokens in {measured['windows']:,} windows; matrix-product peak in fp32 "
        f"{measured['peak_gflops_per_second']:.0f} GFLOP/s",
        "",
        f"| system | documents/s | over {REFERENCE} | same label | logits differ by at most |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in measured["systems"].items():
        lines.append(
            f"| {name} | {row['documents_per_second']:.1f} | {row['speedup']:.2f}× | {100 * row['agreement']:.1f}% | "
            f"{row['largest_logit_difference']:.1g} |"
        )
    if jobs := result["whole_jobs"]:
        lines += [
            "",
            f"Whole jobs, {jobs['documents']:,} documents. Seconds of the whole process, of the run (Ray Data's "
            "execution of the peer, the run report's wall-clock time), and from the first batch at the model to the "
            "end of the last.",
            "",
            "| job | whole process | run | scoring | whole process, over the fp32 pipeline | same label |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, row in jobs["systems"].items():
            lines.append(
                f"| {name} | {row['whole']:.1f} s | {row['running']:.1f} s | {row['scoring']:.1f} s | "
                f"{row['speedup']:.2f}× | {100 * row['agreement']:.1f}% |"
            )
    packaged = "".join(f", {package} {number}" for package, number in result["packages"].items())
    lines += [
        "",
        f"{described(where)}, {result['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}, Ray {where['ray']}{packaged}, {where['date']}.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="the demo's held-out shards")
    parser.add_argument("--documents", type=int, help=f"to measure (default: all but {WARM_UP}, for the warm-up)")
    parser.add_argument("--block", type=int, default=100, help="documents of a system's turn (%(default)s)")
    parser.add_argument("--systems", nargs="+", default=[""], help="beginnings of names (default: all systems)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-end-to-end", action="store_true", help="no whole jobs")
    arguments = parser.parse_args()
    names = chosen(arguments.systems)
    model, tokenizer = load_model(arguments.model)
    head = model.config.problem_type in (None, "single_label_classification")
    if not (isinstance(model, TRBertForSequenceClassification) and head and model.config.backbone == "bert"):
        raise ConfigurationError(f"--model {arguments.model}: the peers run a BERT that gives documents one label each")
    texts = held_out_texts(arguments.corpus)
    count = len(texts) - WARM_UP if arguments.documents is None else arguments.documents
    if not 1 <= count <= len(texts) - WARM_UP:
        raise InputError(
            f"--documents {count}: {arguments.corpus} has {len(texts)} documents, of which {WARM_UP} are for the "
            "warm-up, and none is computed twice"
        )
    if min(arguments.block, arguments.threads) < 1:
        raise ConfigurationError("--block and --threads must be at least 1")
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[: count + WARM_UP]]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    # The systems share oneDNN's cache of prepared shapes. It must hold those of all; an engine alone makes it small.
    os.environ.setdefault(CACHED_SHAPES, "8192")
    jobs = None
    if not arguments.skip_end_to_end:
        jobs = whole_jobs(arguments.model, model, tokenizer, texts, arguments.threads)
    measured = engines(
        model, tokenizer, texts, names, warm_up=WARM_UP, block=arguments.block, threads=arguments.threads
    )
    result = {
        "machine": machine(),
        "threads": arguments.threads,
        "packages": {package: version(package) for package in packages(names)},
        "engines": measured,
        "whole_jobs": jobs,
    }
    save("peers", result, markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
