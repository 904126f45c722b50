"""The rows that carry splits through the Ray Data pipeline, with one fixed schema for all stages.

A row is one split: plain columns, and documents or results as Arrow IPC bytes. A stage that fails sets `error` and
passes the row on, so that no split is lost. Nothing here imports the model, so that the processes that write results
start without it.
"""

from enum import StrEnum
from typing import Any

import pyarrow as pa

SPLIT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("version", pa.string()),
        ("size", pa.int64()),
        ("shard_rows", pa.int64()),
        ("index", pa.int32()),  # -1: not a split; the row has the shard's num_splits or error
        ("num_splits", pa.int32()),  # on the shard's last row; otherwise null
        ("rows", pa.int64()),
        ("skipped_rows", pa.int64()),  # rows of already committed splits since the shard's previous row
        ("payload", pa.large_binary()),
        ("rejected", pa.large_binary()),
        ("stats", pa.string()),
        ("highlights", pa.string()),  # what the run's page shows of it, see `highlights`, as JSON
        ("actor", pa.string()),  # which actor scored it and when, `predict.ActorSplit` as JSON
        ("committed", pa.string()),  # what was published, `commit.Committed` as JSON
        ("error", pa.string()),  # why a stage failed, for people
        ("error_kind", pa.string()),  # the same for the driver, an `ErrorKind`
    ]
)

# Quarantined rows.
REJECTED_SCHEMA = pa.schema(
    [("shard", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


class ErrorKind(StrEnum):
    """The cause of a row's error."""

    WORK = "work"  # the shard, the split or the input's storage
    OUTPUT = "output"  # the results could not be written
    STOPPED = "stopped"  # the run was asked to stop


def split_table(row: dict[str, Any]) -> pa.Table:
    """A table of one row in the pipeline's schema."""
    return pa.Table.from_pylist([row], schema=SPLIT_SCHEMA)


def error_table(row: dict[str, Any], error: Exception, kind: ErrorKind = ErrorKind.WORK) -> pa.Table:
    """The row of a split or shard that a stage failed on, without its payload."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return _failed_table(row, reason, kind)


def stopped_table(row: dict[str, Any]) -> pa.Table:
    """The row of a split or shard that was not processed because the run stops."""
    return _failed_table(row, "stopped", ErrorKind.STOPPED)


def _failed_table(row: dict[str, Any], reason: str, kind: ErrorKind) -> pa.Table:
    return split_table(
        {**row, "payload": None, "rejected": None, "highlights": None, "error": reason, "error_kind": kind}
    )


def to_ipc(table: pa.Table) -> bytes:
    """Convert a table to Arrow IPC stream bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_ipc(data: Any) -> pa.Table:
    """Read a table from Arrow IPC stream bytes (or a binary scalar) without copying."""
    buffer = data.as_buffer() if isinstance(data, pa.Scalar) else pa.py_buffer(data)
    return pa.ipc.open_stream(buffer).read_all()
