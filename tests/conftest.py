"""What is settled before any test: variables, what a test is marked with, and in which order tests run on which worker.

Nothing comes from a hub: a folder on disk stands for a repository.
"""

import collections
import gc
import os
import signal
import tempfile
from typing import Any

# Set before any library reads them: no network, and no cache outside the tests' own folder.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="train_loop-tests-")
os.environ["TRAIN_LOOP_CACHE"] = os.environ["HF_HOME"] + "/train_loop"
os.environ["ACCELERATE_USE_CPU"] = "true"
# Models this small are fastest on one thread, and tests that start several processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

RUNS = {
    "test_architectures.py",
    "test_fuzz.py",
    "test_streams.py",
    "test_gpu_day.py",
    "test_soak.py",
    "test_versions.py",
    "test_devices.py",
    "test_golden.py",
    "test_old_runs.py",
    "test_estimate.py",
    "test_sharded_memory.py",
}
"""Files whose tests start whole runs in ways of their own."""
LAUNCHED = {
    "test_launching.py",
    "test_processes.py",
    "test_study.py",
    "test_hsdp.py",
    "test_experts.py",
    "test_shards.py",
    "test_gloo.py",
    "test_survival.py",
}
"""Files of `distributed` whose tests start several processes."""
SECONDS = {"cluster": 30.0, "distributed": 8.0, "slow": 15.0, "browser": 2.0, "run": 1.5, "unit": 0.05}
"""What a test takes, roughly, by its marks: long files are begun first, so that no worker is left alone with one."""

# What a shell runs in the background ignores interrupts, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and with them the libraries: not in the process that only hands tests out to workers."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        gc.disable()  # until all is loaded
        config.pluginmanager.import_plugin("tests.support.fixtures")


def pytest_collection_finish() -> None:
    """What is loaded by now stays: to look through it for what can be freed would take as long as some tests."""
    gc.freeze()
    gc.enable()


def place_of(nodeid: str) -> str:
    """What a test stays together with, on one worker."""
    file = nodeid.partition("::")[0]
    return "processes" if file.split("/")[1] in ("cluster", "distributed") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers a file stays together, and tests that start processes come one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # see `SECONDS`

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return place_of(nodeid)

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by what it needs, see CONTRIBUTING.md; with several workers, put long files first."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for item in items:
        folder, file = item.path.parent.name, item.path.name
        fixtures = set(getattr(item, "fixturenames", ()))
        if folder == "cluster":
            kind = "cluster"
        elif (folder, file) == ("report", "test_page.py"):
            kind = "browser"
        elif (folder == "distributed" and file in LAUNCHED) or file == "test_one_file_loop.py":
            kind = "distributed"
        else:
            kind = "run" if fixtures & {"command", "settings", "run"} or file in RUNS else "unit"
        item.add_marker(kind)
        seconds[place_of(item.nodeid)] += sum(SECONDS.get(mark.name, 0.0) for mark in item.iter_markers())
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -seconds[place_of(item.nodeid)])
