"""The page of a run: its report, the reports before it and its sample documents as one HTML file without scripts.

Charts are made by pygal, which takes 50 ms with its import and needs nothing but Python; matplotlib takes a second, and
the interactive libraries would put megabytes of JavaScript into each page. Colours are the page's, for dark and light.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from trbert_model.explanation import Explanation, plain, templates
from trbert_model.options import option

from .corpus import QUARANTINE, RUNS, SAMPLES
from .errors import UsageError
from .storage import Storage

TREND = 30  # earlier runs
_LABELS = 12  # of the chart; the table has them all
_SHOWN = 50  # shards and splits in a list

# Entries of a report that are mappings.
_MAPPINGS = (
    *("actors", "bad_rows", "busy_seconds", "expectation", "faults", "flops", "kept_by_length", "labels", "model"),
    *("options", "per_second_steady_state", "placement", "rejected_rows", "seconds", "shards", "splits", "timeline"),
    *("versions", "finish_by", "exit_layers"),
)

Report = Mapping[str, Any]


class Link(NamedTuple):
    """A cell of a table that leads to an object of the output."""

    text: str
    href: str


@dataclass
class Table:
    """Rows of texts and links; the first cell of a row names it."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Chart:
    """A picture, as SVG, and its numbers; name: unique in the page."""

    name: str
    title: str
    svg: Any
    table: Table


@dataclass
class Section:
    """A part of the page."""

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class ReportConfig:
    """The options of jobs/report.py.

    Raises:
        UsageError: an option is missing.
    """

    output: str = option("", "output of jobs/score.py", positional=True)
    run: str | None = option(None, "the run's id (default: the newest)")
    html: str | None = option(None, "local file to write (default: _runs/<run>.html in the output)")

    def __post_init__(self):
        if not self.output:
            raise UsageError("output is required")


def make_page(config: ReportConfig) -> str:
    """Write the page of a run that an output has the report of, of this or an older version. Returns where it is.

    Raises:
        UsageError: there is no report of the run, or it is damaged, or the page cannot be written.
        StorageError: the output cannot be read or written.
    """
    output = Storage(config.output)
    runs = _run_ids(output)
    if not runs:
        raise UsageError(f"{config.output}: no report of a run there (in {RUNS})")
    run = config.run or runs[-1]
    if run not in runs:
        raise UsageError(f"{config.output}: no report of run {run}; the newest is {runs[-1]}")
    found = read_reports(output, [run])
    if not found:
        raise UsageError(f"{config.output}: the report {RUNS}/{run}.json is damaged")
    earlier = read_reports(output, [each for each in runs if each < run][-TREND:])
    samples = _parsed(output.read_if_there(f"{SAMPLES}/{run}.json") or b"null") or []
    root = ".." if not config.html else Path(output.root).as_uri() if output.is_local else output.uri
    try:
        text = page(found[0], earlier, samples, root)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{config.output}: the report or the samples of run {run} are damaged: {error!r}") from error
    if not config.html:
        output.write(f"{RUNS}/{run}.html", text.encode())
        return f"{output.uri}/{RUNS}/{run}.html"
    try:
        Path(config.html).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{config.html}: cannot be written: {error.strerror}") from error
    return config.html


def earlier_reports(output: Storage) -> list[Report]:
    """The reports of an output's last runs, oldest first, without those that are damaged.

    Raises:
        StorageError: the output cannot be read.
    """
    return read_reports(output, _run_ids(output)[-TREND:])


def read_reports(output: Storage, runs: Iterable[str]) -> list[Report]:
    """The reports of these runs, without those that are damaged."""
    contents = output.read_many(f"{RUNS}/{run}.json" for run in runs)
    reports = (_parsed(data) for _, data in contents)
    return [report for report in reports if _is_report(report)]


def write_page(output: Storage, report: Report, earlier: Sequence[Report], samples: list[dict[str, Any]]) -> None:
    """Write a run's page beside its report."""
    output.write(f"{RUNS}/{report['run']}.html", page(report, earlier, samples).encode())


