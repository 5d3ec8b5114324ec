"""The page in a browser: everything is drawn, nothing is asked of the network, and it can be used without eyes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loopwright.framework.report.page.document import write_report
from tests.browser import AXE, LAPTOP, PHONE, Opened, needs_browser, open_browser

from .sample_runs import FINISHED, START, add_media, add_rows, write_run

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Pages of a run, of many, of one that failed, of an empty one, and of one with odd names and values."""
    root = tmp_path_factory.mktemp("runs")
    one = write_run(root / "one", ended=FINISHED)
    add_media(one)
    for seed in range(10):
        write_run(
            root / "ten" / f"run_{seed}",
            seed=seed,
            learning_rate=1e-3 * (seed + 1),
            ended=FINISHED,
        )
    failed = write_run(
        root / "failed", epochs=1, ended={"how": "failed", "why": "ValueError: boom"}
    )
    failure = {
        "summary": "rank 0 failed",
        "ranks": [
            {"rank": 0, "kind": "failed", "trace": "Traceback …\nValueError: boom"}
        ],
    }
    (failed / "failure.json").write_text(json.dumps(failure))
    empty = write_run(root / "empty", ended={"how": "failed", "why": "at step 0"})
    (empty / "record" / "metrics.jsonl").write_text("")
    odd = write_run(root / "odd", epochs=1, ended=FINISHED)
    rows = [{"step": step, "time": START + step, "values": {"a/b/größe λ": "NaN" if step == 7 else step ** 2,
             "always": "Infinity", "</script><b>": 1 / step}} for step in range(1, 20)]  # fmt: skip
    add_rows(
        odd,
        [
            *rows,
            {"step": 20, "values": {"single": 3.5, "constant": 1}},
            {"step": 30, "values": {"constant": 1}},
        ],
    )
    return {
        folder.name: Path(
            write_report([str(folder)], root / f"{folder.name}.html")
        ).as_uri()
        for folder in (one, root / "ten", failed, empty, odd)
    }


@pytest.mark.parametrize(
    ("name", "device", "scheme"),
    [
        *((name, LAPTOP, "light") for name in ("one", "ten", "failed", "empty", "odd")),
        *((name, LAPTOP, "dark") for name in ("one", "failed")),
        *((name, PHONE, "light") for name in ("ten", "odd")),
    ],
)
def test_every_curve_is_drawn_without_error_request_or_barrier(
    browser, pages, name: str, device: dict, scheme: str
):
    opened = Opened(browser, pages[name], **device, color_scheme=scheme)
    blank = opened.draw_all()
    wide = opened.page.evaluate("document.documentElement.scrollWidth > innerWidth")
    faults = opened.faults() if AXE.is_file() else []
    told = opened.page.inner_text("main")
    opened.context.close()
    # Infinities alone leave an empty plot, which says so.
    assert set(blank) <= {"always"}
    assert not wide, "the page is wider than the screen"
    assert faults == []
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [pages[name]]
    if name == "odd":
        assert "NaN at step 7" in told
        assert "</script><b>" in told
    if name == "empty":
        assert "No metrics were logged" in told


def test_what_one_does_with_the_page(browser, pages):
    """Sort, hide a run, change the axis, zoom, read by keyboard, show a table, change the theme."""
    opened = Opened(browser, pages["ten"], **LAPTOP, color_scheme="light")
    page = opened.page
    first = "#runs tbody tr:first-child th"
    page.click("#runs th button[data-title='val_loss']")
    lowest = page.inner_text(first)
    page.click("#runs th button[data-title='val_loss']")
    assert page.inner_text(first) != lowest
    assert page.get_attribute("#runs th[aria-sort]", "aria-sort") == "descending"
    page.click("#runs th button[data-title='learning_rate']")
    assert page.inner_text(first).strip() == "ten/run_0"
    page.click(".run >> nth=0")
    assert page.evaluate(
        "document.querySelector('.chart').chart.lines().every((line) => line.run.name !== 'ten/run_0')"
    )
    page.select_option(".controls select >> nth=-1", "epoch")
    plot = page.locator(".chart .plot").first
    plot.scroll_into_view_if_needed()
    assert "epochs" in (plot.get_attribute("aria-label") or "")
    box = page.locator(".chart .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    page.mouse.up()
    low, high = page.evaluate(
        "(({min, max}) => [min, max])(document.querySelector('.chart').chart.u.scales.x)"
    )
    assert (low, high) == (pytest.approx(2, abs=0.6), pytest.approx(4, abs=0.6))
    assert page.locator(".tip:visible").count() == 1
    page.click("text=Show all")
    plot.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(250)
    assert "epoch" in page.inner_text("#said")
    page.click(".chart header button >> nth=1")
    assert page.locator(".chart table").first.is_visible()
    page.click("[aria-label='Change between light and dark']")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert opened.said == []
    opened.context.close()


def test_a_million_rows_are_painted_within_two_seconds(browser, tmp_path: Path):
    folder = write_run(tmp_path / "long", epochs=1, ended=FINISHED)
    with (folder / "record" / "metrics.jsonl").open("w") as file:
        for step in range(1_000_000):
            value = 1e3 if step == 654_321 else (step * 7919 % 1000) / 1000
            file.write(
                f'{{"step":{step},"epoch":0,"time":{START + step},"values":{{"loss":{value}}}}}\n'
            )
    file = write_report([str(folder)])
    assert Path(file).stat().st_size < 3e6
    opened = Opened(browser, Path(file).as_uri(), **LAPTOP)
    assert opened.draw_all() == []
    painted = opened.page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    )
    highest = opened.page.evaluate(
        "Math.max(...document.querySelector('.chart').chart.u.data[1])"
    )
    opened.context.close()
    assert highest == 1000
    assert painted < 2000


def test_a_served_page_follows_a_run_that_goes_on(browser, tmp_path: Path):
    folder = write_run(tmp_path / "run", epochs=1)
    program = "import sys; from loopwright.framework.command_line.main import main; sys.exit(main(sys.argv[1:]))"
    server = subprocess.Popen(
        [sys.executable, "-c", program, "report", str(folder), "--live"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout
        address = server.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        opened = Opened(browser, address, **LAPTOP)
        assert opened.page.locator("h1 + .chip").inner_text() == "running"
        record = folder / "record" / "run.json"
        add_rows(
            folder,
            [
                {"step": 500, "epoch": 1, "values": {"fresh": 0.5}},
                {"step": 501, "values": {"fresh": 0.4}},
            ],
        )
        record.write_text(
            json.dumps({**json.loads(record.read_text()), "ended": FINISHED})
        )
        opened.page.wait_for_selector(
            ".chart[aria-label='fresh'] canvas", timeout=30_000
        )
        assert opened.page.locator("h1 + .chip").inner_text() == "finished"
        assert opened.said == []
        opened.context.close()
    finally:
        server.send_signal(2)
        server.communicate(timeout=20)
    assert server.returncode == 0
