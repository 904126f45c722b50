"""The page of a run: what it shows of every kind of report, and what it never shows."""

import json
import random
import re
import time
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.command import run_command
from jobs.report import main
from pipeline.highlights import Highlights, choose_samples
from pipeline.page import page
from pipeline.plan import Plan
from pipeline.predict import SplitPredictor
from pipeline.report import RunStatistics, SplitStats
from pipeline.storage import Storage
from tests.pipeline.stages import encode_options, only_shard, run_stages, texts, write_shard

EVIL = "</style></script><script>alert('evil')</script><img src=x onerror=alert(1)>"
EMPTY = {"run": "20261101T000000Z-a"}


def scored(directory, model, *, predictor=None, **options):
    """The rows of a shard that left the pipeline, and the run's statistics of them."""
    predictor = predictor or SplitPredictor(["id"], "id", model=str(model), device="cpu")
    shard = only_shard(directory / "in")
    output = Storage(str(directory / "out"))
    rows = run_stages(shard, encode_options(directory / "in", model, split_bytes=400, **options), predictor, output)
    statistics = RunStatistics("20261102T000000Z-b", Plan(pending=[(shard, frozenset())]), time.time())
    for row in rows:
        stats = SplitStats.from_json(row["stats"])
        name = json.loads(row["committed"])["object"]
        statistics.highlights.add(row, name, stats.documents, stats.tokens)
        statistics.add_split(stats, shard, row["rows"], row["shard_rows"], json.loads(row["actor"]))
    return rows, statistics


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_directory):
    """A scored shard with texts, ids and details that would do things to a page."""
    directory = tmp_path_factory.mktemp("run")
    documents = [*texts(60), None, " ", EVIL, f"good {EVIL} news", "fine " * 2000]
    write_shard(directory / "in/a.parquet", {"id": [f"{EVIL}{i}" for i in range(65)], "text": documents})
    rows, statistics = scored(directory, model_directory, samples=10.0)
    return directory, rows, statistics


def report_of(statistics, **changes):
    settings = {
        "input": EVIL,
        "output": "out",
        "model": {"uri": EVIL, "digest": "d" * 64, "layers": 4, "reduction_layers": [1, 2]},
        "options": {"text_column": EVIL},
        "placement": {"num_actors": 1},
        "versions": {"python": "3"},
    }
    return statistics.report(status=f"complete {EVIL}", exit_code=0, settings=settings | changes)


def test_samples_are_ten_documents_and_do_not_depend_on_the_order_of_the_work(run, model_directory):
    directory, rows, statistics = run
    samples = statistics.highlights.samples
    assert len(rows) > 5
    assert len(samples) == 10
    assert len({sample["row"] for sample in samples}) == 10
    again, other = scored(directory, model_directory, samples=10.0)[0], Highlights()
    random.Random(1).shuffle(again)
    for row in again:
        other.add(row, json.loads(row["committed"])["object"], 1, 1)
    chosen = [(sample["shard"], sample["row"], sample["id"]) for sample in samples]
    assert [(sample["shard"], sample["row"], sample["id"]) for sample in other.samples] == chosen
    assert other.report()["rejected_rows"] == statistics.highlights.report()["rejected_rows"]


def test_samples_say_what_the_results_say(run):
    directory, _, statistics = run
    results = {}
    for file in (directory / "out").glob("*.parquet"):
        results |= {row["row"]: row for row in pq.read_table(file).to_pylist()}
    for sample in statistics.highlights.samples:
        row, explanation = results[sample["row"]], sample["explanation"]
        assert sample["id"] == row["id"]
        assert explanation["outcome"] == {"label": row["label"], "score": row["score"]}
        assert explanation["kept_tokens"] == row["kept_tokens"]
        assert explanation["num_tokens"] == row["num_tokens"]


def test_without_samples_no_text_leaves_the_readers(run, model_directory):
    directory, _, _ = run
    rows, statistics = scored(directory, model_directory)
    assert statistics.highlights.samples == []
    assert not any("news" in row["highlights"] for row in rows)
    assert "made with --no-samples" in page(report_of(statistics), [], statistics.highlights.samples)


