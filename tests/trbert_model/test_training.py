"""Training: whole runs through all stages, that resume, start from a fine-tuned model, and stop when they collapse."""

import dataclasses
import json
import logging
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from tests.conftest import TINY, tiny_tokenizer
from tests.trbert_model.two_words import places_in, rows_of, save_backbone, write_parts
from trbert_model import CheckpointError, ConfigurationError, InputError, TrainingError
from trbert_model.calibration.table import Calibration, OperatingPoint, with_table
from trbert_model.card import write_card
from trbert_model.checkpoints.conversion import apply_adapter, convert_checkpoint
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.options import LabelledColumns
from trbert_model.tasks.classification.labelled import RawTexts
from trbert_model.training import TrainingConfig, train
from trbert_model.training.config import STAGES
from trbert_model.training.objectives import FineTune, Imitation, Joint, Reinforcement


def test_options_out_of_range_are_refused():
    places = {"train": "t", "backbone": "b", "output": "o"}
    for wrong, message in [
        ({"speedup": 1.0}, "speedup 1.0"),
        ({"speed_range": (2.0,)}, "speed_range"),
        ({"speed_range": (3.0, 2.0)}, "two rising numbers"),
        ({"dtype": "int8"}, "dtype"),
        ({"guide": "saliency"}, "guide 'saliency' is none of gradient, attention"),
        ({"guide": "attention", "task": "question-answering"}, "guide attention: only for classification"),
        ({"train": ""}, "train is"),
        ({"samples": 1}, "compares at least 2"),
        ({"length_penalty": float("nan")}, "length_penalty nan"),
        ({"joint_epochs": -1.0}, "joint_epochs -1.0"),
        ({"crops": 1.5}, "crops 1.5"),
        ({"unreduced": -0.1}, "unreduced -0.1"),
        ({"unreduced": 1.0}, "unreduced 1.0"),
        ({"crops": 0.5, "distillation": False}, "crops 0.5: only"),
        ({"crops": 0.5, "task": "question-answering"}, "crops 0.5: only"),
        ({"feature_distillation": 1.0, "task": "question-answering"}, "feature_distillation 1.0: only"),
        ({"feature_distillation": -1.0}, "feature_distillation -1.0 must be at least 0"),
        ({"unlabelled": "u", "distillation": False}, "unlabelled u: only"),
        ({"unlabelled": "u", "task": "question-answering"}, "unlabelled u: only"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            TrainingConfig(**places | wrong)


def test_an_output_that_cannot_be_written_is_named_before_the_training(corpus):
    (corpus / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"output .*file/model: it cannot be written: .*Not a directory"):
        train(options(corpus, output=str(corpus / "file/model")))


@pytest.fixture
def corpus(tmp_path):
    """Documents whose label is which of two words they hold, and a tiny backbone."""
    write_parts(tmp_path, rows_of(8, 24))
    save_backbone(tmp_path / "backbone")
    return tmp_path


def options(corpus, **changes) -> TrainingConfig:
    values = {
        **places_in(corpus),
        "fine_tune_epochs": 30.0,
        "imitation_epochs": 8.0,
        "selectors_epochs": 2.0,
        "joint_epochs": 2.1,
        "learning_rate": 2e-3,
        "speedup": 1.8,
        "samples": 3,
    }
    return TrainingConfig(**values | changes)


@pytest.mark.parametrize(("adapter_rank", "guide"), [(None, "gradient"), (4, "attention")])
def test_a_run_trains_saves_and_resumes(corpus, adapter_rank, guide, caplog):
    epochs = 30.0 if adapter_rank is None else 2.0
    config = options(corpus, adapter_rank=adapter_rank, fine_tune_epochs=epochs, guide=guide)
    with caplog.at_level(logging.INFO, "trbert_model"):
        trained = train(config)
    measured = trained["stages"]
    said = [record.getMessage() for record in caplog.records if record.name == "trbert_model.training.trainer"]
    progress = r"stage 2 of 4, imitation · step 10 of 32 · ETA 0:00:\d\d · loss [\d.]+ · "
    assert any(re.match(progress, line) for line in said)
    done = [line.split(" · ")[0] for line in said if " · done: " in line]
    assert done == [f"stage {i} of 4, {stage}" for i, stage in enumerate(STAGES[:4], 1)]
    card = (corpus / "model/README.md").read_text()
    assert f"| joint | {100 * measured['joint']['accuracy']:.2f}% " in card
    assert str(corpus) not in card
    assert set(measured) == {"fine_tune", "imitation", "selectors", "joint", "joint_without_reduction"}
    assert measured["fine_tune"]["flops_speedup"] == 1.0
    assert measured["joint"]["flops_speedup"] == pytest.approx(1.8, rel=0.15)
    if adapter_rank is None:
        assert measured["fine_tune"]["accuracy"] > 0.9
        assert measured["joint"]["accuracy"] > 0.9

    model, tokenizer = load_model(corpus / "model")
    raw = RawTexts.read(config.evaluation, config)
    texts, labels = raw.texts, raw.values
    engine = Engine(model, tokenizer, EngineOptions(device="cpu"))
    results = engine.score_columns(texts)
    accuracy = np.mean([engine.task.labels[i] == label for i, label in zip(results.outputs.argmax(1), labels)])
    assert accuracy == measured["joint"]["accuracy"]
    assert json.loads((corpus / "model/training.json").read_text())["stages"] == measured
    if adapter_rank is not None:
        rebuilt = apply_adapter(corpus / "backbone", corpus / "model/adapter")
        again = Engine(rebuilt, tiny_tokenizer(), EngineOptions(device="cpu")).score_columns(texts)
        np.testing.assert_allclose(again.outputs, results.outputs, atol=1e-5)

    # Run again, as after a kill: every stage goes on from its last checkpoint, and the result is the same.
    again = train(config)
    assert again["replicas"] == trained["replicas"]
    assert {stage: values.get("accuracy") for stage, values in again["stages"].items()} == {
        stage: values.get("accuracy") for stage, values in measured.items()
    }
    with pytest.raises(ConfigurationError, match="trained with other options"):
        train(dataclasses.replace(config, speedup=1.5))


def test_a_card_shows_the_speeds_too_and_never_replaces_anothers(model_directory, tmp_path):
    model = shutil.copytree(model_directory, tmp_path / "model")
    point = OperatingPoint((0.5,), (0.3,), ((0.1, 0.5),), 3.0, 2.8, 91.0, (85, 95), 1.0, (-1, 3))
    table = Calibration("key", "dev.parquet", 1000, "accuracy", 92.0, point, (point,))
    (model / "calibration.json").write_bytes(with_table(model, table))
    assert write_card(model)
    assert "| 3.00× | 2.80× | 91.00% | -1.00 | -3.00 to +1.00 |" in (model / "README.md").read_text()
    assert write_card(model), "its own card is made anew"
    (model / "README.md").write_text("by hand")
    assert not write_card(model)
    assert (model / "README.md").read_text() == "by hand"


def test_what_cannot_be_reported_or_uploaded_is_said(corpus):
    """The tests look nothing up on a hub, so it cannot be reached."""
    brief = {"fine_tune_epochs": 0.5, "imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
    with pytest.raises(ConfigurationError, match="report_to nowhere: "):
        train(options(corpus, **brief, report_to=("nowhere",)))
    with pytest.raises(TrainingError, match=r"push_to_hub me/model: .*; the model is in "):
        train(options(corpus, **brief, push_to_hub="me/model"))
    assert (corpus / "model/model.safetensors").is_file()


def test_a_stage_that_was_killed_goes_on_from_its_checkpoint(corpus, monkeypatch):
    """Killed in the joint stage, and run again: the stages before it as they were, and of it the steps that miss."""
    settings = {"fine_tune_epochs": 4.0, "joint_epochs": 30.0, "selectors_epochs": 0.0, "imitation_epochs": 2.1}
    forward, calls = Joint.forward, []

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 70:  # the first checkpoint is at step 50
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    config = options(corpus, **settings)
    with monkeypatch.context() as patched:
        patched.setattr(Joint, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    before = {path: path.read_bytes() for path in (corpus / "model/stages/imitation").rglob("*.safetensors")}
    assert before
    assert (corpus / "model/stages/joint/checkpoint-50").is_dir()

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Joint, "forward", counted)
        train(config)
    assert len(calls) == 30 * 64 // 16 - 50
    assert {path: path.read_bytes() for path in (corpus / "model/stages/imitation").rglob("*.safetensors")} == before


def test_one_model_for_many_speeds_from_a_fine_tuned_backbone(corpus):
    """Fine-tuned once; with other reduction layers, layer 0 among them, and no fine-tune, it trains on from there."""
    none = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
    dense = train(options(corpus, output=str(corpus / "dense"), **none))["stages"]
    assert set(dense) == {"fine_tune"}
    config = options(
        corpus,
        backbone=str(corpus / "dense"),
        fine_tune_epochs=0.0,
        reduction_layers=(0, 1, 2),
        selector_size=8,
        speed_range=(1.3, 3.0),
        speedup=2.0,
        joint_epochs=8.0,
        crops=0.5,
        teacher_cache=str(corpus / "cache"),
    )
    measured = train(config)["stages"]
    assert measured["fine_tune"]["accuracy"] == dense["fine_tune"]["accuracy"]
    assert measured["joint"]["flops_speedup"] == pytest.approx(2.0, rel=0.2)
    assert len(list((corpus / "cache").glob("teacher-*.safetensors"))) == 1
    model, _ = load_model(corpus / "model")
    assert model.config.reduction_layers == [0, 1, 2]
    assert model.config.selector_size == 8
    table = pq.read_table(corpus / "train.parquet")
    renamed = pa.array([{"bad": "x", "good": "y"}[label] for label in table["label"].to_pylist()])
    pq.write_table(table.set_column(1, "label", renamed), corpus / "other.parquet")
    other = dataclasses.replace(config, train=str(corpus / "other.parquet"), output=str(corpus / "other"))
    with pytest.raises(InputError, match=r"labels \['x', 'y'\] are none of the model's"):
        train(other)


def test_more_documents_without_labels_are_learnt_from_after_the_fine_tune(corpus, monkeypatch):
    labelled = RawTexts.read(str(corpus / "train.parquet"), LabelledColumns()).texts
    others = RawTexts.read(str(corpus / "evaluation.parquet"), LabelledColumns()).texts
    pq.write_table(pa.table({"text": others}), corpus / "unlabelled.parquet")
    seen: dict[str, list] = {"FineTune": [], "Imitation": [], "Reinforcement": [], "Joint": []}
    for objective in (FineTune, Imitation, Reinforcement, Joint):

        def counted(self, *, forward=objective.forward, **batch):
            assert (batch["labels"] >= 0).all()
            seen[type(self).__name__].append(len(batch["labels"]))
            return forward(self, **batch)

        monkeypatch.setattr(objective, "forward", counted)
    epochs = {"fine_tune_epochs": 1.0, "imitation_epochs": 1.0, "selectors_epochs": 1.0, "joint_epochs": 1.0}
    train(options(corpus, unlabelled=str(corpus / "unlabelled.parquet"), feature_distillation=1.0, **epochs))
    assert sum(seen.pop("FineTune")) == len(labelled)
    assert {stage: sum(counts) for stage, counts in seen.items()} == dict.fromkeys(seen, len(labelled) + len(others))


def test_a_speed_that_is_out_of_reach_is_refused_before_the_fine_tune(corpus):
    with pytest.raises(ConfigurationError, match=r"a FLOPs speed-up of 50\.0 is out of reach"):
        train(options(corpus, speedup=50.0))
    assert not (corpus / "model/stages/fine_tune").exists()


def test_one_label_is_none_to_learn(corpus):
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "x"]}), corpus / "one.parquet")
    with pytest.raises(InputError, match="column 'label' has fewer than two different labels"):
        train(options(corpus, train=str(corpus / "one.parquet")))


