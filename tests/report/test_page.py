"""The report's page in a real browser: every plot with its data, every control doing what it says, no request anywhere.

Debian's chromium, without a head; Playwright drives it.
"""

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.made_run import EXPERTS, HEADS, HOSTILE, LAYERS, append, make_run, metrics, set_state, statistics
from train_loop.report import server
from train_loop.report.html_page import write
from train_loop.report.page_data import gather
from train_loop.report.run_reader import RunFiles

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing: apt-get install chromium")
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
)
STEPS, EVERY = 300, 20
LINES = {  # a plot's curves, and how many points each has: one of the 300 steps was not finite
    "loss": {"loss": STEPS - 1, "validation_loss": 15},
    "perplexity": {"loss": STEPS - 1, "validation_perplexity": 15},
    "bits": {"validation_bits_per_byte": 15},
    "accuracy": {"validation_accuracy": 15},
    "learning_rate": {"learning_rate": STEPS},
    "grad_norm": {"grad_norm": STEPS - 1},
    "clipped_share": {"clipped_share": 15},
    "tokens_per_second": {"tokens_per_second": STEPS},
    "mfu": {"mfu": STEPS},
    "memory": {"peak_memory_bytes": STEPS},
    "logits_entropy": {"logits_entropy": 15},
    "top_1": {"logits_top_1_probability": 15},
    "logits_z": {"logits_z": 15},
    "noise": {"gradient_noise_scale": 15},
    "balance_loss": {"balance_loss": STEPS},
}
HEAT_MAPS = {
    **dict.fromkeys(("layer_grad_norm", "layer_update_ratio", "activation_rms", "activation_outliers"), LAYERS * 15),
    **dict.fromkeys(("dead_units", "layer_weight_norm"), LAYERS * 15),
    "attention_entropy": LAYERS * HEADS * 15,
    **dict.fromkeys(("expert_tokens", "expert_probability"), LAYERS * EXPERTS * 15),
    "parameters": 7 * 15,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(OPTIONS))
        yield started
        started.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """`show(address, width=1400, scheme="light")` -> the page; nothing may be asked of anyone, no error be logged."""
    pages, problems = [], []

    def opened(address: str, width: int = 1400, scheme: str = "light", **options: Any) -> Any:
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        pages.append(tab)
        place = address.rstrip("/")
        tab.on("console", lambda line: problems.append(f"{line.type}: {line.text}"))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        tab.on("request", lambda asked: asked.url.startswith((place, "data:")) or problems.append(f"asked {asked.url}"))
        tab.goto(address)
        return tab

    yield opened
    for tab in pages:
        tab.close()
    assert problems == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, and the page of the first and of both."""
    folder = tmp_path_factory.mktemp("page")
    runs = [
        RunFiles(make_run(folder / "first", STEPS, every=EVERY)),
        RunFiles(make_run(folder / "second", STEPS, seed=3, every=EVERY, learning_rate=1e-2)),
    ]
    write(gather(runs[:1]), folder / "one.html")
    write(gather(runs), folder / "two.html")
    return folder


@pytest.fixture
def one(folder: Path) -> str:
    """The address of one run's page."""
    return (folder / "one.html").as_uri()


def points(tab: Any, plot: str) -> dict[str, int]:
    """How many points each line of a plot has in the document."""
    found = tab.eval_on_selector_all(
        f"#{plot} path.line:not(.faint)", "all => all.map(each => [each.dataset.key, each.getAttribute('d')])"
    )
    return {key.rpartition("/")[2]: len(re.findall("[ML]", path)) for key, path in found}


def labels(tab: Any, plot: str) -> str:
    """All that is written in a plot."""
    return str(tab.eval_on_selector(f"#{plot} svg", "each => each.textContent"))


