"""Takes the pictures of the documentation from what `make demo` wrote: `make pictures`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "build/demo"


def take(page: Path, picture: str, *options: str) -> None:
    command = [sys.executable, "-m", "tests.look.browser", str(page), f"docs/{picture}", *options]
    subprocess.run(command, cwd=ROOT, env=os.environ, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    take(DEMO / "explain.html", "explain.png", "--width", "900")
    *_, newest = sorted((DEMO / "scores/_runs").glob("*.html"))
    take(newest, "run-page.png", "--width", "900", "--height", "1500", "--at", "#tokens")
