"""Options from a call, a YAML file and the command line are the same options."""

from dataclasses import dataclass

import pytest

from trbert_model import ConfigurationError
from trbert_model.options import option, parse_options


@dataclass(frozen=True)
class Some:
    name: str = option("", "a name")
    size: int | None = option(None, "a size")
    rate: float = option(0.5, "a rate")
    fast: bool = option(False, "a switch")
    columns: tuple[str, ...] = option((), "some columns")
    layers: tuple[int, ...] | None = option(None, "some layers")
    place: str | None = option(None, "a path", path=True)


FULL = Some("x", 3, 0.25, True, ("a", "b"), (0, 2))


def test_three_ways_to_the_same_options(tmp_path):
    arguments = "--name x --size 3 --rate 0.25 --fast --columns a,b --layers 0,2".split()
    assert parse_options(Some, arguments, "") == FULL
    file = tmp_path / "options.yaml"
    file.write_text("name: x\nsize: 3\nrate: 0.25\nfast: true\ncolumns: [a, b]\nlayers: [0, 2]\n")
    assert parse_options(Some, ["--config", str(file)], "") == FULL


def test_a_path_may_begin_at_home_in_a_file_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "options.yaml").write_text("name: ~/x\nplace: ~/é/中\n", "utf-8")
    home = str(tmp_path)
    assert parse_options(Some, ["--config", "~/options.yaml"], "") == Some("~/x", place=f"{home}/é/中")
    assert parse_options(Some, ["--place=~"], "").place == home
    assert parse_options(Some, ["--place", "s3://~/a"], "").place == "s3://~/a"


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("name: x\nfast: true\nrate: 1\n")
    parsed = parse_options(Some, ["--config", str(file), "--no-fast", "--name", "y"], "")
    assert parsed == Some(name="y", rate=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", r"unknown options \['colour'\]"),
        ("size: big", "size must be a int, not 'big'"),
        ("size: true", "size must be a int, not True"),
        ("columns: a", "columns must be a list, not 'a'"),
        ("layers: [0, x]", r"layers\[1\] must be a int"),
        ("- a list", "must be a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_option(tmp_path, text, message):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        parse_options(Some, ["--config", str(file)], "")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: cannot be read"):
        parse_options(Some, ["--config", str(tmp_path / "nowhere.yaml")], "")


def test_null_is_only_for_optional_options(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("size: null")
    assert parse_options(Some, ["--config", str(file)], "").size is None
    file.write_text("rate: null")
    with pytest.raises(ConfigurationError, match="rate must be a float"):
        parse_options(Some, ["--config", str(file)], "")


def test_unknown_arguments_exit_with_2():
    with pytest.raises(SystemExit) as stopped:
        parse_options(Some, ["--colour", "red"], "")
    assert stopped.value.code == 2