def pixel(tab: Any, plot: str, x: float, y: float) -> list[int]:
    """The colour of a heat map at a share of its width and height."""
    return list(
        tab.eval_on_selector(
            f"#{plot} canvas",
            """(shown, [x, y]) => {
                const paper = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
                paper.drawImage(shown, -Math.floor(x * shown.width), -Math.floor(y * shown.height));
                return [...paper.getImageData(0, 0, 1, 1).data];
            }""",
            [x, y],
        )
    )


def tooltip(tab: Any) -> str:
    """What the tooltip says; nothing where there is none."""
    element = tab.query_selector("#tooltip")
    return element.inner_text() if element and element.is_visible() else ""


def reach(tab: Any, selector: str) -> Any:
    """Scroll to something and say where it is, once the scroll's event, which takes the tooltip away, has been told."""
    tab.locator(selector).scroll_into_view_if_needed()
    tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return tab.locator(selector).bounding_box()


def hover(tab: Any, selector: str, position: Any = None) -> None:
    """Point at something."""
    reach(tab, selector)
    tab.hover(selector, position=position)


def test_every_plot_is_there_with_its_data(show: Callable[..., Any], one: str) -> None:
    tab = show(one)
    for plot, wanted in LINES.items():
        assert tab.is_visible(f"#{plot} svg"), plot
        assert points(tab, plot) == wanted, plot
    for plot, cells in HEAT_MAPS.items():
        assert int(tab.get_attribute(f"#{plot} canvas", "data-cells")) == cells, plot
    assert points(tab, "update_ratio") == {str(layer): 15 for layer in range(LAYERS)}
    assert (
        list(points(tab, "by_position").values()) == [8] * 5 and list(points(tab, "by_frequency").values()) == [4] * 5
    )
    assert list(points(tab, "probe_loss").values()) == [15]
    areas = tab.eval_on_selector_all("#time path.area", "all => all.map(each => each.dataset.key)")
    assert areas == ["data", "forward", "backward", "waiting", "optimizer", "other"]
    assert tab.locator("#grad_norm .marks[data-key=skipped] > *").count() == 1
    assert tab.locator("#grad_norm .marks[data-key=clipped] > *").count() > 20
    for plot in (*LINES, *HEAT_MAPS, "update_ratio", "by_position", "by_frequency", "probe_loss", "time"):
        assert len(tab.inner_text(f"#{plot} figcaption")) > 40, plot  # what to look for
    assert not tab.is_visible("#loss_scale")  # there is none


def test_lines_are_where_their_numbers_are(show: Callable[..., Any], one: str, folder: Path) -> None:
    """Ends of the learning rate's line, read back through the plot's own ticks."""
    tab = show(one)
    ticks = tab.eval_on_selector_all(
        "#learning_rate .grid text", "all => all.map(each => [each.textContent, Number(each.getAttribute('y'))])"
    )
    (low, bottom), (high, top) = sorted(
        (float(text), y) for text, y in ticks if re.fullmatch(r"0\.\d+|0", text) and y < 205
    )[:2]
    path = tab.get_attribute("#learning_rate path.line", "d")
    ys = [float(part.split()[1]) for part in re.split("[ML]", path)[1:]]
    steps = [
        e for e in map(json.loads, (folder / "first/metrics.jsonl").read_text().splitlines()) if e["event"] == "step"
    ]
    for y, event in zip(ys, steps, strict=True):
        assert low + (y - bottom) / (top - bottom) * (high - low) == pytest.approx(event["learning_rate"], abs=3e-5)


