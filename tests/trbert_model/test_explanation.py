"""Explanations: each token's characters and layers are those that the model really computed."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trbert_model
from tests.conftest import TINY, WORDS, tiny_classifier, tiny_tokenizer
from trbert_model import ConfigurationError, Explanation, InputError, TRBertConfig, TRBertForQuestionAnswering
from trbert_model.engine import Engine, EngineOptions
from trbert_model.explanation import NOT_READ, ExplainedText, Recording

TEXT = "The good news, of a game — 中 bank\r\n and café banking.  Fine <b>sport</b>"


def engine(model=None, **options):
    return Engine(model or tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu", **options))


def answering(**options):
    torch.manual_seed(0)
    model = TRBertForQuestionAnswering(TRBertConfig(**TINY)).eval()
    for selector in model.bert.encoder.selectors:
        torch.nn.init.normal_(selector.linear_1.weight, std=1.0)
        torch.nn.init.normal_(selector.linear_2.weight, std=1.0)
    return engine(model, **options)


ENGINE = engine()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(WORDS[:11]), min_size=1, max_size=90), st.sampled_from([30, 64, 10_000]))
def test_layers_are_those_of_the_models_own_selections(words, budget):
    scorer = engine(max_tokens_per_batch=budget, stride=0)
    text = " ".join(words)
    documents, _ = scorer.task.encode_rows([("fine",), (text,), ("good news",)])
    recording = Recording({1})
    results = scorer.score(documents, recording=recording)
    windows = recording.windows[1]
    assert list(recording.windows) == [1]
    reductions = scorer.config.reduction_layers
    counted = [sum(int((layers > layer).sum()) for _, layers in windows) for layer in reductions]
    assert counted == results.kept_tokens[1].tolist()
    for window, layers in windows:
        ids = torch.tensor(window.input_ids, dtype=torch.long)
        output = scorer.model(ids, cu_seqlens=torch.tensor([0, len(ids)]), output_selections=True)
        expected = np.full(len(ids), scorer.config.num_hidden_layers)
        for layer, selection in zip(reductions, output.selections):
            expected[selection.token_indices[~selection.keep].numpy()] = layer
        np.testing.assert_array_equal(layers, expected)


def test_each_token_has_its_characters():
    explanation = trbert_model.explain(ENGINE, TEXT)
    (text,) = explanation.texts
    words = [text.text[start:end] for start, end in zip(text.starts, text.ends)]
    assert words[:4] == ["The", "good", "news", ","]
    assert [word for word in words if word.startswith(("bank", "ing"))] == ["bank", "bank", "ing"]
    assert "中" in words
    assert "".join(run.text for run in text.runs()) == TEXT
    assert set(text.layers) <= {*ENGINE.config.reduction_layers, ENGINE.config.num_hidden_layers}
    assert explanation.num_tokens == len(words) + 2 * explanation.num_windows
    columns = ENGINE.task.result_columns(ENGINE.score_columns([TEXT]).outputs, [])
    assert explanation.outcome == {name: columns[name][0].as_py() for name in ("label", "score")}


def test_a_token_in_several_windows_has_its_highest_number_of_layers():
    text = " ".join(WORDS[i % 11] for i in range(100))
    scorer = engine(stride=10)
    explanation = trbert_model.explain(scorer, text)
    assert explanation.num_windows > 3
    assert len(explanation.texts[0].layers) == 100
    documents, _ = scorer.task.encode_rows([(text,)])
    recording = Recording({0})
    scorer.score(documents, recording=recording)
    highest = dict.fromkeys(range(100), -1)
    for window, layers in recording.windows[0]:
        for token, count in zip(range(window.first, 100), layers[1:-1].tolist()):
            highest[token] = max(highest[token], count)
    assert explanation.texts[0].layers == list(highest.values())


def test_tokens_beyond_a_truncated_document_were_not_read():
    explanation = trbert_model.explain(engine(overflow="truncate"), "good " * 40)
    assert len(explanation.texts[0].layers) == 30
    answered = trbert_model.explain(answering(overflow="truncate"), "good news", "bank " * 60)
    assert answered.texts[1].layers.count(NOT_READ) == 60 - (32 - 3 - 2)
    assert "not read" in answered.to_html()


def test_a_dense_model_computes_every_token_in_all_layers():
    explanation = trbert_model.explain(engine(reduce=False), TEXT)
    assert set(explanation.texts[0].layers) == {TINY["num_hidden_layers"]}
    assert [level.layers for level in explanation.levels] == [TINY["num_hidden_layers"]]


def test_a_batch_that_is_halved_is_recorded_once():
    scorer = engine(stride=0)
    forward, failed = scorer._forward_once, []

    def fails_after_its_reductions(windows, policies, *recorded):
        results = forward(windows, policies, *recorded)
        if len(windows) > 2:
            failed.append(len(windows))
            raise MemoryError
        return results

    text = " ".join(WORDS[i % 11] for i in range(170))
    expected = trbert_model.explain(scorer, text)
    scorer._forward_once = fails_after_its_reductions
    assert trbert_model.explain(scorer, text) == expected
    assert failed


def test_questions_show_both_texts_and_the_answer():
    question, context = " good  news?", "a game of the bank and fine sport. " * 4
    explanation = trbert_model.explain(answering(), question, context)
    asked, told = explanation.texts
    assert (asked.name, told.name) == ("question", "context")
    assert [question[start:end] for start, end in zip(asked.starts, asked.ends)][:2] == ["good", "news"]
    start, end = told.answer
    assert context[start:end] == explanation.outcome["answer"]
    assert "".join(run.text for run in told.runs() if run.in_answer) == explanation.outcome["answer"]
    assert explanation.to_html().count('<mark class="answer">') >= 1


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_labels_and_numbers_are_shown_by_name(kind):
    explanation = trbert_model.explain(engine(tiny_classifier(problem_type=kind)), TEXT)
    (values,) = [value for value in explanation.outcome.values() if isinstance(value, dict)]
    assert list(values) == ["bad", "fine", "good"]
    assert re.search(r"bad -?\d.*, fine -?\d.*, good -?\d", explanation.to_text())


def test_the_text_form_brackets_the_survivors():
    text = ExplainedText("text", "good  news\nof sport", [0, 6, 11, 14], [4, 10, 13, 19], [4, 4, 1, 4], left_out=7)
    shown = Explanation([text], {"label": "x\x1b[2J"}, 4, [1, 2], 6, 1, [5, 4]).to_text()
    assert "[good  news]\nof [sport]\n… and 7 more characters" in shown
    assert "1 of 4 layers: 1 tokens" in shown
    assert "\x1b" not in shown


EVIL = "</style></div><script>alert('good')</script><img src=x onerror=alert(1)> good news & {{ 7*7 }}"


def test_texts_and_labels_cannot_add_html():
    model = tiny_classifier(id2label={0: EVIL, 1: EVIL, 2: EVIL}, label2id={EVIL: 0})
    explanation = trbert_model.explain(engine(model), EVIL)
    for page in (explanation.to_html(), explanation._repr_html_()):
        assert "<script" not in page
        assert "<img" not in page
        assert "49" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)
        assert page.count("</style>") == page.count("<style>")


def test_a_notebook_may_show_an_explanation_twice():
    explanation = trbert_model.explain(ENGINE, TEXT)
    groups = [set(re.findall(r'type="radio" name="([^"]+)"', explanation._repr_html_())) for _ in range(2)]
    assert [len(group) for group in groups] == [1, 1]
    assert groups[0] != groups[1]


def test_an_explanation_survives_json():
    for explanation in (trbert_model.explain(ENGINE, TEXT), trbert_model.explain(answering(), "good", TEXT)):
        assert Explanation.from_dict(json.loads(json.dumps(dataclasses.asdict(explanation)))) == explanation


def test_only_the_beginning_of_a_long_text_is_kept():
    documents, _ = ENGINE.task.encode_rows([("banking good " * 50,)])
    recording = Recording({0})
    ENGINE.score(documents, recording=recording)
    beginning = ("banking good " * 50)[:16]
    kept = ENGINE.explanation((beginning,), documents[0], recording.windows[0], {}, lengths=(650,))
    (text,) = kept.texts
    assert (text.text, text.left_out) == ("banking good ban", 650 - 16)
    assert [text.text[start:end] for start, end in zip(text.starts, text.ends)] == ["bank", "ing", "good"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("good", "a context"), "classification: it needs text, nothing else"),
        (("  ",), "the text must be a text that is not empty"),
        ((None,), "the text must be a text that is not empty, not NoneType"),
        (("\u200b",), "no token"),
    ],
)
def test_a_document_that_cannot_be_scored_is_an_error(texts, message):
    with pytest.raises(InputError, match=message):
        trbert_model.explain(ENGINE, *texts)
    if len(texts) == 2:
        with pytest.raises(InputError, match="it needs question and context"):
            trbert_model.explain(answering(), "good")


def test_options_of_an_engine_are_its_own(model_directory):
    with pytest.raises(ConfigurationError, match="give them to the Engine"):
        trbert_model.explain(ENGINE, TEXT, options=EngineOptions())
    assert trbert_model.explain(model_directory, TEXT, options=EngineOptions(device="cpu")).num_layers == 4
    assert callable(trbert_model.explain)  # its module has another name
