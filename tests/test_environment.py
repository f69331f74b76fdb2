"""What launchers say in environment variables."""

import pytest

from tests.support.runs import Command
from train_loop import environment
from train_loop.errors import InputError

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_MAX_RESTARTS")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "1e3", " 1", "\u0663", "9" * 30, "99999999"])
def test_a_number_that_is_none_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    if name == "TORCHELASTIC_MAX_RESTARTS" and value == "99999999":
        return environment.check()
    assert command("sample", "--model", "x", "--prompt", "a") == 2
    assert f"environment variable {name}: expected a whole number" in command.err and command.err.count("\n") == 1
    with pytest.raises(InputError, match=name):
        environment.check()


def test_a_rank_beyond_the_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    environment.check()  # some clusters set it alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK is 2, but WORLD_SIZE is 2"):
        environment.check()
