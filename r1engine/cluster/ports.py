"""Whether each host reaches a port of each other."""

from __future__ import annotations

import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from r1engine.ranks import World

SECONDS = 5.0  # for one connection
TOKEN_BYTES = 16


def unreached(world: World, hosts: list[str], ports: range | None) -> list[str]:
    """A text for each port that a host cannot open, and for each host that another does not reach. Collective.

    The first rank of each host listens for the time of the check, says a random number to who connects, and reads
    nothing. It connects to each host by its name, its own too: a name that stands for the loopback is found so.
    """
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    listener, problem = _open(ports) if world.rank in leaders else (None, "")
    token = secrets.token_bytes(TOKEN_BYTES)
    if listener is not None:
        threading.Thread(target=_say, args=(listener, token), daemon=True).start()
    port = listener.getsockname()[1] if listener is not None else 0
    there = world.everyones((port, token, problem))
    found = [f"{hosts[rank]}: {there[rank][2]}" for rank in leaders if there[rank][2]]
    own: list[str] = []
    if world.rank in leaders:
        targets = [(hosts[rank], there[rank][0], there[rank][1]) for rank in leaders if there[rank][0]]
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda target: _problem(*target), targets)
            own = [f"{hosts[world.rank]} does not reach {answer}" for answer in answers if answer]
    everyones = world.everyones(own)  # all have asked
    if listener is not None:
        listener.close()
    return found + [text for texts in everyones for text in texts]


def _open(ports: range | None) -> tuple[socket.socket | None, str]:
    """A listener on the first port that is free."""
    problem = ""
    for port in ports or [0]:
        try:
            is_dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if is_dual else socket.AF_INET
            return socket.create_server(("", port), family=family, dualstack_ipv6=is_dual), ""
        except OSError as error:
            problem = f"port {port}: {error.strerror}"
    return None, f"found no free port ({problem}), required one of {ports[0]}-{ports[-1]}" if ports else problem


def _say(listener: socket.socket, token: bytes) -> None:
    with suppress(OSError):  # the check is over
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(token)


def _problem(host: str, port: int, token: bytes) -> str:
    """Why this host does not reach the port; "" if it does."""
    try:
        with socket.create_connection((host, port), timeout=SECONDS) as connection:
            said = b""
            while len(said) < TOKEN_BYTES and (piece := connection.recv(TOKEN_BYTES - len(said))):
                said += piece
    except OSError as error:
        return f"{host} port {port}: {error.strerror or error}"
    return "" if said == token else f"{host} port {port}: somebody else answers; the name is that of another machine"