def test_heat_maps_are_coloured_by_their_numbers(show: Callable[..., Any], one: str) -> None:
    tab = show(one)
    # Dead units: none in layer 0, most in the last one; dark is low, bright is high.
    assert sum(pixel(tab, "dead_units", 0.5, 0.1)[:3]) < sum(pixel(tab, "dead_units", 0.5, 0.5)[:3])
    assert sum(pixel(tab, "dead_units", 0.5, 0.5)[:3]) < sum(pixel(tab, "dead_units", 0.5, 0.9)[:3])
    # Entropy falls with time.
    assert sum(pixel(tab, "attention_entropy", 0.02, 0.5)[:3]) > sum(pixel(tab, "attention_entropy", 0.98, 0.5)[:3])
    hover(tab, "#dead_units svg", {"x": 300, "y": 60})
    assert "layer 2" in tooltip(tab) and "4 %" in tooltip(tab)
    # Of a layer's four experts, the last one gets most tokens.
    assert sum(pixel(tab, "expert_tokens", 0.5, 0.04)[:3]) < sum(pixel(tab, "expert_tokens", 0.5, 0.29)[:3])
    hover(tab, "#expert_tokens svg", {"x": 300, "y": 60})
    assert re.search(r"expert \d\.\d.*[2468]0 %", tooltip(tab), re.DOTALL)
    before = pixel(tab, "parameters", 0.5, 0.5)
    tab.select_option("#parameters select", "second_moment")
    assert pixel(tab, "parameters", 0.5, 0.5) != before


def test_hover_tells_the_values_of_every_run(show: Callable[..., Any], folder: Path) -> None:
    tab = show((folder / "two.html").as_uri())
    box = reach(tab, "#loss svg")
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 90)
    told = tooltip(tab)
    assert re.search(r"^step 1[345]\d\n", told) and all(
        name in told for name in ("first, training", "second, training")
    )
    step = int(re.search(r"step (\d+)", told)[1])  # type: ignore[index]
    for name in ("first", "second"):
        events = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        loss = next(e["loss"] for e in events if e["event"] == "step" and e["step"] == step)
        value = float(re.search(rf"{name}, training\s+([\d.]+)", told)[1])  # type: ignore[index]
        assert value == pytest.approx(loss, rel=1e-3)
    tab.mouse.move(5, 5)
    assert tooltip(tab) == ""
    tab.focus("#loss svg")
    tab.keyboard.press("ArrowRight")
    assert tooltip(tab).startswith(f"step {step + 1}\n")


def test_dragging_zooms_every_plot_and_a_double_click_goes_back(show: Callable[..., Any], one: str) -> None:
    tab = show(one)
    box = reach(tab, "#loss svg")

    def drag(begin: float, end: float) -> None:
        tab.mouse.move(box["x"] + begin * box["width"], box["y"] + 80)
        tab.mouse.down()
        tab.mouse.move(box["x"] + end * box["width"], box["y"] + 80, steps=4)
        tab.mouse.up()

    drag(0.5, 0.75)
    assert 60 < points(tab, "loss")["loss"] < 100 and 60 < points(tab, "mfu")["mfu"] < 100
    assert tab.is_visible("#unzoom") and points(tab, "by_position")["step 0"] == 8
    tab.dblclick("#loss svg")
    assert points(tab, "loss")["loss"] == STEPS - 1 and not tab.is_visible("#unzoom")
    drag(0.5, 0.75)
    tab.click("#unzoom")
    assert points(tab, "mfu")["mfu"] == STEPS


