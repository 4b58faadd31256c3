"""The page, as a browser shows it."""

from __future__ import annotations

import io
import itertools
import shutil

import pytest
import torch

import vdcache
from tests.zoo import ZOO, build


def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,1600"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


@pytest.fixture(scope="module")
def chrome():
    if shutil.which("chromedriver") is None:
        pytest.skip("Chromium is not installed: apt-get install chromium chromium-driver")
    driver = browser()
    yield driver
    driver.quit()


def page_of(name, path, **more):
    torch._dynamo.reset()
    report = vdcache.explain(build(name), **ZOO[name].call(0, 6), **more)
    report.to_html(path)
    return report


def test_a_page_needs_nothing_else(tmp_path):
    report = page_of("wan", tmp_path / "wan.html", recipe="every-3")
    text = (tmp_path / "wan.html").read_text()
    assert "http://" not in text and "https://" not in text and "<link" not in text and "src=" not in text
    assert text.count("<rect") > len(report.branches)
    fragment = report._repr_html_()
    assert fragment.startswith('<div class="vdcache-report">') and "<html" not in fragment


def test_names_are_escaped(tmp_path):
    from dataclasses import replace

    report = replace(vdcache.explain(torch.nn.Linear(2, 2), torch.zeros(1, 2)), model="<script>alert(1)</script>")
    assert "<script>alert" not in report.to_html()


@pytest.mark.slow
def test_the_rendered_page(chrome, tmp_path):
    """What is drawn: a rail a stream, a square a branch, a slot along each rail, areas by FLOPs, hovering tells more."""
    import numpy
    from imageio.v3 import imread
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    report = page_of("flux", tmp_path / "flux.html", recipe="every-3")
    chrome.get(f"file://{tmp_path / 'flux.html'}")
    assert not chrome.get_log("browser")
    find = lambda css: chrome.find_elements(By.CSS_SELECTOR, css)  # noqa: E731
    assert len(find("svg.house .rail")) == 3 and len(find("svg.house .slot")) == 3 and len(find("svg.house .merge")) == 2
    squares = find("svg.house rect[fill]")
    assert len(squares) == len(report.branches) == 10
    areas = {s.get_attribute("data-tip").splitlines()[0]: s.rect["width"] * s.rect["height"] for s in squares}
    by_name = {b.name: b.flops for b in report.branches}
    big, small = max(by_name, key=by_name.get), min(by_name, key=by_name.get)
    assert areas[big] / areas[small] == pytest.approx(by_name[big] / by_name[small], rel=0.25)

    ActionChains(chrome).move_to_element(squares[0]).perform()
    (tip,) = find(".tip")
    assert tip.is_displayed() and "joint attention" in tip.text and "transformer_flux.py" in tip.text

    seen = imread(io.BytesIO(find("svg.house")[0].screenshot_as_png))[..., :3]
    for colour in ("6b46c1", "2f855a", "b83280"):  # joint attention, MLP, fused
        rgb = numpy.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)])
        assert (numpy.abs(seen.astype(int) - rgb).sum(-1) < 12).mean() > 0.005, f"#{colour} is hardly to be seen"


@pytest.mark.slow
def test_sixty_blocks_fit_without_scrolling(chrome, tmp_path):
    from selenium.webdriver.common.by import By

    from vdcache.testing import TinyDiT, latent, time_of

    torch._dynamo.reset()
    report = vdcache.explain(TinyDiT(60), latent(0), time_of(0), latent(1, 1, 3, 4), recipe="every-3")
    report.to_html(tmp_path / "deep.html")
    chrome.get(f"file://{tmp_path / 'deep.html'}")
    house = chrome.find_element(By.CSS_SELECTOR, "svg.house")
    assert house.rect["width"] <= 1244
    squares = chrome.find_elements(By.CSS_SELECTOR, "svg.house rect[fill]")
    assert len(squares) == 120
    spans = sorted((s.rect["x"], s.rect["x"] + s.rect["width"]) for s in squares if "attention" in s.get_attribute("data-tip"))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "squares of neighbouring blocks overlap"
