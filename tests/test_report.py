"""The page about a result: its figures are the JSON's, it asks nobody for anything, and is legible on any screen."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxprune import cli
from onnxprune.errors import PruneError
from onnxprune.report import figures, page
from onnxprune.report.document import document

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
browsing = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver (Debian: chromium, chromium-driver)"
)
NET = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N,16] x) => (float[N,4] y) {
    t = MatMul(x, first)
    r = Relu(t)
    y = Gemm(r, second)
}"""
HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp;\x07\u202e" + "long" * 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    proto = onnx.parser.parse_model(NET)
    for name, shape in ((HOSTILE, (16, 32)), ("second", (32, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    proto.graph.node[0].input[1] = HOSTILE
    onnx.save(proto, tmp_path / "dense.onnx")
    x = rng.standard_normal((300, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=rng.integers(0, 4, 300))
    return tmp_path / "dense.onnx"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.main([str(a) for a in arguments]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def commands(folder: Path) -> dict[str, list[object]]:
    dense, data = folder / "dense.onnx", folder / "data.npz"
    return {
        "prune": ["prune", dense, "-o", folder / "p.onnx", "--sparsity", "0.5", "--data", data],
        "sensitivity": ["sensitivity", dense, "--data", data, "--jobs", "1", "--levels", "0.5,0.9"],
        "auto": ["auto", dense, "--data", data, "-o", folder / "a.onnx", "--jobs", "1", "--max-drop", "0.2"],
        "evaluate": ["evaluate", dense, "--data", data],
        "benchmark": ["benchmark", dense, "--runs", "3", "--baseline", dense],
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.binary_location = CHROMIUM
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, path: Path, scheme: str = "light", width: int = 1400) -> None:
    """Open a page in a colour scheme and width, and wait until it is drawn."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    for _ in range(600):
        if browser.execute_script("return document.documentElement.getAttribute('data-drawn')"):
            return
        time.sleep(0.1)
    raise AssertionError(f"not drawn after 60 s; console: {browser.get_log('browser')}")


@browsing
@pytest.mark.parametrize("kind", ["prune", "sensitivity", "auto"])
def test_figures_on_the_page_are_those_of_the_json(kind, model, browser, capsys):
    target = model.parent / f"{kind}.html"
    told = run(capsys, *commands(model.parent)[kind], "--report", target, "--json")
    opened(browser, target)
    embedded = json.loads(browser.execute_script("return document.getElementById('json').textContent"))
    assert embedded == told
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(e => [e.id, e.data.map(t => [t.x, t.y])])"
    )
    by_id = dict(drawn)
    if kind == "prune":
        rows = told["report"]["weights"]
        assert by_id["sparsity"][0][0] == [100 * row["sparsity"] for row in rows]
        assert [x for x, _ in by_id["sizes"]] == [[r["size"] for r in rows], [r["size"] - r["zeros"] for r in rows]]
        counts = [h[when] for h in told["histograms"].values() for when in ("before", "after")]
        assert [y for _, y in by_id["histograms"]] == counts
        assert [sum(h["after"]) for h in told["histograms"].values()] == [r["size"] - r["zeros"] for r in rows]
        assert by_id["latency"][0][0] == [told["benchmark"][k]["median"] for k in ("baseline", "latency")]
    elif kind == "sensitivity":
        expected = [[[100 * p[k] for p in c["points"]] for k in ("level", "loss")] for c in told["curves"]]
        assert by_id["curves"] == expected
    else:
        front = sorted(told["frontier"], key=lambda c: c["value"])
        assert by_id["frontier"][1] == [[100 * c["value"] for c in front], [100 * c["loss"] for c in front]]
        assert by_id["frontier"][2] == [[100 * told["best"]["value"]], [100 * told["best"]["loss"]]]


@browsing
def test_nothing_leaves_the_page_and_it_fits_any_screen(model, browser, capsys):
    target = model.parent / "prune.html"
    run(capsys, *commands(model.parent)["prune"], "--report", target, "--json")
    browser.get_log("browser")
    browser.get_log("performance")
    seen = {}
    for scheme in ("light", "dark"):
        for width in (400, 1400):
            opened(browser, target, scheme, width)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            cut = browser.execute_script(
                "return [...document.querySelectorAll('section, .tile, .plot')].filter("
                "e => e.getBoundingClientRect().right > innerWidth + 1).length"
            )
            assert cut == 0
            small = browser.execute_script(
                "return [...document.querySelectorAll('main *')].filter(e => e.textContent.trim() && "
                "parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML.slice(0, 80))"
            )
            assert small == []
        seen[scheme] = browser.execute_script(
            "const s = e => getComputedStyle(e); const p = document.querySelector('section');"
            "return [s(p).color, s(p).backgroundColor, s(document.querySelector('.xtick text')).fill,"
            " document.querySelector('#sparsity').data[0].marker.color]"
        )
        for text in (seen[scheme][0], seen[scheme][2]):
            assert contrast(text, seen[scheme][1]) >= 4.5
    assert all(a != b for a, b in zip(seen["light"], seen["dark"], strict=True))
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked
    assert {url for url in asked if not url.startswith("data:")} == {target.as_uri()}
    names = browser.execute_script("return [...document.querySelectorAll('td:first-child')].map(e => e.textContent)")
    assert any(name.startswith("</script><img src=x onerror=alert(1)><b>&amp;\\x07\\u202elong") for name in names)
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    ticks = browser.execute_script("return [...document.querySelectorAll('.ytick text')].map(e => e.textContent)")
    assert any(tick.startswith("</script><img") for tick in ticks)


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours as `rgb(r, g, b)`."""

    def light(colour: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted([light(one), light(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", ["evaluate", "benchmark"])
def test_every_command_writes_a_page_of_its_json(kind, model, capsys):
    target = model.parent / "page.html"
    told = run(capsys, *commands(model.parent)[kind], "--report", target, "--json")
    text = target.read_text(encoding="utf-8")
    found = json.loads(text.split('id="json">')[1].split("</script>")[0])
    assert {key: told[key] for key in found} == found
    assert {"command", "environment"} <= found.keys()
    assert str(Path.home()) not in json.dumps(found["environment"])


def test_a_hostile_name_opens_no_element():
    made = document("evaluate", {"model": HOSTILE, "evaluation": {"metric": HOSTILE, "score": 1.0, "notes": [HOSTILE]}})
    text = page.page(made)
    assert "<img" not in text.split("<script", 1)[0]
    assert "\x07" not in text.split("<script", 1)[0]
    assert text.count("<script") - page.page({**made, "model": "", "evaluation": {}}).count("<script") == 0
    assert figures.literal("<b>&\n") == "&lt;b&gt;&amp;\\n"


def test_without_plotly_nothing_is_measured(model, capsys, monkeypatch):
    real = builtins.__import__

    def none(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", none)
    arguments = [*commands(model.parent)["prune"], "--report", model.parent / "p.html"]
    assert cli.main([str(a) for a in arguments]) == cli.BAD_INPUT
    assert "pip install 'onnxprune[report]'" in capsys.readouterr().err
    assert not (model.parent / "p.onnx").exists()


def test_a_report_over_the_model_is_refused(model, capsys):
    arguments = [*commands(model.parent)["prune"], "--report", model]
    assert cli.main([str(a) for a in arguments]) == cli.BAD_INPUT
    assert "choose another name" in capsys.readouterr().err
    assert not (model.parent / "p.onnx").exists()


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(PruneError, match="does not exist"):
        page.write(document("evaluate", {"model": "m"}), tmp_path / "none" / "p.html")