def page(report: Report, earlier: Sequence[Report], samples: list[dict[str, Any]], root: str = "..") -> str:
    """The page of a run as HTML.

    Args:
        report: as stored; entries may be missing, since older versions did not write all.
        earlier: reports of earlier runs, oldest first.
        samples: from `highlights.Highlights`.
        root: the output's URI, relative to the page.
    """
    sections = [
        _outcome(report),
        *([_finish_by(report)] if report.get("finish_by") else []),
        _time(report, root),
        _tokens(report),
        *([_exits(report)] if report.get("exit_layers") else []),
        _labels(report, earlier),
        _problems(report, root),
        _trend(report, earlier),
    ]
    explained = [
        (sample["id"] or "no id", sample["shard"], sample["row"], Explanation.from_dict(sample["explanation"]))
        for sample in samples
    ]
    template = templates(Path(__file__).parent / "templates").get_template("run.html")
    return template.render(report=report, facts=_facts(report), sections=sections, samples=explained)


def _run_ids(output: Storage) -> list[str]:
    names = (file.path.rsplit("/", 1)[-1] for file in output.files(RUNS))
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def _is_report(report: Any) -> bool:
    if not isinstance(report, dict) or not isinstance(report.get("run"), str):
        return False
    return all(isinstance(report.get(name) or {}, dict) for name in _MAPPINGS)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


# Parts of the page. A part without its entries in the report says so.


def _facts(report: Report) -> list[tuple[str, str]]:
    model, shards = report.get("model", {}), report.get("shards", {})
    seconds, placement = report.get("seconds", {}), report.get("placement") or {}
    rejected, options = sum(report.get("bad_rows", {}).values()), report.get("options", {})
    facts = [
        ("run", report["run"]),
        ("exit code", report.get("exit_code")),
        ("stopped", report.get("stopped")),
        ("started", report.get("started")),
        ("time", f"{seconds['wall']:,.1f} s" if "wall" in seconds else None),
        ("documents", f"{report.get('documents', 0):,} scored, {rejected:,} quarantined"),
        (
            "shards",
            f"{shards.get('completed', 0):,} completed, {shards.get('complete_before', 0):,} complete before, "
            f"{len(shards.get('unreadable', ())):,} unreadable, of {shards.get('in_corpus', 0):,}",
        ),
        ("input", report.get("input")),
        ("output", report.get("output")),
        ("model", model and f"{model.get('uri')} ({str(model.get('digest'))[:12]}…)"),
        ("machines", placement and ", ".join(f"{name} {value}" for name, value in placement.items())),
        ("options", ", ".join(f"{name} {plain(value)}" for name, value in options.items() if value not in (None, []))),
        ("versions", ", ".join(f"{name} {value}" for name, value in report.get("versions", {}).items())),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "", {})]


def _outcome(report: Report) -> Section:
    section = Section("outcome", "Outcome and expectation")
    expected = report.get("expectation") or {}
    speed, flops = report.get("per_second_steady_state", {}), report.get("flops", {})
    rows = [
        ("FLOPs speed-up over dense", _times(flops.get("speedup")), _times(expected.get("flops_speedup"))),
        ("time speed-up over dense", "not measured", _times(expected.get("measured_speedup"))),
        ("points, compared with dense", "not measured", _points_gained(expected)),
    ]
    spread = expected.get("kept_spread") or []
    for i, kept in enumerate(report.get("kept_fractions", [])):
        likely = (expected.get("kept_fractions") or [])[i : i + 1]
        usual = f" (5% to 95% of documents: {_percent(spread[i][0])} to {_percent(spread[i][1])})" if spread[i:] else ""
        rows.append((f"tokens kept by reduction {i}", _percent(kept), _percent(likely[0]) + usual if likely else "–"))
    rows += [
        ("documents/s", _number(speed.get("documents")), "–"),
        ("tokens/s", _number(speed.get("tokens")), "–"),
        ("actors computing", _percent(report.get("actors", {}).get("computing_share")), "–"),
    ]
    if expected:
        section.notes.append(
            f"Expected by {expected.get('asked')}, from {expected.get('documents', 0):,} documents of "
            f"{expected.get('corpus')}."
        )
    else:
        section.notes.append("The model's calibration table says nothing about these thresholds.")
    section.notes += [f"Warning: {warning}" for warning in report.get("warnings", [])]
    section.tables.append(Table("This run beside what was expected", ("", "this run", "expected"), rows))
    return section


