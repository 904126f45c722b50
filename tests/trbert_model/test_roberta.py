"""RoBERTa and XLM-R: equality with transformers' own, and their tokenizers' words and characters."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
)

from tests.conftest import classification_task
from trbert_model import ConfigurationError, InputError, TRBertModel, convert_checkpoint
from trbert_model.engine import Engine, EngineOptions
from trbert_model.tasks.base import TaskOptions
from trbert_model.tasks.question_answering.task import QuestionAnsweringTask
from trbert_model.training import TrainingConfig, train
from trbert_model.varlen import model_inputs

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
SHAPE |= {"vocab_size": 400, "type_vocab_size": 1, "max_position_embeddings": 42, "pad_token_id": 1}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXT = (
    "The birth of Zoë, born in Köln. It's 12 o'clock... 中国人说 中文!!!  Two  spaces\n\nand   three, a 🎉🎉 party\t."
)
FAMILIES = {
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
    "xlm-r classes": (XLMRobertaConfig, XLMRobertaForSequenceClassification),
    "xlm-r answers": (XLMRobertaConfig, XLMRobertaForQuestionAnswering),
}


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"The {TEXT} birth, birth\n\n\n      ..."] * 3, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _fast(backend)


def sentence_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([TEXT, "good news, bad news"] * 3, trainer)
    return _fast(backend)


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


TOKENIZERS = {"byte-level": byte_level(), "SentencePiece": sentence_piece()}
both = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def source(family: str, directory, **config):
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**SHAPE | config)).eval()
    torch.nn.init.normal_(model.base_model.embeddings.position_embeddings.weight)  # far from each other
    model.save_pretrained(directory)
    return model


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # padded on the left, transformers' classes classify by the padding
    ("family", "left"), [*((family, False) for family in FAMILIES), ("xlm-r answers", True)]
)
def test_equal_to_transformers_and_saved_and_loaded(tmp_path, family, left):
    theirs = source(family, tmp_path / "source", num_labels=2 if "answers" in family else 3)
    converted = convert_checkpoint(tmp_path / "source", reduction_layers=[0, 2])
    converted.save_pretrained(tmp_path / "saved")
    ids = torch.randint(4, SHAPE["vocab_size"], (4, 40))
    mask = (torch.arange(40) < torch.tensor([[40], [1], [17], [33]])).long()
    if left:
        mask = mask.flip(1)
    ids = torch.where(mask.bool(), ids, SHAPE["pad_token_id"])
    with torch.inference_mode():
        expected = theirs(ids, attention_mask=mask)
        for model in (converted, type(converted).from_pretrained(tmp_path / "saved").eval()):
            assert model.config.backbone == "roberta"
            assert (model.config.usable_positions, model.config.pair_separators) == (40, 2)
            # Token types, which selectors need, change nothing.
            output = model(ids, attention_mask=mask, token_type_ids=mask, reduce=False)
            packed = model(**model_inputs([row[there.bool()] for row, there in zip(ids, mask)]), reduce=False)
            for name in ("logits",) if "logits" in output else ("start_logits", "end_logits"):
                seen = ... if name == "logits" else mask.bool()
                torch.testing.assert_close(output[name][seen], expected[name][seen], atol=1e-4, rtol=0)
                torch.testing.assert_close(packed[name], expected[name][seen], atol=1e-4, rtol=0)
            with pytest.raises(InputError, match="41 tokens is longer than the model's 40 positions"):
                model(**model_inputs([[7] * 41]))


def test_a_masked_language_model_gives_the_bare_model_or_a_fresh_head(tmp_path):
    RobertaForMaskedLM(RobertaConfig(**SHAPE)).save_pretrained(tmp_path)
    assert type(convert_checkpoint(tmp_path)) is TRBertModel
    assert convert_checkpoint(
        tmp_path, task="classification", head={"id2label": {0: "no", 1: "yes"}}
    ).config.id2label == {0: "no", 1: "yes"}


def test_more_positions_begin_as_copies_of_the_usable_ones(tmp_path):
    theirs = source("roberta", tmp_path)
    model = convert_checkpoint(tmp_path, max_positions=60)
    table = model.bert.embeddings.position_embeddings.weight
    assert model.config.usable_positions == 60
    assert torch.equal(table[:42], theirs.roberta.embeddings.position_embeddings.weight)
    assert torch.equal(table[42:], table[2:22])
    with pytest.raises(ConfigurationError, match=r"max_positions 39: .* has 40 positions already"):
        convert_checkpoint(tmp_path, max_positions=39)


@pytest.mark.parametrize(("family", "tokenizer"), [("roberta", "byte-level"), ("xlm-r classes", "SentencePiece")])
def test_trained_and_scored(tmp_path, family, tokenizer):
    source(family, tmp_path / "backbone")
    TOKENIZERS[tokenizer].save_pretrained(tmp_path / "backbone")
    rows = pa.table({"text": ["good news", "bad news, very bad news indeed"] * 4, "label": ["good", "bad"] * 4})
    pq.write_table(rows, tmp_path / "train.parquet")
    config = TrainingConfig(
        train=str(tmp_path / "train.parquet"),
        backbone=str(tmp_path / "backbone"),
        output=str(tmp_path / "out"),
        fine_tune_epochs=1.0,
        imitation_epochs=0.0,
        selectors_epochs=1.0,
        joint_epochs=1.0,
        reduction_layers=(0, 1),
        speedup=1.5,
        speed_range=None,
        samples=2,
        batch_size=4,
    )
    train(config)
    engine = Engine.from_pretrained(tmp_path / "out", EngineOptions(device="cpu"))
    assert engine.task.max_positions == 40
    results = engine.score_columns(["good news", "bad " * 100])
    assert results.outputs.shape == (2, 2)
    assert results.num_windows[1] > 1


def test_answered(tmp_path):
    source("xlm-r answers", tmp_path, num_labels=2)
    engine = Engine(convert_checkpoint(tmp_path), TOKENIZERS["SentencePiece"], EngineOptions(device="cpu"))
    (answer,) = engine.score_columns(["Who was born?"], [TEXT]).outputs
    span = TEXT[answer.spans[0].start : answer.spans[0].end]
    assert span
    assert span == span.strip()


# --- the tokenizers -------------------------------------------------------------------------------------------------


@both
def test_a_question_and_its_passage_are_laid_out_as_the_encoder_knows_them(tokenizer):
    task = QuestionAnsweringTask(tokenizer, max_positions=40, pair_separators=2)
    (document,) = task.encode(["born where?"], [TEXT])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    windows = list(task.windows(document))
    for window in windows:
        passage = document.context.ids[window.first : window.first + window.count]
        expected = [cls, *document.ids, sep, sep, *passage, sep]
        assert window.input_ids.tolist() == expected
        assert window.token_type_ids.tolist() == [0] * (len(document.ids) + 3) + [1] * (len(passage) + 1)
    assert len(windows[0].input_ids) == 40


@both
def test_a_questions_first_word_is_that_of_the_passage(tokenizer):
    task = QuestionAnsweringTask(tokenizer, max_positions=40)
    (document,) = task.encode(["birth"], ["The birth"])
    assert document.ids.tolist() == document.context.ids[-len(document.ids) :].tolist()
    assert not len(task.encode([" "], ["The birth"])[0].ids)


@both
def test_every_word_is_found_by_its_characters_and_answered_with_them(tokenizer):
    task = QuestionAnsweringTask(tokenizer, 400, TaskOptions(max_answer_tokens=60))
    (document,) = task.encode(["birth"], [TEXT])
    (window,) = task.windows(document)
    start = 0
    for word in TEXT.split():
        start = TEXT.index(word, start)
        first, last = document.context.tokens(start, start + len(word))
        logits = [np.full(len(window.input_ids), -20.0) for _ in range(2)]
        for values, token in zip(logits, (first, last)):
            values[window.passage + token] = 20.0
        found = task.combine(document, [window], [tuple(logits)]).spans[0]
        assert (found.start, found.end) == (start, start + len(word)), word
        start += len(word)


@both
def test_long_texts_in_pieces_have_the_same_tokens(monkeypatch, tokenizer):
    task = classification_task(32, tokenizer)
    text = TEXT * 5
    (whole,) = task.tokenize([text])
    for size in range(1, 40):
        monkeypatch.setattr("trbert_model.tasks.text.PIECE_CHARACTERS", size)
        assert np.array_equal(task.tokenize([text])[0], whole), size
