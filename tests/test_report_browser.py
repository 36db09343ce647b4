"""The page of `snscc report` in a browser: what a person sees and can do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from snscc_ray.answers.report import report
from snscc_ray.runs.local import run_here
from snscc_ray.runs.run import Request
from tests.conftest import TINY, digits_table

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)

# Names that would run, were they ever taken for markup.
EVIL_FILE = "<img src=x onerror=window.hacked=1>.png"
EVIL_CLASS = '"><svg onload=window.hacked=1>'
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on files in folders whose names are their labels."""
    place = tmp_path_factory.mktemp("browser")
    table = digits_table(200).to_pylist()
    for number, row in enumerate(table):
        folder = place / "images" / (EVIL_CLASS if row["label"] == 3 else str(row["label"]))
        folder.mkdir(parents=True, exist_ok=True)
        name = EVIL_FILE if number == 0 else f"{number:03}.png"
        (folder / name).write_bytes(row["image"])
    (place / "images" / "5" / "broken.png").write_bytes(b"no image")
    own = [
        *TINY, "data.limit=null", "data.source=folder", f"data.path={place / 'images'}",
        "data.folders_are_labels=true", "data.skip_corrupt=true",
    ]  # fmt: skip
    folder = place / "<b onclick=alert(1)>"
    run_here(Request("digits", own, folder), QUIET)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    (run / "clusters.json").write_text(
        '{"chosen": 10, "runner_up": 9, "tried": [8, 9, 10], "why": "<script>hacked=1</script>",'
        ' "criteria": {"stability": [0.5, 0.6, 0.9], "eigengap": [null, 0.1, 0.3]}}'
    )
    report(run, run / "report.html", QUIET, device="cpu")
    return (run / "report.html").as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome, page: str) -> Iterator[webdriver.Chrome]:
    """The page, freshly opened on a large screen; at the end, nothing may have been complained."""
    screen(chromium, 1280)
    chromium.get(page)
    chromium.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return window.hacked") is None


