"""ScoreConfig: what is refused, and what an output is bound to."""

import pytest

from pipeline.config import ScoreConfig, identity_defaults
from pipeline.errors import UsageError
from trbert_model.errors import ConfigurationError
from trbert_model.options import parse_options

PLACES = {"input": "in", "output": "out", "model": "m"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input": ""}, "input is required"),
        ({"split_bytes": 0}, "split_bytes 0 must be at least 1"),
        ({"num_actors": 0}, "num_actors 0"),
        ({"gpus_per_actor": -1.0}, "gpus_per_actor -1.0 must not be negative"),
        ({"max_bad_rows": -1}, "max_bad_rows"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch 0"),
        ({"id_column": "row"}, r"columns \['row'\] .* named like columns of the results"),
        ({"id_column": "a", "keep_columns": ("a",)}, "named more than once"),
        ({"overflow": "cut"}, "overflow 'cut'"),
        ({"stride": -1}, "stride -1"),
        ({"finish_by": "06:00"}, "finish_by needs max_drop: how many points of accuracy"),
        ({"finish_by": "six", "max_drop": 1.0}, "finish_by 'six' must be a time such as 06:00"),
        ({"finish_by": "", "max_drop": 1.0}, "finish_by '' must be a time"),
        ({"finish_by": "3h", "max_drop": 1.0, "thresholds": (0.5,)}, "thresholds and finish_by cannot go together"),
        ({"finish_by": "3h", "max_drop": 1.0, "reduce": False}, "no_reduce and finish_by cannot go together"),
        ({"finish_by": "3h", "max_drop": 1.0, "id_column": "Thresholds_Version"}, "named like columns of the results"),
        ({"max_drop": 1.0, "speedup": 2.0}, "speedup and max_drop cannot go together"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(wrong, message):
    with pytest.raises(UsageError, match=message):
        ScoreConfig(**PLACES | wrong)


def test_the_identity_holds_what_decides_results_and_nothing_else():
    one = ScoreConfig(**PLACES, keep_columns=("a",))
    other = ScoreConfig(**PLACES, keep_columns=("a",), num_actors=3, max_tokens_per_batch=99, progress_interval=1)
    assert one.identity() == other.identity()
    assert ScoreConfig(**PLACES, overflow="truncate").identity() != ScoreConfig(**PLACES).identity()
    assert "output" not in one.identity()


def test_defaults_are_there_for_every_option_of_the_identity():
    assert set(identity_defaults()) == set(ScoreConfig(**PLACES).identity())


def test_a_time_in_yaml_without_quotes_is_refused_with_the_remedy(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("input: in\noutput: out\nmodel: m\nmax_drop: 1\nfinish_by: 22:00\n")
    with pytest.raises(ConfigurationError, match="finish_by must be a str, not 1320; put it in quotes"):
        parse_options(ScoreConfig, ["--config", str(file)], "")
    file.write_text(file.read_text().replace("22:00", '"22:00"'))
    assert parse_options(ScoreConfig, ["--config", str(file)], "").finish_by == "22:00"


def test_the_command_line_fills_it():
    arguments = "--input in --output out --model m --keep-columns a,b --no-reduce --gpus-per-actor 0".split()
    parsed = parse_options(ScoreConfig, arguments, "")
    assert parsed == ScoreConfig(**PLACES, keep_columns=("a", "b"), reduce=False, gpus_per_actor=0.0)