def test_the_papers_recipe_leaves_the_threshold_alone(corpus):
    train(options(corpus, fine_tune_epochs=1.0, imitation_epochs=0.0, speedup=None))
    model, _ = load_model(corpus / "model")
    assert model.config.selector_thresholds == [0.5, 0.5]


def test_a_distilbert_trains(corpus):
    shape = {"vocab_size": TINY["vocab_size"], "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64}
    torch.manual_seed(0)
    DistilBertModel(DistilBertConfig(**shape, max_position_embeddings=32)).save_pretrained(corpus / "backbone")
    measured = train(options(corpus, fine_tune_epochs=2.0, imitation_epochs=1.0))["stages"]
    assert measured["joint"]["flops_speedup"] == pytest.approx(1.8, rel=0.2)
    assert load_model(corpus / "model")[0].config.pooler_activation == "relu"


@pytest.mark.parametrize(("penalty", "what"), [(1e4, "keeps nothing"), (-0.0, "keeps everything")])
def test_a_collapse_is_said_and_stops_the_stage(corpus, monkeypatch, penalty, what):
    if penalty <= 0:  # fresh selectors let nearly everything through, and nothing costs anything
        monkeypatch.setattr("trbert_model.training.trainer._COLLAPSED", (0.0, 0.6))
    config = options(
        corpus,
        fine_tune_epochs=1.0,
        imitation_epochs=0.0,
        selectors_epochs=200.0,
        length_penalty=penalty,
        guide_rate=0.0,
        selector_learning_rate=3e-2 if penalty else 1e-5,
        speedup=None,
    )
    with pytest.raises(TrainingError, match=rf"selector \d {what} .* the length penalty"):
        train(config)


def test_a_dense_model_that_this_package_fine_tuned_converts_with_other_reduction_layers(corpus):
    none = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
    train(options(corpus, fine_tune_epochs=1.0, evaluation=None, **none))
    model = convert_checkpoint(corpus / "model", reduction_layers=[2])
    assert model.config.reduction_layers == [2]
    assert [model.config.id2label[i] for i in range(2)] == ["bad", "good"]
    again, _ = load_model(corpus / "model")
    texts = RawTexts.read(str(corpus / "evaluation.parquet"), LabelledColumns()).texts
    scored = [
        Engine(each, tiny_tokenizer(), EngineOptions(device="cpu", reduce=False)).score_columns(texts).outputs
        for each in (model, again)
    ]
    np.testing.assert_allclose(*scored, atol=1e-5)


def test_questions_train_through_every_stage(corpus):
    """The answer is the word of the question, wherever it stands in the context."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        words = rng.choice(["the", "news", "of", "a", "and"], rng.integers(8, 40)).tolist()
        answer = ["bank", "game", "sport"][i % 3]
        index = int(rng.integers(len(words)))
        words[index] = answer
        start = len(" ".join(words[:index])) + (index > 0)
        rows.append({"question": answer, "context": " ".join(words), "answers": [answer], "answer_start": [start]})
    for name, part in (("train", rows[:64]), ("evaluation", rows[64:])):
        pq.write_table(pa.Table.from_pylist(part), corpus / f"{name}.parquet")
    config = options(corpus, task="question-answering", fine_tune_epochs=40.0, speed_range=(1.3, 2.5), joint_epochs=8.0)
    measured = train(config)["stages"]
    assert measured["fine_tune"]["f1"] > 0.9
    assert measured["joint"]["flops_speedup"] == pytest.approx(1.8, rel=0.2)
    assert set(measured["joint"]) >= {"f1", "exact_match", "dense_passes_per_document"}
    model, tokenizer = load_model(corpus / "model")
    answers = Engine(model, tokenizer, EngineOptions(device="cpu", reduce=False)).score_columns(
        [row["question"] for row in rows[64:]], [row["context"] for row in rows[64:]]
    )
    found = [row["context"][a.spans[0].start : a.spans[0].end] for a, row in zip(answers.outputs, rows[64:])]
    assert np.mean([answer == row["question"] for answer, row in zip(found, rows[64:])]) > 0.8


def test_an_adapter_that_answers_over_longer_positions_is_rebuilt(corpus):
    rows = [{"question": "good", "context": "the good game", "answers": ["good"], "answer_start": [4]}] * 16
    pq.write_table(pa.Table.from_pylist(rows), corpus / "questions.parquet")
    none = {"imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
    settings = {"task": "question-answering", "adapter_rank": 4, "max_positions": 48, "selector_size": 8}
    files = dict.fromkeys(("train", "evaluation"), str(corpus / "questions.parquet"))
    train(options(corpus, **settings, **files, **none | {"fine_tune_epochs": 2.0}))
    trained, _ = load_model(corpus / "model")
    rebuilt = apply_adapter(corpus / "backbone", corpus / "model/adapter")
    assert rebuilt.config.max_position_embeddings == 48
    assert type(rebuilt) is type(trained)
    expected = trained.state_dict()
    for name, tensor in rebuilt.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("able", [True, False])
def test_auto_trains_in_bfloat16_where_the_machine_computes_in_it(able, monkeypatch):
    monkeypatch.setattr("trbert_model.engine.precision.computes_bfloat16", lambda: able)
    config = TrainingConfig(train="t", backbone="b", output="o", dtype="auto")
    assert config.autocast is (torch.bfloat16 if able else None)
    assert dataclasses.replace(config, dtype="bfloat16").autocast is torch.bfloat16
    assert dataclasses.replace(config, dtype="float32").autocast is None


def test_nothing_that_training_reads_is_replaced(model_directory, tmp_path):
    (tmp_path / "link").symlink_to(model_directory)
    before = {path.name: path.read_bytes() for path in model_directory.iterdir()}
    config = TrainingConfig(train="corpus.parquet", backbone=str(model_directory), output=str(tmp_path / "link"))
    with pytest.raises(ConfigurationError, match="is the backbone, which would be replaced"):
        train(config)
    assert {path.name: path.read_bytes() for path in model_directory.iterdir()} == before
    corpus = tmp_path / "corpus.parquet"
    corpus.write_bytes(b"rows")
    with pytest.raises(ConfigurationError, match="is not a directory"):
        train(dataclasses.replace(config, output=str(corpus)))
    assert corpus.read_bytes() == b"rows"


def test_a_backbone_without_a_tokenizer_is_refused(model_directory, tmp_path):
    """transformers would make a tokenizer that knows no word."""
    backbone = shutil.copytree(model_directory, tmp_path / "backbone")
    (backbone / "tokenizer.json").unlink()
    rows = pa.table({"text": ["good", "bad"] * 4, "label": ["good", "bad"] * 4})
    pq.write_table(rows, tmp_path / "train.parquet")
    config = TrainingConfig(train=str(tmp_path / "train.parquet"), backbone=str(backbone), output=str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        train(config)


def test_tags_of_words_are_learnt_in_all_stages(corpus):
    rng = np.random.default_rng(0)
    names = {"bank": "B-LOC", "game": "I-LOC", "good": "B-PER"}
    for file, count in (("train", 48), ("evaluation", 12)):
        lengths = rng.integers(8, 40, count)
        tokens = [rng.choice(["the", "news", "bank", "game", "good", "and"], n).tolist() for n in lengths]
        tags = [[names.get(token, "O") for token in each] for each in tokens]
        pq.write_table(pa.table({"tokens": tokens, "ner_tags": tags}), corpus / f"{file}.parquet")
    config = options(
        corpus,
        task="token-classification",
        fine_tune_epochs=10.0,
        imitation_epochs=2.0,
        selectors_epochs=1.0,
        joint_epochs=1.0,
        joint_imitation=0.5,
        speedup=1.4,
    )
    measured = train(config)["stages"]
    assert set(measured) == {"fine_tune", "imitation", "selectors", "joint", "joint_without_reduction"}
    assert set(measured["joint"]) >= {"f1", "precision", "recall", "accuracy"}
    assert measured["fine_tune"]["f1"] > 0.95
    assert measured["joint"]["accuracy"] > 0.9
    assert measured["joint"]["flops_speedup"] == pytest.approx(1.4, rel=0.15)
    engine = Engine.from_pretrained(corpus / "model", EngineOptions(device="cpu"))
    assert engine.config.id2label == dict(enumerate(["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]))
    (tagging,) = engine.score_columns(["the bank game and good news"]).outputs
    assert engine.task.tag_set.entities(tagging.tags) == [("LOC", 1, 2), ("PER", 4, 4)]