def _finish_by(report: Report) -> Section:
    finish = report["finish_by"]
    section = Section("finish-by", f"Finish by {finish.get('asked')}")
    section.notes.append(f"To be finished by {finish.get('deadline')}: {finish.get('outcome')}.")
    choices = [
        (each["time"], f"{each['splits']:,}", each["point"], each.get("estimate") or "not known yet", each["why"])
        for each in finish.get("choices", [])
    ]
    columns = ("time", "splits done", "speed of the next splits", "estimated end", "why")
    section.tables.append(Table("What was chosen when", columns, choices))
    points = [
        (
            *(point["name"], point["thresholds_version"], f"{point['splits']:,}", f"{point['documents']:,}"),
            *(_times(point["flops_speedup"]), _points_gained(point["expected"])),
            ", then ".join(map(_percent, point["kept_fractions"])) or "–",
            ", then ".join(map(_percent, point["expected"].get("kept_fractions", []))) or "–",
        )
        for point in finish.get("points", [])
    ]
    measured = ("splits", "documents", "FLOPs speed-up", "expected points", "kept", "expected to be kept")
    section.tables.append(Table("Speeds that max_drop allows", ("speed", "thresholds_version", *measured), points))
    return section


def _time(report: Report, root: str) -> Section:
    section = Section("time", "Time")
    if line := report.get("timeline"):
        width = line["bin_seconds"]
        ends = [f"{(i + 1) * width:.{1 if width < 1 else 0}f} s" for i in range(len(line["documents"]))]
        for name in ("documents", "tokens"):
            rates = [count / width for count in line[name]]
            title = f"{name.capitalize()} per second of the steady state"
            section.charts.append(_chart("Line", f"{name}-over-time", title, ends, {f"{name}/s": rates}, _number))
    else:
        section.notes.append("The report does not tell when documents were scored.")
    seconds, busy = report.get("seconds", {}), report.get("busy_seconds", {})
    parts = [(name.replace("_", " "), f"{value:,.1f}") for name, value in seconds.items()]
    parts += [(f"busy: {name}", f"{value:,.1f}") for name, value in busy.items()]
    section.tables.append(Table("Where the time went", ("part", "seconds"), parts))
    if slowest := report.get("slowest_splits"):
        rows = [
            (
                Link(f"{split['shard']} split {split['split']}", f"{root}/{quote(split['object'])}"),
                f"{split['seconds']:,.2f}",
                f"{split['documents']:,}",
                f"{split['tokens']:,}",
                f"{split['tokens'] / max(split['seconds'], 1e-3):,.0f}",
            )
            for split in slowest
        ]
        section.tables.append(Table("Slowest splits", ("split", "seconds", "documents", "tokens", "tokens/s"), rows))
    return section


def _tokens(report: Report) -> Section:
    section = Section("tokens", "Kept tokens")
    kept = [100 * fraction for fraction in report.get("kept_fractions", [])]
    expected = [100 * fraction for fraction in (report.get("expectation") or {}).get("kept_fractions") or []]
    model = report.get("model", {})
    layers, reductions = model.get("layers"), model.get("reduction_layers", [])
    if not kept:
        section.notes.append("No tokens were dropped.")
        return section
    if layers and len(reductions) == len(kept):
        names = [f"layer {layer}" for layer in range(layers)]
        series = {"this run": _by_layer(kept, reductions, layers)}
        if len(expected) == len(kept):
            series["expected"] = _by_layer(expected, reductions, layers)
    else:
        names, series = [f"reduction {i}" for i in range(len(kept))], {"this run": kept}
        if len(expected) == len(kept):
            series["expected"] = expected
    title = "Share of the tokens that each layer computes" if layers else "Share of the tokens that are kept"
    if report.get("exit_layers"):
        title = "Share of the tokens that the reductions leave to each layer, of documents that did not leave before"
    section.charts.append(_chart("Bar", "kept-by-layer", title, names, series, _points))
    if by_length := report.get("kept_by_length"):
        names = [f"up to {int(bound):,}" for bound in by_length]
        series = {
            f"reduction {i}": [100 * group["kept_fractions"][i] for group in by_length.values()]
            for i in range(len(kept))
        }
        title = "Kept tokens by the document's tokens"
        chart = _chart("Bar", "kept-by-length", title, names, series, _points)
        chart.table.header = [*chart.table.header, "documents"]
        counts = [f"{group['documents']:,}" for group in by_length.values()]
        chart.table.rows = [[*row, count] for row, count in zip(chart.table.rows, counts)]
        section.charts.append(chart)
    return section


