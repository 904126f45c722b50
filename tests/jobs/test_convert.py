"""The convert command never destroys what it reads, nor another model."""

import contextlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from jobs.convert import _written_to, main
from pipeline.errors import UsageError
from tests.conftest import TINY, tiny_tokenizer
from trbert_model.checkpoints.files import model_digest
from trbert_model.checkpoints.loading import load_checkpoint


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def bert(tmp_path) -> Path:
    BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


SPELLINGS = {
    "as it is": lambda directory: str(directory),
    "with a slash": lambda directory: f"{directory}/",
    "relative": lambda directory: os.path.relpath(directory),
    "through its parent": lambda directory: f"{directory}/../{directory.name}",
    "a link": lambda directory: _linked(directory),
    "a URI": lambda directory: f"file://{directory}",
}


def _linked(directory: Path) -> str:
    link = directory.parent / "link"
    link.symlink_to(directory)
    return str(link)


@pytest.mark.parametrize("of_a_trbert", [False, True])
@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_a_checkpoint_is_not_converted_onto_itself(spelled, of_a_trbert, bert, model_directory, tmp_path):
    source = Path(shutil.copytree(model_directory, tmp_path / "trbert")) if of_a_trbert else bert
    before = contents(source)
    with pytest.raises(UsageError, match="the model would replace"):
        main([str(source), spelled(source)])
    assert contents(source) == before


@pytest.mark.parametrize("inside", ["the source", "the target"])
def test_one_directory_inside_the_other_harms_neither(inside, bert):
    source = bert
    target = bert / "converted"
    if inside == "the target":
        target = bert.parent
    before = contents(source)
    assert main([str(source), str(target)]) == 0
    assert contents(source) == before
    assert load_checkpoint(target).digest == model_digest(target)
    assert not list(target.glob(".trbert-*"))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_the_source_in_the_target_are_replaced(link, model_directory, tmp_path):
    """As hub caches have their files: writing into them would change the source."""
    (tmp_path / "target").mkdir()
    source = Path(shutil.copytree(model_directory, tmp_path / "source"))
    before = contents(source)
    for name in before:
        link(source / name, tmp_path / "target" / name)
    assert main([str(source), str(tmp_path / "target"), "--reduction-layers", "0,3"]) == 0
    assert contents(source) == before
    assert load_checkpoint(tmp_path / "target").model.config.reduction_layers == [0, 3]


def test_another_checkpoint_is_not_replaced(bert, model_directory):
    before = contents(bert)
    with pytest.raises(UsageError, match="there is another checkpoint"):
        main([str(model_directory), str(bert)])
    assert contents(bert) == before


def test_an_empty_place_is_not_the_working_directory(bert, tmp_path, monkeypatch):
    """As from a shell's variable that is not set."""
    monkeypatch.chdir(tmp_path)
    for places in ([str(bert), ""], ["", "model"]):
        with pytest.raises(UsageError, match="must not be empty"):
            main(places)
    assert os.listdir(tmp_path) == ["bert"]


def test_the_source_may_be_a_local_uri(bert, tmp_path):
    assert main([f"file://{bert}", f"file://{tmp_path}/target"]) == 0
    assert load_checkpoint(tmp_path / "target").model.config.num_labels == 3


def test_the_adapter_is_not_replaced(bert, tmp_path):
    with pytest.raises(UsageError, match="the model would replace"):
        main([str(bert), str(tmp_path / "adapter"), "--adapter", str(tmp_path / "adapter")])


def test_converted_again_nothing_is_left_of_the_first_time(bert, tmp_path):
    target = tmp_path / "target"
    assert main([str(bert), str(target)]) == 0
    expected = contents(target)
    (target / "added_tokens.json").write_text('{"<new>": 1}')
    (target / "vocab.txt").write_text("another\n")
    (target / "notes.md").write_text("mine")
    assert main([str(bert), str(target)]) == 0
    assert contents(target) == expected | {"notes.md": b"mine"}


def test_a_model_that_is_converted_elsewhere_becomes_one_in_the_end(tmp_path):
    """The files go to the store one by one; without config.json they are no model."""

    class Store:
        is_local, done = False, []

        def errors(self, action):
            return contextlib.nullcontext()

        def delete(self, names):
            self.done.extend(sorted(names))

        def write(self, name, data):
            self.done.append(name)

    with _written_to(Store(), replaced=("vocab.txt", "added_tokens.json")) as directory:
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            (directory / name).write_text(name)
    assert Store.done == ["added_tokens.json", "model.safetensors", "vocab.txt", "config.json"]
    with pytest.raises(UsageError, match=r"no config\.json there"):
        main([f"zip://nothing::{archive(tmp_path)}", str(tmp_path / "out")])


def archive(directory):
    with zipfile.ZipFile(directory / "a.zip", "w") as file:
        file.writestr("nothing/x", "")
    return directory / "a.zip"
