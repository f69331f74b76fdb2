"""scripts/bench/sharded_memory.py: a real sharded run, watched from outside."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT

BENCH = ROOT / "scripts" / "bench" / "sharded_memory.py"
HOLDS = """
import mmap, sys
own = bytearray(b"1") * (64 << 20)
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(mapped[place] for place in range(0, len(mapped), mmap.PAGESIZE))
print(flush=True)
sys.stdin.read()
"""


def test_every_process_and_phase_of_a_sharded_run_is_seen() -> None:
    command = [sys.executable, str(BENCH), "--parameters", "1m", "--json", "--set", "export.verify=false"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["parallelism"] == "FSDP2"
    assert set(found["peaks"]) == set(found["phases"]) == {"0", "1"}
    for process, peaks in found["peaks"].items():
        assert 1e8 < peaks["anonymous"] < peaks["rss"] <= peaks["rss_kernel"] * 1.01
        phases = found["phases"][process]
        assert set(phases) >= {"imports", "building", "truth sheet", "training", "evaluation", "samples", "export"}
        assert max(each["anonymous"] for each in phases.values()) == peaks["anonymous"]
    assert 0 < found["seconds_to_first_step"] < found["seconds"]


def test_pages_of_files_do_not_count_as_a_process_own_memory(tmp_path: Path) -> None:
    bench: dict[str, Any] = runpy.run_path(str(BENCH))
    mapped = tmp_path / "mapped"
    mapped.write_bytes(bytes(128 << 20))
    program = [sys.executable, "-c", HOLDS, str(mapped)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        told = bench["_kilobytes"](Path(f"/proc/{process.pid}/status"))
    assert 64 << 10 < told["RssAnon"] < 96 << 10
    assert told["RssFile"] > 128 << 10
