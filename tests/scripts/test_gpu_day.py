"""GPU day: what it says of bad input, of parts that fail or hang, and of a CPU; and that its checks can say no."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_day.sh"
VERDICTS = {"yes", "no", "failed", "skipped", None}
FIELDS = {"name", "verdict", "value", "expected", "unit", "why", "seconds"}


@pytest.fixture
def gpu_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`gpu_day("day")` -> the module of that name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: importlib.import_module(f"gpu_day.{name}")


def script(*arguments: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd="/")


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a mistake in the input."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("gpu_day: ")
    return line


def test_an_unknown_part_is_refused_with_those_that_there_are() -> None:
    line = refused(script("--cpu", "--python", sys.executable, "--parts", "machine", "trap"))
    assert "trap" in line and "traps" in line and "sharding" in line


def test_an_unknown_option_is_refused() -> None:
    assert "--gpu" in refused(script("--python", sys.executable, "--gpu"))


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(script("--cpu", "--python", sys.executable, "--output", tmp_path / "file" / "day"))
    assert "--output" in line and "file" in line


def test_a_python_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path / "python") in refused(script("--cpu", "--python", tmp_path / "python"))
    assert "--python" in refused(script("--cpu", "--python"))


@pytest.mark.parametrize("code", [0, 1])
def test_a_file_that_is_no_python_is_refused(tmp_path: Path, code: int) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nexit {code}\n")
    fake.chmod(0o755)
    assert "Python 3.11" in refused(script("--cpu", f"--python={fake}"))


def test_a_python_without_torch_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # no site-packages
    bare.chmod(0o755)
    assert "torch" in refused(script("--cpu", "--python", bare, "--output", tmp_path))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cpu_has_to_be_asked_for(tmp_path: Path) -> None:
    assert "--cpu" in refused(script("--python", sys.executable, "--output", tmp_path))


def test_help_has_a_line_for_each_part(gpu_day: Callable[[str], Any]) -> None:
    result = script("--python", sys.executable, "--help")
    assert result.returncode == 0
    for part in gpu_day("day").PARTS:
        assert part.about in result.stdout
        assert (ROOT / "scripts" / "gpu_day" / f"{part.name}.py").is_file()


def test_the_limits_fit_into_eight_minutes(gpu_day: Callable[[str], Any]) -> None:
    assert sum(part.seconds for part in gpu_day("day").PARTS) <= 470 < gpu_day("day").DAY_SECONDS == 480


FINE = "rows.check('fine', same, 1, 1)"
FAKES = {
    "fine": FINE,
    "crashing": f"{FINE}\nos.abort()",
    "failing": "rows.check('broken', lambda: 1 / 0)\n" + FINE,
    "saying_no": "rows.check('wrong', same, 1, 2)",
    "hanging": f"{FINE}\nprint(subprocess.Popen(['sleep', '60']).pid, flush=True)\ntime.sleep(60)",
    "slow": "time.sleep(2)",
    "early": "rows.check('early', same, time.time() - psutil.Process().create_time() > 1.5, True)",
    "deaf": f"{FINE}\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
}
PROLOGUE = """
import os, signal, subprocess, sys, time
import psutil
from pathlib import Path
from gpu_day.rows import Rows, same
rows = Rows(Path(sys.argv[sys.argv.index("--json") + 1]), float(sys.stdin.readline()))
"""


def fake_day(day: Any, output: Path, *names: str, seconds: float = 20, whole: float = 60) -> tuple[int, dict[str, Any]]:
    """Run made-up parts; the exit code and what is told of each."""
    parts = [day.Part(name, seconds, "made up") for name in names]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    code = day.day(
        parts,
        lambda part: [sys.executable, "-c", PROLOGUE + FAKES[part.name]],
        output,
        time.monotonic() + whole,
        environment,
    )
    told = json.loads((output / "day.json").read_text())["parts"]
    assert [each["part"] for each in told] == list(names)
    for name in names:
        assert all((output / f"{name}.{kind}").exists() for kind in ("json", "txt"))
    return code, {each["part"]: each for each in told}


def test_a_part_that_fails_does_not_stop_the_others(gpu_day: Callable[[str], Any], tmp_path: Path) -> None:
    code, told = fake_day(gpu_day("day"), tmp_path, "crashing", "failing", "saying_no", "fine")
    assert code == 1
    assert told["crashing"]["yes"] == 1 and "exit code" in told["crashing"]["ended"]
    assert (told["failing"]["failed"], told["failing"]["yes"], told["failing"]["ended"]) == (1, 1, "done")
    assert (told["saying_no"]["no"], told["saying_no"]["ended"]) == (1, "done")
    assert (told["fine"]["yes"], told["fine"]["ended"]) == (1, "done")
    assert "ZeroDivisionError" in (tmp_path / "failing.txt").read_text()


def test_a_day_of_good_parts_ends_with_0(gpu_day: Callable[[str], Any], tmp_path: Path) -> None:
    assert fake_day(gpu_day("day"), tmp_path, "fine")[0] == 0


@pytest.mark.parametrize("name", ["hanging", "deaf"])
def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_its_rows(
    name: str, gpu_day: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_day("day"), "PATIENCE_SECONDS", 1.0)
    began = time.monotonic()
    code, told = fake_day(gpu_day("day"), tmp_path, name, "fine", seconds=4)
    assert time.monotonic() - began < 20
    assert code == 1
    assert told[name]["yes"] == 1 and "ran out of time" in told[name]["ended"]
    assert told["fine"]["ended"] == "done"
    assert "ran out of time" in (tmp_path / f"{name}.txt").read_text()
    if name == "hanging":
        child = (tmp_path / "hanging.log").read_text().splitlines()[-1]
        state = Path(f"/proc/{child}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"  # nobody's child may stay a zombie


def test_a_day_that_is_over_starts_no_more_parts(gpu_day: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "fine.json").write_text('{"rows": [{"verdict": "yes"}]}')  # of an earlier day
    code, told = fake_day(gpu_day("day"), tmp_path, "fine", whole=0)
    assert code == 1
    assert told["fine"]["yes"] == 0 and "no time" in told["fine"]["ended"]


def test_a_part_is_there_before_it_is_its_turn(gpu_day: Callable[[str], Any], tmp_path: Path) -> None:
    _, told = fake_day(gpu_day("day"), tmp_path, "slow", "early")
    assert told["early"]["yes"] == 1, (tmp_path / "early.txt").read_text()


def test_a_day_that_is_stopped_leaves_no_part_behind(
    gpu_day: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day, before = gpu_day("day"), psutil.Process().children()
    wait = subprocess.Popen.wait

    def stopped(process: Any, timeout: float | None = None) -> int:
        if timeout is not None:  # while the first part is at work
            raise SystemExit(1)
        return wait(process)

    monkeypatch.setattr(subprocess.Popen, "wait", stopped)
    with pytest.raises(SystemExit):
        fake_day(day, tmp_path, "fine", "slow")
    left = [each for each in psutil.Process().children() if each not in before]
    assert not [each.cmdline() for each in left if each.status() != psutil.STATUS_ZOMBIE]


def test_a_row_says_what_became_of_its_check(gpu_day: Callable[[str], Any], tmp_path: Path) -> None:
    rows = gpu_day("rows")
    kept = rows.Rows(tmp_path / "part.json", 100)

    def skipped() -> Any:
        raise rows.Skipped("not here")

    kept.check("below", rows.at_most, 1.0, 2.0)
    kept.check("above", rows.at_most, 3.0, 2.0)
    kept.check("no number", rows.at_most, float("nan"), 2.0)
    kept.check("a figure", rows.figure, {"a": float("inf")})
    kept.check("skipped", skipped)
    kept.check("failed", lambda: [][0])
    kept.check("too late", rows.same, 1, 1, seconds=1000)
    found = json.loads((tmp_path / "part.json").read_text())["rows"]
    assert [row["verdict"] for row in found] == ["yes", "no", "no", None, "skipped", "failed", "skipped"]
    assert all(row.keys() == FIELDS for row in found)
    assert found[5]["why"].startswith("IndexError")


def test_a_wrong_product_is_noticed(gpu_day: Callable[[str], Any]) -> None:
    arithmetic = gpu_day("arithmetic")
    x, y = torch.randn(16, 16), torch.randn(16, 16)
    assert arithmetic._excess(x @ y, x, y) <= 1
    assert arithmetic._excess((x.bfloat16() @ y.bfloat16()).float(), x, y) > 1
    assert arithmetic._excess(y @ x, x, y) > 1


def test_fp32_that_is_less_is_noticed(gpu_day: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: bmm(x.bfloat16(), y.bfloat16()).float())
    found = gpu_day("arithmetic").fp32_is_fp32()
    assert found.verdict == "no" and found.why == "lost in bmm"


def test_documents_that_see_each_other_are_noticed(
    gpu_day: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from train_loop.training.objective import Objective

    isolation = gpu_day("isolation")
    objective = isolation._objective("llama", "sdpa", torch.float32)
    assert isolation.none_sees_another(objective).verdict == "yes"
    arguments = Objective._arguments

    def leaking(self: Objective, inputs: torch.Tensor, positions: torch.Tensor | None) -> dict[str, Any]:
        mask = {} if positions is None else {"attention_mask": torch.ones_like(inputs)}
        return arguments(self, inputs, positions) | mask

    monkeypatch.setattr(Objective, "_arguments", leaking)
    for check in (isolation.none_sees_another, isolation.no_gradient_reaches_another):
        assert check(objective).verdict == "no"
    assert isolation.one_at_a_time(objective, 1e-5).verdict == "no"


def test_a_look_at_the_future_is_noticed(gpu_day: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention

    def sees_the_future(*tensors: torch.Tensor, is_causal: bool = False, **options: Any) -> torch.Tensor:
        return attend(*tensors, is_causal=False, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sees_the_future)
    assert gpu_day("traps").no_future("sdpa", torch.float32).verdict == "no"


@pytest.mark.slow
def test_the_whole_day_on_a_cpu(gpu_day: Callable[[str], Any], tmp_path: Path) -> None:
    result = script("--cpu", "--python", sys.executable, "--output", tmp_path, seconds=600)
    told = json.loads((tmp_path / "day.json").read_text())["parts"]
    assert [each["part"] for each in told] == [part.name for part in gpu_day("day").PARTS]
    for each in told:
        assert each["ended"] == "done", (tmp_path / f"{each['part']}.txt").read_text()
        part = json.loads((tmp_path / f"{each['part']}.json").read_text())
        assert part["rows"] and (tmp_path / f"{each['part']}.txt").read_text()
        for row in part["rows"]:
            assert row.keys() == FIELDS and row["verdict"] in VERDICTS
            assert row["verdict"] not in ("no", "failed"), row
            assert row["why"] if row["verdict"] == "skipped" else row["value"] is not None, row
    assert result.returncode == 0, result.stderr
