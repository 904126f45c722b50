"""What commands import before they know their options: not what takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if "__main__" in path.read_text())

CHECK = """
import sys
from jobs.{job} import main
try:
    main({arguments})
except SystemExit as end:
    assert end.code == {code}, end.code
else:
    raise AssertionError("not ended by its options")
print(sorted({{"torch", "transformers", "ray", "matplotlib"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--no-such-option"], 2)])
def test_no_command_imports_torch_or_ray_to_say_what_its_options_are(job, arguments, code):
    check = CHECK.format(job=job, arguments=arguments, code=code)
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_every_command_is_looked_at():
    assert JOBS == ["compact", "convert", "evaluate", "explain", "report", "score", "train", "verify"]
