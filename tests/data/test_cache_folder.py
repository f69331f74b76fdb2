"""The cache folder is shared: what is unfinished is its maker's, and goes with it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from train_loop.data import cache_folder
from train_loop.data.cache_folder import alone, sweep, unfinished, writing
from train_loop.errors import InputError

NAME = "0123456789abcdef0123"


def test_what_is_unfinished_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path / NAME) as folder:
        (folder / "part").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_stays(tmp_path: Path) -> None:
    with unfinished(tmp_path / NAME) as folder:
        (folder / "part").write_text("whole")
        os.rename(folder, tmp_path / NAME)
    assert [path.name for path in tmp_path.rglob("*")] == [NAME, "part"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        with unfinished(tmp_path / NAME) as folder:
            assert folder.stat().st_mode & 0o777 == 0o770
        with alone(tmp_path / "l"):
            assert (tmp_path / "l").stat().st_mode & 0o777 == 0o660
    finally:
        os.umask(before)


def test_a_sweep_leaves_the_living_alone(tmp_path: Path) -> None:
    with unfinished(tmp_path / NAME) as folder, alone(tmp_path / f"{NAME}.lock"):
        sweep(tmp_path)
        assert folder.is_dir() and (tmp_path / f"{NAME}.lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_removes_what_the_dead_left(tmp_path: Path) -> None:
    """Of whatever was being made, also by 0.1.0; a process that is killed cleans nothing up."""
    program = (
        "import os, signal, sys; from pathlib import Path; from train_loop.data.cache_folder import alone, unfinished\n"
        f"with alone(Path('{NAME}.lock')), unfinished(Path('{NAME}')) as made:\n"
        "    (made / 'part').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    (tmp_path / f"{NAME}.tmp-{cache_folder.socket.gethostname()}-4711").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_hosts_are_removed_after_a_day(tmp_path: Path) -> None:
    fresh, old = (tmp_path / f"{NAME}.tmp-elsewhere-0000000{number}" for number in (1, 2))
    for folder in (fresh, old):
        folder.mkdir()
        (folder / "part").write_text("half")
    yesterday = time.time() - 25 * 3600
    for path in (old, old / "part", fresh):
        os.utime(path, (yesterday, yesterday))
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [fresh]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """A user's folders and files, and a link that was planted under one of our names."""
    others = tmp_path / "others"
    others.mkdir()
    (others / "kept").write_text("kept")
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("notes", "notes.tmp", "my.lock", f"{NAME}.tmp-"):
        (cache / name).mkdir()
    (cache / f"{NAME}.tmp-{cache_folder.socket.gethostname()}-01234567").symlink_to(others)
    (cache / f"{NAME}.lock").symlink_to(others / "kept")
    before = sorted(cache.iterdir())
    sweep(cache)
    with alone(cache / f"{NAME}.lock"):
        pass
    assert sorted(cache.iterdir()) == before and (others / "kept").read_text() == "kept"


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with alone(tmp_path / "l"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and list(tmp_path.iterdir()) == []


def no_locks(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


def test_on_a_disk_without_locks_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder.fcntl, "flock", no_locks)
    with alone(tmp_path / "l"), alone(tmp_path / "l"), unfinished(tmp_path / NAME) as folder:
        sweep(tmp_path)
        assert folder.is_dir()


def test_a_colleagues_lock_file_can_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that may be read only, as under the usual umask."""
    real = os.open

    def denied(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode)

    (tmp_path / "l").write_text("")
    monkeypatch.setattr(cache_folder.os, "open", denied)
    with alone(tmp_path / "l"):
        file = real(tmp_path / "l", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            cache_folder.fcntl.flock(file, cache_folder.fcntl.LOCK_EX | cache_folder.fcntl.LOCK_NB)
        os.close(file)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), "(No space left on device); make room, or name another folder"),
        (OSError(30, "Read-only file system"), "(Read-only file system); name another folder with data.cache_dir"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, error: Exception, expected: str) -> None:
    with pytest.raises(InputError) as found, writing("data.cache_dir", tmp_path):
        raise error
    assert str(found.value).startswith(f"data.cache_dir: {tmp_path} cannot be used ") and expected in str(found.value)


def test_another_files_error_is_not_the_folders(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"^/data/t.txt: cannot be used \(Permission denied\)$"),
        writing("x", tmp_path),
    ):
        raise PermissionError(13, "Permission denied", "/data/t.txt")
    with pytest.raises(InputError, match=r"^x: the server has gone$"), writing("x", tmp_path):
        raise OSError("the server has gone")