def _exits(report: Report) -> Section:
    section = Section("exits", "Exit layers")
    found, depth = report["exit_layers"], report.get("model", {}).get("layers")
    documents = found.get("documents") or {}
    layers = range(1, depth + 1) if depth else sorted(map(int, documents))
    counts = [documents.get(str(layer), 0) for layer in layers]
    section.notes.append(
        f"Documents left after {_number(found.get('mean'))} layers on average. A document of several windows, or whose "
        "words leave singly, counts at its mean."
    )
    title = "Share of the documents that left after each layer"
    shares = [100 * count / max(sum(counts), 1) for count in counts]
    chart = _chart("Bar", "exit-layers", title, [f"layer {layer}" for layer in layers], {"this run": shares}, _points)
    chart.table.header = [*chart.table.header, "documents"]
    chart.table.rows = [[*row, f"{count:,}"] for row, count in zip(chart.table.rows, counts)]
    section.charts.append(chart)
    return section


def _by_layer(kept: Sequence[float], reductions: Sequence[int], layers: int) -> list[float]:
    """The share of tokens that each layer computes, from the shares that the reductions keep."""
    at = dict(zip(reductions, kept))
    shares, share = [], 100.0
    for layer in range(layers):
        share = at.get(layer, share)
        shares.append(share)
    return shares


def _labels(report: Report, earlier: Sequence[Report]) -> Section:
    section = Section("labels", "Labels")
    counts = report.get("labels", {})
    if not counts:
        section.notes.append("This run has no labels.")
        return section
    same = [each for each in earlier if each.get("labels") and _digest(each) == _digest(report)]
    columns: dict[str, dict[str, float]] = {"this run": _shares(counts)}
    if same:
        columns["run before"] = _shares(same[-1]["labels"])
        before = [_shares(each["labels"]) for each in same]
        names = {name for shares in before for name in shares}
        columns[f"mean of {len(before)} runs"] = {
            name: sum(shares.get(name, 0.0) for shares in before) / len(before) for name in names
        }
    else:
        section.notes.append("No earlier run of this model to compare with.")
    every = {name for shares in columns.values() for name in shares}
    labels = sorted(every, key=lambda name: (-counts.get(name, 0), name))
    series = {column: [shares.get(label, 0.0) for label in labels] for column, shares in columns.items()}
    chart = _chart("Bar", "label-shares", "Share of each label", labels, series, _points)
    if len(labels) > _LABELS:
        few = {column: values[:_LABELS] for column, values in series.items()}
        chart.svg = _svg("Bar", "label-shares", labels[:_LABELS], few, _points)
        section.notes.append(f"The chart shows the {_LABELS} most frequent of {len(labels):,} labels.")
    chart.table.header = [*chart.table.header, "count"]
    chart.table.rows = [[*row, f"{counts.get(label, 0):,}"] for row, label in zip(chart.table.rows, labels)]
    section.charts.append(chart)
    return section


def _problems(report: Report, root: str) -> Section:
    section = Section("problems", "Quarantined rows and faults")
    bad = report.get("bad_rows", {})
    rows: list[tuple[Any, ...]] = []
    for reason, count in sorted(bad.items(), key=lambda item: (-item[1], item[0])):
        examples = report.get("rejected_rows", {}).get(reason, [])
        rows += [
            (
                reason if i == 0 else "",
                f"{count:,}" if i == 0 else "",
                Link(f"{row['shard']} row {row['row']:,}", f"{root}/{QUARANTINE}/{quote(row['object'])}"),
                row["id"] or "–",
                row["detail"],
            )
            for i, row in enumerate(examples)
        ] or [(reason, f"{count:,}", "–", "–", "–")]
    if rows:
        section.tables.append(
            Table("Quarantined rows, the first of each reason", ("reason", "rows", "row", "id", "detail"), rows)
        )
    else:
        section.notes.append("No row was quarantined.")
    for title, found in (
        ("Unreadable shards", report.get("shards", {}).get("unreadable", {})),
        ("Failed splits", report.get("splits", {}).get("failed", {})),
        ("Shards that are no longer in the corpus", dict.fromkeys(report.get("shards", {}).get("removed", []), "")),
    ):
        if found:
            more = len(found) - _SHOWN
            title += f" (the first {_SHOWN} of {len(found):,})" if more > 0 else ""
            section.tables.append(Table(title, ("name", "reason"), sorted(found.items())[:_SHOWN]))
    faults = report.get("faults", {})
    if any(faults.values()):
        rows = [(name.replace("_", " "), f"{count:,}") for name, count in faults.items()]
        section.tables.append(Table("Faults that the run went on after", ("fault", "times"), rows))
    return section


