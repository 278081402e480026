"""A process beside one rank of an SGLang server, on the same GPU: takes its weights from the trainer's ranks.

It meets the trainer's ranks and the other receivers in a group, takes a round of tensors, and answers with a handle of
the memory that they lie in, which the trainer gives the server (`/update_weights_from_tensor`). So the server needs no
change, and gets of each round what this rank needs and no more.

    python -m r1engine.rollout.sglang.receiver --host HOST --port PORT --key FILE [--device cuda:0]

Commands come as JSON over HTTP with the servers' key; nothing that comes is unpickled.
"""

from __future__ import annotations

import argparse
import hmac
import json
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6
from typing import Any

import torch

from r1engine.rollout.sglang.buckets import Bucket, payload
from r1engine.rollout.sglang.delivery import ALIGNMENT, Parcel, Spec
from r1engine.rollout.sglang.key import key_of
from r1engine.rollout.sglang.peers import Meeting, PeerGroup, Transfer

MOST_BODY_BYTES = 2**26  # of a command: the names and shapes of a round


class Receiver:
    """What the commands do; one group, and the memory of the last two rounds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: PeerGroup | None = None
        self._kept: deque[torch.Tensor] = deque(maxlen=2)  # the server reads one while the next one comes
        self._one = threading.Lock()

    def join(self, meeting: Meeting, rank: int) -> None:
        """Meet the others, in place of those of an earlier group."""
        self.leave()
        with self._one:
            self._group = PeerGroup(meeting, rank, self._device)

    def leave(self) -> None:
        """End the group, also while it waits for a round, and free the memory."""
        group, self._group = self._group, None
        if group is not None:
            group.leave()
        self._kept.clear()

    def receive(self, number: int, first: int, place: int, wanted: list[tuple[int, Parcel]]) -> str:
        """Take a round and return its handle, as the server's `serialized_named_tensors` wants it.

        Args:
            number: of the round.
            first:  member of the group that is rank 0 of this server.
            place:  rank of the server that this receiver stands beside.
            wanted: the parcels of that rank, each with its number in the round.
        """
        with self._one:
            if self._group is None:
                raise RuntimeError("this receiver is in no group; required a /join before")
            num_bytes = max(ALIGNMENT, sum(p.num_bytes for _, p in wanted))  # of nothing there is no handle
            flat = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            if not flat.is_cuda:
                flat.share_memory_()
            own, passed, taken = _transfers(flat, number, first, place, wanted)
            self._group.exchange([], own)
            self._group.exchange(passed, taken)
            self._kept.append(flat)
            return _handle(flat, wanted)


def tag(number: int, parcel: int, place: int) -> int:
    """Of a chunk of a parcel of a round."""
    return number % 2**7 * 2**24 + parcel * 2**8 + place


def _transfers(
    flat: torch.Tensor, number: int, first: int, place: int, wanted: list[tuple[int, Parcel]]
) -> tuple[list[Transfer], list[Transfer], list[Transfer]]:
    """Of a round: this rank's chunks from the trainer, the same to the others on its node, and theirs."""
    own, passed, taken = [], [], []
    start = 0
    for index, parcel in wanted:
        data = flat[start : start + parcel.num_bytes]
        for at, member in enumerate(parcel.members):
            chunk = data[parcel.chunk(at)]
            if member == place:
                own.append(Transfer(chunk, parcel.sources[at], tag(number, index, at)))
            else:
                at_own = parcel.members.index(place)
                passed.append(Transfer(data[parcel.chunk(at_own)], first + member, tag(number, index, at_own)))
                taken.append(Transfer(chunk, first + member, tag(number, index, at)))
        start += parcel.num_bytes
    return own, passed, taken


def _handle(flat: torch.Tensor, wanted: list[tuple[int, Parcel]]) -> str:
    names, tensors, starts, start = [], [], [], 0
    for _, parcel in wanted:
        end = start
        for spec in parcel.specs:
            names.append(spec.name)
            starts.append(end)
            end += spec.num_bytes
            tensors.append(flat[starts[-1] : end].view(getattr(torch, spec.dtype)).view(spec.shape))
        start += parcel.num_bytes
    return payload(Bucket(names, tensors), flat, starts)


def command(number: int, first: int, place: int, parcels: list[Parcel]) -> dict[str, Any]:
    """The body of /receive for one rank of a server: its parcels of a round."""
    wanted = [
        [index, p.sender, p.sources, p.members.start, p.members.stop, [[s.name, s.dtype, s.shape] for s in p.specs]]
        for index, p in enumerate(parcels)
        if place in p.members
    ]
    return {"round": number, "first": first, "place": place, "parcels": wanted}


def _parcels(body: dict[str, Any]) -> list[tuple[int, Parcel]]:
    """Of the body that `command` makes."""
    return [
        (
            index,
            Parcel(
                sender, tuple(sources), range(start, stop), tuple(Spec(n, d, tuple(shape)) for n, d, shape in specs)
            ),
        )
        for index, sender, sources, start, stop, specs in body["parcels"]
    ]


class _Commands(BaseHTTPRequestHandler):
    """POST /join, /receive, /leave; GET /health."""

    protocol_version = "HTTP/1.1"
    receiver: Receiver
    key: str

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        if not hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {self.key}"):
            self.close_connection = True  # what it wants is not read
            return self._answer(401, {})
        size = int(self.headers.get("Content-Length", "0"))
        if size > MOST_BODY_BYTES:
            self.close_connection = True
            return self._answer(413, {})
        try:
            answer = self._do(json.loads(self.rfile.read(size)))
        except Exception as error:  # whatever it is, the trainer names it
            return self._answer(400, {"success": False, "message": f"{type(error).__name__}: {error}"})
        return self._answer(200, {"success": True} | answer)

    def _do(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.path == "/join":
            self.receiver.join(Meeting(body["host"], body["port"], body["size"], body["name"]), body["rank"])
        elif self.path == "/receive":
            return {"payload": self.receiver.receive(body["round"], body["first"], body["place"], _parcels(body))}
        elif self.path == "/leave":
            self.receiver.leave()
        else:
            raise ValueError(f"found {self.path}, required /join, /receive or /leave")
        return {}

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def receiving(host: str, port: int, key: str, device: torch.device) -> ThreadingHTTPServer:
    """A server of the commands for one receiver; `serve_forever` runs it.

    Args:
        host:   to listen on.
        port:   0: a free one.
        key:    that every command must have.
        device: that the tensors come to.
    """
    if device.type == "cpu":
        torch.multiprocessing.set_sharing_strategy("file_system")  # the server is no child of this process
    handler = type("Commands", (_Commands,), {"receiver": Receiver(device), "key": key})
    kind = (
        type("Listener", (ThreadingHTTPServer,), {"address_family": AF_INET6}) if ":" in host else ThreadingHTTPServer
    )
    return kind((host, port), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="address that the trainer reaches, and no other")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", type=Path, required=True, help="file of mode 600 with a line 'api-key: ...'")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    receiving(args.host, args.port, key_of(args.key), device).serve_forever()


if __name__ == "__main__":
    main()