def test_the_controls_do_what_they_say(show: Callable[..., Any], one: str) -> None:
    tab = show(one)
    assert labels(tab, "loss").endswith("step") and labels(tab, "layer_grad_norm").endswith("step")
    tab.click("#toolbar button:text-is('tokens')")
    assert labels(tab, "loss").endswith("tokens trained on") and "300k" in labels(tab, "loss")
    assert tab.get_attribute("#toolbar button:text-is('tokens')", "aria-pressed") == "true"
    tab.click("#toolbar button:text-is('time')")
    assert labels(tab, "mfu").endswith("time in steps (s)")
    tab.click("#toolbar button:text-is('steps')")

    raw = tab.get_attribute("#loss path.line", "d")
    tab.click("#toolbar button:text-is('5 %')")
    assert tab.get_attribute("#loss path.line.faint", "d") == raw  # the raw line stays, faint
    smooth = tab.get_attribute("#loss path.line:not(.faint)", "d")

    def roughness(path: str) -> float:
        ys = [float(part.split()[1]) for part in re.split("[ML]", path)[1:]]
        return sum(abs(b - a) for a, b in itertools.pairwise(ys[200:]))

    assert roughness(smooth) < roughness(raw) / 5
    tab.click("#toolbar button:text-is('off')")
    assert tab.get_attribute("#loss path.line", "d") == raw

    tab.click("#loss .tool:text-is('log')")
    logarithmic = tab.get_attribute("#loss path.line", "d")
    assert logarithmic != raw and points(tab, "loss")["loss"] == STEPS - 1
    tab.click("#loss .tool:text-is('log')")
    assert tab.get_attribute("#loss path.line", "d") == raw

    tab.click("#loss .legend button:has-text('validation')")
    assert points(tab, "loss") == {"loss": STEPS - 1}
    assert points(tab, "perplexity").keys() == {"loss", "validation_perplexity"}  # a plot's legend is its own
    tab.click("#loss .legend button:has-text('validation')")
    assert points(tab, "loss") == LINES["loss"]


def test_the_slider_moves_the_probe_through_training(show: Callable[..., Any], one: str, folder: Path) -> None:
    tab = show(one)
    events = [
        e for e in map(json.loads, (folder / "first/study.jsonl").read_text().splitlines()) if e["event"] == "probe"
    ]

    def shown() -> tuple[str, list[int]]:
        tokens = tab.eval_on_selector_all(
            ".tokens span", "all => all.map(each => parseInt(each.style.getPropertyValue('--loss') || '0'))"
        )
        return tab.inner_text(".slider output"), tokens

    text, losses = shown()
    assert text.startswith("step 300 ") and tab.text_content(".tokens") == "".join(events[-1]["tokens"]).replace(
        "\n", "⏎\n"
    )
    tab.fill(".slider input", "0")
    text, first = shown()
    mean = sum(events[0]["losses"][1:]) / len(events[0]["losses"][1:])
    assert text.startswith(f"step 20 · mean loss {mean:.4g}"[:26])
    assert first == [0, *(round(100 * min(1, loss / 8)) for loss in events[0]["losses"][1:])]
    assert sum(first) > sum(losses)
    hover(tab, ".tokens span >> nth=1")
    told = tooltip(tab)
    assert f"{events[0]['losses'][1]:.3g}" in told and all(word in told for word in ("“the”", "“of”", "50 %", "“⏎”"))


def test_samples_ledger_groups_and_settings_are_there(show: Callable[..., Any], folder: Path) -> None:
    tab = show((folder / "two.html").as_uri())
    assert tab.locator("#samples li").count() == 15 and "name300" in tab.inner_text("#samples li >> nth=0")
    assert "190,322" in tab.inner_text("#data-books")
    for name in ("Decay groups", "Truth sheet", "Configuration"):
        tab.click(f"summary:text-is('{name}')")
    text = tab.inner_text("#sheets")
    assert "1,376,256" in text and "LlamaForCausalLM" in text
    differing = tab.eval_on_selector_all("#sheets tr.differs", "all => all.map(each => each.innerText)")
    assert sorted(line.split("\t") for line in differing) == [
        ["optimizer.learning_rate", "0.003", "0.01"],
        ["run.seed", "0", "3"],
    ]


