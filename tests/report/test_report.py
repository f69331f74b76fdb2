"""The report's data, its files and its server: it shows what the run's files say, in whatever state they are."""

import http.client
import json
import math
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.made_run import HOSTILE, MAX_GRAD_NORM, append, make_run, metrics, set_state
from tests.support.runs import Command
from train_loop.errors import InputError
from train_loop.report import downsample, server
from train_loop.report.html_page import page
from train_loop.report.page_data import MOST_PROBES, gather, names
from train_loop.report.run_reader import RunFiles


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of 300 steps."""
    return make_run(tmp_path_factory.mktemp("runs") / "first")


def lines(path: Path, kind: str) -> list[dict]:
    """The events of one kind in a log, read plainly."""
    return [event for event in map(json.loads, path.read_text().splitlines()) if event["event"] == kind]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400), st.integers(8, 60))
def test_thinning_keeps_ends_extremes_and_order(values: list[float], most: int) -> None:
    array = np.array(values)
    kept = downsample.kept(array, most)
    assert (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == len(values) - 1
    assert len(kept) <= most or len(values) <= most
    if len(values) <= most:
        assert len(kept) == len(values)
    if not np.isnan(array).all():
        assert np.nanmax(array[kept]) == np.nanmax(array) and np.nanmin(array[kept]) == np.nanmin(array)
    assert np.isnan(array[kept]).any() == np.isnan(array).any()


def test_a_spike_of_one_step_stays_a_spike_at_any_length(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", steps=0)
    count = 50_000
    losses = [2 + math.sin(step / 900) for step in range(count)]
    losses[31_337] = 9.5
    append(folder / "metrics.jsonl", [{"event": "step", "step": n + 1, "loss": loss} for n, loss in enumerate(losses)])
    curve = gather([RunFiles(folder)])["runs"][0]["curves"]["loss"]
    assert len(curve["value"]) <= 2000 and curve["value"][curve["step"].index(31_338)] == 9.5
    assert curve["step"][0] == 1 and curve["step"][-1] == count
    # A smooth line is drawn through the buckets' means: together they have the mean of all.
    assert np.mean(curve["mean"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_every_number_is_the_files(run: Path) -> None:
    data = gather([RunFiles(run)])["runs"][0]
    steps, evaluations = lines(run / "metrics.jsonl", "step"), lines(run / "metrics.jsonl", "evaluation")
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "peak_memory_bytes"):
        curve = data["curves"][name]
        assert curve["step"] == [event["step"] for event in steps]
        assert [value is None for value in curve["value"]] == [event[name] is None for event in steps]
        numbers = [event[name] for event in steps if event[name] is not None]
        assert [value for value in curve["value"] if value is not None] == pytest.approx(numbers, rel=1e-5)
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy"):
        assert data["curves"][f"validation_{name}"]["value"] == pytest.approx([e[name] for e in evaluations], rel=1e-5)
    clipped = [event["step"] for event in steps if (event["grad_norm"] or 0) > MAX_GRAD_NORM]
    assert data["marks"]["clipped"]["step"] == clipped and data["totals"]["clipped"] == len(clipped) > 0
    assert data["marks"]["skipped"]["step"] == [7] and data["totals"]["skipped"] == 1
    assert data["axis"]["tokens"] == [0, *np.cumsum([event["tokens"] for event in steps]).tolist()]
    assert data["axis"]["seconds"] == pytest.approx([0, *np.cumsum([event["seconds"] for event in steps]).tolist()])
    assert data["groups"][0]["weight_decay"] == 0.1 and data["ledger"]["validation"]["gzip_bytes"] == 190_322


def test_the_parts_of_a_step_add_up_to_it(run: Path) -> None:
    time = gather([RunFiles(run)])["runs"][0]["time"]
    whole = np.sum(list(time["parts"].values()), axis=0).mean()
    assert whole == pytest.approx(
        np.mean([event["seconds"] for event in lines(run / "metrics.jsonl", "step")]), rel=1e-2
    )


def test_layers_heads_and_parameters_are_the_files(run: Path) -> None:
    data = gather([RunFiles(run)])["runs"][0]
    events = lines(run / "study.jsonl", "statistics")
    assert data["layers"]["rows"] == ["0", "1", "2"] and data["layers"]["step"] == [event["step"] for event in events]
    for name in ("grad_norm", "update_ratio", "activation_rms", "dead_units"):
        for layer in range(3):
            wanted = [event["layers"][str(layer)][name] for event in events]
            assert data["layers"]["tables"][name][layer] == pytest.approx(wanted, rel=1e-3)
    heads = data["heads"]["tables"]["attention_entropy"]
    assert data["heads"]["rows"] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert heads[3] == pytest.approx([event["layers"]["1"]["attention_entropy"][1] for event in events], rel=1e-3)
    assert len(data["parameters"]["rows"]) == 7
    assert data["curves"]["logits_z"]["value"] == pytest.approx([event["logits"]["z"] for event in events], rel=1e-5)
    assert data["by_position"]["values"][-1] == pytest.approx(events[-1]["loss_by_position"], rel=1e-4)


def test_the_probe_is_the_files(run: Path) -> None:
    probe, events = gather([RunFiles(run)])["runs"][0]["probe"], lines(run / "study.jsonl", "probe")
    assert len(probe["events"]) == len(events) <= MOST_PROBES
    for found, event in zip(probe["events"], events, strict=True):
        assert [probe["strings"][token] for token in found["tokens"]] == event["tokens"]
        assert found["losses"][0] is None and found["losses"][1:] == pytest.approx(event["losses"][1:], rel=1e-3)
        assert found["top"][0] == []
        assert [[probe["strings"][word], share] for word, share in found["top"][1]] == [
            [word, pytest.approx(share, rel=1e-2)] for word, share in event["top"][1]
        ]


@pytest.mark.parametrize(
    "missing", ["config.yaml", "truth.json", "ledger.json", "status.json", "metrics.jsonl", "study.jsonl"]
)
def test_whatever_is_missing_the_rest_is_shown(tmp_path: Path, missing: str) -> None:
    folder = make_run(tmp_path / "run", steps=40)
    (folder / missing).unlink()
    data = gather([RunFiles(folder)])
    lost = ["metrics.jsonl: ends at step 0; status.json says 40"] if missing == "metrics.jsonl" else []
    assert page(data) and data["runs"][0]["notes"] == lost
    assert ("loss" in data["runs"][0]["curves"]) == (missing != "metrics.jsonl")
    assert (data["runs"][0]["layers"] is None) == (missing == "study.jsonl")


def test_what_is_damaged_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=40)
    (folder / "truth.json").write_text('{"batch": {"st')
    (folder / "config.yaml").write_bytes(b"\xff\xfe[")
    (folder / "ledger.json").write_text("[1, 2]")
    count = len((folder / "metrics.jsonl").read_text().splitlines()) + 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '\x00\x00\n[]\n{"event": "step", "step": "x"}\n{"event": "evaluation", "step": 40, "loss": "high"}\n'
        )
        file.write('{"event": "step", "step": 41, "los')  # being written
    found = gather([RunFiles(folder)])["runs"][0]
    assert len(found["curves"]["loss"]["step"]) == 40 and found["curves"]["loss"]["step"][-1] == 40
    assert found["notes"] == [
        "config.yaml can't be read: it is damaged, or is being written",
        "truth.json can't be read: it is damaged, or is being written",
        "ledger.json can't be read: it is damaged, or is being written",
        f"metrics.jsonl: lines {count} to {count + 2} can't be read and are left out",
    ]
    for shape in ({"layers": [1]}, {"layers": {"0": 3}}, {"parameters": "x", "logits": 7}, {"loss_by_position": 1}):
        append(folder / "study.jsonl", [{"event": "statistics", "step": 50, **shape}])
        assert page(gather([RunFiles(folder)]))
    append(folder / "study.jsonl", [{"event": "probe", "step": 60, "tokens": 3, "top": [[["a"]], 5], "losses": [1]}])
    assert page(gather([RunFiles(folder)]))


def test_a_growing_run_is_followed_and_one_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=40, state="running")
    files = RunFiles(folder)
    log = folder / "metrics.jsonl"
    text = json.dumps({"event": "step", "step": 41, "loss": 1.5}) + "\n"
    with log.open("a") as file:
        file.write(text[:20])
    files.refresh()
    assert len(files.steps["loss"]) == 40
    with log.open("a") as file:
        file.write(text[20:])
    files.refresh()
    assert len(files.steps["loss"]) == 41 and files.steps["loss"][-1] == 1.5
    # A resumed run cuts it back in place; one that was copied here replaces it.
    shorter = "".join(json.dumps(event) + "\n" for event in metrics(20, 0, 20))
    log.write_text(shorter)
    files.refresh()
    data = gather([files])["runs"][0]
    assert data["curves"]["loss"]["step"][-1] == 20 and len(data["samples"]) == 1
    assert len(data["layers"]["step"]) == 2
    # Between two looks it may have grown past where it was.
    log.write_text("".join(json.dumps({"event": "step", "step": 1 + each, "loss": 2.5}) + "\n" for each in range(999)))
    files.refresh()
    assert list(files.steps["loss"]) == [2.5] * 999 and files.notes == []
    log.unlink()
    files.refresh()
    assert not files.steps["loss"]


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, steps=1, study=False) for name in ("x/run", "y/run", "z")]
    assert names([RunFiles(folders[0])]) == ["run"]
    assert names([RunFiles(folder) for folder in folders[:2]]) == ["x/run", "y/run"]
    assert names([RunFiles(folders[2]), RunFiles(folders[2])]) == ["z (1)", "z (2)"]


def test_hostile_text_stays_inside_the_data(tmp_path: Path) -> None:
    folder = make_run(tmp_path / HOSTILE.replace("/", "|"), steps=20, text=HOSTILE)
    plain = page(gather([RunFiles(make_run(tmp_path / "plain", steps=20))]))
    text = page(gather([RunFiles(folder)]))
    for sign in ("<script", "</script", "<img", "<!--"):
        assert text.count(sign) == plain.count(sign)
    between = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(between)["runs"][0]["samples"][0]["prompt"].endswith(HOSTILE)


def test_the_command_writes_one_page_and_needs_no_torch(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from train_loop.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib')))"
    )
    output = tmp_path / "page.html"
    command = [sys.executable, "-c", program, "report", "--run", str(run), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{output}\n" and result.stderr == ""
    assert "default-src 'none'" in output.read_text() and list(tmp_path.iterdir()) == [output]


def test_a_wheel_takes_the_pages_parts_along() -> None:
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["train_loop.report"]
    parts = [path for path in (root / "train_loop/report").iterdir() if path.is_file() and path.suffix != ".py"]
    assert {path.name for path in parts} >= {"page.html", "page.css", "page.js", "charts.js"}
    assert all(any(path.match(pattern) for pattern in patterns) for path in parts)


def test_the_page_stands_in_the_runs_folder(command: Command, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=20)
    assert command("report", "--run", folder) == 0
    assert command.out == f"{folder / 'report.html'}\n" and (folder / "report.html").stat().st_size > 20_000


def test_figures_are_drawn_for_papers(command: Command, run: Path, tmp_path: Path) -> None:
    from PIL import Image

    other = make_run(tmp_path / "$x_1$", steps=50, seed=2)  # a name, not a formula
    arguments = ["report", "--run", run, "--run", other, "--output", tmp_path / "p.html", "--png", tmp_path / "png"]
    assert command(*arguments) == 0
    files = [Path(line) for line in command.out.splitlines()][1:]
    assert sorted(files) == sorted((tmp_path / "png").iterdir()) and len(files) == 12 + 2 * 8
    for file in files:
        colors = Image.open(file).convert("RGB").getcolors(maxcolors=1 << 24)
        assert colors is not None and len(colors) > 20, file  # not blank


MISTAKES = {
    "no folder": (["--run", "nowhere"], "run nowhere: no such folder"),
    "no run": (["--run", "{empty}"], "holds no run (none of config.yaml"),
    "no name": ([], "--run"),
    "not a port": (["--run", "{run}", "--serve", "http"], "--serve: invalid int value: 'http'"),
    "no such port": (["--run", "{run}", "--serve", "70000"], "--serve 70000: the port must be between 0"),
    "a page and a server": (["--run", "{run}", "--serve", "0", "--output", "x"], "leave out --output and --png"),
    "a folder that isn't there": (["--run", "{run}", "--output", "{empty}/a/b.html"], "b.html: cannot be written"),
    "a file in the way": (
        ["--run", "{run}", "--output", "{empty}/p.html", "--png", "{run}/truth.json"],
        "cannot be written to",
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    command: Command, run: Path, tmp_path_factory: pytest.TempPathFactory, arguments: list[str], expected: str
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    assert command("report", *(each.format(run=run, empty=empty) for each in arguments)) == 2
    assert expected in command.err and command.err.count("\n") == 1 and command.out == ""
    assert list(empty.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command("report", "--run", run, "--output", tmp_path / "p.html", "--png", tmp_path / "png") == 2
    assert "pip install 'train-loop[report]'" in command.err and command.err.count("\n") == 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A run that goes on, and the port that its page is served at."""
    folder = make_run(tmp_path / "run", steps=40, state="running")
    with server.server([RunFiles(folder)], 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, serving.server_port
        serving.shutdown()
        thread.join()


def ask(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.headers), text


def test_the_server_answers_with_what_is_new(served: tuple[Path, int]) -> None:
    folder, port = served
    status, headers, text = ask(port, "/data.json")
    assert status == 200 and json.loads(text)["runs"][0]["curves"]["loss"]["step"][-1] == 40
    assert ask(port, "/data.json", If_None_Match=headers["ETag"])[0] == 304
    append(folder / "metrics.jsonl", [{"event": "step", "step": 41, "loss": 2.5}])
    status, again, text = ask(port, "/data.json", If_None_Match=headers["ETag"])
    assert status == 200 and again["ETag"] != headers["ETag"]
    assert json.loads(text)["runs"][0]["curves"]["loss"]["value"][-1] == 2.5
    set_state(folder, "complete", 41)
    assert json.loads(ask(port, "/data.json")[2])["runs"][0]["status"]["state"] == "complete"
    assert "connect-src 'self'" in ask(port, "/")[2]


def test_only_this_machine_is_answered_under_its_own_name(served: tuple[Path, int]) -> None:
    _, port = served
    assert ask(port, "/data.json", Host=f"localhost:{port}")[0] == 200
    assert ask(port, "/data.json", Host=f"elsewhere.example:{port}")[0] == 403
    assert ask(port, "/../config.yaml")[0] == 404
    assert server.HOST == "127.0.0.1"


def test_a_port_in_use_is_one_line(command: Command, served: tuple[Path, int]) -> None:
    folder, port = served
    assert command("report", "--run", folder, "--serve", port) == 2
    assert f"--serve {port}: " in command.err and "choose another port" in command.err
    assert command.err.count("\n") == 1
    with pytest.raises(InputError):
        server.server([], port)


def test_an_interrupt_ends_the_server_cleanly(run: Path) -> None:
    command = [sys.executable, "-m", "train_loop", "report", "--run", str(run), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip()
        assert ask(int(address.rstrip("/").rpartition(":")[2]), "/")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
