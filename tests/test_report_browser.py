"""The page of `snscc report` in a browser: what a person sees and can do."""

from __future__ import annotations

import csv
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from snscc_ray import Report
from snscc_ray.answers.names import Naming, save
from snscc_ray.answers.report import report
from snscc_ray.core.display import Display
from snscc_ray.runs.finished import ASSIGNMENTS
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
    save(Naming((EVIL_CLASS, *(None,) * 9)), run)
    before = Path(shutil.copytree(run, run.parent / "before"))
    table = pq.read_table(before / ASSIGNMENTS)
    cluster = table["cluster"].to_numpy().copy()
    cluster[::7] = (cluster[::7] + 1) % 10
    pq.write_table(table.set_column(1, "cluster", pa.array(cluster)), before / ASSIGNMENTS)
    report(run, run / "report.html", Display(QUIET), device="cpu", against=before)
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
    assert labels and all(label and re.search(r", cluster \d$| \(0\)$", label) for label in labels)


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


def tool(driver: webdriver.Chrome, name: str) -> WebElement:
    """A button of the first map."""
    return find(driver, f".tools [data-do={name}]")[0]


def wait_for_sheets(driver: webdriver.Chrome) -> None:
    driver.execute_async_script(
        "const done = arguments[0], wait = () => [...sheets.values()].every((s) => s.ready)"
        " ? done() : setTimeout(wait, 20); wait();"
    )


