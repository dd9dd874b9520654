"""The page: everything is in it, nothing comes from elsewhere, and no file can put code into it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_run import start

from experiments import report
from utils import UserError


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_directory(run_arguments: list[str], tmp_path: Path) -> Path:
    start(run_arguments, "num_epochs=3")
    return tmp_path / "checkpoints" / "run"


def write_page(paths: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Page:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, paths), "--out", str(out), *more])
    report.main()
    return Page(out.read_text(encoding="utf-8"))


def test_a_page_of_a_run_and_of_results_stands_alone(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "table.md").write_text(
        "| a | b |\n|---|---|\n| 1 | <script>alert(1)</script> |\n\n![x](http://elsewhere/x.png)\n"
    )
    (results / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (results / "summary.json").write_text('{"accuracy": 0.5}')
    page = write_page([run_directory, results], tmp_path / "report.html", monkeypatch, "--questions", "2")
    assert page.open == []  # every tag is closed
    kinds = [tag for tag, _ in page.tags]
    assert "script" not in kinds
    for tag, attributes in page.tags:
        for key in ("src", "href"):
            assert re.match(r"#part\d|data:image/", attributes.get(key, "#part1")), (tag, attributes)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3  # curves, what the layers say, and that of the results; these questions have no graph
    assert all(len(image["alt"]) > 10 for image in images)
    assert kinds.count("section") == 2
    assert page.text.count("gold: ") == 2
    assert "thought 1: " in page.text
    for word in ("thought_map: identity", "accuracy: 0.5", "val_loss", "<script>alert(1)</script>"):  # the last as text
        assert word in page.text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [attributes for _, attributes in page.tags]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync")


@pytest.fixture
def browser() -> Iterator[Any]:
    if BROWSER is None or shutil.which("chromedriver") is None:
        pytest.skip("needs Chromium or Chrome, and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in QUIET:
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_a_browser_shows_the_page_on_a_phone_in_the_dark_and_in_print(
    browser: Any, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    cells = [f"column {i}" for i in range(40)]
    (results / "table.md").write_text("\n".join(f"| {' | '.join(row)} |" for row in (cells, ["---"] * 40, cells)) + "\n")
    (results / "table.txt").write_text("a line of " + "many " * 60 + "words\n")
    (results / "summary.json").write_text('{"accuracy": 0.5}')
    write_page([run_directory, results], tmp_path / "report.html", monkeypatch)
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get((tmp_path / "report.html").as_uri())
    shown = "return [...document.querySelectorAll('section')].map(each => each.getBoundingClientRect().height > 100)"
    assert browser.execute_script(shown) == [True, True]
    assert all(browser.execute_script("return [...document.images].map(each => each.complete && each.naturalWidth > 0)"))
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390  # tables scroll in their own boxes
    assert browser.execute_script("return document.querySelector('#part2 .wide').scrollWidth") > 1000

    background = "return getComputedStyle(document.documentElement).backgroundColor + getComputedStyle(document.body).color"
    light = browser.execute_script(background)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert browser.execute_script(background) != light

    inside = "return document.querySelector('.settings pre').checkVisibility()"
    assert not browser.execute_script(inside)  # folded on the screen, open in print
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(inside)
    assert browser.get_log("browser") == []


def test_what_is_neither_a_run_nor_results_is_said_and_nothing_is_written(run_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: neither a run"):
        report.write_page([run_directory, tmp_path / "empty"], tmp_path / "report.html", 0)
    assert not (tmp_path / "report.html").exists()


def test_wandb_gets_the_page(run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc: nobody has logged in, so the page is kept offline
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    page = tmp_path / "page.html"
    monkeypatch.setattr(
        "sys.argv", ["report", str(run_directory), "--out", str(page), "--questions", "0", "--wandb", "coconut"]
    )
    report.main()
    [kept] = (tmp_path / "wandb").glob("offline-run-*/files/media/html/*.html")
    assert page.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8")


def test_a_watched_run_is_written_again_when_its_metrics_have_grown(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    looks = iter([0, 1, 0])  # nothing new, a new epoch, nothing new

    def sleep(seconds: float) -> None:
        kind = next(looks, None)
        if kind is None:
            raise KeyboardInterrupt
        if kind:
            metrics = run_directory / "metrics.jsonl"
            metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")

    monkeypatch.setattr(report.time, "sleep", sleep)
    monkeypatch.setattr(report, "write_page", lambda paths, out, questions, logged: written.append(out))
    with pytest.raises(KeyboardInterrupt):
        report.watch([run_directory], tmp_path / "page.html", 0)
    assert written == [tmp_path / "page.html"] * 2


def test_a_run_in_its_first_epoch_is_waited_for(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = run_directory / "metrics.jsonl"
    whole, page = metrics.read_text(), tmp_path / "page.html"
    metrics.write_text('{"kind": "step", "step": 1}\n')

    def sleep(seconds: float) -> None:
        if page.exists():
            raise KeyboardInterrupt
        assert "nothing to show yet" in caplog.text
        metrics.write_text(whole)

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        report.watch([run_directory], page, 0)
    with pytest.raises(UserError, match="nowhere"):
        report.watch([run_directory.with_name("nowhere")], page, 0)
