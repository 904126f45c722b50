"""What the page of a run shows of single documents, rows and splits. Everything is small, also for large corpora.

The readers choose sample documents of each split, since only they have the texts. The actors add which layers computed
their tokens, and the driver keeps some of all splits. Which ones depends on the input, not on the order of the work.
"""

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trbert_model.terminal import get_logger

if TYPE_CHECKING:
    from trbert_model.engine import Engine
    from trbert_model.explanation import Recording

logger = get_logger(__name__)

SAMPLES = 10  # of a run
_SAMPLE_CHARACTERS = 4000  # of each text of a sample
_MOST_CHARACTERS = 1_000_000  # of a document that may be a sample, since an explanation takes memory for all its tokens
_REJECTS = 5  # of a reason
_SLOWEST = 10
_BINS = 60


def choose_samples(
    texts: Sequence[tuple[str, ...]], candidates: Sequence[int], most: int, seed: str
) -> list[dict[str, Any]]:
    """Choose sample documents of a split, none of them extremely long.

    Args:
        texts: the texts of the split's rows.
        candidates: the rows with a document, by index.
        most: how many to choose.
        seed: the name of the split.

    Returns:
        For each of them its index among the candidates, a random `rank` by which the driver chooses among splits, the
        beginnings of its texts, and their lengths in characters.
    """
    may_be = [i for i, row in enumerate(candidates) if sum(map(len, texts[row])) <= _MOST_CHARACTERS]
    generator = np.random.default_rng(int(hashlib.sha256(seed.encode(errors="surrogateescape")).hexdigest()[:16], 16))
    ranks = generator.random(len(candidates))
    return [
        {
            "position": int(position),
            "rank": float(ranks[position]),
            "texts": [text[:_SAMPLE_CHARACTERS] for text in texts[candidates[position]]],
            "characters": [len(text) for text in texts[candidates[position]]],
        }
        for position in sorted(may_be, key=ranks.__getitem__)[:most]
    ]


def explain_samples(
    engine: "Engine",
    samples: list[dict[str, Any]],
    recording: "Recording",
    documents: Iterable[Any],
    results: dict[str, pa.Array],
) -> list[dict[str, Any]]:
    """Add explanations to the samples of a split; documents: those of the samples. Leaves out what was not recorded."""
    explained = []
    for sample, document in zip(samples, documents):
        position = sample["position"]
        if position not in recording.windows:
            continue
        try:
            explanation = engine.explanation(
                tuple(sample["texts"]),
                document,
                recording.windows[position],
                engine.task.outcome(results, position),
                lengths=tuple(sample["characters"]),
            )
        except BaseException as error:
            # Samples are not part of the results. Panics of the tokenizer are no subclass of Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            logger.warning("a sample of the run's page cannot be explained: %r", error)
            continue
        explained.append({"position": position, "rank": sample["rank"], "explanation": dataclasses.asdict(explanation)})
    return explained


def first_rejects(rejected: pa.Table, quoting: str) -> list[dict[str, Any]]:
    """The first few quarantined rows of each reason; quoting: the reason whose details may quote texts."""
    rows = []
    for reason in pc.unique(rejected["reason"]).to_pylist():
        rows += rejected.filter(pc.equal(rejected["reason"], reason)).slice(0, _REJECTS).to_pylist()
    return [row | {"detail": "see the quarantined row"} if row["reason"] == quoting else row for row in rows]


class Highlights:
    """Collects the highlights of a run on the driver."""

    def __init__(self) -> None:
        self.samples: list[dict[str, Any]] = []
        self._rejects: dict[str, list[dict[str, Any]]] = {}
        self._slowest: list[tuple[float, str, int, dict[str, Any]]] = []
        self._spans: list[tuple[float, float, int, int]] = []  # start, end, documents, tokens

    def add(self, row: dict[str, Any], name: str, documents: int, tokens: int) -> None:
        """Add a committed split; row: as it left the pipeline, name: of its objects."""
        actor = json.loads(row["actor"])
        start, end = actor["start"], actor["end"]
        self._spans.append((start, end, documents, tokens))
        about = {"object": name, "rows": row["rows"], "documents": documents, "tokens": tokens}
        heapq.heappush(self._slowest, (end - start, row["shard"], row["index"], about))
        if len(self._slowest) > _SLOWEST:
            heapq.heappop(self._slowest)
        highlights = json.loads(row["highlights"] or "{}")
        for reject in highlights.get("rejected", []):
            rows = self._rejects.setdefault(reject["reason"], [])
            rows.append({**reject, "object": name})
            rows.sort(key=lambda each: (each["shard"], each["row"]))
            del rows[_REJECTS:]
        self.samples += highlights.get("samples", [])
        self.samples.sort(key=lambda sample: (sample["rank"], sample["shard"], sample["row"]))
        del self.samples[SAMPLES:]

    def report(self) -> dict[str, Any]:
        """The entries of the run report; without the samples, since a report holds no texts."""
        return {
            "timeline": self._timeline(),
            "slowest_splits": [
                {"shard": shard, "split": index, "seconds": round(seconds, 3), **about}
                for seconds, shard, index, about in sorted(self._slowest, key=lambda each: (-each[0], *each[1:3]))
            ],
            "rejected_rows": {
                reason: [{name: row[name] for name in ("shard", "row", "id", "detail", "object")} for row in rows]
                for reason, rows in sorted(self._rejects.items())
            },
        }

    def _timeline(self) -> dict[str, Any] | None:
        """Documents and tokens in equal parts of the steady state. Those of a split are spread over its time."""
        if not self._spans:
            return None
        spans = np.array(self._spans)
        first, last = spans[:, 0].min(), spans[:, 1].max()
        width = max(last - first, 1e-3) / _BINS
        begin = np.minimum((spans[:, 0] - first) / width, _BINS - 1e-3)
        end = np.maximum((spans[:, 1] - first) / width, begin + 1e-3)
        sums = np.zeros((2, _BINS))
        for i in range(_BINS):
            overlap = np.clip(np.minimum(end, i + 1) - np.maximum(begin, i), 0, None)
            sums[:, i] = (overlap / (end - begin)) @ spans[:, 2:]
        documents, tokens = sums.round(1).tolist()
        return {"bin_seconds": round(float(width), 4), "documents": documents, "tokens": tokens}
