"""A user's machine need not be a cluster; CI's has to be."""

import os

import pytest

from tests.support import hosts


def test_what_cannot_run_here_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hosts.MUST_RUN, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(pytest.skip.Exception, match="needs no-such-program"):
        hosts.need(["no-such-program"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        hosts.need([])


def test_in_ci_nothing_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hosts.MUST_RUN, "must run")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(pytest.fail.Exception, match="needs no-such-program"):
        hosts.need(["no-such-program"])
