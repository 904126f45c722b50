"""Saved models: a digest names what is loaded, by everybody who loads it; nothing else in the directory matters."""

import json
import os
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import SPECIAL, WORDS, tiny_classifier, tiny_tokenizer
from trbert_model import CheckpointError
from trbert_model.checkpoints import loading
from trbert_model.checkpoints.conversion import convert_checkpoint
from trbert_model.checkpoints.files import INDEX, WEIGHTS, model_digest, model_files
from trbert_model.checkpoints.loading import load_checkpoint, load_model


@pytest.fixture
def model(model_directory, tmp_path) -> Path:
    """A copy of the model to do things to."""
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


def write(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def change(path: Path, **entries: object) -> None:
    """Entries of a JSON file set, or the file made."""
    write(path, (json.loads(path.read_text()) if path.exists() else {}) | entries)


def other_weights(path: Path, seed: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tiny_classifier(seed).state_dict(), path, metadata={"format": "pt"})


def swap_words(directory: Path, name: str = "tokenizer.json") -> None:
    """A tokenizer that takes good for bad."""
    values = json.loads((directory / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    write(directory / name, values)


def result(directory: Path) -> tuple[str, list]:
    """The digest, and what a model gives: its logits for a text as its tokenizer reads it."""
    model, tokenizer, digest = load_checkpoint(directory)
    ids = tokenizer("good bad news")["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor(ids), cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32)).logits
    return digest, [ids, logits.tolist()]


def outcome(directory: Path) -> object:
    """The result, or the error in one line."""
    try:
        return result(directory)
    except CheckpointError as error:
        return re.fullmatch(f"{directory}: .+", str(error))[0]


def use_index(model: Path, *names: object) -> None:
    """Weights that an index names, in the place of the one file."""
    (model / WEIGHTS).unlink()
    change(model / INDEX, metadata={}, weight_map={f"weight {i}": name for i, name in enumerate(names)})


# ---- what counts ----


def test_the_digest_of_a_plain_directory_is_what_it_always_was(tmp_path):
    """Outputs and calibration tables are bound to it."""
    files = {"config.json": "{}", "tokenizer.json": '{"a": 1}', WEIGHTS: "weights", "vocab.txt": "the\n"}
    beside = {"training.json": "{}", "calibration.json": "{}", "notes.md": "x", "sub/more.json": "{}"}
    for name, text in (files | beside).items():
        write(tmp_path / name, text)
    assert model_files(tmp_path) == sorted(files)
    assert model_digest(tmp_path) == "29be4be768be5e8cbff4b4d3f60e33f959d0b8d1478cf6725a29ac9c7b5ea4e8"


def test_what_is_loaded_has_the_directorys_digest(model):
    assert load_checkpoint(model).digest == model_digest(model)


def test_weights_in_a_folder_that_the_index_names_count(model):
    use_index(model, "shards/1.safetensors", "./shards//2.safetensors")
    tensors = tiny_classifier(1).state_dict()
    names = sorted(tensors)
    (model / "shards").mkdir()
    save_file({name: tensors[name] for name in names[::2]}, model / "shards/1.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, model / "shards/2.safetensors")
    write(model / "shards/config.json", {})
    assert [name for name in model_files(model) if "/" in name] == ["shards/1.safetensors", "shards/2.safetensors"]
    loaded, _, digest = load_checkpoint(model)
    torch.testing.assert_close(loaded.state_dict(), tensors, rtol=0, atol=0)

    tensors[names[0]] += 1
    save_file({name: tensors[name] for name in names[::2]}, model / "shards/1.safetensors")
    assert load_checkpoint(model).digest == model_digest(model) != digest


BAD_INDEXES = {
    "above": ["../elsewhere/w.safetensors"],
    "above by a detour": ["shards/../../elsewhere/w.safetensors"],
    "absolute": ["{tmp}/elsewhere/w.safetensors"],
    "not there": ["shards/missing.safetensors"],
    "a folder": ["."],
    "a name with a NUL": ["w\0.safetensors"],
    "no name": [""],
    "a number": [7],
    "null": [None],
    "a list": [["w.safetensors"]],
    "pickled": ["pytorch_model.bin"],
}
DAMAGED_INDEXES = ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000]


@pytest.mark.parametrize("names", [pytest.param(names, id=name) for name, names in BAD_INDEXES.items()])
def test_an_index_that_names_anything_else_than_weights_inside_is_refused(names, model, tmp_path):
    other_weights(tmp_path / "elsewhere/w.safetensors")
    use_index(model, *[name.format(tmp=tmp_path) if isinstance(name, str) else name for name in names])
    for refuse in (model_files, model_digest, load_model, convert_checkpoint):
        with pytest.raises(CheckpointError, match=f"^{model}: {INDEX} names ") as refused:
            refuse(model)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", DAMAGED_INDEXES)
def test_a_damaged_index_is_named(text, model):
    use_index(model)
    write(model / INDEX, text)
    for refuse in (model_files, load_model):
        with pytest.raises(CheckpointError, match=f"^{model}: {INDEX} is damaged") as refused:
            refuse(model)
        assert "\n" not in str(refused.value)


def test_links_are_followed(model, model_directory, tmp_path):
    """The model hub's cache is links to blobs elsewhere."""
    for number, path in enumerate(sorted(model.iterdir())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, model))
    (model / "dangling.json").symlink_to("nowhere")
    assert model_digest(model) == model_digest(model_directory)
    assert result(model) == result(model_directory)


def test_a_name_that_is_not_utf8_counts_like_another(model):
    before = model_digest(model)
    Path(os.fsdecode(os.fsencode(model) + b"/\xff.json")).write_text("{}")
    assert load_checkpoint(model).digest == model_digest(model) != before


# ---- nothing else is read ----


def tokenizer_entry(name: str, **entries: str | list[str]):
    def point(model: Path, elsewhere: Path) -> None:
        change(model / name, **json.loads(json.dumps(entries).replace("ELSEWHERE", str(elsewhere))))

    return point


def without_tokenizer_file(point):
    def both(model: Path, elsewhere: Path) -> None:
        (model / "tokenizer.json").unlink()
        change(model / "tokenizer_config.json", tokenizer_class="BertTokenizer")
        point(model, elsewhere)

    return both


def explicit_weights(model: Path, elsewhere: Path) -> None:
    (model / "sub").symlink_to(elsewhere)
    change(model / "config.json", transformers_weights="sub/w.safetensors")


def adapter(model: Path, elsewhere: Path) -> None:
    change(model / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(elsewhere), r=2)


def adapter_alone(model: Path, elsewhere: Path) -> None:
    (model / WEIGHTS).unlink()
    adapter(model, elsewhere)


def link_of_another_kind(model: Path, elsewhere: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").symlink_to(elsewhere / "tokenizer.json")


MAP, CONFIG = "special_tokens_map.json", "tokenizer_config.json"
POINTERS = {
    "weights that config.json names": explicit_weights,
    "an adapter beside the weights": adapter,
    "an adapter": adapter_alone,
    "a tokenizer file": tokenizer_entry(CONFIG, tokenizer_file="ELSEWHERE/tokenizer.json"),
    "a tokenizer file in the map": tokenizer_entry(MAP, tokenizer_file="ELSEWHERE/tokenizer.json"),
    "versions": tokenizer_entry(CONFIG, fast_tokenizer_files=["ELSEWHERE/tokenizer.1.0.json"]),
    "versions above": tokenizer_entry(CONFIG, fast_tokenizer_files=["../elsewhere/tokenizer.1.0.json"]),
    "a vocabulary": without_tokenizer_file(tokenizer_entry(CONFIG, vocab="ELSEWHERE/vocab.txt")),
    "a vocabulary in the map": without_tokenizer_file(tokenizer_entry(MAP, vocab="ELSEWHERE/vocab.txt")),
    "an argument": without_tokenizer_file(tokenizer_entry(CONFIG, init_inputs=["ELSEWHERE/vocab.txt"])),
    "a vocabulary file": without_tokenizer_file(tokenizer_entry(CONFIG, vocab_file="ELSEWHERE/vocab.txt")),
    "a vocabulary file in the map": without_tokenizer_file(tokenizer_entry(MAP, vocab_file="ELSEWHERE/vocab.txt")),
    "a file that does not count": link_of_another_kind,
}


@pytest.mark.parametrize("point", [pytest.param(point, id=name) for name, point in POINTERS.items()])
def test_files_elsewhere_change_nothing_under_a_digest(point, model, tmp_path):
    """Whatever a model's files point to: it is refused by name, or not read."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    (elsewhere / WEIGHTS).rename(elsewhere / "w.safetensors")
    shutil.copy(elsewhere / "tokenizer.json", elsewhere / "tokenizer.1.0.json")
    write(elsewhere / "vocab.txt", "\n".join([*SPECIAL, *WORDS]))
    point(model, elsewhere)
    before = outcome(model)
    other_weights(elsewhere / "w.safetensors")
    swap_words(elsewhere)
    swap_words(elsewhere, "tokenizer.1.0.json")
    write(elsewhere / "vocab.txt", "\n".join([*SPECIAL, *reversed(WORDS)]))
    assert outcome(model) == before


def test_adapters_and_weights_by_another_name_are_refused_by_name(model, tmp_path):
    explicit_weights(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"transformers_weights: 'sub/w\.safetensors'"):
        load_model(model)
    adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*jobs/convert\.py --adapter"):
        load_model(model)


def test_paths_that_older_versions_left_behind_do_no_harm(model, model_directory):
    change(
        model / CONFIG, tokenizer_file="/root/cache/x", special_tokens_map_file=None, init_inputs=[], vocab_file="/x"
    )
    assert result(model)[1] == result(model_directory)[1]


# ---- files that change ----


def test_overwriting_its_files_changes_nothing_in_a_loaded_model(model):
    loaded, _ = load_model(model)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    size = (model / WEIGHTS).stat().st_size
    with (model / WEIGHTS).open("r+b") as file:  # as cp does it: the same file, other contents
        file.write(b"\0" * size)
    torch.testing.assert_close(loaded.state_dict(), before, rtol=0, atol=0)


def another_thresholds(model: Path) -> None:
    change(model / "config.json", selector_thresholds=[0.1, 0.1])


@pytest.mark.parametrize(
    "happening",
    [
        pytest.param(lambda model: other_weights(model / WEIGHTS), id="other weights"),
        pytest.param(another_thresholds, id="another configuration"),
        pytest.param(
            lambda model: os.replace(shutil.copy(model / WEIGHTS, model / "new"), model / WEIGHTS), id="moved"
        ),
        pytest.param(lambda model: (model / "tokenizer_config.json").unlink(), id="a file less"),
        pytest.param(lambda model: write(model / "added_tokens.json", {}), id="a file more"),
        pytest.param(lambda model: shutil.rmtree(model), id="all gone"),
    ],
)
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("trbert_model.checkpoints.files._digest", id="digest"),
        pytest.param("trbert_model.checkpoints.loading._made_of", id="made"),
        pytest.param("safetensors.torch.load_file", id="weights"),
    ],
)
def test_a_directory_that_changes_while_it_is_loaded_is_refused(moment, happening, model, monkeypatch):
    original, happened = pkgutil.resolve_name(moment), []

    def then(*args, **kwargs):
        value = original(*args, **kwargs)
        happened.append(happening(model))
        return value

    monkeypatch.setattr(moment, then)
    with pytest.raises(CheckpointError, match=f"^{model}: ") as refused:
        load_model(model)
    assert happened
    assert "\n" not in str(refused.value)


def test_files_about_the_model_may_change_meanwhile(model, monkeypatch):
    original = loading._made_of

    def then(*args):
        write(model / "calibration.json", {})
        return original(*args)

    monkeypatch.setattr(loading, "_made_of", then)
    load_model(model)


# ---- what is in the files ----


def test_weights_of_any_precision_are_loaded_in_full(model):
    tensors = {name: value.half() for name, value in load_file(model / WEIGHTS).items()}
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    loaded, _ = load_model(model)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(loaded.classifier.weight.half(), tensors["classifier.weight"], rtol=0, atol=0)


def test_a_panic_in_rust_is_an_error_like_another(model):
    values = json.loads((model / "tokenizer.json").read_text())
    write(model / "tokenizer.json", values | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}})
    with pytest.raises(CheckpointError, match=f"^{model}: cannot be loaded: Precompiled") as refused:
        load_model(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_whoever_ends_the_process_is_let_through(ending, model, monkeypatch):
    def end(*args, **kwargs):
        raise ending

    monkeypatch.setattr("trbert_model.checkpoints.loading.AutoTokenizer.from_pretrained", end)
    with pytest.raises(ending):
        load_model(model)


def test_errors_speak_of_the_directory_and_leave_nothing_behind(model, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    load_model(model)
    write(model / "config.json", "{")
    with pytest.raises(CheckpointError, match=f"'{model}/config.json' is not a valid JSON file"):
        load_model(model)
    assert os.listdir(tmp_path / "tmp") == []


def test_a_model_knows_where_it_came_from(model):
    loaded, tokenizer = load_model(model)
    assert loaded.config.name_or_path == tokenizer.name_or_path == str(model)
    assert tokenizer("good")["input_ids"] == tiny_tokenizer()("good")["input_ids"]


def test_weights_in_many_files_are_the_same_model(model, tmp_path):
    whole, _ = load_model(model)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len([name for name in model_files(tmp_path / "sharded") if name.endswith(".safetensors")]) > 2
    assert result(tmp_path / "sharded")[1] == result(model)[1]