def test_zoomed_in_images_take_the_place_of_points(browser: webdriver.Chrome) -> None:
    assert browser.execute_script("return maps[0].cells.length") == 0
    canvas = find(browser, "canvas")[0]
    canvas.send_keys("+")
    wait_for_sheets(browser)
    assert tool(browser, "pictures").get_attribute("aria-pressed") == "true"
    cells = browser.execute_script("return maps[0].cells")
    assert len(cells) > 5 and len({cell["index"] for cell in cells}) == len(cells)
    for axis in ("x", "y"):
        steps = [(cell[axis] - cells[0][axis]) / cell["side"] for cell in cells]
        assert all(abs(step - round(step)) < 1e-6 for step in steps), "on a grid, without overlap"
    # Each image shows its own pixels: as many bright ones as in the thumbnail of the page.
    differs = browser.execute_script(
        """
        const map = maps[0], ratio = devicePixelRatio, side = 32;
        const pixels = (source, x, y, w) => {
          const pen = Object.assign(document.createElement("canvas"), { width: side, height: side })
            .getContext("2d");
          pen.imageSmoothingEnabled = false;
          pen.drawImage(source, x, y, w, w, 0, 0, side, side);
          return pen.getImageData(0, 0, side, side).data;
        };
        return map.cells.filter((c) => c.x > 0 && c.y > 0 && c.x + c.side < canvas.clientWidth
            && c.y + c.side < canvas.clientHeight && c.index !== state.point).map((c) => {
          const [number, column, line] = data.places[rows[c.index]];
          const { image, columns } = sheetOf(number), own = image.naturalWidth / columns;
          const [x, y, w] = [c.x + 2, c.y + 2, c.side - 4].map((value) => value * ratio);
          const shown = pixels(map.canvas, x, y, w);
          const kept = pixels(image, column * own, line * own, own);
          return shown.reduce((sum, v, i) => sum + Math.abs(v - kept[i]), 0) / shown.length;
        });
        """.replace("canvas.client", "map.canvas.client")
    )
    assert len(differs) > 5
    assert sorted(differs)[len(differs) // 2] < 12, "names cover some of them"
    canvas.send_keys("0")
    assert browser.execute_script("return [maps[0].zoom, maps[0].cells.length]") == [1, 0]
    tool(browser, "pictures").click()
    assert browser.execute_script("return maps[0].cells.length") > 5


def test_each_cluster_is_named_where_it_is_densest(browser: webdriver.Chrome) -> None:
    written = browser.execute_script(
        "const found = [], pen = CanvasRenderingContext2D.prototype, fill = pen.fillText;"
        "pen.fillText = function (text, x, y) { found.push([text, x, y]); };"
        "draw(maps[0]); pen.fillText = fill; return found;"
    )
    used = {
        line["index"]: line["number"] for line in browser.execute_script("return peaksOf(maps[0])")
    }
    assert len(written) > len(used) / 2 and len({text for text, *_ in written}) == len(written)
    for index, number in used.items():
        assert browser.execute_script(f"return group({index})") == number
        near = """
          const { points } = maps[0];
          const apart = (i, j) => Math.hypot(...points[i].map((v, axis) => v - points[j][axis]));
          const near = (i) =>
            rows.filter((_, j) => group(j) === group(i) && apart(i, j) < 0.05).length;
          const all = rows.map((_, i) => i).filter((i) => group(i) === arguments[1]).map(near);
          return [near(arguments[0]), Math.max(...all)];
        """
        at_peak, most = browser.execute_script(near, index, number)
        assert at_peak >= 0.6 * most


def downloaded(driver: webdriver.Chrome, folder: Path) -> list[dict[str, str]]:
    """What the download button of the first map writes."""
    behaviour = {"behavior": "allow", "downloadPath": str(folder)}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    tool(driver, "download").click()
    file, until = folder / "selected.csv", time.monotonic() + 20
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_a_region_is_dragged_and_its_ids_are_downloaded(
    browser: webdriver.Chrome, run: Path, tmp_path: Path
) -> None:
    assert not tool(browser, "download").is_enabled()
    canvas = find(browser, "canvas")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    side = canvas.size["width"]
    start = ActionChains(browser).move_to_element_with_offset(canvas, -side // 3, -side // 3)
    start.click_and_hold().move_by_offset(side // 2, side // 2).release().perform()
    inside = browser.execute_script(
        "const [a, b] = maps[0].region; return rows.filter((_, i) => maps[0].points[i].every("
        "(v, axis) => v >= a[axis] && v <= b[axis])).map((row) => data.images[row].id)"
    )
    told = find(browser, ".tools [role=status]")[0].text
    assert 0 < len(inside) < 200 and told == f"{len(inside)} selected, of 200 on the map"
    lines = downloaded(browser, tmp_path)
    assert sorted(line["id"] for line in lines) == sorted(inside)
    table = pq.read_table(run / ASSIGNMENTS)
    assigned = dict(zip(table["id"].to_pylist(), table["cluster"].to_pylist(), strict=True))
    assert all(int(line["cluster"]) == assigned[line["id"]] for line in lines)
    tool(browser, "closer").click()
    assert browser.execute_script("return maps[0].zoom") > 1
    tool(browser, "clear").click()
    assert not tool(browser, "download").is_enabled()


def test_a_region_is_selected_by_keys(browser: webdriver.Chrome, tmp_path: Path) -> None:
    canvas = find(browser, "canvas")[0]
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN):
        for _ in range(6):
            canvas.send_keys(Keys.SHIFT + key)
    some = int(find(browser, ".tools [role=status]")[0].text.split()[0])
    assert 0 < some < 200
    canvas.send_keys(Keys.ESCAPE)
    assert not tool(browser, "clear").is_enabled()
    tool(browser, "view").send_keys(Keys.ENTER)
    assert len(downloaded(browser, tmp_path)) == 200
    assert {EVIL_FILE} < {line["id"].split("/")[-1] for line in downloaded(browser, tmp_path)}


def test_the_border_between_two_clusters_is_chosen(browser: webdriver.Chrome) -> None:
    assert len(displayed(browser, ".border")) == 1
    choice = Select(find(browser, "#border")[0])
    doubts = [
        int(o.text.split(" images, ")[-1].split()[0])
        for o in choice.options
        if " images, " in o.text
    ]
    assert len(doubts) > 3 and doubts == sorted(doubts, reverse=True), "the most confused first"
    find(browser, "#border")[0].send_keys(Keys.ARROW_DOWN)
    shown = displayed(browser, ".border")
    assert [part.get_attribute("data-border") for part in shown] == ["1"]
    shares = [int(e.text.rstrip("%+")) for e in displayed(browser, ".border .cap")]
    assert shares and shares == sorted(shares)
    displayed(browser, ".border .thumb")[0].send_keys(Keys.ENTER)
    assert find(browser, "#large")[0].is_displayed()


def test_what_moved_is_shown(browser: webdriver.Chrome) -> None:
    part = find(browser, "#moved")[0]
    assert "200 images in both runs" in part.text and "The largest moves" in part.text
    assert len(displayed(browser, "#moved .thumb")) > 5


def test_a_notebook_shows_the_page(
    chromium: webdriver.Chrome, page: str, run: Path, tmp_path: Path
) -> None:
    inline = Report(run / "report.html")._repr_html_()
    (tmp_path / "cell.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{inline}")
    screen(chromium, 1280)
    chromium.get((tmp_path / "cell.html").as_uri())
    chromium.switch_to.frame(find(chromium, "iframe")[0])
    assert find(chromium, "h1")[0].text == run.name
    assert find(chromium, "#shown")[0].text == "200 of 200 points shown", "the script runs"
    assert chromium.execute_script("return window.hacked") is None
    chromium.switch_to.default_content()
    assert chromium.get_log("browser") == []


def test_a_page_too_large_for_a_notebook_is_named(tmp_path: Path) -> None:
    large = tmp_path / "<large>.html"
    large.write_bytes(b" " * 20_000_001)
    told = Report(large)._repr_html_()
    assert "&lt;large&gt;.html has 20 MB" in told and "<iframe" not in told


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
    assert len(targets) == 13 and all(find(browser, f"#{target} h2") for target in targets)
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
