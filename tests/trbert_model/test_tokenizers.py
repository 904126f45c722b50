"""A converted checkpoint's tokenizer gives the ids of the source's, whichever files the source has."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from jobs.convert import main
from trbert_model import CheckpointError
from trbert_model.checkpoints.loading import load_checkpoint
from trbert_model.checkpoints.tokenizer import read_tokenizer
from trbert_model.configuration import TRBertConfig

LETTERS = "abcdeéèüßÅÉABCİı中文字1'.-"
WORDS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "café", "cafe", "Good", "good"]
WORDS += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
TEXTS = ["The GOOD café, Cafe\u0301 CAFÉ 中文字 good.", " [MASK] [SEP]a <new>  the\tthe\u200b\n", "", "İı ÅßE"]


def bert_json() -> str:
    """A tokenizer.json that lowercases, truncates and pads, as sentence encoders have it."""
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    around = [("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=around
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([word for word in WORDS if word.startswith("[") and word != "[unused0]"])
    backend.enable_truncation(12)
    backend.enable_padding(length=12)
    return backend.to_str()


def roberta_files(directory: Path) -> dict[str, str]:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.model.save(str(directory))
    return {name: (directory / name).read_text() for name in ("vocab.json", "merges.txt")}


VOCAB = {"vocab.txt": "\n".join(WORDS) + "\n"}
NEW = {"added_tokens.json": json.dumps({"<new>": len(WORDS)})}
JSON = {"tokenizer.json": bert_json()}
BERT = {
    "vocabulary": VOCAB,
    "windows line ends": {"vocab.txt": VOCAB["vocab.txt"].replace("\n", "\r\n")},
    "cased": VOCAB | {"tokenizer_config.json": '{"do_lower_case": false}'},
    "accents": VOCAB | {"tokenizer_config.json": '{"strip_accents": false, "tokenize_chinese_chars": false}'},
    "hub": VOCAB | JSON | {"tokenizer_config.json": '{"do_lower_case": true, "model_max_length": 512}'},
    "tokenizer.json": JSON,
    "cased beside a lowercasing tokenizer.json": JSON | {"tokenizer_config.json": '{"do_lower_case": false}'},
    "class": VOCAB | {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer", "do_lower_case": false}'},
    "bare class": JSON | {"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
    "special tokens": VOCAB
    | {"special_tokens_map.json": '{"cls_token": "[unused0]", "unk_token": {"content": "[UNK]"}}'},
    "added": VOCAB | NEW,
    "added and special": VOCAB | NEW | {"special_tokens_map.json": '{"additional_special_tokens": ["<new>"]}'},
}
ROBERTA = {
    "vocabulary and merges": {},
    "space before": {"tokenizer_config.json": '{"add_prefix_space": true}'},
    "special tokens": {"special_tokens_map.json": '{"mask_token": {"content": "<mask>", "lstrip": true}}'},
}


def checkpoint(directory: Path, files: dict[str, str], family: str = "bert") -> Path:
    sizes = {"vocab_size": 340, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 42}
    if family == "bert":
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(directory)
    else:
        RobertaForSequenceClassification(RobertaConfig(**sizes)).save_pretrained(directory)
        files = roberta_files(directory) | files
    for name, text in files.items():
        (directory / name).write_bytes(text.encode())
    return directory


LAYOUTS = [("bert", files) for files in BERT.values()] + [("roberta", files) for files in ROBERTA.values()]


@pytest.mark.parametrize(("family", "files"), LAYOUTS, ids=[*BERT, *(f"roberta {name}" for name in ROBERTA)])
def test_ids_are_those_of_the_source(tmp_path, family, files):
    source = AutoTokenizer.from_pretrained(checkpoint(tmp_path / "source", files, family))
    assert main([str(tmp_path / "source"), str(tmp_path / "converted")]) == 0
    loaded = load_checkpoint(tmp_path / "converted").tokenizer
    auto = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert auto.model_max_length <= load_checkpoint(tmp_path / "converted").model.config.usable_positions

    @settings(max_examples=25, deadline=None)
    @given(st.text(st.sampled_from(LETTERS + " \n\t<>[]") | st.characters(codec="utf-8"), max_size=40))
    def same(text):
        expected = source(text)["input_ids"]
        assert auto(text)["input_ids"] == expected
        # As the tasks use it: without the tokens around a text, which they add.
        assert loaded.backend_tokenizer.encode(text, add_special_tokens=False).ids == expected[1:-1]

    same()
    for text in TEXTS:
        assert auto(text)["input_ids"] == loaded(text)["input_ids"] == source(text)["input_ids"]
        assert auto(text, TEXTS[0])["input_ids"] == source(text, TEXTS[0])["input_ids"]


def test_a_byte_order_mark_is_no_content(tmp_path):
    checkpoint(tmp_path / "source", BERT["cased"])
    expected = AutoTokenizer.from_pretrained(tmp_path / "source")(TEXTS)["input_ids"]
    config = tmp_path / "source/tokenizer_config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert main([str(tmp_path / "source"), str(tmp_path / "converted")]) == 0
    assert load_checkpoint(tmp_path / "converted").tokenizer(TEXTS)["input_ids"] == expected


def test_longer_position_tables_take_longer_texts(tmp_path):
    checkpoint(tmp_path / "source", BERT["hub"] | {"tokenizer_config.json": '{"model_max_length": 42}'})
    assert main([str(tmp_path / "source"), str(tmp_path / "longer"), "--max-positions", "60"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "longer").model_max_length == 60


def test_a_checkpoint_without_a_tokenizer_is_converted_and_said_to_have_none(tmp_path, capsys):
    checkpoint(tmp_path / "source", {"tokenizer_config.json": "{}"})
    assert main([str(tmp_path / "source"), str(tmp_path / "converted")]) == 0
    assert "has no tokenizer" in capsys.readouterr().out


BROKEN = {
    "no JSON": ({"tokenizer.json": "{"}, "its tokenizer cannot be read: "),
    "no mapping": (VOCAB | {"tokenizer_config.json": "[]"}, "must hold a mapping"),
    "a path": (JSON | {"tokenizer_config.json": '{"vocab": "/etc/passwd"}'}, "names files of its own"),
    "another family's": ({"vocab.json": "{}"}, r"BertTokenizer needs tokenizer\.json or vocab\.txt"),
    "too many words": ({"vocab.txt": "\n".join([*WORDS, *map(str, range(10_000, 10_400))])}, "has 4.. tokens"),
}


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN)
def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_line(tmp_path, files, message):
    checkpoint(tmp_path, files)
    config = TRBertConfig(vocab_size=340, hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_tokenizer(tmp_path, config)
    assert "\n" not in str(refused.value)


def test_a_vocabulary_without_merges_is_refused(tmp_path):
    checkpoint(tmp_path, {}, "roberta")
    (tmp_path / "merges.txt").unlink()
    config = TRBertConfig(
        vocab_size=340, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, backbone="roberta"
    )
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read: .*merges"):
        read_tokenizer(tmp_path, config)
