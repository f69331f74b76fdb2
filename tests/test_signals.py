"""Stop signals: what they do at which moment, to whom they answer, and what is as before afterwards."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from train_loop.errors import Interrupted
from train_loop.signals import STOP_SIGNALS, StopRequest, exit_code


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever happens here, other tests have their handlers."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def current() -> list[object]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_interrupts_what_can_be_started_again(number: signal.Signals) -> None:
    before = current()
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught, StopRequest() as stop:
        try:
            send(number)
        except Exception:  # of a library that goes on after whatever happens
            pytest.fail("swallowed")
    assert caught.value.name == number.name and stop.name == number.name and isinstance(caught.value, KeyboardInterrupt)
    assert current() == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_only_asks_once_there_is_something_to_save(number: signal.Signals) -> None:
    before = current()
    with StopRequest() as stop:
        stop.defer()
        send(number)
        assert stop.asked and stop.name == number.name
        send(signal.SIGTERM)
        assert stop.name == number.name
        with pytest.raises(KeyboardInterrupt) as caught:
            send(signal.SIGINT)
        assert not isinstance(caught.value, Interrupted)
    assert current() == before


def test_several_signals_at_once_don_t_break_off_the_tidying() -> None:
    """A closed terminal, or a launcher, sends more than one."""
    tidy = False
    with pytest.raises(Interrupted, match="SIGHUP"), StopRequest():
        try:
            send(signal.SIGHUP)
        finally:
            send(signal.SIGTERM)
            send(signal.SIGHUP)
            tidy = True
    assert tidy


def test_under_nohup_a_closed_terminal_does_not_matter() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop, StopRequest() as inner:
        send(signal.SIGHUP)
        assert not stop.asked and not inner.asked
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_innermost_context_gets_the_signal() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            inner.defer()
            send(signal.SIGTERM)
        assert inner.asked and not outer.asked
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_signals_that_are_ignored_from_now_on_stay_so() -> None:
    """Also where a command around the run would bring its own handlers back."""
    with StopRequest(), StopRequest() as inner:
        inner.ignore_from_now_on()
    send(signal.SIGTERM)
    send(signal.SIGHUP)


@pytest.mark.parametrize(("processes", "ignored"), [("1", False), ("2", True)])
def test_the_first_of_several_processes_that_ends_does_not_change_how_the_others_end(
    monkeypatch: pytest.MonkeyPatch, processes: str, ignored: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(Interrupted), StopRequest():
        send(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM) is signal.SIG_IGN) == ignored


def test_other_threads_leave_signals_alone() -> None:
    before = current()

    def work() -> None:
        with StopRequest() as stop:
            stop.defer()
            assert current() == before

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize(("restarts", "so_far", "expected"), [(None, None, 3), ("0", "0", 3), ("2", "1", 0)])
def test_to_a_launcher_that_restarts_a_stop_is_a_success(
    monkeypatch: pytest.MonkeyPatch, restarts: str | None, so_far: str | None, expected: int
) -> None:
    for name, value in (("MAX_RESTARTS", restarts), ("RESTART_COUNT", so_far)):
        if value is not None:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert exit_code() == expected
