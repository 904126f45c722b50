"""Checkpoints as they are found: understood as transformers understands them, or refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

from trbert_model import (
    TRBertForSequenceClassification,
    TRBertForTokenClassification,
    TRBertModel,
    VarlenBatch,
    convert_checkpoint,
)
from trbert_model.errors import TRBertError

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 42, "num_labels": 3}
DISTIL = {"vocab_size": 60, "dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 2, "num_labels": 3}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, type_vocab_size=1)),
}
ABSENT = object()
IDS = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """Save a checkpoint with other entries in its configuration and other tensors; returns its model and directory."""

    def save(model, entries=(), tensors=lambda tensors: tensors):
        model.eval().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | dict(entries)
        config = {name: value for name, value in config.items() if value is not ABSENT}
        (tmp_path / "config.json").write_text(json.dumps(config))
        changed = tensors(load_file(tmp_path / "model.safetensors"))
        save_file({name: value.contiguous() for name, value in changed.items()}, tmp_path / "model.safetensors")
        return model, tmp_path

    return save


def assert_same(theirs, directory, atol=1e-5):
    ours = convert_checkpoint(directory)
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=atol, rtol=0)
    return ours


def renamed(change):
    return lambda tensors: {change(name): value for name, value in tensors.items()}


def with_prefix(prefix):
    return renamed(lambda name: prefix + name)


def with_pooler(tensors):
    """As RoBERTa's checkpoints of old versions: the encoder has a pooler that the classifier does not use."""
    return tensors | {"roberta.pooler.dense.weight": torch.randn(32, 32), "roberta.pooler.dense.bias": torch.randn(32)}


def with_position_ids(tensors):
    return with_prefix("module.")(tensors | {"bert.embeddings.position_ids": torch.arange(42)[None]})


