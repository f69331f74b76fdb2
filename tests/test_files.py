"""Files appear whole, under names that nobody can plant."""

import os
import stat
from pathlib import Path

import pytest

from train_loop import files


def test_what_stood_there_is_replaced_in_one_go_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomically(path, "one\n")
    inode = path.stat().st_ino
    files.write_atomically(path, "two\n")
    assert path.read_text() == "two\n" and path.stat().st_ino != inode
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    for name in ("a.json", "a.json.tmp"):
        (tmp_path / name).symlink_to(precious)
    files.write_atomically(tmp_path / "a.json", "new")
    assert precious.read_text() == "x" and (tmp_path / "a.json").read_text() == "new"
    assert not (tmp_path / "a.json").is_symlink() and (tmp_path / "a.json.tmp").is_symlink()


def test_a_name_that_is_taken_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if somebody could foresee it."""
    monkeypatch.setattr(files, "new_token", lambda: "0" * 16)
    precious = tmp_path / "precious"
    planted = files.private(tmp_path / "a.json")
    for target in (precious, tmp_path / "nowhere"):
        planted.symlink_to(target)
        with pytest.raises(FileExistsError):
            files.write_atomically(tmp_path / "a.json", "new")
        assert not precious.exists() and not (tmp_path / "nowhere").exists()
        planted.unlink(missing_ok=True)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                files.write_atomically(tmp_path / "a.json", "two")
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "one")]


def test_a_folder_takes_another_s_place_whole(tmp_path: Path) -> None:
    for name in ("new", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    files.replace(tmp_path / "new", tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_of_libraries_get_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "model").mkdir()
        file = tmp_path / "model" / "weights"
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        files.share(file)
        files.write_atomically(tmp_path / "model" / "a.json", "x")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_page_goes_to_a_device_as_it_does_to_a_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    files.write_output(Path(f"/dev/fd/{writer}"), "page")
    os.close(writer)
    with open(reader) as pipe:
        assert pipe.read() == "page"
    files.write_output(tmp_path / "page.html", "page")
    assert (tmp_path / "page.html").read_text() == "page"
