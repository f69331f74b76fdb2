"""The report's data, its files and its server: it shows what the run's files say, in whatever state they are."""

import http.client
import json
import math
import signal
import socket
import struct
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
from train_loop.report.html_page import as_json, page
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
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "peak_memory_bytes", "balance_loss"):
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
    experts = data["experts"]["tables"]
    assert data["experts"]["rows"] == [f"{layer}.{expert}" for layer in range(3) for expert in range(4)]
    for name in ("tokens", "probability"):
        assert experts[name][6] == pytest.approx([event["experts"]["1"][name][2] for event in events], rel=1e-3)
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
    told = {
        "metrics.jsonl": ["metrics.jsonl: ends at step 0, and status.json says 40"],
        "status.json": [],
        "study.jsonl": [],
    }
    assert page(data) and data["runs"][0]["notes"] == told.get(missing, [f"{missing} is missing"])
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


def test_a_gap_in_the_log_is_a_gap_in_each_curve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=40)
    log = folder / "metrics.jsonl"
    written = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [event for event in written if event["event"] == "step"]
    kept = [event for event in written if event["step"] not in (1, 2, 10, 11, 12, 30)]
    log.write_text("".join(json.dumps(event) + "\n" for event in [*kept, kept[5]]))
    data = gather([RunFiles(folder)])["runs"][0]
    curve = dict(zip(data["curves"]["loss"]["step"], data["curves"]["loss"]["value"], strict=True))
    assert [step for step, value in curve.items() if value is None] == [2, 7, 12, 30]  # the 7th was not finite
    assert len(curve) == 34 + 3 and curve[13] == pytest.approx(steps[12]["loss"], rel=1e-5)
    assert data["notes"] == [
        "metrics.jsonl: steps 1 to 2, 10 to 12 and 30 have no line",
        f"metrics.jsonl: step {kept[5]['step']} has more than one line; the last one counts",
    ]
    assert data["totals"]["tokens"] == 34_000


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=40)
    lost = {"event": "evaluation", "step": 41, "loss": None, "perplexity": None, "reason": "the loss is nan"}
    append(folder / "metrics.jsonl", [{"event": "step", "step": 41, "loss": math.nan, "grad_norm": math.inf}, lost])
    data = gather([RunFiles(folder)])
    assert data["runs"][0]["notes"] == ["validation after step 41: the loss is nan"]
    assert "NaN" not in as_json(data) and "Infinity" not in as_json(data)


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
    assert sorted(files) == sorted((tmp_path / "png").iterdir()) and len(files) == 13 + 2 * 10
    for file in files:
        colors = Image.open(file).convert("RGB").getcolors(maxcolors=1 << 24)
        assert colors is not None and len(colors) > 20, file  # not blank


MISTAKES = {
    "no folder": (["--run", "nowhere"], "run nowhere: no such folder"),
    "no run": (["--run", "{empty}"], "holds no run (none of config.yaml"),
    "no name": ([], "--run"),
    "a file": (["--run", "{run}/truth.json"], "is a file; name the folder of a run"),
    "a folder in the way": (["--run", "{run}", "--output", "{empty}"], "cannot be written (is a folder)"),
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


def raw(port: int, request: bytes) -> bytes:
    """The answer to some bytes, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    return answer


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


OWN_NAMES = ("localhost", "LOCALHOST:1", "Localhost.:80", "127.0.0.1", "127.0.0.1:", "[::1]", "[::1]:8000")
STRANGERS = (
    *("elsewhere.example", "localhost.example", "127.0.0.1.example:80", "localhost:80@evil.example", "evil@localhost"),
    *("", ":80", "localhost:8o", "0.0.0.0", "[::2]", "localhost, evil.example", "http://localhost", "127.0.0.2"),
)


@pytest.mark.parametrize(
    ("request_", "status"),
    [(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % name.encode(), 200) for name in OWN_NAMES]
    + [(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % name.encode(), 403) for name in STRANGERS]
    + [
        (b"GET / HTTP/1.0\r\n\r\n", 200),  # needs no Host
        (b"GET / HTTP/1.0\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /?a=1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        *[
            (b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path, 404)
            for path in (b"/%zz", b"/%00", b"/../../etc/passwd", b"/%2e%2e/x", b"//etc/passwd", b"http://localhost/")
        ],
        *[
            (b"%s / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc" % method, 405)
            for method in (b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE")
        ],
        (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 70_000), 414),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/9.x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00 hello\r\n\r\n", 400),  # TLS
    ],
)
def test_each_request_has_its_answer(
    served: tuple[Path, int], capfd: pytest.CaptureFixture[str], request_: bytes, status: int
) -> None:
    answer = raw(served[1], request_)
    if request_.startswith((b"GET / HTTP/9", b"\x16")):  # no version, so no status line
        assert b"Error code: 400" in answer
    else:
        assert answer.split(None, 2)[1] == str(status).encode()
    assert (b"<script" in answer) == (status == 200)
    assert (b"Allow: GET, HEAD" in answer) == (status == 405)
    assert capfd.readouterr().err == ""


def test_head_is_get_without_a_body(served: tuple[Path, int]) -> None:
    head, get = (raw(served[1], b"%s /data.json HTTP/1.0\r\n\r\n" % method) for method in (b"HEAD", b"GET"))
    headers, body = get.split(b"\r\n\r\n", 1)

    def without_date(text: bytes) -> list[bytes]:
        return [line for line in text.split(b"\r\n") if line and not line.startswith(b"Date")]

    assert without_date(head) == without_date(headers) and b"Content-Length: %d" % len(body) in head


def test_clients_that_say_nothing_or_go_away_cost_nothing(
    served: tuple[Path, int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port = served
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(server.MOST_CONNECTIONS + 20)]
    assert ask(port, "/data.json")[0] == 200
    for each in idle[:10]:  # the oldest were ended, long before they were idle for too long
        each.settimeout(5)
        assert each.recv(1) == b""
    for each in idle:
        each.close()
    for request in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /data.json", b"\r\n", b""):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                connection.sendall(request)
    assert ask(port, "/")[0] == 200
    monkeypatch.setattr(server._Handler, "timeout", 0.05)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"GET / HT")
        assert slow.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_a_run_may_go_while_it_is_served(served: tuple[Path, int]) -> None:
    folder, port = served
    folder.rename(folder.with_name("elsewhere"))
    status, _, text = ask(port, "/data.json")
    assert status == 200 and json.loads(text)["runs"][0]["notes"] == ["the run's folder is gone"]
    folder.with_name("elsewhere").rename(folder)
    assert json.loads(ask(port, "/data.json")[2])["runs"][0]["curves"]["loss"]["step"][-1] == 40


def test_a_port_in_use_is_one_line(command: Command, served: tuple[Path, int]) -> None:
    folder, port = served
    assert command("report", "--run", folder, "--serve", port) == 2
    assert f"--serve {port}: " in command.err and "choose another port" in command.err
    assert command.err.count("\n") == 1
    with pytest.raises(InputError):
        server.server([], port)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_quietly(run: Path, number: int) -> None:
    command = [sys.executable, "-m", "train_loop", "report", "--run", str(run), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip()
        assert ask(int(address.rstrip("/").rpartition(":")[2]), "/")[0] == 200
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""
