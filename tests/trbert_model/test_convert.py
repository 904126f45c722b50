"""Conversion, and equality with what the original TR-BERT computed (tests/reference_outputs/README.md)."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
)

from trbert_model import CheckpointError, ConfigurationError, TRBertModel, VarlenBatch, convert_checkpoint

FOLDERS = sorted((Path(__file__).parent.parent / "reference_outputs").glob("*/"))
REFERENCES = [folder for folder in FOLDERS if folder.name != "bert6-multiple-choice"]  # test_multiple_choice.py
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


def expected_sequences(folder):
    tensors = load_file(folder / "expected.safetensors")
    indices = sorted({int(name.split(".")[0]) for name in tensors})
    return [{k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".")[0] == str(i)} for i in indices]


def run(model, sequences):
    """The sequences as one varlen batch → one dictionary a sequence, named as the expectation is."""
    batch = VarlenBatch.from_sequences(
        [s["input_ids"] for s in sequences], token_type_ids=[s["token_type_ids"] for s in sequences]
    )
    with torch.inference_mode():
        output = model(batch.input_ids, token_type_ids=batch.token_type_ids, cu_seqlens=batch.cu_seqlens)
    results = [{"kept_tokens": [int(kept[i]) for kept in output.kept_tokens]} for i in range(len(sequences))]
    lengths = batch.cu_seqlens.diff().tolist()
    for name in ("logits", "start_logits", "end_logits"):
        if name in output:
            values = output[name] if name == "logits" else output[name].split(lengths)
            for result, value in zip(results, values):
                result[name] = value
    return results


def assert_same(results, sequences):
    for result, expected in zip(results, sequences, strict=True):
        counts = expected["kept_tokens"].int().tolist()
        # The original lists no further count once one token is left; we list the tokens alive.
        assert result["kept_tokens"] == counts + [1] * (2 - len(counts))
        for name in expected.keys() & {"logits", "start_logits", "end_logits"}:
            torch.testing.assert_close(result[name], expected[name], atol=1e-4, rtol=0)


def test_the_references_are_there():
    assert len(REFERENCES) == 4


@pytest.mark.parametrize("folder", REFERENCES, ids=lambda folder: folder.name)
def test_each_sequence_alone_equals_the_original(folder):
    model, sequences = convert_checkpoint(folder), expected_sequences(folder)
    assert len(sequences) >= 11
    assert_same([run(model, [sequence])[0] for sequence in sequences], sequences)


@pytest.mark.parametrize("folder", REFERENCES, ids=lambda folder: folder.name)
@pytest.mark.parametrize("seed", range(5))
def test_one_batch_in_any_order_equals_the_original(folder, seed):
    model, sequences = convert_checkpoint(folder), expected_sequences(folder)
    random.Random(seed).shuffle(sequences)
    assert_same(run(model, sequences), sequences)


@pytest.mark.parametrize("folder", REFERENCES, ids=lambda folder: folder.name)
def test_padded_input_equals_the_original(folder):
    model, sequences = convert_checkpoint(folder), expected_sequences(folder)
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(s["input_ids"]) for s in sequences], batch_first=True)
    with torch.inference_mode():
        output = model(
            pad([s["input_ids"] for s in sequences], batch_first=True),
            attention_mask=mask,
            token_type_ids=pad([s["token_type_ids"] for s in sequences], batch_first=True),
        )
    results = [{"kept_tokens": [int(kept[i]) for kept in output.kept_tokens]} for i in range(len(sequences))]
    for name in ("logits", "start_logits", "end_logits"):
        if name in output:
            for i, result in enumerate(results):
                result[name] = output[name][i] if name == "logits" else output[name][i, : int(mask[i].sum())]
    assert_same(results, sequences)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_fresh_conversion_answers_as_its_source(tmp_path, kind):
    torch.manual_seed(1)
    if kind == "bert":
        source = BertForSequenceClassification(BertConfig(**TINY, num_hidden_layers=4, num_labels=3))
    else:
        source = DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, n_heads=4, hidden_dim=64, n_layers=4, vocab_size=99, num_labels=3)
        )
    source.eval().save_pretrained(tmp_path)
    model = convert_checkpoint(tmp_path, reduction_layers=[0, 2])
    ids = torch.randint(1, 99, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.inference_mode():
        output = model(ids, attention_mask=mask)
        torch.testing.assert_close(output.logits, source(ids, attention_mask=mask).logits, atol=1e-5, rtol=0)
    assert [kept.tolist() for kept in output.kept_tokens] == [[20, 7, 20]] * 2
    assert model.config.id2label == source.config.id2label


def test_distilbert_question_answering_converts(tmp_path):
    config = DistilBertConfig(dim=32, n_heads=4, hidden_dim=64, n_layers=2, vocab_size=99)
    source = DistilBertForQuestionAnswering(config).eval()
    source.save_pretrained(tmp_path)
    ids = torch.randint(1, 99, (2, 9))
    with torch.inference_mode():
        output = convert_checkpoint(tmp_path)(ids, token_type_ids=torch.ones_like(ids))
        torch.testing.assert_close(output.start_logits, source(ids).start_logits, atol=1e-5, rtol=0)


def test_fresh_selectors_that_know_the_question_keep_every_token(tmp_path):
    config = DistilBertConfig(dim=32, n_heads=4, hidden_dim=64, n_layers=4, vocab_size=99)
    DistilBertForQuestionAnswering(config).save_pretrained(tmp_path)
    model = convert_checkpoint(tmp_path, question_aware=True)
    batch = VarlenBatch.from_sequences([range(5, 25)], token_type_ids=[[0] * 4 + [1] * 16])
    found = {"token_type_ids": batch.token_type_ids, "cu_seqlens": batch.cu_seqlens, "output_selections": True}
    output = model(batch.input_ids, **found)
    assert [int(kept) for kept in output.kept_tokens] == [20, 20]
    assert (output.selections[0].logits[4:] < 0).all()  # of their own, nothing is near an answer
    model.save_pretrained(tmp_path / "saved")
    kept = type(model).from_pretrained(tmp_path / "saved").eval()(batch.input_ids, **found).kept_tokens
    assert [int(count) for count in kept] == [20, 20]


def test_conversion_survives_saving(tmp_path):
    model = convert_checkpoint(REFERENCES[0])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.reduction_layers == model.config.reduction_layers
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_a_pretraining_checkpoint_gives_the_bare_model_or_a_fresh_head(tmp_path):
    BertForPreTraining(BertConfig(**TINY, num_hidden_layers=2)).save_pretrained(tmp_path)
    assert type(convert_checkpoint(tmp_path)) is TRBertModel
    model = convert_checkpoint(tmp_path, task="classification", head={"id2label": {0: "no", 1: "yes", 2: "maybe"}})
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    with pytest.raises(CheckpointError, match="no head for question-answering"):
        convert_checkpoint(tmp_path, task="question-answering")


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        convert_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match="pickled weights"):
        convert_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        convert_checkpoint(tmp_path)
    save_file({"decoder.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no bert encoder"):
        convert_checkpoint(tmp_path)


def test_other_architectures_are_refused_even_if_their_tensors_fit(tmp_path):
    BertForSequenceClassification(BertConfig(**TINY, num_hidden_layers=2)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for kind in ("mpnet", "electra"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        with pytest.raises(CheckpointError, match=f"a {kind} checkpoint, not a BERT"):
            convert_checkpoint(tmp_path)


def test_an_incomplete_checkpoint_is_refused_by_tensor(tmp_path):
    tensors = load_file(REFERENCES[0] / "model.safetensors")
    del tensors["bert.encoder.layer.3.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((REFERENCES[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"missing \['bert\.encoder\.layer\.3\.output\.dense\.bias'\]"):
        convert_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_more_positions_begin_as_copies_of_the_first(tmp_path, kind):
    if kind == "bert":
        config = BertConfig(**TINY, num_hidden_layers=2, max_position_embeddings=20)
        source = BertForSequenceClassification(config)
    else:
        source = DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, n_heads=4, hidden_dim=64, n_layers=2, vocab_size=99, max_position_embeddings=20)
        )
    source.eval().save_pretrained(tmp_path)
    model = convert_checkpoint(tmp_path, max_positions=50)
    table = model.bert.embeddings.position_embeddings.weight
    assert model.config.max_position_embeddings == 50
    assert table.shape == (50, 32)
    assert torch.equal(table[20:40], table[:20])
    assert torch.equal(table[40:], table[:10])
    short = torch.randint(1, 99, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(model(short).logits, source(short).logits, atol=1e-5, rtol=0)
        assert model(torch.randint(1, 99, (1, 50))).logits.shape == (1, 2)
    with pytest.raises(ConfigurationError, match=r"max_positions 19: .* has 20 positions already"):
        convert_checkpoint(tmp_path, max_positions=19)
