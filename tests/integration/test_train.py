"""jobs/train.py --num-workers: Ray Train on a real cluster, two workers that end with the same parameters."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertConfig, BertModel

from jobs.train import main
from pipeline.errors import PipelineError, UsageError
from pipeline.train import train_distributed
from tests.conftest import TINY, tiny_tokenizer
from trbert_model.checkpoints.loading import load_model
from trbert_model.training import TrainingConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def places(tmp_path):
    """Sixteen documents, two steps of eight, and a tiny backbone."""
    rng = np.random.default_rng(0)
    labels = ["bad", "good"] * 8
    texts = [" ".join([*rng.choice(["the", "news", "of"], 12), label]) for label in labels]
    pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "train.parquet")
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    names = {"train": "train.parquet", "backbone": "backbone", "output": "model"}
    return {option: str(tmp_path / name) for option, name in names.items()}


def test_two_workers_end_with_the_same_parameters(places, capsys):
    arguments = [f"--{name}={value}" for name, value in places.items()]
    arguments += ["--evaluation", places["train"], "--batch-size", "8", "--speedup", "1.8", "--speed-range", "1.3,2.5"]
    arguments += [part for stage in ("fine-tune", "imitation", "selectors") for part in (f"--{stage}-epochs", "1")]
    assert main([*arguments, "--num-workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "joint                    accuracy" in printed
    assert load_model(places["output"])[0].config.reduction_layers == [1, 2]
    measured = json.loads((Path(places["output"]) / "training.json").read_text())
    assert len(measured["replicas"]) == 2
    assert len(set(measured["replicas"])) == 1
    assert measured["stages"]["joint"]["documents"] == 16


def test_what_two_workers_cannot_train_is_refused_by_name(places):
    with pytest.raises(UsageError, match="batch_size 7 must be a multiple of num_workers 2"):
        train_distributed(TrainingConfig(**places, batch_size=7), 2)
    with pytest.raises(UsageError, match="num_workers 64: the cluster has 6 CPUs"):
        train_distributed(TrainingConfig(**places, batch_size=64), 64)
    with pytest.raises(PipelineError, match=r"training on 1 workers failed: .*no column 'body'"):
        train_distributed(TrainingConfig(**places, batch_size=8, text_column="body"), 1)
