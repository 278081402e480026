"""The trainer's side of the route `receivers`: every rank sends what it owns, to all servers at once.

In each round every rank has some of its tensors. What goes where follows from what all have (delivery.py). One rank of
the trainer commands the receivers of a server: they take the round, and the server loads it from their memory while the
next one travels.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.formats import Precision, stored
from r1engine.hf.tensors import hf_shapes
from r1engine.ranks import World
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.delivery import Parcel, ServerLayout, Spec, flows, parcels, rounds
from r1engine.rollout.sglang.dispatch import Endpoint, agree
from r1engine.rollout.sglang.key import is_local
from r1engine.rollout.sglang.peers import MEET_SECONDS, Meeting, PeerGroup, Transfer
from r1engine.rollout.sglang.receiver import command, tag
from r1engine.rollout.sglang.server import free_port

LOAD_SECONDS = 300.0  # of a round, into a server


@dataclass
class Sent:
    """Bytes of a delivery."""

    own: int = 0  # of the weights that this rank had
    to_a_server: int = 0  # that this rank sent to the first server
    received: list[int] = field(default_factory=list)  # by each rank of that server, from all


class Delivery:
    """One for each rank of the trainer; `meet` and `run` are collective."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        world: World,
        *,
        layout: ServerLayout,
        sizes: Mapping[str, int],
        limit: int,
        ports: range | None,
    ) -> None:
        """
        Args:
            endpoints: of the servers, with their receivers; the same on every rank.
            world:     the trainer's ranks.
            layout:    of every server, as if on one node.
            sizes:     Hugging Face name -> bytes on the server.
            limit:     bytes that a rank of a server takes at once.
            ports:     of which the first rank listens on one; None: any.
        """
        self.endpoints, self._world, self._layout, self._sizes, self._ports = endpoints, world, layout, sizes, ports
        self._limit = max(1, limit // world.pp_size)  # every pipeline stage cuts its rounds for itself
        self._group: PeerGroup | None = None
        self._members: list[tuple[str, int]] = []  # URLs of the group's servers, each with its failures so far
        self._first: dict[str, int] = {}  # URL -> member of the group that is rank 0 of that server
        self.is_broken = False  # the group, in the refresh that runs
        self.failed: list[str] = []  # why servers were left out in it

    # ------------------------------------------------------------------ the group

    def meet(self) -> None:
        """A group with the receivers of all usable servers; made anew when a server has come, gone or failed since."""
        self.is_broken, self.failed = False, []
        while True:
            members = [(endpoint.client.url, endpoint.failures) for endpoint in self._usable()]
            if not any(self._world.everyones(members != self._members)):
                return
            self.close()
            self._world.from_first(self._ask_receivers)
            agree(self.endpoints, self._world)
            self._members = [(endpoint.client.url, endpoint.failures) for endpoint in self._usable()]
            if self._members:
                self._open()
            agree(self.endpoints, self._world)

    def _ask_receivers(self) -> None:
        """Leave out servers without a full set of receivers that answer: waiting for them would take minutes."""
        ranks = self._layout.ranks
        for endpoint in self._usable():
            silent = [receiver.url for receiver in endpoint.receivers if not receiver.answers()]
            if silent or len(endpoint.receivers) != ranks:
                found = f"{', '.join(silent)} silent" if silent else f"{len(endpoint.receivers)}"
                self._fail(endpoint, ServerError(f"{endpoint.client.url}: found receivers {found}, required {ranks}"))

    def _open(self) -> None:
        usable, ranks = self._usable(), self._layout.ranks
        first = [self._world.size + number * ranks for number in range(len(usable))]
        self._first = {endpoint.client.url: start for endpoint, start in zip(usable, first, strict=True)}
        meeting = self._world.from_first(lambda: self._place(usable))
        asked: list[tuple[Endpoint, Future]] = []
        with ThreadPoolExecutor(len(usable) * ranks) as pool:
            for endpoint, start in zip(usable, first, strict=True) if self._world.is_first else ():
                for place, receiver in enumerate(endpoint.receivers):
                    body = vars(meeting) | {"rank": start + place}
                    asked.append((endpoint, pool.submit(receiver.post, "/join", body, seconds=2 * MEET_SECONDS)))
            problem = ""
            try:
                self._group = PeerGroup(meeting, self._world.rank, self._world.device)
            except RuntimeError as error:
                problem = str(error)
        refused = {endpoint.client.url: reason for endpoint, post in asked if (reason := post.exception())}
        for endpoint in [e for e in usable if e.client.url in refused] or (usable if problem else []):
            self._fail(endpoint, refused.get(endpoint.client.url) or ServerError(f"{endpoint.client.url}: {problem}"))

    def _place(self, usable: list[Endpoint]) -> Meeting:
        hosts = [urlsplit(receiver.url).hostname or "" for endpoint in usable for receiver in endpoint.receivers]
        host = "127.0.0.1" if all(map(is_local, hosts)) else socket.gethostname()
        port = free_port(host if host == "127.0.0.1" else "0.0.0.0", self._ports)
        return Meeting(host, port, self._world.size + len(hosts), f"r1engine-{port}")

    def close(self) -> None:
        """Leave the group; the receivers free their memory."""

        def leave(receiver: Client) -> None:
            with contextlib.suppress(ServerError):  # one that is gone has left the group
                receiver.post("/leave", {}, seconds=10.0)

        if self._group is not None:
            if self._world.is_first:
                urls = {url for url, _ in self._members}
                there = [r for e in self.endpoints if e.client.url in urls for r in e.receivers]
                with ThreadPoolExecutor(max(1, len(there))) as pool:
                    list(pool.map(leave, there))
            self._group.leave()
        self._group, self._members = None, []

    def _fail(self, endpoint: Endpoint, error: BaseException) -> None:
        """Leave a server out: nobody knows which weights it holds."""
        if not isinstance(error, ServerError):
            raise error
        endpoint.fail(f"in a refresh: {error}")
        self.failed.append(str(error))

    def _usable(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.endpoints if endpoint.is_usable]

    # ------------------------------------------------------------------ a delivery

    def run(self, weights: Iterable[tuple[str, torch.Tensor | None]], version: int) -> Sent:
        """This rank's weights to all servers; returns when the servers that it commands have loaded all ranks'.

        Args:
            weights: see `delivery.rounds`.
            version: of the weights.
        """
        sent, usable = Sent(received=[0] * self._layout.ranks), self._usable()
        if not usable:
            return sent
        size, rank = self._world.size, self._world.rank
        layouts = {endpoint.client.url: _on_nodes(self._layout, endpoint) for endpoint in usable}
        commanded = [endpoint for number, endpoint in enumerate(usable) if number * size // len(usable) == rank]
        own = rounds(weights, self._sizes, self._layout, self._limit)
        with ThreadPoolExecutor(4 * len(commanded) + 1) as pool:
            commands = [_Commanded(e, self._first[e.client.url], version, pool) for e in commanded]
            for number in itertools.count():
                share = next(own, None)
                if self._note_failures(commands):
                    self.is_broken = True  # their receivers do not go on, and whoever sends to them would wait
                shares = self._everyones(share)
                if shares is None:
                    break
                sent.own += sum(spec.num_bytes for spec in shares[rank])
                of_layout = {layout: parcels(shares, layout) for layout in dict.fromkeys(layouts.values())}
                for one in commands:
                    one.take(number, of_layout[layouts[one.endpoint.client.url]])
                found = {url: of_layout[layout] for url, layout in layouts.items()}
                self._send(number, usable, found, dict(share or []), sent)
            for one in commands:
                one.finish()
            if self._group is not None:
                self._note_failures(commands)
        self._blame(usable)
        return sent

    def _everyones(self, share: list[tuple[str, torch.Tensor]] | None) -> list[list[Spec]] | None:
        """What every rank has in a round; None: there is no more, or the group is broken."""
        specs = None if share is None else [_spec(name, tensor) for name, tensor in share]
        told = self._world.everyones((specs, self.is_broken))
        if any(is_broken for _, is_broken in told):
            self.close()  # else the receivers of other servers would wait for what does not come
            return None
        return None if all(found is None for found, _ in told) else [found or [] for found, _ in told]

    def _blame(self, usable: list[Endpoint]) -> None:
        """If the group broke and nobody knows by which server, all of them are left out."""
        self.is_broken = any(self._world.everyones(self.is_broken))
        agree(self.endpoints, self._world)
        if self.is_broken and all(endpoint.is_usable for endpoint in usable):
            for endpoint in usable:
                self._fail(endpoint, ServerError(f"{endpoint.client.url}: a transfer to its receivers failed"))

    def _send(
        self,
        number: int,
        usable: list[Endpoint],
        found: dict[str, list[Parcel]],
        tensors: dict[str, torch.Tensor],
        sent: Sent,
    ) -> None:
        """A round to all servers: each rank's tensors, and the chunks of others' that it forwards."""
        chunks, scattered, gathered = self._chunks(number, itertools.chain(*found.values()), tensors)
        transfers = [
            Transfer(chunks[_key(parcel, place)], self._first[url] + member, tag(number, index, place))
            for url, own in found.items()
            for index, parcel in enumerate(own)
            for place, member in enumerate(parcel.members)
            if parcel.sources[place] == self._world.rank
        ]
        for own in list(found.values())[:1]:
            counted = flows(own, self._world.size, self._layout)
            sent.to_a_server += counted.sent[self._world.rank]
            sent.received = [a + b for a, b in zip(sent.received, counted.received, strict=True)]
        try:
            assert self._group is not None  # there are servers
            self._group.exchange(scattered, gathered)
            self._group.exchange(transfers)
        except RuntimeError as error:
            self.is_broken = True
            gone = [(e, r) for e in usable for r in e.receivers if not r.answers()]
            for endpoint, receiver in gone:
                self._fail(endpoint, ServerError(f"{receiver.url}: the receiver has ended ({error})"))

    def _chunks(
        self, number: int, found: Iterable[Parcel], tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[_Key, torch.Tensor], list[Transfer], list[Transfer]]:
        """The chunks that this rank sends to servers, and what the ranks scatter to each other before."""
        flat: dict[tuple[Spec, ...], torch.Tensor] = {}
        chunks: dict[_Key, torch.Tensor] = {}
        scattered, gathered = [], []
        rank, known = self._world.rank, dict[_Key, int]()  # chunk -> its number, the same on every rank
        for parcel in found:
            for place, source in enumerate(parcel.sources):
                key = _key(parcel, place)
                if key in known:
                    continue
                known[key] = len(known)
                if parcel.sender == rank:
                    if parcel.specs not in flat:
                        flat[parcel.specs] = _flat(parcel, tensors)
                    chunks[key] = flat[parcel.specs][parcel.chunk(place)]
                    if source != rank:
                        scattered.append(Transfer(chunks[key], source, tag(number, known[key], 255)))
                elif source == rank:
                    size = parcel.chunk(place).stop - parcel.chunk(place).start
                    chunks[key] = torch.empty(size, dtype=torch.uint8, device=self._world.device)
                    gathered.append(Transfer(chunks[key], parcel.sender, tag(number, known[key], 255)))
        return chunks, scattered, gathered

    def _note_failures(self, commands: list[_Commanded]) -> bool:
        """Leave out servers that failed; whether there are any."""
        failed = [(one.endpoint, error) for one in commands if (error := one.error()) and one.endpoint.is_usable]
        for endpoint, error in failed:
            self._fail(endpoint, error)
        return bool(failed)


def sizes(arch: Architecture, precision: Precision) -> dict[str, int]:
    """Hugging Face name -> bytes on a server, scales included, of every tensor of the model."""
    shapes = hf_shapes(arch).items()
    return {name: sum(form.num_bytes for form in stored(name, shape, precision).values()) for name, shape in shapes}


class _Commanded:
    """A server whose receivers this rank commands."""

    def __init__(self, endpoint: Endpoint, first: int, version: int, pool: ThreadPoolExecutor) -> None:
        self.endpoint, self._first, self._version, self._pool = endpoint, first, version, pool
        self._loads: list[Future[None]] = []  # of each round, in order

    def take(self, number: int, found: list[Parcel]) -> None:
        """Begin a round, when the one before the last is loaded: the receivers keep the memory of two."""
        for before in self._loads[:-1][-1:]:
            before.exception()
        received = self._pool.submit(self._receive, number, found)
        self._loads.append(self._pool.submit(self._load, received, self._loads[-1] if self._loads else None))

    def _receive(self, number: int, found: list[Parcel]) -> list[str]:
        """The handles of a round, one a rank of the server."""
        receivers = self.endpoint.receivers
        with ThreadPoolExecutor(len(receivers)) as pool:
            posts = [
                pool.submit(r.post, "/receive", command(number, self._first, place, found), seconds=2 * MEET_SECONDS)
                for place, r in enumerate(receivers)
            ]
        answers = [post.result() for post in posts]
        try:
            return [answer["payload"] for answer in answers]
        except (LookupError, TypeError) as error:
            raise ServerError(f"{receivers[0].url}/receive: found {answers!r:.200}, required a payload") from error

    def _load(self, received: Future[list[str]], before: Future[None] | None) -> None:
        if before is not None:
            before.result()
        body = {"load_format": "flattened_bucket", "flush_cache": False, "weight_version": str(self._version)}
        body["serialized_named_tensors"] = received.result()
        self.endpoint.client.post("/update_weights_from_tensor", body, seconds=LOAD_SECONDS)

    def finish(self) -> None:
        """Wait for all loads."""
        for load in self._loads:
            load.exception()

    def error(self) -> BaseException | None:
        """Of the first round that failed."""
        return next((error for load in self._loads if load.done() and (error := load.exception())), None)


_Key = tuple[tuple[Spec, ...], int, int]


def _key(parcel: Parcel, place: int) -> _Key:
    """Of a chunk, which is the same for all nodes with as many members."""
    return parcel.specs, len(parcel.members), place


def _spec(name: str, tensor: torch.Tensor) -> Spec:
    return Spec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _flat(parcel: Parcel, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """[bytes] uint8: the tensors of a parcel as its members hold them."""
    pieces = [tensors[spec.name].contiguous().flatten().view(torch.uint8) for spec in parcel.specs]
    flat = torch.cat(pieces)
    return torch.nn.functional.pad(flat, (0, parcel.num_bytes - len(flat)))


def _on_nodes(layout: ServerLayout, endpoint: Endpoint) -> ServerLayout:
    """With the ranks of a server on the nodes on which its receivers are."""
    hosts = [urlsplit(receiver.url).hostname for receiver in endpoint.receivers]
    nodes, start = [], 0
    for _, group in itertools.groupby(hosts):
        size = len(list(group))
        nodes.append(range(start, start + size))
        start += size
    return ServerLayout(tuple(nodes), layout.num_experts, layout.expert)
