"""Pairs: a question and a text to be classified together, as transformers does, over all windows of the text."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import BertConfig, BertForSequenceClassification, RobertaForSequenceClassification

import trbert_model
from jobs.convert import main as convert
from tests.conftest import LABELS, TINY, WORDS, tiny_classifier, tiny_tokenizer
from tests.trbert_model.test_roberta import byte_level, source
from tests.trbert_model.two_words import places_in, save_backbone, write_parts
from trbert_model import ConfigurationError, InputError, convert_checkpoint
from trbert_model.calibration.measure import calibrate
from trbert_model.checkpoints.conversion import apply_adapter
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions
from trbert_model.labelled import LabelledCorpus
from trbert_model.options import LabelledColumns
from trbert_model.tasks.base import TaskOptions
from trbert_model.tasks.classification.labelled import LabelledTexts
from trbert_model.tasks.classification.labellings import MultiLabel, SingleLabel
from trbert_model.tasks.classification.losses import MultiLabelLosses, SingleLabelLosses
from trbert_model.tasks.classification.pairs import EncodedPair, PairClassificationTask
from trbert_model.training import TrainingConfig, train

TEXT = "the good news of a game and the bad bank " * 4 + "é 中."
words = st.lists(st.sampled_from(WORDS), max_size=90).map(" ".join)


def pair_task(
    max_positions: int = 32, pooling: str = "log-sum-exp", labelling: type = SingleLabel, **options
) -> PairClassificationTask:
    given_options = TaskOptions(**options)
    labels = labelling(LABELS, given_options)
    return PairClassificationTask(tiny_tokenizer(), max_positions, labels, given_options, pooling)


def pair_engine(pooling: str = "log-sum-exp", config: dict | None = None, **options) -> Engine:
    model = tiny_classifier(text_pairs=True, window_pooling=pooling, **config or {})
    return Engine(model, tiny_tokenizer(), EngineOptions(device="cpu", **options))


# --- as transformers ------------------------------------------------------------------------------------------------

PAIRS = [("good news", "the bad bank"), ("a fine game of sport", "good"), ("the bank", "é 中 news. the good game")]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_converted_classifier_of_pairs_says_what_transformers_does(tmp_path, family, capsys):
    torch.manual_seed(0)
    if family == "bert":
        tokenizer, special = tiny_tokenizer(), processors.BertProcessing
        theirs = BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).eval()
        torch.nn.init.normal_(theirs.bert.embeddings.token_type_embeddings.weight)  # far from each other
        theirs.save_pretrained(tmp_path / "theirs")
    else:
        tokenizer, special = byte_level(), processors.RobertaProcessing
        source("roberta", tmp_path / "theirs", num_labels=3)
        theirs = RobertaForSequenceClassification.from_pretrained(tmp_path / "theirs").eval()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.sep_token, tokenizer.cls_token)]
    tokenizer.backend_tokenizer.post_processor = special(*ends)
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert convert([str(tmp_path / "theirs"), str(tmp_path / "ours"), "--task", "classification", "--pairs"]) == 0
    assert "TRBertForSequenceClassification" in capsys.readouterr().out
    engine = Engine.from_pretrained(tmp_path / "ours", EngineOptions(device="cpu"))
    assert engine.config.text_pairs
    found = engine.score_columns(*zip(*PAIRS)).outputs
    for (first, second), logits in zip(PAIRS, found):
        with torch.inference_mode():
            inputs = tokenizer(first, second, return_tensors="pt", return_token_type_ids=family == "bert")
            expected = theirs(**inputs).logits[0]
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    # Converted again, as for training, it still reads pairs.
    assert convert_checkpoint(tmp_path / "ours").config.text_pairs


def test_only_a_classifier_can_be_one_of_pairs(tmp_path, answering_model):
    with pytest.raises(ConfigurationError, match="text_pairs is for classification; the task is question-answering"):
        convert_checkpoint(answering_model, text_pairs=True)
    for config, message in [
        ({"window_pooling": "max"}, "window_pooling 'max' is none of mean, log-sum-exp"),
        ({"window_pooling": "log-sum-exp", "problem_type": "regression"}, "is for labels"),
    ]:
        tiny_classifier(**config).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        with pytest.raises(ConfigurationError, match=message):
            convert_checkpoint(tmp_path / "model")


# --- windows --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(words.filter(str.strip), words.filter(str.strip), st.sampled_from([None, 0, 3]))
def test_every_window_has_the_question_and_the_text_is_in_them_once(question, text, stride):
    task = pair_task(stride=stride)
    ((document,), failures) = task.encode_rows([(question, text)])
    assert not failures
    if task.problem(document):
        assert len(document.ids) > 32 - 3 - 8 - (stride or 0)
        return
    cls, sep, seen, end = task.tokenizer.cls_token_id, task.tokenizer.sep_token_id, 0, 0
    for window in task.windows(document):
        passage = document.text[window.first : window.first + window.count]
        assert window.input_ids.tolist() == [cls, *document.ids, sep, *passage, sep]
        assert window.token_type_ids.tolist() == [0] * (2 + len(document.ids)) + [1] * (1 + len(passage))
        assert len(window.input_ids) <= 32
        assert window.first <= end
        seen, end = seen + window.new_tokens, window.first + window.count
    assert seen == end == len(document.text)
    spans = task.token_spans((question, text), document)
    assert len(spans) == len(document.ids) + len(document.text)
    (again,) = task.from_column(pa.chunked_array([task.to_column([document])]))
    assert (again.ids.tolist(), again.text.tolist()) == (document.ids.tolist(), document.text.tolist())


def test_a_text_that_many_questions_share_is_tokenised_and_stored_once():
    task = pair_task()
    documents, _ = task.encode_rows([("good", TEXT), ("bad", "news"), ("fine", TEXT)])
    assert documents[0].text is documents[2].text
    column = task.to_column(documents)
    assert len(column.field("text").dictionary) == 2
    again = list(task.from_column(pa.chunked_array([column.filter(pa.array([True, False, True]))])))
    assert [each.ids.tolist() for each in again] == [documents[0].ids.tolist(), documents[2].ids.tolist()]
    assert again[0].text is again[1].text


# --- windows together -----------------------------------------------------------------------------------------------


def test_one_window_that_is_sure_decides():
    logits = [np.array([0.5, 1.0, 0.0])] * 14 + [np.array([-2.0, -2.0, 9.0])]
    windows = [SimpleNamespace(new_tokens=50)] * 15
    document = EncodedPair(np.zeros(1, np.int32), np.zeros(1, np.int32))
    pooled = pair_task().combine(document, windows, logits)
    assert pooled.argmax() == 2
    # One softmax over the logits of all windows, of which each label has its share.
    shares = np.exp(np.array(logits)).sum(0) / np.exp(np.array(logits)).sum()
    np.testing.assert_allclose(np.exp(pooled) / np.exp(pooled).sum(), shares)
    assert pair_task(pooling="mean").combine(document, windows, logits).argmax() == 1
    # For several labels: it does not grow with the number of windows.
    np.testing.assert_allclose(pair_task().combine(document, windows[:9], [np.full(3, -1.0)] * 9), np.full(3, -1.0))


@pytest.mark.parametrize("kind", ["one", "several"])
def test_training_learns_what_decoding_joins(kind):
    task = pair_task(labelling=SingleLabel if kind == "one" else MultiLabel, stride=4)
    documents = task.encode_all([("good news", TEXT), ("bad", "a game"), ("fine", TEXT)])
    targets = np.array([2, 0, 1]) if kind == "one" else np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)
    dataset = LabelledTexts(documents, targets, task).dataset()
    examples = [list(range(a, b)) for a, b in zip(dataset.first_window, dataset.first_window[1:])]
    batch = dataset.collate(examples)
    count, generator = len(dataset.windows), torch.Generator().manual_seed(0)
    output, dense = (
        SimpleNamespace(
            logits=torch.randn(n, 3, generator=generator), pooler_output=torch.randn(n, 5, generator=generator)
        )
        for n in (2 * count, count)
    )
    losses = SingleLabelLosses(3) if kind == "one" else MultiLabelLosses(3)
    batch["teacher"] = losses.signals(dense)
    found, distilled = losses.labelled(output, batch, repeats=2), losses.distilled(output, batch, repeats=2)
    assert found.shape == distilled.shape == (6,)

    def joined(logits, i, repeat=0):
        pieces = [logits[repeat * count + index].double().numpy() for index in examples[i]]
        return torch.tensor(task.combine(documents[i], [dataset.windows[index] for index in examples[i]], pieces))

    for repeat in range(2):
        for i in range(3):
            mine = joined(output.logits, i, repeat).float()[None]
            expected = losses.to_labels(mine, torch.from_numpy(targets[i : i + 1]))
            assert found[3 * repeat + i] == pytest.approx(float(expected), rel=1e-4)
            expected = losses.to_logits(mine, joined(dense.logits, i).float()[None])
            assert distilled[3 * repeat + i] == pytest.approx(float(expected), rel=1e-4)
    weighted = type(losses)(3, classifier_input_weight=0.5).distilled(output, batch, repeats=2)
    distance = (output.pooler_output[:count] - dense.pooler_output).square().sum(1)
    share = (distance / dense.pooler_output.square().sum(1))[examples[2]].mean()
    assert weighted[2] - distilled[2] == pytest.approx(0.5 * float(share), rel=1e-4)


def test_an_example_has_several_windows_one_of_them_with_evidence():
    task = pair_task(stride=4)
    documents = task.encode_all([("good news", TEXT * 4), ("bad", "a game")])
    place = len(documents[0].text) - 3
    dataset = LabelledTexts(documents, np.array([2, 0]), task, [[(place, place + 1)], []]).dataset()
    (holding,) = [i for i, mask in enumerate(dataset.evidence) if mask.any()]
    window = dataset.windows[holding]
    marked = window.input_ids[dataset.evidence[holding]]
    assert marked.tolist() == documents[0].text[place : place + 2].tolist()
    drawn = [dataset[0] for _ in range(30)]
    assert all(holding in example and len(set(example)) == 4 for example in drawn)
    assert len({tuple(example) for example in drawn}) > 3
    batch = dataset.collate([drawn[0], dataset[1]])
    guide = dataset.losses.guide(batch, [0, 1])
    assert guide.shape == (2, len(batch["input_ids"]))
    assert int((guide[0] == 1).sum()) == 2
    assert not dataset.losses.guided_by_saliency
    dataset.crops = 1.0
    for piece in map(dataset.shown, dataset.windows):
        assert (piece.token_type_ids == 0).sum() == piece.passage, "the question stays"
        assert piece.input_ids[0] == task.tokenizer.cls_token_id
        assert piece.input_ids[-1] == piece.input_ids[piece.passage - 1] == task.tokenizer.sep_token_id
        assert len(piece.input_ids) == len(piece.token_type_ids)


# --- models ---------------------------------------------------------------------------------------------------------


def test_a_pair_does_not_see_its_batch_and_is_explained():
    pairs = [("good news", TEXT), ("fine", "a game"), ("bad bank", TEXT)]
    engine = pair_engine(config={"question_aware": True})
    together = engine.score_columns(*zip(*pairs)).outputs
    small = pair_engine(config={"question_aware": True}, max_tokens_per_batch=33)
    for pair, logits in zip(pairs, together):
        np.testing.assert_allclose(small.score_columns(*[[text] for text in pair]).outputs[0], logits, atol=1e-5)
    assert not np.allclose(together[0], together[2], atol=1e-7), "the question counts"
    explanation = trbert_model.explain(engine, *pairs[0])
    assert [text.name for text in explanation.texts] == ["question", "text"]
    assert explanation.num_windows == 2
    question, text = explanation.texts
    assert [question.text[start:end] for start, end in zip(question.starts, question.ends)] == ["good", "news"]
    assert "".join(run.text for run in text.runs()) == TEXT
    with pytest.raises(InputError, match="it needs question and text, nothing else"):
        trbert_model.explain(engine, TEXT)


@pytest.fixture
def corpus(tmp_path):
    """Pairs whose label is which of two words is in one place of a text of several windows."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        shown, asked = ["bad", "good"][i % 2], ["game", "bank"][i // 2 % 2]
        text = rng.choice(["the", "news", "of", "a", "and"], rng.integers(20, 60)).tolist()
        place = int(rng.integers(len(text)))
        text[place] = shown
        start = len(" ".join(text[:place])) + (place > 0)
        rows.append(
            {
                "asked": f"a {asked}",
                "body": " ".join(text),
                "label": shown,
                "answers": [shown],
                "answer_start": [start],
            }
        )
    write_parts(tmp_path, rows)
    save_backbone(tmp_path / "backbone")
    return tmp_path


