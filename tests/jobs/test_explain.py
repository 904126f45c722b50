"""jobs/explain.py: a text or a file in, a page out, and one line for what does not fit."""

import pytest

from jobs.command import run_command
from jobs.explain import main


def test_a_text_and_a_file_with_it_say_the_same(tmp_path, model_directory, answering_model, tagging_model, capsys):
    (tmp_path / "text.txt").write_text("the good news of a game", encoding="utf-8")
    page = tmp_path / "page.html"
    assert main(["the good news of a game", "--model", str(model_directory)]) == 0
    of_text = capsys.readouterr().out
    assert main([str(tmp_path / "text.txt"), "--model", str(model_directory), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{of_text}\nAlso in {page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["good news", "--context", str(tmp_path / "text.txt"), "--model", str(answering_model)]) == 0
    assert "context ([computed by all layers]):" in capsys.readouterr().out
    assert main([str(tmp_path / "text.txt"), "--model", str(tagging_model)]) == 0
    assert "\nfound " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good"], "model is required"),
        (["--model", "m"], "text is required"),
        (["missing.txt", "--model", "m"], "missing.txt: no such file"),
        (["bytes", "--model", "m"], "bytes: not UTF-8 at byte 4"),
        (["good", "--model", "no-model"], "no-model"),
        (["good", "--context", "fine", "--model", "MODEL"], "it needs text, nothing else"),
        (["good", "--thresholds", "0.5", "--model", "MODEL"], "must be one for each"),
        (["good", "--html", "no/page.html", "--model", "MODEL"], "no/page.html: cannot be written"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message, tmp_path, model_directory, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"good\xff")
    given = [str(model_directory) if argument == "MODEL" else argument for argument in arguments]
    assert run_command(lambda: main(given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
