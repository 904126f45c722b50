"""The guide, its targets, and the teacher's signals by window."""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, BertConfig, BertModel

from tests.conftest import classification_task, tiny_classifier
from trbert_model.tasks.classification.labelled import LabelledTexts
from trbert_model.tasks.classification.losses import UNLABELLED, SingleLabelLosses
from trbert_model.training.teacher import (
    TeacherSignals,
    attention_guide,
    deep_layer,
    guide,
    signals_digest,
    teacher_signals,
)
from trbert_model.varlen import ATTENTION_NAME, model_inputs, top_tokens, varlen_attention


def as_dataset(windows, labels):
    """Windows (with their first and last token put aside, which the task adds) as a dataset."""
    return LabelledTexts([window[1:-1] for window in windows], np.array(labels), classification_task()).dataset()


def test_top_tokens_are_the_highest_scored_and_the_first():
    scores = torch.tensor([0.0, 5, 4, 3, 0.0, 1, 2])
    chosen = top_tokens(scores, torch.tensor([0, 4, 7]), torch.tensor([3, 2]))
    assert chosen.tolist() == [True, True, True, False, True, False, True]
    assert top_tokens(scores, torch.tensor([0, 4, 7]), torch.tensor([9, 1])).tolist() == [True] * 5 + [False] * 2


def test_the_guide_is_the_originals_saliency():
    """abs⟨∂loss/∂h_d, h_d − h_i⟩ of one document at a time, by autograd from its definition."""
    model = tiny_classifier(num_hidden_layers=6, reduction_layers=[1, 3]).requires_grad_(False)
    model.enable_input_require_grads()
    documents, labels = [np.arange(5, 14), np.arange(6, 20)], torch.tensor([0, 2])
    found, scores = guide(model, {**model_inputs(documents), "labels": labels}, SingleLabelLosses(3))
    together = scores.split([9, 14], dim=1)
    for index, document in enumerate(documents):
        output = model(
            **model_inputs([document]), labels=labels[index : index + 1], reduce=False, output_hidden_states=True
        )
        h = output.hidden_states
        (gradient,) = torch.autograd.grad(output.loss, h[5])
        for layer in range(5):
            expected = (gradient * (h[5] - h[layer])).sum(-1).abs()
            torch.testing.assert_close(together[index][layer], expected, atol=1e-5, rtol=1e-3)
        signals = torch.cat([output.logits, output.pooler_output], 1)
        torch.testing.assert_close(found[index : index + 1], signals, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_attention_guide_is_what_the_last_layer_attends_to(pooling):
    """As transformers' own attention weights say, of one document at a time."""
    model = tiny_classifier(num_hidden_layers=3, reduction_layers=[1], classifier_pooling=pooling)
    theirs = BertModel(BertConfig(**model.config.to_dict() | {"attn_implementation": "eager"})).eval()
    theirs.load_state_dict(model.bert.state_dict(), strict=False)
    documents, labels = [np.arange(5, 14), np.arange(6, 20)], torch.tensor([0, 2])
    _, scores = attention_guide(model, {**model_inputs(documents), "labels": labels}, SingleLabelLosses(3))
    assert scores.shape == (deep_layer(model.config), 23)
    for document, found in zip(documents, scores.split([9, 14], dim=1)):
        weights = theirs(torch.tensor(document)[None], output_attentions=True).attentions[-1][0].mean(0)
        expected = weights[0] if pooling == "cls" else weights.mean(0)
        for layer in found:
            torch.testing.assert_close(layer, expected.detach(), atol=1e-6, rtol=1e-4)
    assert AttentionInterface()[ATTENTION_NAME] is varlen_attention


def test_signals_belong_to_windows_whatever_batch_they_were_computed_in(tmp_path):
    model = tiny_classifier(num_hidden_layers=6)
    rng = np.random.default_rng(0)
    windows = [rng.integers(5, 20, n).astype(np.int32) for n in (12, 30, 7, 21, 3)]
    labels = [0, 1, 2, 1, 0]
    dataset = as_dataset(windows, labels)
    together = teacher_signals(model, dataset)
    alone = teacher_signals(model, dataset, tokens_per_batch=1)
    together.save(tmp_path / "teacher.safetensors")
    loaded = TeacherSignals.load(tmp_path / "teacher.safetensors")
    for indices in ([3, 0], [4, 4, 2]):
        for signals in (alone, loaded):
            logits, scores = signals.of_windows(indices)
            assert scores.shape == (5, sum(len(windows[index]) for index in indices))
            expected, expected_scores = together.of_windows(indices)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(scores, expected_scores, atol=2e-3, rtol=1e-2)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_document_without_a_label_has_the_guide_of_the_most_probable_one():
    model = tiny_classifier(num_hidden_layers=6)
    windows = [np.arange(5, 14), np.arange(6, 20), np.arange(5, 19)]
    unlabelled = as_dataset(windows, [UNLABELLED, 2, UNLABELLED])
    unlabelled.teacher = teacher_signals(model, unlabelled)
    probable = unlabelled.teacher.targets[:, :3].argmax(1).tolist()
    known = teacher_signals(model, as_dataset(windows, [probable[0], 2, probable[2]]))
    torch.testing.assert_close(unlabelled.teacher.guide, known.guide)
    assert unlabelled.collate([[2], [1]])["labels"].tolist() == [probable[2], 2]


def test_another_dense_model_or_corpus_has_other_signals():
    model, windows = tiny_classifier(), [np.arange(5, 9), np.arange(6, 12)]
    digest = signals_digest(model, as_dataset(windows, [0, 1]))
    with torch.no_grad():
        model.bert.encoder.selectors[0].linear_1.weight += 1  # no part of the dense model
    assert signals_digest(model, as_dataset(windows, [0, 1])) == digest
    assert signals_digest(model, as_dataset(windows, [1, 1])) != digest
    assert signals_digest(model, as_dataset(windows, [0, 1]), autocast=torch.bfloat16) != digest
    assert signals_digest(model, as_dataset([np.arange(5, 10), np.arange(6, 12)], [0, 1])) != digest
    with torch.no_grad():
        model.classifier.bias += 1
    assert signals_digest(model, as_dataset(windows, [0, 1])) != digest