@given(st.integers(0, 30), st.integers(0, 12))
def test_as_many_samples_as_asked_for(count, most):
    chosen = choose_samples([("a", "b" * 9000)] * (count + 1), list(range(1, count + 1)), most, "split")
    assert len(chosen) == len({sample["position"] for sample in chosen}) == min(count, most)
    assert choose_samples([("a" * 1_000_001,)], [0], 10, "split") == []
    assert all(len(sample["texts"][1]) == 4000 and sample["characters"] == [1, 9000] for sample in chosen)


def test_kept_tokens_by_length_add_up(run):
    _, _, statistics = run
    report = report_of(statistics)
    groups = report["kept_by_length"].values()
    assert sum(group["documents"] for group in groups) == report["documents"] == 63
    assert sum(group["tokens"] for group in groups) == report["tokens"]
    for i, kept in enumerate(report["kept_fractions"]):
        total = sum(group["kept_fractions"][i] * group["tokens"] for group in groups)
        assert total / report["tokens"] == pytest.approx(kept)
    assert max(int(bound) for bound in report["kept_by_length"]) >= 2048


def split_row(index, start, end):
    actor = json.dumps({"start": start, "end": end})
    return {"actor": actor, "shard": "a", "index": index, "rows": 1, "highlights": None}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e3), st.integers(0, 10**6)), min_size=1, max_size=20))
def test_the_timeline_loses_no_document(splits):
    highlights = Highlights()
    for i, (start, seconds, documents) in enumerate(splits):
        highlights.add(split_row(i, 1.7e9 + start, 1.7e9 + start + seconds), "o", documents, 2 * documents)
    report = highlights.report()
    total = sum(documents for _, _, documents in splits)
    assert sum(report["timeline"]["documents"]) == pytest.approx(total, rel=1e-3, abs=6)
    assert len(report["slowest_splits"]) == min(10, len(splits))
    seconds = [split["seconds"] for split in report["slowest_splits"]]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == pytest.approx(max(each[1] for each in splits), abs=0.01)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.ids, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_nothing_from_outside_becomes_html(run):
    _, _, statistics = run
    statistics.unreadable, statistics.failed_splits, statistics.removed = {EVIL: EVIL}, {f"{EVIL} 3": EVIL}, [EVIL]
    report = report_of(statistics) | {"labels": {EVIL: 5, "b": 3}, "warnings": [EVIL]}
    report["rejected_rows"]["null"][0] |= {"id": EVIL, "detail": EVIL, "shard": EVIL, "object": f'"{EVIL}'}
    report["bad_rows"][EVIL] = 1
    earlier = json.loads(json.dumps(report)) | {"run": f"20261101T000000Z-{EVIL}"}
    text = page(report, [earlier], statistics.highlights.samples)
    elements = Elements(text)
    tags = {tag for tag, _ in elements.seen}
    assert not tags & {"script", "img", "iframe", "link", "object", "base"}
    assert not [name for _, attributes in elements.seen for name in attributes if name.startswith("on")]
    assert len(elements.ids) == len(set(elements.ids))
    assert not elements.open
    # Nothing is fetched from elsewhere: all links lead into the page or the output.
    links = [attributes["href"] for tag, attributes in elements.seen if tag == "a"]
    assert all(link.startswith(("#", "../")) for link in links)
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_a_page_names_what_matters(run):
    _, _, statistics = run
    point = {"kept_fractions": [0.6, 0.3], "kept_spread": [[0.5, 0.7], [0.2, 0.4]], "flops_speedup": 2.5}
    point |= {"measured_speedup": 2.0, "drop": 0.5, "drop_interval": [-0.1, 1.0], "asked": "speedup 2.5"}
    report = report_of(statistics, expectation=point | {"corpus": "dev", "documents": 900})
    earlier = [report | {"run": f"202610{day:02d}T000000Z-a"} for day in range(1, 32)]
    text = page(report, earlier, [])
    for part in (
        "2.50×",
        "60.0% (5% to 95% of documents: 50.0% to 70.0%)",
        "-0.50 (-1.00 to +0.10)",
        "Documents per second",
        "Tokens per second",
        "Share of the tokens that each layer computes",
        "Kept tokens by the document",
        "Slowest splits",
        "mean of 31 runs",
        "the text is null",
        "a.parquet row 60",
        "20261031T000000Z-a",
    ):
        assert part in text, part
    assert "20261002T000000Z-a" not in text.split("Runs, the newest last")[1]  # the last thirty, this one included
    assert re.search(r'<a href="../_quarantine/a-[0-9a-f]{16}-[0-9a-f]{12}-\d{6}.parquet">', text)