def screen(driver: webdriver.Chrome, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def find(driver: webdriver.Chrome, selector: str) -> list[WebElement]:
    return list(driver.find_elements("css selector", selector))


def displayed(driver: webdriver.Chrome, selector: str) -> list[WebElement]:
    return [element for element in find(driver, selector) if element.is_displayed()]


def test_every_image_loads(browser: webdriver.Chrome) -> None:
    sides: list[Any] = browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const pictures = [...document.querySelectorAll(".pic")];
        const urls = pictures.map((p) => getComputedStyle(p).backgroundImage.slice(5, -2));
        Promise.all([...new Set(urls)].map(async (url) => {
          const image = new Image();
          image.src = url;
          await image.decode();
          return [image.naturalWidth, image.naturalHeight, pictures.length];
        })).then(done, (error) => done([String(error)]));
        """
    )
    assert sides and all(side[0] > 0 and side[1] > 0 for side in sides), sides
    assert sides[0][2] > 400
    labels = [e.get_attribute("aria-label") for e in find(browser, "#outliers .pic")]
    assert labels and all(label and ", cluster " in label for label in labels)


def test_names_are_text_and_run_nothing(browser: webdriver.Chrome, run: Path) -> None:
    assert find(browser, "h1")[0].text == run.name
    assert find(browser, "main img, main svg[onload], main script") == []
    assert "<script>hacked=1</script>" in find(browser, "#number")[0].text
    assert EVIL_CLASS in find(browser, ".confusion")[0].text
    thumb = next(e for e in find(browser, ".thumb") if EVIL_FILE in str(e.get_attribute("title")))
    browser.execute_script("arguments[0].click()", thumb)
    assert EVIL_FILE in find(browser, "#large-id")[0].text
    find(browser, "#large-close")[0].click()
    find(browser, "input[value=label]")[0].click()
    assert EVIL_CLASS in [entry.text[2:] for entry in find(browser, "#legend button")]


def test_the_cluster_filter_shows_one_cluster(browser: webdriver.Chrome) -> None:
    everything = len(displayed(browser, "article.card"))
    assert everything > 1
    choice = Select(find(browser, "#filter")[0])
    choice.select_by_index(2)
    chosen = find(browser, "#filter")[0].get_attribute("value")
    shown = displayed(browser, "[data-cluster]")
    assert shown and {part.get_attribute("data-cluster") for part in shown} == {chosen}
    assert len(displayed(browser, "article.card")) == 1
    choice.select_by_index(0)
    assert len(displayed(browser, "article.card")) == everything


def test_legend_entries_filter_the_map(browser: webdriver.Chrome) -> None:
    entries = find(browser, "#legend button")
    before = browser.execute_script("return document.querySelector('canvas').toDataURL()")
    counts = []
    for entry in entries[:2]:
        entry.click()
        assert entry.get_attribute("aria-pressed") == "true"
        counts.append(int(find(browser, "#shown")[0].text.split(" of ")[0]))
    assert 0 < counts[0] < counts[1] < 200
    assert before != browser.execute_script("return document.querySelector('canvas').toDataURL()")
    for entry in entries[:2]:
        entry.click()
    assert find(browser, "#shown")[0].text.startswith("200 of 200")


def test_the_map_is_walked_by_keys(browser: webdriver.Chrome) -> None:
    canvas = find(browser, "canvas")[-1]
    canvas.send_keys(Keys.ARROW_RIGHT)
    said = [find(browser, "#said")[0].get_attribute("textContent")]
    for key in (Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP):
        canvas.send_keys(key)
        said.append(find(browser, "#said")[0].get_attribute("textContent"))
    assert all(said) and len(set(said)) > 2
    tip = displayed(browser, ".tip")
    assert (
        len(tip) == 1 and "confident" in tip[0].text and tip[0].text.split("\n")[0] in str(said[-1])
    )
    canvas.send_keys(Keys.ENTER)
    assert find(browser, "#large")[0].is_displayed()
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not find(browser, "#large")[0].is_displayed()
    assert browser.switch_to.active_element == canvas, "the focus goes back"


def test_the_map_answers_to_the_mouse(browser: webdriver.Chrome) -> None:
    canvas = find(browser, "canvas")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    offset = browser.execute_script(
        "const [x, y] = at(maps[0], 0), side = arguments[0].clientWidth;"
        "return [Math.round(x - side / 2), Math.round(y - side / 2)]",
        canvas,
    )
    ActionChains(browser).move_to_element_with_offset(canvas, *offset).perform()
    assert len(displayed(browser, ".tip")) == 1
    ActionChains(browser).move_to_element(find(browser, "#shown")[0]).perform()
    assert displayed(browser, ".tip") == []


def test_thumbnails_are_reached_and_opened_by_keys(browser: webdriver.Chrome) -> None:
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.text == "Skip to the report"
    thumb = find(browser, "#clusters .thumb")[0]
    browser.execute_script("arguments[0].focus()", thumb)
    thumb.send_keys(Keys.ENTER)
    assert find(browser, "#large-id")[0].text == thumb.get_attribute("title")
    browser.switch_to.active_element.send_keys(Keys.ENTER)  # the close button has the focus
    assert not find(browser, "#large")[0].is_displayed()
    assert browser.switch_to.active_element == thumb


@pytest.mark.parametrize("width", [360, 768])
def test_a_small_screen_is_never_scrolled_sideways(browser: webdriver.Chrome, width: int) -> None:
    screen(browser, width)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = browser.execute_script(
        "return [...document.querySelectorAll('section, section > *, .chart, canvas')]"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.outerHTML)"
    )
    assert wide == []


def test_headings_landmarks_and_names(browser: webdriver.Chrome) -> None:
    assert [len(find(browser, tag)) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    targets = [str(link.get_attribute("href")).split("#")[1] for link in find(browser, "nav a")]
    assert len(targets) == 10 and all(find(browser, f"#{target} h2") for target in targets)
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, canvas, svg, select')].filter((e) =>"
        " !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length"
        " || e.querySelector('[aria-label]'))).map((e) => e.outerHTML)"
    )
    assert unnamed == []


def test_dark_and_light_can_both_be_read(browser: webdriver.Chrome) -> None:
    def brightness(scheme: str) -> list[float]:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        return list(
            browser.execute_script(
                "const s = getComputedStyle(document.body);"
                "return [s.color, s.backgroundColor].map((c) =>"
                " c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765)"
            )
        )

    (ink, paper), (light_ink, dark_paper) = brightness("light"), brightness("dark")
    assert paper - ink > 0.7 and light_ink - dark_paper > 0.7
