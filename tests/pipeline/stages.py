"""The pipeline's stages in this process, without Ray: corpora, options, and a whole run of one shard."""

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import Committed, bind_output, output_identity, publish_splits, settle_done, write_marker
from pipeline.corpus import Shard, list_shards
from pipeline.encode import EncodeOptions, read_shards, shard_groups
from pipeline.manifest import SUCCESS, write_manifest
from pipeline.plan import make_plan
from pipeline.predict import SplitPredictor
from pipeline.rows import from_ipc
from pipeline.storage import Storage
from trbert_model.engine import Engine, EngineOptions

ON_CPU = EngineOptions(device="cpu")
WORDS = "the good bad fine news sport a of and game bank".split()


def texts(count: int, words: int = 20, start: int = 0) -> list[str]:
    """Different documents of the tiny tokenizer's words."""
    return [
        " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(1 + (i * 13) % words))
        for i in range(start, start + count)
    ]


def write_shard(path: Path, columns: dict, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


@functools.cache
def task_of(model: Path, engine: EngineOptions) -> Any:
    """What the driver gives the readers."""
    return Engine.from_pretrained(model, engine).task


def encode_options(directory: Path, model: Path, engine: EngineOptions = ON_CPU, **changes) -> EncodeOptions:
    settings = {
        "input": Storage(str(directory)),
        "task": task_of(model, engine),
        "text_columns": ("text",),
        "id_column": "id",
        "keep_columns": (),
        "split_bytes": 1 << 20,
    } | changes
    kept = settings.pop("keep_columns")
    identifier = [settings["id_column"]] if settings["id_column"] else []
    return EncodeOptions(**settings, passed_columns=[*identifier, *kept])


def encode(shard: Shard, options: EncodeOptions, done: frozenset[int] = frozenset()) -> list[dict]:
    """The rows that reading a shard yields, documents and rejected rows as tables."""
    batch = pa.Table.from_pylist(shard_groups([(shard, done)]))
    rows = [row for table in read_shards(batch, options) for row in table.to_pylist()]
    for row in rows:
        if row["payload"] is not None:
            row["documents"], row["bad"] = from_ipc(row["payload"]), from_ipc(row["rejected"])
    return rows


def only_shard(directory: Path) -> Shard:
    (shard,) = list_shards(Storage(str(directory)))
    return shard


def run_stages(shard: Shard, options: EncodeOptions, predictor, output: Storage, done=frozenset()) -> list[dict]:
    """Read, predict and publish a shard."""
    batch = pa.Table.from_pylist(shard_groups([(shard, done)]))
    rows = []
    for encoded in read_shards(batch, options):
        rows += publish_splits(predictor(encoded), output).to_pylist()
    return rows


def score_here(directory: Path, output: Storage, model: Path, split_bytes: int = 600) -> None:
    """A whole run over a directory of shards, as `pipeline.score` does it, in this process."""
    identity = {"input": str(directory), "model_digest": "digest"}
    bind_output(output, identity, overwrite=False)
    run_again(directory, output, model, split_bytes)


def run_again(directory: Path, output: Storage, model: Path, split_bytes: int = 600) -> None:
    """What a run does about what it finds: `pipeline.run.run_job` without Ray."""
    options = encode_options(directory, model, split_bytes=split_bytes)
    predictor = SplitPredictor(["id"], "id", model=str(model), device="cpu")
    plan = make_plan(list_shards(Storage(str(directory))), output)
    if plan.manifest is None:
        output.delete([SUCCESS, *plan.distrusted])
    for shard in plan.complete:
        output.delete(plan.superseded.get(shard.key, []))
    settled = settle_done(output, plan.pending, "")
    markers = list(plan.markers.values())
    for shard, _ in plan.pending:
        splits = {index: committed for (path, index), committed in settled.items() if path == shard.path}
        rows = run_stages(shard, options, predictor, output, frozenset(splits))
        assert all(row["error"] is None for row in rows), rows
        splits |= {row["index"]: Committed(**json.loads(row["committed"])) for row in rows if row["index"] >= 0}
        superseded = plan.superseded.get(shard.key, [])
        markers.append(write_marker(output, shard, [splits[i] for i in sorted(splits)], "run", superseded=superseded))
    if plan.manifest is None:
        write_manifest(output, output_identity(output), markers, [], "run")
