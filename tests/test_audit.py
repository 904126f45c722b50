"""`make audit` must not call clean what it could not look up."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

FOUND = {"name": "p", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
CLEAN, SKIPPED = {"name": "q", "version": "1", "vulns": []}, {"name": "r", "skip_reason": "not found"}


@pytest.fixture
def audit(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("audit", Path(__file__).parent.parent / ".ci/audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.venv, "create", lambda *args, **kwargs: None)
    return module


@pytest.mark.parametrize(
    ("answers", "code", "says"),
    [
        ([[CLEAN, SKIPPED]], 0, "1 of 2 dependencies looked up at pypi: 0 known vulnerabilities"),
        ([[FOUND, CLEAN]], 1, "p 1: CVE-1 (fixed in 2)"),
        ([[SKIPPED], [CLEAN]], 0, "looked up at osv"),
        ([[SKIPPED], None], 0, "COULD NOT be checked"),
        ([None, None], 0, "COULD NOT be checked"),
    ],
)
def test_audit(audit, answers, code, says, capsys, monkeypatch):
    def run(*command):
        if "pip" in command:
            return subprocess.CompletedProcess(command, 0, "", "")
        answer = answers.pop(0)
        output = "" if answer is None else json.dumps({"dependencies": answer})
        return subprocess.CompletedProcess(command, 1, output, "ConnectionError: no network")

    monkeypatch.setattr(audit, "_run", run)
    assert audit.main() == code
    assert says in capsys.readouterr().out


def test_without_pip_audit(audit, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(audit, "_run", lambda *command: failed)
    assert audit.main() == 0
    assert "COULD NOT be checked" in capsys.readouterr().out
