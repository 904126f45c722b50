"""`make audit`: look the pinned dependencies up in the databases of known vulnerabilities.

pip-audit does it, in an environment of its own. It counts what it could not look up as clean; this says how many were
looked up, and where there is no network that nothing could be. Exits with 1 if something is known, else with 0.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "build/audit"
COMMAND = ["--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip", "--progress-spinner", "off"]


def main() -> int:
    python = TOOL / "bin/python"
    if not python.exists():
        venv.create(TOOL, with_pip=True)
    installed = _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit>=2.10,<3")
    if installed.returncode:
        return _could_not(f"pip-audit cannot be installed: {_last_line(installed.stderr)}")
    reasons = []
    for service in ("pypi", "osv"):
        audit = _run(TOOL / "bin/pip-audit", *COMMAND, "--vulnerability-service", service, "--format", "json")
        try:
            dependencies = json.loads(audit.stdout)["dependencies"]
        except (ValueError, KeyError):
            reasons.append(f"{service}: {_last_line(audit.stderr)}")
            continue
        looked_up = [dependency for dependency in dependencies if "skip_reason" not in dependency]
        if not looked_up:
            reasons.append(f"{service}: it knows none of the {len(dependencies)} packages")
            continue
        return _report(service, looked_up, len(dependencies))
    return _could_not("; ".join(reasons))


def _run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]


def _could_not(reason: str) -> int:
    print(f"audit: the dependencies COULD NOT be checked, which says nothing about them ({reason})")
    return 0


def _report(service: str, looked_up: list[dict], total: int) -> int:
    known = [(each, finding) for each in looked_up for finding in each["vulns"]]
    for each, finding in known:
        fixed = ", ".join(finding["fix_versions"]) or "no version yet"
        print(f"{each['name']} {each['version']}: {finding['id']} (fixed in {fixed})")
    print(f"audit: {len(looked_up)} of {total} dependencies looked up at {service}: {len(known)} known vulnerabilities")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main())
