"""The verification finds what it is there to find: contents with one thing wrong each."""

from copy import deepcopy
from typing import Any

import pytest

from tests.chaos.verification import SUCCESS, Contents, Findings, compare_files, compare_rows

ROWS = {"a.parquet": 3, "b.parquet": 1}


def result(shard: str, row: int) -> dict[str, Any]:
    columns = {"id": "the same", "source": "s", "label": "good", "score": 0.5, "num_windows": 2}
    return {"shard": shard, "row": row, **columns, "num_tokens": 7 + row, "kept_tokens": [5, 2]}


def marker(shard: str, name: str, sha256: str) -> dict[str, Any]:
    return {"shard": shard, "splits": [{"object": name, "sha256": sha256}]}


@pytest.fixture
def reference() -> Contents:
    """Two shards of a split each; row 1 of the first is quarantined."""
    markers = {
        "_shards/a": marker("a.parquet", "a-0.parquet", "aa"),
        "_shards/b": marker("b.parquet", "b-0.parquet", "bb"),
    }
    places = [("a.parquet", 0), ("a.parquet", 2), ("b.parquet", 0)]
    quarantined = {"shard": "a.parquet", "row": 1, "id": "the same", "reason": "null", "detail": ""}
    return Contents(
        results={place: [result(*place)] for place in places},
        quarantined={("a.parquet", 1): [quarantined]},
        objects={"a-0.parquet": "aa", "b-0.parquet": "bb", "_quarantine/a-0.parquet": "qq"},
        json={**markers, SUCCESS: {"shards": list(markers.values())}},
    )


@pytest.fixture
def contents(reference: Contents) -> Contents:
    return deepcopy(reference)


def findings(contents: Contents, reference: Contents) -> Findings:
    found = Findings()
    compare_rows(contents, ROWS, reference, found, "prefix")
    compare_files(contents, reference, found)
    return found


def test_nothing(contents, reference):
    assert not findings(contents, reference)


def test_a_lost_row(contents, reference):
    del contents.results["a.parquet", 2]
    del contents.quarantined["a.parquet", 1]
    assert findings(contents, reference) == Findings(lost=["a.parquet row 1, by prefix", "a.parquet row 2, by prefix"])


def test_a_doubled_row(contents, reference):
    contents.results["b.parquet", 0] *= 2
    assert findings(contents, reference).doubled == ["b.parquet row 0, by prefix: 2 times"]


def test_a_row_among_results_and_quarantined(contents, reference):
    contents.quarantined["b.parquet", 0] = contents.quarantined["a.parquet", 1]
    assert findings(contents, reference).doubled == ["b.parquet row 0, by prefix: 2 times"]


def test_a_row_that_is_not_in_the_input(contents, reference):
    contents.results["a.parquet", 3] = [result("a.parquet", 3)]
    assert findings(contents, reference) == Findings(wrong=["a.parquet row 3, by prefix: not in the input"])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("label", "bad"),
        ("num_tokens", 8),
        ("num_windows", 1),
        ("kept_tokens", [5]),
        ("id", None),
        ("source", ""),
        ("score", 0.5002),
    ],
)
def test_another_value(contents, reference, column, value):
    contents.results["b.parquet", 0][0][column] = value
    (found,) = findings(contents, reference).wrong
    assert found.startswith(f"b.parquet row 0, by prefix: {column} {value!r} instead of")


def test_a_score_may_differ_by_what_batches_may_change(contents, reference):
    contents.results["b.parquet", 0][0]["score"] += 0.9e-4
    assert not findings(contents, reference)
    contents.results["b.parquet", 0][0]["score"] = float("nan")
    assert findings(contents, reference)


def test_another_reason_and_another_end(contents, reference):
    contents.quarantined["a.parquet", 1][0]["reason"] = "empty"
    contents.quarantined["b.parquet", 0] = [{**contents.quarantined["a.parquet", 1][0]}]
    del contents.results["b.parquet", 0]
    contents.results["a.parquet", 1] = []
    assert findings(contents, reference).wrong == [
        "a.parquet row 1, by prefix: empty instead of null",
        "b.parquet row 0, by prefix: a quarantined row, where the undisturbed run has a result row",
    ]


def test_other_files(contents, reference):
    del contents.objects["_quarantine/a-0.parquet"]
    contents.objects["c-0.parquet"] = "cc"
    contents.objects["b-0.parquet"] = "b2"
    assert findings(contents, reference).wrong == [
        "_quarantine/a-0.parquet is missing",
        "c-0.parquet is one too many",
        "b-0.parquet is not what the marker of b.parquet says",
    ]


def test_a_success_that_is_missing_or_tells_something_else(contents, reference):
    contents.json[SUCCESS]["shards"].pop()
    assert SUCCESS in findings(contents, reference).wrong[0]
    del contents.json[SUCCESS]
    assert [SUCCESS in found for found in findings(contents, reference).wrong] == [True, True]
