"""What many tests share: tiny models with tokenizers, and corpora."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline import placement
from trbert_model import (
    TRBertConfig,
    TRBertForQuestionAnswering,
    TRBertForSequenceClassification,
    TRBertForTokenClassification,
)
from trbert_model.engine import precision
from trbert_model.modeling import TRBertPreTrainedModel
from trbert_model.tasks.base import TaskOptions
from trbert_model.tasks.classification.labellings import SingleLabel
from trbert_model.tasks.classification.task import ClassificationTask
from trbert_model.tasks.question_answering.task import QuestionAnsweringTask
from trbert_model.tasks.token_classification.tags import TagSet
from trbert_model.tasks.token_classification.task import TokenClassificationTask

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be looked up on a hub
# Ray Data's executors ask for their cluster when they are collected, too: tests that are interrupted would start a Ray
# of their own on the way out, and hang.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
torch.set_num_threads(1)  # tiny models: more threads only wait for each other
# Tests compare with results in fp32, also on machines where "auto" is bfloat16.
cpu_is_fast_in_bfloat16 = precision.cpu_is_fast_in_bfloat16
precision.cpu_is_fast_in_bfloat16 = lambda: False
placement._fast_in_bfloat16 = lambda least_cpus: [False]

TESTS = Path(__file__).parent
WORDS = [
    "the",
    "good",
    "bad",
    "fine",
    "news",
    "sport",
    "a",
    "of",
    "and",
    "game",
    "bank",
    "##s",
    "##ing",
    "é",
    "中",
    ".",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TINY = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def scenario_rank(item: pytest.Item) -> int:
    """0 for what runs in this process; others start dozens of processes, the chaos most of all."""
    place = item.path.relative_to(TESTS).parts
    return 2 if place == ("chaos", "test_chaos.py") else int(place[0] == "integration")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cheap ones first."""
    items.sort(key=scenario_rank)


LABELS = ("bad", "fine", "good")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{k}_token": v for k, v in names.items()})


def classification_task(
    max_positions: int = 32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    labels: tuple[str, ...] = LABELS,
    **options,
) -> ClassificationTask:
    settings = TaskOptions(**options)
    return ClassificationTask(tokenizer or tiny_tokenizer(), max_positions, SingleLabel(labels, settings), settings)


def question_task(max_positions: int = 32, **options) -> QuestionAnsweringTask:
    return QuestionAnsweringTask(tiny_tokenizer(), max_positions, TaskOptions(**options))


def tagging_task(max_positions: int = 32, tokenizer=None, tags: tuple[str, ...] = TAGS, **options):
    return TokenClassificationTask(tokenizer or tiny_tokenizer(), max_positions, TagSet(tags), TaskOptions(**options))


def tiny_tagger(seed: int = 0, tags: tuple[str, ...] = TAGS, **config) -> TRBertForTokenClassification:
    """A random model of tags whose selectors really choose."""
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(tags)), "label2id": {name: i for i, name in enumerate(tags)}}
    model = TRBertForTokenClassification(TRBertConfig(**TINY | labels | config)).eval()
    _let_selectors_choose(model)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    return model


def tiny_classifier(seed: int = 0, **config) -> TRBertForSequenceClassification:
    """A random model whose selectors really choose."""
    torch.manual_seed(seed)
    labels = dict(enumerate(LABELS))
    settings = TINY | {"id2label": labels, "label2id": {v: k for k, v in labels.items()}} | config
    model = TRBertForSequenceClassification(TRBertConfig(**settings)).eval()
    _let_selectors_choose(model)
    return model


def _let_selectors_choose(model: TRBertPreTrainedModel) -> None:
    """Weights large enough for keep probabilities on both sides of 0.5."""
    for selector in model.base_model.encoder.selectors:
        torch.nn.init.normal_(selector.linear_1.weight, std=1.0)
        torch.nn.init.normal_(selector.linear_2.weight, std=1.0)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A saved tiny classification model with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tiny_classifier().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def answering_model(tmp_path_factory) -> Path:
    """A saved tiny model that answers, at random, and whose selectors choose."""
    directory = tmp_path_factory.mktemp("answers")
    torch.manual_seed(0)
    model = TRBertForQuestionAnswering(TRBertConfig(**TINY)).eval()
    _let_selectors_choose(model)
    torch.nn.init.normal_(model.qa_outputs.weight, std=1.0)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tagging_model(tmp_path_factory) -> Path:
    """A saved tiny model of entities, at random."""
    directory = tmp_path_factory.mktemp("tags")
    tiny_tagger().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
