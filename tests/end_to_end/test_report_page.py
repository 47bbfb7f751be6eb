"""The page of a report in a browser: no network, everything by keyboard, legible in light, dark, narrow and print."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_slm.analysis.report import Output, write_report
from tests.browser import Browser, open_browser
from tests.run_directories import HOSTILE, observe, write_run

pytestmark = pytest.mark.slow
LEAST_CONTRAST = 4.5
"""WCAG 2, level AA, for text below 18 points."""
BYTES = 10_000_000

CONTRASTS = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function rgba(color) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const color = rgba(getComputedStyle(at).backgroundColor);
    if (color[3] === 255) return color;
  }
  throw new Error('no background');
}
const found = [];
for (const element of document.body.querySelectorAll('*')) {
  const isText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!isText || !element.getClientRects().length || ['SCRIPT', 'NOSCRIPT'].includes(element.tagName)) continue;
  const style = getComputedStyle(element);
  const [ink, paper] = [rgba(element.closest('svg') ? style.fill : style.color), behind(element)].map(luminance);
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  found.push([ratio, `${element.tagName} ${element.getAttribute('class')} ${element.textContent.slice(0, 30)}`]);
}
return found.sort((one, other) => one[0] - other[0]);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    runs = [write_run(root / "clm", objective="clm"), write_run(root / "slm", ratio=0.6)]
    runs.append(write_run(root / "<b>slm", ratio=0.4, evaluation={"mathematics": "checksum", "general": "other"}))
    for run in runs:
        from megatron_slm.data.tokenizer import load_tokenizer

        known = load_tokenizer(str(run / "tokenizer")).get_vocab()
        ids = [known[text] for text in (*HOSTILE, " the", " sum", " 12")]
        observe(run, with_selection=run.name != "clm", with_reference=run.name != "clm", ids=ids)
    write_report([str(run) for run in runs], Output(root / "report.html"))
    return root / "report.html"


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser, page: Path) -> Browser:
    shared_browser.resize(1280)
    shared_browser.media()
    shared_browser.open(page)
    return shared_browser


def test_it_opens_as_a_file_without_network_or_errors(browser: Browser, page: Path) -> None:
    browser.requests(), browser.console()
    browser.open(page)
    assert browser.requests() == [page.as_uri()]
    assert browser.console() == []
    assert browser.run("return document.querySelectorAll('img, b').length") == 0
    drawn = browser.run("return [...document.querySelectorAll('figure')].map(f => !!f.querySelector('svg, .missing'))")
    assert drawn and all(drawn)


def test_the_axis_changes_by_keyboard(browser: Browser) -> None:
    texts = "return [...document.querySelectorAll('#loss-all svg text')].map(t => t.textContent)"
    assert "trained tokens" in browser.run(texts)
    browser.run("document.querySelector('#axis').focus()")
    browser.press("ArrowDown")
    assert "tokens in the loss" in browser.run(texts)
    browser.press("Home")
    assert "step" in browser.run(texts)


def test_runs_are_chosen_by_keyboard(browser: Browser) -> None:
    count = "return document.querySelector('#loss-all .legend').children.length"
    assert browser.run(count) == 3
    browser.run("document.querySelector('#runs summary').focus()")
    browser.press("Enter", "Tab", "Tab", "Tab", "Space")  # past All and None, to the first run
    assert browser.run(count) == 2
    hidden = "return [...document.querySelectorAll('[data-run=\"0\"]')].every(e => !e.getClientRects().length)"
    assert browser.run(hidden)
    assert "2 of 3" in browser.run("return document.querySelector('#runs summary').textContent")
    browser.press("Escape")
    assert not browser.run("return document.querySelector('#runs').open")


def test_values_of_a_chart_are_read_by_keyboard_and_by_pointer(browser: Browser) -> None:
    value = "return document.querySelector('#loss-all .plot').getAttribute('aria-valuetext')"
    browser.run("document.querySelector('#loss-all .plot').focus()")
    last = browser.run(value)
    browser.press("ArrowLeft")
    assert browser.run(value) != last and "clm" in browser.run(value)
    assert browser.run("return document.querySelector('#loss-all .readout').textContent") == browser.run(value)
    browser.press("Home")
    first = browser.run(value)
    browser.point("#loss-all .plot")
    assert browser.run(value) not in (first, last)


def test_the_data_of_a_chart_are_in_a_table(browser: Browser) -> None:
    browser.run("document.querySelector('#loss-all summary').focus()")
    browser.press("Enter")
    browser.wait("return !!document.querySelector('#loss-all table')")
    cells = "return [...document.querySelectorAll('#loss-all tbody tr:last-child > *')].map(c => c.textContent)"
    assert browser.run(cells)[0] == "7,680"


def test_steps_and_tokens_of_a_passage_change_by_keyboard_and_by_pointer(browser: Browser) -> None:
    heading = "return document.querySelector('.pane h5').textContent"
    words = "return document.querySelector('.detail p').textContent"
    assert browser.run(heading).startswith("Step 60")
    browser.run("document.querySelector('.controls input[type=range]').focus()")
    browser.press("ArrowLeft")
    assert browser.run(heading).startswith("Step 45")
    browser.run("document.querySelector('.tokens [tabindex=\"0\"]').focus()")
    browser.press("ArrowRight", "ArrowRight")
    assert "Token 3" in browser.run(words) and "reference" in browser.run(words)
    assert browser.run("return document.querySelectorAll('.small svg .line').length") >= 3
    browser.point(".tokens [data-index='9']")
    assert "Token 10" in browser.run(words)
    assert browser.run("return document.querySelector('.tokens [data-index=\"9\"]').classList.contains('here')")
    browser.run("document.querySelector('.controls input[type=checkbox]').focus()")
    browser.press("Space")
    assert browser.run("return document.querySelectorAll('.pane').length") == 4


def test_every_control_has_a_name_and_is_reached_by_tab(browser: Browser) -> None:
    tree = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "combobox", "checkbox", "slider", "option", "listbox", "link", "image", "region", "figure"}
    nameless = [
        node
        for node in tree
        if not node.get("ignored") and node["role"]["value"] in named and not node.get("name", {}).get("value")
    ]
    assert not nameless
    assert {"main", "navigation", "region", "figure", "slider"} <= {n["role"]["value"] for n in tree if "role" in n}
    browser.run("document.body.focus(); document.querySelector('.skip').focus()")
    reached = set()
    for _ in range(12):
        browser.press("Tab")
        reached.add(browser.run("return document.activeElement.id || document.activeElement.tagName"))
    assert {"axis", "late", "theme"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_level_aa(browser: Browser, scheme: str, page: Path) -> None:
    browser.media(scheme=scheme)
    browser.open(page)
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    found = browser.run(CONTRASTS)
    assert len(found) > 300
    assert found[0][0] >= LEAST_CONTRAST, found[:5]


def test_the_button_changes_between_dark_and_light(browser: Browser) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = browser.run(colour)
    browser.run("document.querySelector('#theme').focus()")
    browser.press("Enter")
    dark = browser.run(colour)
    assert light == "rgb(255, 255, 255)" and dark != light
    browser.media("print")
    assert browser.run(colour) == light


@pytest.mark.parametrize("width", [375, 800, 1600])
def test_nothing_is_wider_than_the_window(browser: Browser, width: int, page: Path) -> None:
    browser.resize(width)
    browser.open(page)
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_print_cuts_nothing_and_shows_folded_tables(browser: Browser) -> None:
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    browser.media("print")
    browser.resize(700)  # about the width of a page between its margins
    wide = browser.run(
        "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.tagName + ' ' + e.className)"
    )
    assert not wide
    assert browser.run("return [...document.querySelectorAll('details.fold')].every(fold => fold.open)")
    assert browser.pdf().startswith(b"%PDF")


def test_without_its_script_the_page_still_has_verdict_and_tables(page: Path) -> None:
    with open_browser(script=False) as browser:
        text = browser.text(page)
    for part in ("JavaScript is off", "Held-out loss of mathematics improved", "Cost and health", "Fits of quality"):
        assert part in text


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fifty")
    first = write_run(root / "run00", steps=10_000)
    observe(first, tokens=4000, steps=range(0, 10_001, 1000))
    for number in range(1, 50):
        shutil.copytree(first, root / f"run{number:02}")
    write_report([str(run) for run in sorted(root.glob("run*"))], Output(root / "report.html"))
    return root / "report.html"


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("million")
    run = write_run(root / "run", steps=1500)
    observe(run, tokens=1_000_000, steps=range(0, 1501, 107))
    write_report([str(run)], Output(root / "report.html"))
    return root / "report.html"


@pytest.mark.parametrize("name", ["fifty", "million"])
def test_large_reports_are_light_and_open(
    name: str,
    shared_browser: Browser,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    path = request.getfixturevalue(name)
    assert path.stat().st_size < BYTES
    shared_browser.resize(1280)
    shared_browser.media()
    shared_browser.open(path)
    loaded = "return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
    record_property("seconds until the page is loaded", shared_browser.run(loaded))
    if name == "fifty":
        assert shared_browser.run("return document.querySelector('#loss-all .legend').children.length") == 8
