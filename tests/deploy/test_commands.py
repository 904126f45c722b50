"""The commands, options and exit codes that the recipes name are those of the commands."""

import re
import shlex
import subprocess

import pytest

from jobs.score import __doc__ as score_help
from pipeline import run
from pipeline.config import ScoreConfig
from pipeline.errors import OutputBusyError
from tests.deploy.recipes import DAG, DEPLOY, ONE_MACHINE, RAYJOB, VERSION, constants, template_of
from trbert_model.options import parse_options

(CONTAINER,) = template_of(ONE_MACHINE)["spec"]["containers"]
COMMANDS = {
    "rayjob.yaml": shlex.split(RAYJOB["spec"]["entrypoint"]),
    "cronjob-one-machine.yaml": CONTAINER["command"] + CONTAINER["args"],
    "nightly_scoring.py": shlex.split(constants(DAG)["ENTRYPOINT"]),
    "nightly.yaml": ["trbert-score", "--config", str(DEPLOY / "cron/nightly.yaml")],
}
# Another try would end in the same way, or has no time left.
FINAL = {run.EXIT_USAGE, run.EXIT_BAD_INPUT, run.EXIT_STOPPED}


@pytest.mark.parametrize("recipe", COMMANDS)
def test_options_are_those_of_trbert_score(recipe):
    command, *options = COMMANDS[recipe]
    assert command == "trbert-score"
    config = parse_options(ScoreConfig, options, "")
    assert config.stop_after_seconds == 5 * 3600


def test_runs_are_tried_again_after_the_same_exit_codes_everywhere():
    every = {run.EXIT_FAILED, OutputBusyError.exit_code, *FINAL}
    assert all(f" {code} " in score_help for code in every)
    rules = ONE_MACHINE["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert [set(rule["onExitCodes"]["values"]) for rule in rules if rule["action"] == "FailJob"] == [FINAL]
    assert set(constants(DAG)["FINAL"]) == FINAL
    service = (DEPLOY / "cron/trbert-nightly.service").read_text()
    assert f"RestartPreventExitStatus={' '.join(str(code) for code in sorted(FINAL))}\n" in service


def test_images_are_of_this_version():
    files = (path for folder in ("docker", "kubernetes") for path in (DEPLOY / folder).iterdir())
    named = {image for path in files for image in re.findall(r"\btrbert:[\w.-]+", path.read_text())}
    assert named == {f"trbert:{VERSION}", f"trbert:{VERSION}-cuda"}


def test_the_crontab_says_how_a_run_ended(tmp_path):
    """Only if it is not complete, since cron mails what is printed."""
    line = (DEPLOY / "cron/crontab").read_text().splitlines()[-1]
    *_, user, command = line.split(maxsplit=6)
    assert user == "trbert"
    assert "%" not in line  # a line break to cron
    for code, printed in ((0, ""), (4, f"trbert-score ended with exit code 4; see {tmp_path / 'log'}\n")):
        program = tmp_path / "trbert-score"
        program.write_text(f"#!/bin/sh\necho progress; exit {code}\n")
        program.chmod(0o755)
        words = command.replace("/opt/trbert/bin/trbert-score", str(program))
        done = subprocess.run(["sh", "-c", words], env={"LOG": str(tmp_path / "log")}, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == (printed, "")
    assert (tmp_path / "log").read_text() == "progress\nprogress\n"
