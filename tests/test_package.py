"""What `pip install` of a built wheel gives: all files of the packages, and the commands, from any directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("trbert_model", "pipeline", "jobs")
FILES = ("pyproject.toml", "README.md", "LICENSE")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS = {f"trbert-{path.stem}" for path in (ROOT / "jobs").glob("*.py") if "__main__" in path.read_text()}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, cwd: Path, expect: int = 0) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == expect, f"{words} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of_packages() -> set[str]:
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A source distribution, and the wheel built from that alone, as pip does where there is no wheel."""
    place = tmp_path_factory.mktemp("package")
    source = place / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    backend = "from setuptools import build_meta; build_meta.build_{}(r'{}')"
    run(sys.executable, "-c", backend.format("sdist", place), cwd=source)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    run(sys.executable, "-c", backend.format("wheel", place), cwd=unpacked)
    (wheel,) = place.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The scripts directory of an environment with only the wheel, and the dependencies of this one: installing them
    again would take minutes. A path in a .pth file brings them, but not the project, whose own .pth is not read there.
    """
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    scheme = {"base": str(place), "platbase": str(place)}
    scripts, libraries = (Path(sysconfig.get_path(name, "venv", scheme)) for name in ("scripts", "purelib"))
    (libraries / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(scripts / "python", "-c", "import pipeline", cwd=place, expect=1)
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, built[1], cwd=place)
    return scripts


def test_the_wheel_and_the_source_distribution_hold_all_files_of_the_packages(built):
    archive, wheel = built
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = {name for name in opened.namelist() if ".dist-info/" not in name}
    with tarfile.open(archive) as opened:
        in_archive = {name.partition("/")[2] for name in opened.getnames()}
    assert in_wheel == files_of_packages()
    assert files_of_packages() - in_archive == set()


def test_every_command_has_a_console_script():
    assert set(SCRIPTS) == COMMANDS


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_installed_command_shows_its_help_from_any_directory(script, installed, tmp_path):
    assert run(installed / script, "--help", cwd=tmp_path).startswith(f"usage: {script} ")


def test_installed_commands_run_what_the_wheel_holds(installed, tmp_path):
    where = run(installed / "python", "-c", "import pipeline; print(pipeline.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(installed.parent)
    report = tmp_path / "scores/_runs/20261101T000000Z-a.json"
    report.parent.mkdir(parents=True)
    report.write_text('{"run": "20261101T000000Z-a"}')
    run(installed / "trbert-report", "scores", "--html", "run.html", cwd=tmp_path)
    assert "20261101T000000Z-a" in (tmp_path / "run.html").read_text()  # its template came along


def test_trbert_score_ends_as_the_script_does(installed, tmp_path):
    arguments = ["--input", "nowhere", "--output", "scores", "--model", "none"]
    done = [
        subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        for command, environment in (
            ([installed / "trbert-score"], ENVIRONMENT),
            ([sys.executable, ROOT / "jobs/score.py"], ENVIRONMENT | {"PYTHONPATH": str(ROOT)}),
        )
    ]
    assert done[0].returncode == done[1].returncode == 2
    assert done[0].stderr == done[1].stderr
    assert done[0].stderr.startswith("error: ")