NAMES = {
    **{f"{prefix}{kind}": (kind, with_prefix(prefix)) for kind in MODELS for prefix in ("module.", "model.")},
    "module._orig_mod.": ("bert", with_prefix("module._orig_mod.")),
    "doubled": ("bert", with_prefix("bert.")),
    "doubled encoder": ("bert", renamed(lambda name: f"bert.{name}" if name.startswith("bert.") else name)),
    "model for bert": ("bert", renamed(lambda name: name.replace("bert.", "model."))),
    "without bert": ("bert", renamed(lambda name: name.removeprefix("bert."))),
    "without distilbert": ("distilbert", renamed(lambda name: name.removeprefix("distilbert."))),
    "gamma": ("bert", renamed(lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"))),
    "position ids": ("bert", with_position_ids),
    "two poolers": ("roberta", with_pooler),
}


@pytest.mark.parametrize(("kind", "tensors"), NAMES.values(), ids=NAMES)
def test_tensors_are_found_by_the_names_of_wrappers_and_old_versions(saved, kind, tensors):
    assert_same(*saved(MODELS[kind](), tensors=tensors))


@pytest.mark.parametrize("kind", MODELS)
def test_an_old_configuration_names_neither_type_nor_class(saved, kind):
    entries = dict.fromkeys(("model_type", "architectures", "pad_token_id"), ABSENT)
    assert_same(*saved(MODELS[kind](), entries))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_taken(saved, dtype):
    halved = saved(MODELS["bert"](), tensors=lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    assert_same(*halved, atol=0.05)


LABELS = [
    (None, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    (ABSENT, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    (["a", "b", "c"], ["a", "b", "c"]),
    ({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]),
    ({"0": 1, "1": 2, "2": 3}, ["1", "2", "3"]),
]


@pytest.mark.parametrize(("id2label", "names"), LABELS)
def test_labels(saved, id2label, names):
    model = assert_same(*saved(MODELS["bert"](), {"id2label": id2label, "label2id": ABSENT}))
    assert [model.config.id2label[i] for i in range(3)] == names


def test_numbers_that_are_text_and_nulls_are_understood(saved):
    entries = {"layer_norm_eps": "1e-12", "num_attention_heads": "4", "hidden_dropout_prob": None, "problem_type": ""}
    model = assert_same(*saved(MODELS["bert"](), entries))
    assert model.config.layer_norm_eps == 1e-12


def test_a_byte_order_mark_is_no_content(saved):
    model, directory = saved(MODELS["bert"]())
    (directory / "config.json").write_bytes(b"\xef\xbb\xbf" + (directory / "config.json").read_bytes())
    assert_same(model, directory)


WRONG = {
    "fewer labels": ({"id2label": {"0": "a", "1": "b"}}, "names 2 labels, but the head has 3"),
    "more labels": ({"id2label": list("abcd")}, "names 4 labels, but the head has 3"),
    "labels by name": ({"id2label": {"a": 0, "b": 1, "c": 2}}, "id2label .* does not name the labels by their numbers"),
    "a text": ({"id2label": "abc"}, "id2label 'abc' does not name"),
    "from one": ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "must give each label from 0 to 2 a name"),
    "a null label": ({"id2label": {"0": "a", "1": None, "2": "c"}}, "must give each label"),
    "problem type": ({"problem_type": "ranking"}, "problem_type 'ranking' is none of"),
    "no heads": ({"num_attention_heads": ABSENT}, r"32\) is not a multiple of the number of attention heads \(12"),
    "heads": ({"num_attention_heads": [4]}, "num_attention_heads"),
    "activation": ({"hidden_act": "sine"}, "make no model .*sine"),
    "dropout": ({"hidden_dropout_prob": "high"}, "hidden_dropout_prob"),
    "decoder": ({"is_decoder": True}, "TR-BERT is an encoder"),
    "quantized": ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
}


@pytest.mark.parametrize(("entries", "message"), WRONG.values(), ids=WRONG)
def test_configurations_that_make_no_model_are_refused_in_one_line(saved, entries, message):
    _, directory = saved(MODELS["bert"](), entries)
    with pytest.raises(TRBertError, match=message) as refused:
        convert_checkpoint(directory)
    assert str(refused.value).startswith(str(directory))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", '"bert"', "\xff", "[" * 100_000])
def test_what_is_no_configuration_is_refused_in_one_line(saved, text):
    _, directory = saved(MODELS["bert"]())
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(TRBertError, match=r"config\.json: (cannot be read as JSON|must hold a mapping)") as refused:
        convert_checkpoint(directory)
    assert "\n" not in str(refused.value)


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


TENSORS = {
    "two layers": (renamed(lambda name: name.replace("classifier.", "classifier.0.")), r"its head, classifier\.0\."),
    "another head": (lambda tensors: tensors | {"crf.transitions": torch.zeros(3, 3)}, r"its head, crf\.transitions"),
    "two encoders": (lambda t: t | with_prefix("module.")(t), r"several encoders .*'bert', 'module\.bert'"),
    "an unknown wrapper": (with_prefix("net."), "no bert encoder among its tensors"),
    "integers": (lambda t: {name: value.char() for name, value in t.items()}, "holds integers; quantized"),
    "a shape": (lambda t: t | {"classifier.weight": torch.zeros(3, 8)}, r"classifier\.weight has shape \(3, 8\)"),
    "no positions": (without("position_embeddings"), "position_embeddings"),
    "no token types": (without("token_type"), "token_type_embeddings"),
    "no pooler": (without("pooler"), r"missing \['bert\.pooler\.dense\.weight'"),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_make_no_model_are_refused_in_one_line(saved, tensors, message):
    _, directory = saved(MODELS["bert"](), tensors=lambda own: {n: v.clone() for n, v in tensors(own).items()})
    with pytest.raises(TRBertError, match=message) as refused:
        convert_checkpoint(directory)
    assert str(refused.value).startswith(str(directory))
    assert "\n" not in str(refused.value)


TOKEN_CLASSIFIERS = {
    "bert": lambda: BertForTokenClassification(BertConfig(**SIZES)),
    "distilbert": lambda: DistilBertForTokenClassification(DistilBertConfig(**DISTIL)),
    "roberta": lambda: RobertaForTokenClassification(RobertaConfig(**SIZES, type_vocab_size=1)),
}


UNNAMED = {"architectures": ABSENT}


@pytest.mark.parametrize("kind", TOKEN_CLASSIFIERS)
@pytest.mark.parametrize("entries", [{}, UNNAMED], ids=["named", "unnamed"])
def test_a_token_classifier_is_no_classifier(saved, kind, entries):
    """Its tensors have a classifier's names and shapes."""
    theirs, directory = saved(TOKEN_CLASSIFIERS[kind](), {"id2label": {"0": "O", "1": "B-x", "2": "I-x"}, **entries})
    assert type(assert_same(theirs, directory)) is TRBertForTokenClassification
    with pytest.raises(TRBertError, match=r"missing|no head for classification"):
        convert_checkpoint(directory, task="classification")
    assert type(convert_checkpoint(directory, task="none")) is TRBertModel
    for task in ("classification", "token-classification"):
        head = {"id2label": {0: "no", 1: "yes"}}
        assert convert_checkpoint(directory, task=task, head=head).config.id2label == head["id2label"]


@pytest.mark.parametrize("kind", TOKEN_CLASSIFIERS)
def test_a_token_classifiers_logits_are_transformers_in_a_ragged_batch_too(saved, kind):
    theirs, directory = saved(TOKEN_CLASSIFIERS[kind]())
    sequences = [IDS[0, :n] for n in (3, 20, 1, 11)]
    batch = VarlenBatch.from_sequences(sequences)
    ours = convert_checkpoint(directory)
    with torch.inference_mode():
        together = ours(batch.input_ids, cu_seqlens=batch.cu_seqlens, words=torch.zeros_like(batch.input_ids)).logits
        for sequence, logits in zip(sequences, together.split([len(each) for each in sequences])):
            torch.testing.assert_close(logits, theirs(sequence[None]).logits[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(ours(sequence[None]).logits[0], logits, atol=1e-5, rtol=0)


def test_an_old_token_classifier_has_a_pooler_too(saved):
    """As those of transformers 3, such as dslim/bert-base-NER."""
    shapes = {"bert.pooler.dense.weight": (32, 32), "bert.pooler.dense.bias": (32,)}
    pooler = {name: torch.zeros(shape) for name, shape in shapes.items()}
    theirs, directory = saved(TOKEN_CLASSIFIERS["bert"](), tensors=lambda tensors: tensors | pooler)
    assert type(assert_same(theirs, directory)) is TRBertForTokenClassification
    theirs, directory = saved(TOKEN_CLASSIFIERS["bert"](), UNNAMED, tensors=lambda tensors: tensors | pooler)
    assert type(convert_checkpoint(directory)) is TRBertForSequenceClassification
    assert type(convert_checkpoint(directory, task="token-classification")) is TRBertForTokenClassification


def test_a_token_classifier_of_robertas_is_one_without_its_name_too(saved):
    theirs, directory = saved(TOKEN_CLASSIFIERS["roberta"](), UNNAMED, with_pooler)
    assert type(assert_same(theirs, directory)) is TRBertForTokenClassification


def test_a_classifier_is_no_token_classifier(saved):
    _, directory = saved(MODELS["bert"]())
    with pytest.raises(TRBertError, match="no head for token-classification"):
        convert_checkpoint(directory, task="token-classification")