def _trend(report: Report, earlier: Sequence[Report]) -> Section:
    section = Section("trend", "The last runs")
    runs = [*earlier[-(TREND - 1) :], report]
    names = [_date(str(run["run"])) for run in runs]
    columns: dict[str, tuple[Callable[[Any], str], list[Any]]] = {
        "documents": (_number, [run.get("documents") for run in runs]),
        "quarantined": (_number, [sum(run.get("bad_rows", {}).values()) for run in runs]),
        "tokens/s": (_number, [run.get("per_second_steady_state", {}).get("tokens") for run in runs]),
        "FLOPs speed-up": (_times, [run.get("flops", {}).get("speedup") for run in runs]),
        "tokens kept at last": (_percent, [(run.get("kept_fractions") or [None])[-1] for run in runs]),
        "seconds": (_number, [run.get("seconds", {}).get("wall") for run in runs]),
    }
    if len(runs) > 1:
        for name in ("documents", "tokens/s", "tokens kept at last"):
            written, values = columns[name]
            key = f"trend-{len(section.charts)}"
            section.charts.append(_chart("Line", key, name.capitalize(), names, {name: values}, written))
    rows = [
        (run["run"], run.get("status", "–"), *(written(values[i]) for written, values in columns.values()))
        for i, run in enumerate(runs)
    ]
    section.tables.append(Table("Runs, the newest last", ("run", "status", *columns), rows))
    return section


def _date(run: str) -> str:
    """Month, day and time of a run's id."""
    match = re.match(r"\d{4}(\d\d)(\d\d)T(\d\d)(\d\d)", run)
    return "{}-{} {}:{}".format(*match.groups()) if match else run


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {label: 100 * count / max(total, 1) for label, count in counts.items()}


def _digest(report: Report) -> Any:
    return report.get("model", {}).get("digest")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}%"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _points_gained(expected: Mapping[str, Any]) -> str:
    if not {"drop", "drop_interval"} <= expected.keys():
        return "–"
    low, high = expected["drop_interval"]
    return f"{-expected['drop']:+.2f} ({-high:+.2f} to {-low:+.2f})"


def _chart(
    kind: str,
    name: str,
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    written: Callable[[Any], str],
) -> Chart:
    """A chart and the table of its numbers; kind: a class of pygal, name: unique in the page."""
    rows = [(label, *(written(values[i]) for values in series.values())) for i, label in enumerate(labels)]
    return Chart(name, title, _svg(kind, name, labels, series, written), Table(title, ("", *series), rows))


def _svg(
    kind: str,
    name: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    written: Callable[[Any], str],
) -> Any:
    """A chart as SVG without styles and scripts, which are the page's."""
    import pygal
    from markupsafe import Markup
    from pygal.etree import etree  # lxml's, where it is installed

    lines = kind == "Line"
    chart = getattr(pygal, kind)(
        width=760,
        height=280,
        css=[],
        js=[],
        range=(0, None) if lines else None,
        show_legend=len(series) > 1,
        legend_at_bottom=True,
        print_values=not lines and len(labels) * len(series) <= 24,
        print_values_position="top",
        show_dots=len(labels) <= TREND,
        truncate_label=14,
        x_label_rotation=0 if len(labels) <= 6 else 30,
        x_labels_major_count=8 if lines and len(labels) > 8 else None,
        show_minor_x_labels=not lines or len(labels) <= 8,
        value_formatter=written,
        min_scale=3,
        max_scale=5,
    )
    chart.uuid = name
    chart.x_labels = list(labels)
    for title, values in series.items():
        chart.add(title, [None if value is None else float(value) for value in values])
    svg = chart.render_tree()
    for element in list(svg.iter()):
        if element is not svg:
            element.attrib.pop("id", None)  # of the legend's scripts, the same in every chart
        for child in list(element):
            if child.tag == "desc" and child.get("class") == "value":
                child.tag = "title"  # browsers show it at the pointer
            elif child.tag in ("defs", "desc") or (child.tag == "title" and element is svg) or callable(child.tag):
                element.remove(child)
    svg.attrib |= {"role": "img", "aria-labelledby": f"title-{name}", "class": f"pygal-chart {kind.lower()}"}
    return Markup(etree.tostring(svg, encoding="unicode"))