def test_several_runs_are_laid_over_each_other(show: Callable[..., Any], folder: Path) -> None:
    tab = show((folder / "two.html").as_uri())
    assert tab.locator("#summary article").count() == 2
    keys = tab.eval_on_selector_all("#loss path.line", "all => all.map(each => each.dataset.key)")
    assert keys == ["first/loss", "second/loss", "first/validation_loss", "second/validation_loss"]
    colors = tab.eval_on_selector_all("#mfu path.line", "all => all.map(each => getComputedStyle(each).stroke)")
    assert len(set(colors)) == 2
    tab.click("#toolbar .runs button:has-text('first')")
    keys = tab.eval_on_selector_all("#loss path.line", "all => all.map(each => each.dataset.key)")
    assert keys == ["second/loss", "second/validation_loss"]
    before = pixel(tab, "layer_grad_norm", 0.5, 0.5)
    tab.select_option("#detail", "second")
    assert pixel(tab, "layer_grad_norm", 0.5, 0.5) != before


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_everything_can_be_read(
    show: Callable[..., Any], folder: Path, width: int, scheme: str
) -> None:
    tab = show((folder / "two.html").as_uri(), width, scheme)
    for name in ("Decay groups", "Truth sheet", "Configuration"):
        tab.click(f"summary:text-is('{name}')")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    sticking_out = tab.evaluate(
        """width => [...document.querySelectorAll("figure, figure *, article, .card, h1, h2, p")].filter(
            each => !each.closest(".scroll, clipPath, [clip-path]") && each.getBoundingClientRect().right > width + 0.5
        ).map(each => each.tagName + " " + each.textContent.slice(0, 40))""",
        width,
    )
    assert sticking_out == []
    overlapping = tab.evaluate(
        """() => [...document.querySelectorAll("figure")].flatMap(figure => {
            const boxes = [...figure.querySelectorAll(".grid text")].map(each => each.getBoundingClientRect());
            return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
                Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
                Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(() => figure.id));
        })"""
    )
    assert overlapping == []  # of the axes' labels
    for selector in ("body", "figcaption", ".grid text", ".legend button"):
        assert contrast(tab, selector) > 4.5, selector
    dark = sum(color(tab, "body", "backgroundColor")) < 200
    assert dark == (scheme == "dark")
    tab.click("#theme")  # auto -> light
    assert sum(color(tab, "body", "backgroundColor")) > 600
    tab.click("#theme")
    assert sum(color(tab, "body", "backgroundColor")) < 200


def color(tab: Any, selector: str, name: str) -> list[float]:
    """Red, green and blue of an element."""
    text = tab.eval_on_selector(selector, f"each => getComputedStyle(each).{name}")
    return [float(value) for value in re.findall(r"[\d.]+", text)[:3]]


