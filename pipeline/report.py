"""Statistics of a run: records of single splits, which add up to the run's report."""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trbert_model.calibration.table import change_of
from trbert_model.terminal import clock, printable

from .corpus import Shard
from .highlights import Highlights
from .ledger import UnderWay
from .plan import Plan

_MOST_LABELS = 10  # in the summary


@dataclass
class SplitStats:
    """Counts and times of one split or a sum of splits. Seconds are busy seconds of the stage they are named after."""

    documents: int = 0
    text_bytes: int = 0
    result_bytes: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)  # reason → rows
    labels: dict[str, int] = field(default_factory=dict)  # label → documents
    tokens: int = 0
    windows: int = 0
    kept_tokens: list[int] = field(default_factory=list)  # one per reduction
    flops: float = 0.0
    dense_flops: float = 0.0
    read_seconds: float = 0.0
    tokenize_seconds: float = 0.0
    predict_seconds: float = 0.0
    model_seconds: float = 0.0
    commit_seconds: float = 0.0
    halved_batches: int = 0
    storage_retries: int = 0
    # Least power of two of a document's tokens → documents, their tokens, and those kept by each reduction.
    by_length: dict[str, list[int]] = field(default_factory=dict)
    # Of models with exits: the layer after which documents left, rounded → documents; and the sum of these layers.
    exit_layers: dict[str, int] = field(default_factory=dict)
    exit_layer_sum: float = 0.0

    def count_bad(self, rows: list[dict[str, Any]]) -> None:
        """Count quarantined rows by reason."""
        for row in rows:
            self.bad_rows[row["reason"]] = self.bad_rows.get(row["reason"], 0) + 1

    def __add__(self, other: "SplitStats") -> "SplitStats":
        names = [item.name for item in dataclasses.fields(self)]
        return SplitStats(**{name: _sum(getattr(self, name), getattr(other, name)) for name in names})

    @property
    def bad(self) -> int:
        return sum(self.bad_rows.values())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SplitStats":
        return cls(**json.loads(text))


def _sum(mine: Any, its: Any) -> Any:
    """Add two numbers, lists by position, or dictionaries by key."""
    if isinstance(mine, dict):
        return mine | its | {key: _sum(mine[key], its[key]) for key in mine.keys() & its.keys()}
    if isinstance(mine, list):
        return [sum(pair) for pair in itertools.zip_longest(mine, its, fillvalue=0)]
    return mine + its