@pytest.mark.parametrize("left", ["nothing", "no new entries", "nothing to do"])
def test_reports_of_older_versions_have_a_page_too(run, left):
    _, _, statistics = run
    report = json.loads(json.dumps(report_of(statistics)))
    if left == "nothing":
        report = EMPTY
    elif left == "no new entries":
        for name in ("timeline", "slowest_splits", "rejected_rows", "kept_by_length", "faults", "warnings"):
            del report[name]
        report["model"] = {"uri": "m", "digest": "d"}
    else:
        report = RunStatistics("r", Plan(), time.time()).report(status="complete already", exit_code=0, settings={})
    text = page(report, [EMPTY, report], [])
    assert not Elements(text).open
    if left == "no new entries":
        assert "Share of the tokens that are kept" in text


EXITS = {"mean": 1.75, "documents": {"1": 45, "4": 15}}


def test_the_page_of_a_model_with_exits_shows_after_which_layers_documents_left(run):
    report = report_of(run[2])
    assert "Exit layers" not in page(report, [], [])
    text = page(report | {"exit_layers": EXITS}, [], [])
    assert not Elements(text).open
    for part in ("Exit layers", "after 1.8 layers on average", "75.0%", "25.0%", "layer 3"):
        assert part in text, part


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_report_may_lack_any_entry(run, data):
    report = json.loads(json.dumps(report_of(run[2]) | {"exit_layers": EXITS}))
    for name in data.draw(st.sets(st.sampled_from(sorted(report.keys() - {"run"})))):
        del report[name]
    for entry in [entry for entry in report.values() if isinstance(entry, dict) and entry]:
        for name in data.draw(st.sets(st.sampled_from(sorted(entry)), max_size=1)):
            if entry is not report.get("timeline"):
                del entry[name]
    assert not Elements(page(report, [report], [])).open


@pytest.fixture
def output(tmp_path, run):
    _, _, statistics = run
    storage = Storage(str(tmp_path / "out"))
    for day in ("01", "02", "03"):
        report = report_of(statistics) | {"run": f"202611{day}T000000Z-a"}
        storage.write(f"_runs/{report['run']}.json", json.dumps(report).encode())
    storage.write("_samples/20261103T000000Z-a.json", json.dumps(statistics.highlights.samples).encode())
    storage.write("_runs/20261104T000000Z-a.html", b"")
    return tmp_path / "out"


def test_the_command_makes_the_page_of_a_run(output, capsys, tmp_path):
    assert main([str(output)]) == 0
    newest = output / "_runs/20261103T000000Z-a.html"
    assert capsys.readouterr().out == f"{newest}\n"
    text = newest.read_text()
    assert text.count('class="trbert"') == 10
    assert "20261101T000000Z-a" in text
    there = tmp_path / "page.html"
    assert main([str(output), "--run", "20261102T000000Z-a", "--html", str(there)]) == 0
    text = there.read_text()
    assert "20261101T000000Z-a" in text
    assert "20261103T000000Z-a" not in text
    assert f'href="{output.as_uri()}/_quarantine/' in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "output is required"),
        (["EMPTY"], "no report of a run there"),
        (["OUT", "--run", "../x"], "no report of run ../x; the newest is 20261103T000000Z-a"),
        (["OUT", "--run", "20261102T000000Z-a"], "_runs/20261102T000000Z-a.json is damaged"),
        (["OUT", "--run", "20261101T000000Z-a"], "_runs/20261101T000000Z-a.json is damaged"),
        (["OUT", "--html", "no/page.html"], "no/page.html: cannot be written"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (output / "_runs/20261102T000000Z-a.json").write_text("{")
    (output / "_runs/20261101T000000Z-a.json").write_text('{"run": "20261101T000000Z-a", "labels": [1]}')
    given = [{"OUT": str(output), "EMPTY": str(tmp_path / "empty")}.get(argument, argument) for argument in arguments]
    assert run_command(lambda: main(given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