def contrast(tab: Any, selector: str) -> float:
    """Of a text on a card (WCAG 2.2's contrast ratio; 4.5 is its level AA)."""

    def luminance(channels: list[float]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    name = "fill" if selector == ".grid text" else "color"
    low, high = sorted([luminance(color(tab, selector, name)), luminance(color(tab, "figure", "backgroundColor"))])
    return (high + 0.05) / (low + 0.05)


def test_hostile_text_is_shown_as_text(show: Callable[..., Any], tmp_path: Path) -> None:
    hostile = make_run(tmp_path / HOSTILE.replace("/", "|"), 40, text=HOSTILE)
    set_state(hostile, HOSTILE, 40, HOSTILE)
    write(gather([RunFiles(hostile), RunFiles(make_run(tmp_path / "other", 40))]), tmp_path / "p.html")
    tab = show((tmp_path / "p.html").as_uri())
    for name in ("Decay groups", "Truth sheet", "Configuration"):
        tab.click(f"summary:text-is('{name}')")
    hover(tab, ".tokens span >> nth=-1")
    assert HOSTILE in tooltip(tab)
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 3
    for selector in ("#samples li >> nth=0", ".tokens", "#sheets", "#summary", "#by_frequency svg"):
        assert HOSTILE in tab.text_content(selector), selector
    assert HOSTILE.replace("/", "|") in tab.title()


def test_a_run_without_study_shows_the_rest(show: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 30, study=False)
    write(gather([RunFiles(folder)]), tmp_path / "p.html")
    (folder / "metrics.jsonl").unlink()
    write(gather([RunFiles(folder)]), tmp_path / "empty.html")
    tab = show((tmp_path / "p.html").as_uri())
    assert tab.is_visible("#loss") and not tab.is_visible("#inside") and not tab.is_visible("#probe")
    assert "Inside" not in tab.inner_text("nav")
    tab = show((tmp_path / "empty.html").as_uri())
    assert tab.is_visible("#summary") and not tab.is_visible("#learning")


def test_a_live_page_grows_with_its_run_and_keeps_what_was_chosen(show: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 100, state="running")
    with server.server([RunFiles(folder)], 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            tab = show(f"http://127.0.0.1:{serving.server_port}/")
            asked: list[str] = []
            tab.on("request", lambda request: asked.append(request.url))
            assert points(tab, "loss")["loss"] == 99 and tab.inner_text("#live") == "live"
            tab.click("#loss .legend button:has-text('validation')")
            tab.click("#mfu svg")
            tab.click("#toolbar button:text-is('tokens')")
            append(folder / "metrics.jsonl", metrics(160, 0, 20, after=100))
            append(folder / "study.jsonl", statistics(160, 0, 20, after=100))
            tab.locator("#samples li >> nth=7").wait_for(timeout=15_000)
            assert points(tab, "loss") == {"loss": 159}  # the legend's choice stays
            assert labels(tab, "loss").endswith("tokens trained on")
            assert tab.inner_text(".slider output").startswith("step 160 ")
            assert int(tab.get_attribute("#layer_grad_norm canvas", "data-columns")) == 8
            tab.evaluate("view.zoom([50_000, 90_000])")
            set_state(folder, "complete", 160)
            tab.locator("#live:text-is('run ended')").wait_for(timeout=15_000)
            assert 40 <= points(tab, "loss")["loss"] <= 44  # and the zoom, too
            assert "complete" in tab.inner_text("#summary")
            count = len(asked)
            tab.wait_for_timeout(3000)
            assert len(asked) == count and set(asked) == {f"http://127.0.0.1:{serving.server_port}/data.json"}
        finally:
            serving.shutdown()
            thread.join()


def test_a_damaged_run_is_shown_with_its_gaps(tmp_path: Path, show: Callable[..., Any]) -> None:
    """Values of every wrong kind in every file: the page shows the rest, and its script does not fail."""
    folder = make_run(tmp_path / "run", 60, every=10)
    log, study = folder / "metrics.jsonl", folder / "study.jsonl"
    written = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*written[:12], "garbage\n", *written[20:]]))
    odd: list[Any] = [
        None,
        True,
        "x",
        [],
        [None],
        {},
        {"a": [1]},
        -1,
        1e300,
        -1e300,
        1e-300,
        5e-324,
        float("nan"),
        float("-inf"),
        10**30,
    ]
    for step, value in enumerate(odd, 61):
        line, event = json.loads(written[-3]), json.loads(study.read_text().splitlines()[step % 2])
        append(
            log,
            [dict.fromkeys(line, value) | {"event": kind, "step": step} for kind in ("step", "evaluation", "sample")],
        )
        append(study, [dict.fromkeys(event, value) | {"event": event["event"], "step": step}])
    (folder / "status.json").write_text('{"state": ["x"], "step": {}, "reason": NaN}')
    (folder / "ledger.json").write_text('{"validation": {"bytes": "x", "gzip_bytes": NaN, "more": [{}]}, "train": 3}')
    (folder / "truth.json").write_text('{"batch": [], "parameters": {"total": "x", "groups": [3, {"names": {}}]}}')
    write(gather([RunFiles(folder)]), tmp_path / "page.html")
    tab = show((tmp_path / "page.html").as_uri())
    said = tab.inner_text("#summary")
    assert "metrics.jsonl: line 13 can't be read" in said and "have no line" in said
    path = tab.eval_on_selector("#loss path.line", "each => each.getAttribute('d')")
    assert path.count("M") >= 3  # before and after the step that was not finite, and after the gap
    for button in tab.query_selector_all("#toolbar button, .tools button"):
        if button.is_visible():
            button.click()
    assert not re.search("NaN|undefined|\\[object|Infinity", said)
