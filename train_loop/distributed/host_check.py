"""A roll call of the hosts, before the launcher starts: it would wait for a long time and not say who is missing.

    python -m train_loop.distributed.host_check --port PORT --number N HOST [HOST ...]

The first host listens, and the others send their numbers. When all have done so, or the time is up, every host learns
which hosts are missing. Exit codes: 0 if all hosts are there, 1 if one is missing. It needs and loads only Python.
"""

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence

_PAUSE_SECONDS = 0.2


def listen(port: int, hosts: int, seconds: float) -> list[int]:
    """Run on the first host: find out which hosts did not report in time, send their numbers to the others."""
    ends = time.monotonic() + seconds
    came: dict[int, socket.socket] = {}
    with socket.create_server(("", port), backlog=hosts) as door:
        while len(came) < hosts - 1 and (left := ends - time.monotonic()) > 0:
            door.settimeout(left)
            try:
                guest, _ = door.accept()
                guest.settimeout(max(0.1, min(5.0, left)))
                came[int(guest.makefile().readline())] = guest
            except (OSError, ValueError):  # the time is up, or something else connected
                continue
        missing = sorted(set(range(1, hosts)) - set(came))
        for guest in came.values():
            with guest:
                try:
                    guest.sendall(json.dumps(missing).encode() + b"\n")
                except OSError:
                    continue
    return missing


def report(address: str, port: int, number: int, seconds: float) -> list[int]:
    """Run on another host: report to the first host, and return the numbers of the missing hosts that it answers."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(5.0, left)) as first:
                first.sendall(f"{number}\n".encode())
                first.settimeout(seconds + 5)  # the first host may have begun to wait only now
                if line := first.makefile().readline():
                    return [int(each) for each in json.loads(line)]
        except OSError:  # not there yet
            pass
        time.sleep(_PAUSE_SECONDS)
    return [0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the roll call; return the exit code."""
    parser = argparse.ArgumentParser("train_loop.distributed.host_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, required=True, help="the first host's port")
    parser.add_argument("--number", type=int, required=True, help="the number of this host, from 0")
    parser.add_argument("--seconds", type=float, default=50.0, help="how long to wait for the other hosts (default 50)")
    parser.add_argument("hosts", nargs="+", help="names or addresses of all hosts, in order")
    given = parser.parse_args(arguments)
    if not 0 <= given.number < len(given.hosts):
        parser.error(f"--number {given.number}: {len(given.hosts)} hosts have numbers from 0 to {len(given.hosts) - 1}")
    if not 0 < given.port < 65536 or not 0 < given.seconds <= 1e9:
        parser.error(
            f"--port {given.port} --seconds {given.seconds}: ports go to 65535, and it waits for 1e9 s at most"
        )
    if given.number == 0:
        try:
            missing = listen(given.port, len(given.hosts), given.seconds)
        except OSError as error:
            print(f"train-loop: roll call: port {given.port}: {error.strerror}; choose another one", file=sys.stderr)
            return 1
    else:
        missing = report(given.hosts[0], given.port, given.number, given.seconds)
    if missing:
        names = ", ".join(f"host {each} ({given.hosts[each]})" for each in missing)
        print(
            f"train-loop: roll call: {names} of {len(given.hosts)} did not report within {given.seconds:.0f} s, says "
            f"host {given.number} ({given.hosts[given.number]}, here {socket.gethostname()}); start it there, or check "
            f"whether port {given.port} of {given.hosts[0]} is open to it",
            file=sys.stderr,
        )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