def options(corpus, **changes) -> TrainingConfig:
    values = {
        **places_in(corpus),
        "text_column": "body",
        "question_column": "asked",
        "window_pooling": "log-sum-exp",
        "fine_tune_epochs": 24.0,
        "imitation_epochs": 4.0,
        "selectors_epochs": 0.5,
        "joint_epochs": 3.0,
        "learning_rate": 2e-3,
        "speedup": 1.6,
        "samples": 2,
    }
    return TrainingConfig(**values | changes)


def test_pairs_train_through_every_stage_and_are_measured(corpus):
    config = options(corpus, evidence=True, joint_imitation=0.5)
    measured = train(config)["stages"]
    assert measured["fine_tune"]["accuracy"] > 0.9
    assert measured["joint"]["accuracy"] > 0.8
    assert measured["joint"]["flops_speedup"] == pytest.approx(1.6, rel=0.25)
    model, tokenizer = load_model(corpus / "model")
    assert (model.config.text_pairs, model.config.window_pooling) == (True, "log-sum-exp")
    assert model.config.question_aware
    engine = Engine(model, tokenizer, EngineOptions(device="cpu"))
    read: LabelledCorpus = engine.task.read_corpus(config.evaluation, config)
    table = calibrate(engine, read, key="key", name="evaluation", speedups=(1.5,))
    assert table.default.metric == pytest.approx(100 * measured["joint"]["accuracy"])


