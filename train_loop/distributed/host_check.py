"""Who is there? Asked on every host before its launcher, which would wait long for the others and name nobody.

    python -m train_loop.distributed.host_check --port PORT --number N HOST [HOST ...]

The first host listens, the others say their number. When all have, or the time is up, each is told who is missing.
Exit codes: 0 all are there, 1 somebody is not. Needs nothing but Python, and loads nothing else.
"""

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence

_PAUSE_SECONDS = 0.2


def listen(port: int, hosts: int, seconds: float) -> list[int]:
    """On the first host: the numbers of those who did not come in time; tells them to those who did."""
    ends = time.monotonic() + seconds
    came: dict[int, socket.socket] = {}
    with socket.create_server(("", port), backlog=hosts) as door:
        while len(came) < hosts - 1 and (left := ends - time.monotonic()) > 0:
            door.settimeout(left)
            try:
                guest, _ = door.accept()
                guest.settimeout(max(0.1, min(5.0, left)))
                came[int(guest.makefile().readline())] = guest
            except (OSError, ValueError):  # the time is up, or it was somebody else
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
    """On another host: say that it is there; the numbers of those who are missing, as the first host tells."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(5.0, left)) as first:
                first.sendall(f"{number}\n".encode())
                first.settimeout(seconds + 5)  # it may have begun to wait only now
                if line := first.makefile().readline():
                    return [int(each) for each in json.loads(line)]
        except OSError:  # not there yet
            pass
        time.sleep(_PAUSE_SECONDS)
    return [0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser("train_loop.distributed.host_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, required=True, help="of the first host")
    parser.add_argument("--number", type=int, required=True, help="of this host, from 0")
    parser.add_argument("--seconds", type=float, default=50.0, help="how long to wait for the others (50)")
    parser.add_argument("hosts", nargs="+", help="names or addresses of all, in their order")
    given = parser.parse_args(arguments)
    if not 0 <= given.number < len(given.hosts):
        parser.error(f"--number {given.number}: with {len(given.hosts)} hosts, from 0 to {len(given.hosts) - 1}")
    if given.number == 0:
        try:
            missing = listen(given.port, len(given.hosts), given.seconds)
        except OSError as error:
            print(f"train-loop: roll call: port {given.port}: {error.strerror}; name another one", file=sys.stderr)
            return 1
    else:
        missing = report(given.hosts[0], given.port, given.number, given.seconds)
    if missing:
        names = ", ".join(f"host {each} ({given.hosts[each]})" for each in missing)
        print(
            f"train-loop: roll call: {names} of {len(given.hosts)} did not come within {given.seconds:.0f} s, says "
            f"host {given.number} ({given.hosts[given.number]}, here {socket.gethostname()}); start it there, or see "
            f"whether port {given.port} of {given.hosts[0]} is open to it",
            file=sys.stderr,
        )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
