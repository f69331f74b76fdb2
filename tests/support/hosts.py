"""Several hosts on one machine: network namespaces with names, addresses and cables of their own.

Each host is a namespace with a hostname, an `/etc/hosts` and one network card, whose cable leads to a switch (a bridge,
in a namespace of its own, so that the machine's own network is left alone). Disks can be shared or private.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

MUST_RUN = "TRAIN_LOOP_CLUSTER_TESTS"  # CI sets it, so that nothing is skipped there
_CARD = "eth0"


def need(programs: Sequence[str]) -> None:
    """Skip a test where it cannot run, saying why; fail instead where it has to."""
    missing = [program for program in programs if shutil.which(program) is None]
    reason = f"needs {', '.join(missing)} (Debian: slurm-wlm munge iproute2)" if missing else ""
    if os.geteuid() != 0:
        reason = "needs root, to make hosts out of network namespaces"
    elif not reason:
        tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
        reason = "needs to make namespaces, which this machine refuses" if tried.returncode else ""
    if reason:
        cannot(reason)


def cannot(reason: str) -> None:
    """Skip a test, or fail where it has to run."""
    (pytest.fail if os.environ.get(MUST_RUN) == "must run" else pytest.skip)(reason)


class Hosts:
    """Hosts by name, with addresses 10.77.0.1, 10.77.0.2, ...; a context that leaves nothing behind."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        self._prefix = f"tl{uuid.uuid4().hex[:6]}"
        self._switch = f"{self._prefix}-switch"
        self._table = Path(tempfile.gettempdir()) / f"{self._prefix}-hosts"  # each host's /etc/hosts

    def space(self, name: str) -> str:
        """The name of a host's network namespace."""
        return f"{self._prefix}-{name}"

    def __enter__(self) -> "Hosts":
        try:
            self._ip("netns", "add", self._switch)
            self._ip("-n", self._switch, "link", "add", "hub", "type", "bridge")
            self._ip("-n", self._switch, "link", "set", "hub", "up")
            entries = "127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in self.addresses.items())
            self._table.write_text(entries)
            for name, address in self.addresses.items():
                space = self.space(name)
                self._ip("netns", "add", space)
                card = [_CARD, "netns", space, "type", "veth", "peer", "name", name, "netns", self._switch]
                self._ip("link", "add", *card)
                self._ip("-n", self._switch, "link", "set", name, "master", "hub", "up")
                self._ip("-n", space, "addr", "add", f"{address}/24", "dev", _CARD)
                self._ip("-n", space, "link", "set", _CARD, "up")
                self._ip("-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            self.kill(name)
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", self._switch], capture_output=True, check=False)
        self._table.unlink(missing_ok=True)

    def start(
        self, name: str, command: Sequence[object], private: dict[Path, Path] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command on a host.

        Args:
            name: the host.
            command: and its arguments.
            private: folders that only this host sees, each in the place of another one.
            options: for Popen.
        """
        places = {Path("/etc/hosts"): self._table} | (private or {})
        mounts = "".join(f"mount --bind '{own}' '{place}' && " for place, own in places.items())
        inside = f'hostname {name} && {mounts}exec "$@"'
        network = f"--net=/run/netns/{self.space(name)}"
        prefix = ["nsenter", network, "unshare", "--uts", "--mount", "bash", "-c", inside, name]
        return subprocess.Popen([*prefix, *map(str, command)], text=True, start_new_session=True, **options)

    def run(self, name: str, *command: object, **options: Any) -> str:
        """What a command on a host prints; it has to succeed."""
        started = self.start(name, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        out, err = started.communicate(timeout=60)
        assert started.returncode == 0, (command, out, err)
        return out

    def slow(self, name: str, megabits: int) -> None:
        """Let a host send no more than so many megabits a second: its steps take time, and nobody's cores."""
        rate = ["rate", f"{megabits}mbit", "burst", "32kb", "latency", "2s"]
        try:
            self._run("tc", "-n", self.space(name), "qdisc", "replace", "dev", _CARD, "root", "tbf", *rate)
        except subprocess.CalledProcessError as error:
            cannot(f"needs to slow a cable down, which this machine's kernel cannot (tc: {error.stderr.strip()})")

    def cut(self, name: str) -> None:
        """Pull a host's cable out of the switch."""
        self._ip("-n", self._switch, "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        self._ip("-n", self._switch, "link", "set", name, "up")

    def processes(self, name: str) -> list[int]:
        """The ids of all processes on a host."""
        found = subprocess.run(["ip", "netns", "pids", self.space(name)], capture_output=True, text=True, check=False)
        return [int(line) for line in found.stdout.split()]

    def kill(self, name: str) -> None:
        """`kill -9` of all processes on a host."""
        for _ in range(3):  # some may start others meanwhile
            for process in self.processes(name):
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _ip(self, *arguments: str) -> None:
        self._run("ip", *arguments)

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)