def test_unlabelled_pairs_crops_and_adapters_are_learned_from(corpus):
    epochs = {"fine_tune_epochs": 1.0, "imitation_epochs": 1.0, "selectors_epochs": 0.25, "joint_epochs": 1.0}
    config = options(
        corpus,
        **epochs,
        unlabelled=str(corpus / "evaluation.parquet"),
        crops=0.5,
        feature_distillation=1.0,
        adapter_rank=2,
    )
    train(config)
    rebuilt = apply_adapter(corpus / "backbone", corpus / "model/adapter")
    assert (rebuilt.config.text_pairs, rebuilt.config.window_pooling) == (True, "log-sum-exp")
    none = {**dict.fromkeys(epochs, 0.0), "joint_epochs": 0.1, "backbone": str(corpus / "model"), "evaluation": None}
    other = {"output": str(corpus / "other"), "window_pooling": None}
    with pytest.raises(ConfigurationError, match="it classifies questions with their texts; name the column"):
        train(options(corpus, **none, **other, question_column=None))
    train(options(corpus, **none, **other))
    assert load_model(corpus / "other")[0].config.window_pooling == "log-sum-exp", "as the backbone does"


def test_exits_of_pairs_are_trained_for_windows_that_vote(corpus):
    none = dict.fromkeys(("imitation_epochs", "selectors_epochs", "joint_epochs"), 0.0)
    trained = {"window_pooling": "mean", "reduction_layers": (), "fine_tune_epochs": 1.0, "exits_epochs": 1.0}
    measured = train(options(corpus, **none | trained, exits="first"))["stages"]
    assert set(measured) == {"fine_tune", "exits", "exits_at_0.2"}
    model, tokenizer = load_model(corpus / "model")
    assert model.config.text_pairs
    assert len(model.config.exit_options.layers) == 3
    all_leave = Engine(model, tokenizer, EngineOptions(device="cpu", thresholds=(1.0,) * 3))
    results = all_leave.score_columns(["a game", "a bank"], [TEXT, "good news"])
    assert results.num_windows.tolist() == [2, 1]
    assert results.exit_layers.tolist() == [1, 1]
    with pytest.raises(ConfigurationError, match="exits: not with window_pooling 'log-sum-exp'"):
        train(options(corpus, **none | trained | {"window_pooling": "log-sum-exp"}, exits="first"))


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_options_of_pairs_that_do_not_fit_are_refused(corpus):
    for wrong, message in [
        ({"evidence": True, "question_column": None}, "evidence: only for classification of pairs"),
        ({"window_pooling": "mean", "task": "question-answering"}, "window_pooling mean: only for classification"),
        ({"example_windows": 0}, "example_windows 0 must be at least 1"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            options(corpus, **wrong)
    with pytest.raises(ConfigurationError, match="window_pooling 'max' is none of mean, log-sum-exp"):
        train(options(corpus, window_pooling="max"))
    with pytest.raises(ConfigurationError, match="evidence: only with window_pooling log-sum-exp"):
        train(options(corpus, window_pooling=None, evidence=True))


def test_a_corpus_with_a_question_too_few_or_too_many_is_refused(corpus):
    path = str(corpus / "train.parquet")
    pairs, texts = pair_engine().task, Engine(tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu")).task
    with pytest.raises(InputError, match=r"train.parquet: no column 'question'; its columns are"):
        pairs.read_corpus(path, LabelledColumns(text_column="body"))
    with pytest.raises(InputError, match="question column 'asked': the model classifies texts without questions"):
        texts.read_corpus(path, LabelledColumns(text_column="body", question_column="asked"))
    with pytest.raises(ConfigurationError, match="evidence is for the classification of questions"):
        LabelledTexts([], np.zeros(0, np.int64), texts).with_evidence(path, LabelledColumns())
    for question, message in [
        ("good " * 40, "row 1: the question's 40 tokens leave too little"),
        (None, "1 rows have"),
    ]:
        rows = {"question": ["good", question], "text": ["a", "b"], "label": ["bad", "good"]}
        pq.write_table(pa.table(rows), path)
        with pytest.raises(InputError, match=message):
            pairs.read_corpus(path, LabelledColumns())


def test_a_training_of_an_older_version_goes_on(corpus):
    """Its record has none of the options that came later."""
    brief = {"fine_tune_epochs": 0.5, "imitation_epochs": 0.0, "selectors_epochs": 0.0, "joint_epochs": 0.0}
    config = options(corpus, **brief, question_column=None, window_pooling=None, evaluation=None)
    train(config)
    record = corpus / "model/stages/config.json"
    older = json.loads(record.read_text())
    assert older["question_column"] == "question"
    for name in ("pairs", "window_pooling", "example_windows", "evidence"):
        del older[name]
    record.write_text(json.dumps(older))
    train(config)
    record.write_text(json.dumps(older))
    with pytest.raises(ConfigurationError, match="trained with other options"):
        train(options(corpus, **brief, window_pooling=None, evaluation=None))