@dataclass
class ActorSpan:
    """The activity of a model actor.

    Attributes:
        loaded_seconds: how long its model took to load.
        first_start: when it started its first split, in seconds since the epoch.
        last_end: when it finished its last split, in seconds since the epoch.
        busy_seconds: time spent on splits.
    """

    loaded_seconds: float
    first_start: float
    last_end: float
    busy_seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        share: the share of its shards' bytes that is done.
        documents: documents that are scored, those of splits in progress included.
        eta_seconds: remaining time at the speed so far; None if no document is scored yet.
    """

    share: float
    documents: int
    eta_seconds: float | None


class RunStatistics:
    """Collects the statistics of a run on the driver."""

    def __init__(self, run_id: str, plan: Plan, started: float):
        self.run_id, self.plan = run_id, plan
        self.started = started  # seconds since the epoch
        self.finished: float | None = None
        self.total = SplitStats()
        self.highlights = Highlights()
        self.splits = 0
        self.actors: dict[str, ActorSpan] = {}
        self.unreadable: dict[str, str] = {}
        self.failed_splits: dict[str, str] = {}
        self.shards_completed = 0
        self.removed: list[str] = []  # shards with results that are no longer in the corpus
        self.stopped: str | None = None
        self.deaths = 0  # processes that died while working
        self.hung = 0  # processes that were killed because they showed no progress
        self.quarantined = 0  # rows of the shards this run completed, including those quarantined by earlier runs
        self._lock = threading.Lock()
        self._sizes = {shard.path: shard.size for shard, _ in plan.pending}
        self._unread: dict[str, float] = dict(self._sizes)  # what is left of each shard
        self._bytes_total = float(sum(self._sizes.values()))
        self._bytes_done = 0.0
        self._shown = (0.0, 0)  # the largest share and number of documents that a progress line showed

    def add_shard(self, quarantined: int) -> None:
        """Count a completed shard; called by the threads that write markers."""
        with self._lock:
            self.shards_completed += 1
            self.quarantined += quarantined

    def skip(self, shard: Shard, rows: int, shard_rows: int) -> None:
        """Exclude rows that an earlier run committed, or that could not be scored, from the work of this run."""
        size = shard.size * rows / max(shard_rows, 1)
        self._bytes_total -= size
        self._unread[shard.path] = self._unread.get(shard.path, 0.0) - size

    def skip_rest(self, shard: Shard) -> None:
        """Exclude what is left of an unreadable shard from the work of this run."""
        self._bytes_total -= max(self._unread.pop(shard.path, 0.0), 0.0)

    def add_split(
        self, stats: SplitStats, shard: Shard, rows: int, shard_rows: int, actor_split: dict[str, Any]
    ) -> None:
        """Add a committed split to the totals, to the progress and to its actor's activity."""
        self.total = self.total + stats
        self.splits += 1
        size = shard.size * rows / max(shard_rows, 1)
        self._bytes_done += size
        self._unread[shard.path] = self._unread.get(shard.path, 0.0) - size
        start, end = actor_split["start"], actor_split["end"]
        fresh = ActorSpan(actor_split["loaded_seconds"], start, end, 0.0)
        span = self.actors.setdefault(actor_split["actor"], fresh)
        span.first_start, span.last_end = min(span.first_start, start), max(span.last_end, end)
        span.busy_seconds += end - start

    def steady_seconds(self) -> float:
        """Seconds from the start of the first split on an actor to the end of the last one."""
        spans = list(self.actors.values())  # a copy, since the progress line is made in another thread
        if not spans:
            return 0.0
        return max(span.last_end for span in spans) - min(span.first_start for span in spans)

    def _bytes_under_way(self, under_way: Sequence[UnderWay]) -> float:
        return sum(self._sizes.get(split.shard, 0) * split.share for split in under_way)

    def bytes_left(self, under_way: Sequence[UnderWay] = ()) -> float:
        """Bytes of shards that are neither done nor given up; under_way: splits in progress."""
        return max(self._bytes_total - self._bytes_done - self._bytes_under_way(under_way), 0.0)

    def progress(self, under_way: Sequence[UnderWay] = ()) -> Progress:
        """How far the run is, with the splits in progress."""
        now = time.time()
        spans = list(self.actors.values())  # a copy, since this is called in another thread
        first = min([*(span.first_start for span in spans), *(split.started for split in under_way)], default=now)
        size = self._bytes_done + self._bytes_under_way(under_way)
        # A split that has ended and is not committed yet is in neither.
        share, documents = self._shown = (
            max(self._shown[0], min(size / max(self._bytes_total, 1.0), 1.0)),
            max(self._shown[1], self.total.documents + sum(split.documents for split in under_way)),
        )
        return Progress(share, documents, max(now - first, 0.0) * (1 - share) / share if documents and share else None)

    def progress_line(self, under_way: Sequence[UnderWay] = ()) -> str:
        """One line: documents, speed, kept tokens, and the remaining time at the current speed.

        Args:
            under_way: splits in progress. Speed and kept tokens are those of committed splits.
        """
        elapsed, total, progress = clock(time.time() - self.started), self.total, self.progress(under_way)
        if not progress.documents:
            return f"{elapsed} starting: no document is scored yet"
        eta = "unknown" if progress.eta_seconds is None else clock(progress.eta_seconds)
        parts = [f"{elapsed} {100 * progress.share:.0f}%", f"{progress.documents:,} documents"]
        if self.splits:
            kept = " / ".join(f"{100 * k / max(total.tokens, 1):.0f}%" for k in total.kept_tokens) or "all"
            parts += [f"{total.tokens / max(self.steady_seconds(), 1e-9):,.0f} tokens/s", f"kept {kept}"]
        return " · ".join([*parts, f"{total.bad} bad rows", f"ETA {eta}"])

    def report(self, *, status: str, exit_code: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Build the run report, as stored in `_runs/<run id>.json`."""
        self.finished = self.finished or time.time()
        total, steady, wall = self.total, self.steady_seconds(), self.finished - self.started
        computed = sum(span.busy_seconds for span in self.actors.values())
        presence = sum(span.last_end - span.first_start for span in self.actors.values())
        first = min((span.first_start for span in self.actors.values()), default=self.finished)
        per_second = {
            name: round(value / steady, 3) if steady else None
            for name, value in (
                ("documents", total.documents),
                ("tokens", total.tokens),
                ("text_bytes", total.text_bytes),
            )
        }
        return {
            "run": self.run_id,
            "status": status,
            "exit_code": exit_code,
            "stopped": self.stopped,
            "started": timestamp(self.started),
            "finished": timestamp(self.finished),
            "shards": {
                "in_corpus": len(self.plan.pending) + len(self.plan.complete),
                "complete_before": len(self.plan.complete),
                "completed": self.shards_completed,
                "unreadable": self.unreadable,
                "removed": self.removed,
            },
            "splits": {
                "committed": self.splits,
                "found_committed": sum(len(done) for _, done in self.plan.pending),
                "failed": self.failed_splits,
            },
            "faults": {
                "process_deaths": self.deaths,
                "hung_processes": self.hung,
                "storage_retries": total.storage_retries,
            },
            "warnings": [],
            "expectation": None,
            "finish_by": None,
            "documents": total.documents,
            "bad_rows": total.bad_rows,
            "labels": total.labels,
            "tokens": total.tokens,
            "windows": total.windows,
            "text_bytes": total.text_bytes,
            "result_bytes": total.result_bytes,
            "kept_fractions": [kept / total.tokens for kept in total.kept_tokens] if total.tokens else [],
            "kept_by_length": {
                bound: {"documents": documents, "tokens": tokens, "kept_fractions": [n / max(tokens, 1) for n in kept]}
                for bound, (documents, tokens, *kept) in sorted(total.by_length.items(), key=lambda item: int(item[0]))
            },
            **_exit_layers(total),
            "flops": {
                "spent": total.flops,
                "dense": total.dense_flops,
                "saved": total.dense_flops - total.flops,
                "speedup": total.dense_flops / total.flops if total.flops else None,
            },
            "seconds": {
                "wall": round(wall, 3),
                "startup": round(first - self.started, 3),
                "steady_state": round(steady, 3),
                "finish": round(max(wall - (first - self.started) - steady, 0.0), 3),
            },
            "per_second_steady_state": per_second,
            "busy_seconds": {
                "read": round(total.read_seconds, 3),
                "tokenize": round(total.tokenize_seconds, 3),
                "predict": round(total.predict_seconds, 3),
                "model": round(total.model_seconds, 3),
                "commit": round(total.commit_seconds, 3),
            },
            "actors": {
                "count": len(self.actors),
                "load_seconds": [round(span.loaded_seconds, 3) for span in self.actors.values()],
                "computing_share": round(computed / presence, 4) if presence else None,
                "halved_batches": total.halved_batches,
            },
            **self.highlights.report(),
            **settings,
        }


def _exit_layers(total: SplitStats) -> dict[str, Any]:
    """The report's entry for models with exits."""
    if not total.exit_layers:
        return {}
    layers = dict(sorted(total.exit_layers.items(), key=lambda item: int(item[0])))
    return {"exit_layers": {"mean": total.exit_layer_sum / max(total.documents, 1), "documents": layers}}


def summary(report: dict[str, Any]) -> str:
    """Format the run report for a terminal."""
    shards, seconds, speed = report["shards"], report["seconds"], report["per_second_steady_state"]
    lines = [
        f"{report['status']}  (run {report['run']}, exit code {report['exit_code']})",
        f"  shards      {shards['completed']} completed, {shards['complete_before']} complete before, "
        f"{len(shards['unreadable'])} unreadable, of {shards['in_corpus']}",
    ]
    if report["splits"]["committed"] or shards["in_corpus"] > shards["complete_before"]:
        lines.append(
            f"  documents   {report['documents']:,} scored, {sum(report['bad_rows'].values()):,} quarantined"
            + "".join(f" ({reason}: {count})" for reason, count in sorted(report["bad_rows"].items()))
        )
    if report["documents"]:
        flops, kept = report["flops"], report["kept_fractions"]
        labels = sorted(report["labels"].items(), key=lambda item: -item[1])
        lines += [
            "  labels      "
            + ", ".join(f"{label} {count:,}" for label, count in labels[:_MOST_LABELS])
            + (f" and {len(labels) - _MOST_LABELS:,} more" if len(labels) > _MOST_LABELS else ""),
            f"  tokens      {report['tokens']:,} in {report['windows']:,} windows; kept "
            + (", then ".join(f"{100 * fraction:.1f}%" for fraction in kept) or "all"),
            f"  FLOPs       {flops['spent'] / 1e12:,.3f} T spent, {flops['saved'] / 1e12:,.3f} T saved: "
            f"{flops['speedup']:.2f}x fewer than dense",
            f"  speed       {speed['documents']:,.1f} documents/s, {speed['tokens']:,.0f} tokens/s, "
            f"{speed['text_bytes'] / 1e6:,.3f} MB text/s in steady state",
            f"  time        {seconds['wall']:.1f} s: start-up {seconds['startup']:.1f}, steady state "
            f"{seconds['steady_state']:.1f}, finish {seconds['finish']:.1f}; {report['actors']['count']} actors, "
            f"computing {100 * report['actors']['computing_share']:.0f}% of steady state",
            "  busy        " + ", ".join(f"{stage} {busy:.1f} s" for stage, busy in report["busy_seconds"].items()),
        ]
        if exits := report.get("exit_layers"):
            shares = (
                f"{100 * count / report['documents']:.0f}% after {layer}" for layer, count in exits["documents"].items()
            )
            lines.append(f"  exits       after {exits['mean']:.1f} layers on average: {', '.join(shares)}")
        if expected := report["expectation"]:
            lines.append(
                f"  expected    {expected['flops_speedup']:.2f}x fewer FLOPs, kept "
                + ", then ".join(f"{100 * fraction:.1f}%" for fraction in expected["kept_fractions"])
                + f", {change_of(expected['drop'], expected['drop_interval'])}: {expected['asked']}"
            )
    if finish := report.get("finish_by"):
        versions = [point for point in finish["points"] if point["splits"]]
        lines.append(
            f"  finish by   {finish['asked']} ({finish['deadline']}): {finish['outcome']}; "
            + (", ".join(f"{point['splits']:,} splits at {point['name']}" for point in versions) or "no split scored")
        )
    if page := report.get("page"):
        lines.append(f"  page        {report['output'].rstrip('/')}/{page}")
    lines += [f"  warning     {warning}" for warning in report["warnings"]]
    if any(report["faults"].values()):
        faults = report["faults"]
        lines.append(
            f"  faults      {faults['process_deaths']} processes died at their work, {faults['hung_processes']} hung, "
            f"{faults['storage_retries']} storage requests were made again"
        )
    if removed := shards["removed"]:
        lines.append(f"  removed     {len(removed)} shards are no longer in the corpus, their results are still here")
    lines += _listed("removed", dict.fromkeys(removed, ""))
    lines += _listed("unreadable", shards["unreadable"])
    lines += _listed("failed", report["splits"]["failed"])
    return printable("\n".join(lines))


def _listed(what: str, reasons: dict[str, str], most: int = 50) -> list[str]:
    """One line for each shard or split with its reason, at most `most` of them."""
    rows = [(name.replace("\n", "\\n"), f": {reason}" if reason else "") for name, reason in sorted(reasons.items())]
    lines = [f"  {what:11} {name}{reason}" for name, reason in rows]
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"  {what:11} … and {more:,} more, in the run report"]


def timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
