"""Pages in a real browser: in dark and light, without errors or requests, by keyboard, and named for screen readers."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import trbert_model
from pipeline.page import page
from tests.pipeline.stages import texts, write_shard
from tests.pipeline.test_page import report_of, scored

ROOT = Path(__file__).parent.parent.parent

# Texts whose colour is less than 4.5 times as light or dark as what is behind them (WCAG 2.2, 1.4.3).
CONTRAST = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const over = (color, below) => {
        canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = rgb => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], .05);
    const bad = [];
    for (const element of document.querySelectorAll("body :not(title)")) {
        if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
        const above = [];
        for (let each = element; each; each = each.parentElement) above.unshift(getComputedStyle(each).backgroundColor);
        const behind = above.reduce((below, color) => over(color, below), [255, 255, 255]);
        const style = getComputedStyle(element);
        const text = over(element.closest("svg") ? style.fill : style.color, behind);
        const [dark, bright] = [light(behind), light(text)].sort((a, b) => a - b);
        if (bright / dark < 4.5) bad.push([element.outerHTML.slice(0, 80), text, behind]);
    }
    return bad;
})()"""

# What a screen reader would find without a name, and headings that skip a level.
UNNAMED = """(() => {
    const text = element => (element && element.textContent || "").trim();
    const named = element => text(document.getElementById(element.getAttribute("aria-labelledby")));
    const bad = [];
    for (const svg of document.querySelectorAll("svg"))
        if (svg.getAttribute("role") !== "img" || !named(svg)) bad.push(svg.id);
    for (const table of document.querySelectorAll("table"))
        if (!text(table.caption) || table.querySelector("th:not([scope])")) bad.push(text(table));
    for (const input of document.querySelectorAll("input"))
        if (!text(input.closest("label"))) bad.push(input.className);
    for (const part of document.querySelectorAll("section, [role=group]")) if (!named(part)) bad.push(part.outerHTML);
    for (const link of document.querySelectorAll("a, summary")) if (!text(link)) bad.push(link.outerHTML);
    let last = 0;
    for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
        const level = Number(heading.tagName[1]);
        if (level > last + 1) bad.push(text(heading));
        last = level;
    }
    if (!document.documentElement.lang || document.querySelectorAll("main").length !== 1) bad.push("document");
    return bad;
})()"""


@pytest.fixture(scope="module", autouse=True)
def browser():
    """A real Chromium, as a Python package: an extra, for there is none for some machines (musl, 32 bits).

    `make test` installs it where there is one. Nothing but these tests needs it, so the others run without. Where the
    variable CI is set, its lack is an error.
    """
    try:
        importlib.import_module("PySide6.QtWebEngineCore")
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(
            f"pages need a browser, and PySide6-WebEngine is not here ({error}): make .venv/browser installs it"
        )


@pytest.fixture(scope="module")
def pages(tmp_path_factory, model_directory, answering_model):
    directory = tmp_path_factory.mktemp("pages")
    write_shard(directory / "in/a.parquet", {"id": range(40), "text": [None, *texts(39)]})
    _, statistics = scored(directory, model_directory, samples=10.0)
    report = report_of(statistics) | {"warnings": ["label shares have moved"]}
    earlier = [report | {"run": f"202610{day:02d}T000000Z-a"} for day in range(1, 30)]
    context = "the good news of a game and fine sport of the bank " * 5
    explanations = {
        "text": trbert_model.explain(model_directory, context),
        "question": trbert_model.explain(answering_model, "good news", context),
    }
    for name, explanation in explanations.items():
        (directory / f"{name}.html").write_text(explanation.to_html(), encoding="utf-8")
    (directory / "run.html").write_text(page(report, earlier, statistics.highlights.samples), encoding="utf-8")
    return directory


def seen(pages, name, picture, *options):
    command = [sys.executable, "-m", "tests.look.browser", pages / f"{name}.html", picture, "--height", "900", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["text", "question", "run"])
@pytest.mark.parametrize("mode", [[], ["--dark"]], ids=["light", "dark"])
def test_a_page_can_be_read(pages, name, mode, tmp_path):
    found = seen(pages, name, tmp_path / "page.png", *mode, "--script", f"[{CONTRAST}, {UNNAMED}]")
    assert found == {"loaded": True, "console": [], "requests": [], "value": [[], []]}
    picture = Image.open(tmp_path / "page.png").convert("L")
    levels = picture.histogram()
    assert sum(count > 0 for count in levels) > 30  # not empty: letters have many shades
    background = max(range(256), key=levels.__getitem__)
    assert (background < 60) == bool(mode)
    assert (background > 200) != bool(mode)


def test_the_keyboard_hides_the_tokens_of_fewer_layers(pages, tmp_path):
    script = """[...document.querySelectorAll(".text .run")].map(run =>
        [run.className, getComputedStyle(run).visibility])"""
    before = seen(pages, "text", tmp_path / "before.png", "--script", script)["value"]
    after = seen(pages, "text", tmp_path / "after.png", "--keys", "Tab", "Down", "Down", "--script", script)["value"]
    assert {visibility for _, visibility in before} == {"visible"}
    shown = {name for name, visibility in after if visibility == "visible"}
    assert shown == {"run l4 survivor"}
    assert len({name for name, _ in after}) == 3


def test_the_keyboard_opens_the_numbers_of_a_chart(pages, tmp_path):
    script, links = "document.querySelector('details').open", 7
    keys = [*["Tab"] * (links + 2), "Space"]  # the links, the table of the outcome, the first chart's numbers
    found = seen(pages, "run", tmp_path / "open.png", "--keys", *keys, "--script", script)
    assert found["value"] is True
