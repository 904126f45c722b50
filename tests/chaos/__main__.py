"""The long form of the chaos suite: faults by the hundred, and a table of what became of the rows.

    python -m tests.chaos --faults 200 --seed 1 --report build/chaos/report.json

The report is written after every episode; --resume goes on with the next one. Exit code 1 if any row was lost, doubled
or wrong, any object partial, any driver hung, or one ended in a way that no fault explains.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.episodes import KINDS, EpisodeRun, Outcome, World, as_json, plan
from tests.integration.s3_server import S3Server

VIOLATIONS = ("lost", "doubled", "wrong", "partial")


def main() -> int:
    arguments = _parse()
    settings = {"seed": arguments.seed, "kinds": arguments.kinds, "splits": arguments.splits}
    report: dict[str, Any] = {**settings, "episodes": []}
    if arguments.resume:
        report = json.loads(arguments.report.read_text())
        if different := [name for name, value in settings.items() if report[name] != value]:
            sys.exit(f"{arguments.report}: made with another {', '.join(different)}: cannot be resumed with this one")
    elif arguments.report.exists():
        sys.exit(f"{arguments.report} exists: give --resume to go on with it, or another file")
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # an exception: what was started is ended
    directory = Path(tempfile.mkdtemp(prefix="logs-", dir=arguments.report.parent))
    try:
        run(arguments, report, directory)
    except KeyboardInterrupt:
        print("interrupted: --resume goes on", file=sys.stderr)
        return 130
    finally:
        print(f"\n{table(report)}\n\nlogs: {directory}")
    return 0 if is_clean(report) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--faults", type=int, default=200, help="go on until as many have been injected (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--splits", type=int, default=100, help="of the corpus, about (%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("build/chaos/report.json"), help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the report's next episode")
    return parser.parse_args()


def run(arguments: argparse.Namespace, report: dict[str, Any], directory: Path) -> None:
    """Episodes until enough faults have been injected; `report` grows and is written with each."""
    done = len(report["episodes"])
    with contextlib.ExitStack() as stack:
        data = directory / "s3"
        data.mkdir()
        server = S3Server(data)
        stack.callback(server.stop)
        world = World(server, directory, splits=arguments.splits, seed=arguments.seed)
        stack.callback(world.close)
        if found := world.make_reference():
            raise RuntimeError(f"the undisturbed run's output is wrong already:\n{found}")
        print(f"{world.num_splits} splits, {sum(world.rows.values()):,} rows in {len(world.rows)} shards", flush=True)
        for episode in plan(arguments.seed, arguments.kinds):
            if injected(report) >= arguments.faults:
                break
            if episode.number <= done:
                continue
            outcome = EpisodeRun(world, episode).execute()
            report["episodes"].append(as_json(outcome))
            _write(arguments.report, report)
            print(line(outcome), flush=True)


def _write(path: Path, report: dict[str, Any]) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps({**report, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
    os.replace(beside, path)


def injected(report: dict[str, Any]) -> int:
    return sum(len(episode["strikes"]) for episode in report["episodes"])


def is_clean(report: dict[str, Any]) -> bool:
    return not any(
        episode["hung"] or episode["unexpected"] or any(episode["findings"].values()) for episode in report["episodes"]
    )


def line(outcome: Outcome) -> str:
    """An episode in one line."""
    strikes = ", ".join(
        f"{strike.kind} {'-' if strike.recovery is None else format(strike.recovery, '.1f')}"
        + (f" ({sum(strike.requests.values())} requests)" if strike.requests else "")
        for strike in outcome.strikes
    )
    counts = {**outcome.findings.counts(), "hung": len(outcome.hung), "unexpected exits": len(outcome.unexpected)}
    parts = [
        f"episode {outcome.number}: {strikes or 'no fault'}",
        *([f"missed {', '.join(outcome.missed)}"] if outcome.missed else []),
        f"exits {' '.join(map(str, outcome.exits))}",
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        f"{outcome.seconds:.0f} s",
    ]
    return " | ".join([*parts, *outcome.hung, *outcome.unexpected])


def table(report: dict[str, Any]) -> str:
    """Markdown: what was injected, how long it took to recover, and what became of the rows."""
    episodes = report["episodes"]
    lines = [
        "| fault | injected | reruns | recovery median, s | max, s | " + " | ".join(VIOLATIONS) + " | hung |",
        "|---|" + "---:|" * (5 + len(VIOLATIONS)),
    ]

    def row(name: str, strikes: list[dict[str, Any]], concerned: list[dict[str, Any]]) -> str:
        recoveries = [strike["recovery"] for strike in strikes if strike["recovery"] is not None]
        seconds = [f"{function(recoveries):.1f}" if recoveries else "–" for function in (statistics.median, max)]
        found = [sum(len(episode["findings"][violation]) for episode in concerned) for violation in VIOLATIONS]
        hung = sum(len(episode["hung"]) for episode in concerned)
        cells = [name, len(strikes), sum(strike["reruns"] for strike in strikes), *seconds, *found, hung]
        return "| " + " | ".join(map(str, cells)) + " |"

    for kind in report["kinds"]:
        concerned = [episode for episode in episodes if any(strike["kind"] == kind for strike in episode["strikes"])]
        strikes = [strike for episode in concerned for strike in episode["strikes"] if strike["kind"] == kind]
        lines.append(row(kind, strikes, concerned))
    everything = [strike for episode in episodes for strike in episode["strikes"]]
    lines.append(row("**all**", everything, episodes))
    requests: Counter[str] = Counter()
    for strike in everything:
        requests.update(strike["requests"])
    exits = Counter(code for episode in episodes for code in episode["exits"])
    missed = Counter(kind for episode in episodes for kind in episode["missed"])
    unexpected = [text for episode in episodes for text in episode["unexpected"]]
    return "\n".join(
        [
            *lines,
            "",
            "Lost, doubled, wrong, partial and hung are those of the episodes that the fault was part of; a rerun is "
            "the last fault's before it. Recovery is from the fault to the next new results object.",
            f"{len(episodes)} episodes of {sum(len(e['exits']) for e in episodes)} runs took "
            f"{sum(e['seconds'] for e in episodes) / 60:.0f} minutes; exit codes "
            + (", ".join(f"{code}: {count}" for code, count in sorted(exits.items())) or "none")
            + f"; unexpected exits: {len(unexpected)}.",
            "Requests that were hit: "
            + (", ".join(f"{kind} {n}" for kind, n in sorted(requests.items())) or "none")
            + f"; {sum(requests.values())} in all.",
            "Not injected, for want of a victim or a request to hit, or because the run was over: "
            + (", ".join(f"{kind} {n}" for kind, n in sorted(missed.items())) or "none")
            + ".",
            *(f"Unexpected: {text}" for text in unexpected),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
