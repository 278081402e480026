"""Puts the trainer's weights into running servers, in place, and proves that they arrived.

    pause -> begin -> buckets -> end -> flush -> continue -> compare checksums

Every rank of the trainer sends its share of the weights to every server; the first rank does what is done once. Every
refresh carries a version; a server that fails any step is left out, and one that holds other weights than were sent
stops the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.formats import Precision
from r1engine.ranks import World
from r1engine.rollout.generator import BrokenOff
from r1engine.rollout.sglang.buckets import Bucket, buckets, flatten, order_by_alignment, payload
from r1engine.rollout.sglang.checksum import Expected
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.delivery import ServerLayout
from r1engine.rollout.sglang.digest import CpuDigest, CudaDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Endpoint, agree
from r1engine.rollout.sglang.group import BroadcastGroup
from r1engine.rollout.sglang.receivers import Delivery, sizes

CONTROL_SECONDS = 300.0  # of one control call: a bucket, a checksum of all weights
Route = Literal["tensor", "handle", "distributed", "receivers", "disk"]


@dataclass
class Report:
    """What a refresh took."""

    version: int
    num_bytes: int = 0  # of the weights that each server got
    most_bytes: int = 0  # that the busiest rank of the trainer sent to a server
    most_received: int = 0  # that the busiest rank of a server got
    seconds: dict[str, float] = field(default_factory=dict)  # gather and send, verify
    canary_difference: float = 0.0  # largest |log-probability difference| of the canaries (generator.py)
    failed: list[str] = field(default_factory=list)  # servers left out, with the reason


class Refresher:
    """Refreshes the servers of a run; every rank has one, and every call but `verify_server` is collective."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        arch: Architecture,
        world: World,
        *,
        layout: ServerLayout,
        route: Route,
        bucket_bytes: int,
        folder: WeightFolder,
        digest: type[CpuDigest] | type[CudaDigest] | None,
    ) -> None:
        """
        Args:
            endpoints:    of the servers, the same on every rank; those that fail are marked.
            arch:         of the model.
            world:        the trainer's ranks.
            layout:       of each server, as if on one node.
            route:        "tensor": inside HTTP; "handle": as CUDA IPC handles, to the server on the ranks' own GPUs;
                          "distributed": broadcast by NCCL or gloo; "receivers": by all ranks at once, to a process
                          beside each rank of a server; "disk": safetensors in `folder`.
            bucket_bytes: sent at once.
            folder:       for the disk route; the servers must see it.
            digest:       the servers' hash of a tensor, to compare all of them after each refresh; None: do not.
        """
        self.endpoints, self.arch, self.world, self.layout, self.route = endpoints, arch, world, layout, route
        self.bucket_bytes, self.folder, self.digest = bucket_bytes, folder, digest
        self.ports: range | None = None  # of which this rank's group listens on one; None: any
        self._group: BroadcastGroup | None = None
        self._members: list[tuple[str, int]] = []  # URLs of the group's servers, each with its failures so far
        self._is_broken = False  # this rank's group, in the refresh that runs
        self.precision: Precision = "float32"  # of the servers' tensors
        self._delivery: Delivery | None = None

    @property
    def takes_shares(self) -> bool:
        """Whether each rank sends a share of the weights; otherwise each needs all of them."""
        return self.route != "handle"

    def refresh(self, weights: Iterable[tuple[str, torch.Tensor | None]], version: int) -> Report:
        """Send all weights to all servers and verify them.

        Args:
            weights: full tensors under their Hugging Face names: this rank's share (None: another rank sends it), or
                     all (`takes_shares`). Consumed to the end whatever happens.
            version: number of these weights.

        Returns:
            What it took, the same on every rank but for `failed`.

        Raises:
            BrokenOff: a server ended in the middle of a transfer; the others can take the same weights again.
            RuntimeError: a server holds other weights than were sent, naming the tensors; or no server is left.
        """
        report = Report(version)
        expected = None
        if self.digest is not None and (self.takes_shares or self.world.is_first):
            expected = Expected(self.arch, self.layout.ranks, self.digest, self.layout.expert)
        started = time.monotonic()
        self._send_all(self._noting(weights, expected), version, report)
        report.seconds["send"] = time.monotonic() - started
        started = time.monotonic()
        if self.digest is not None:
            self._verify(expected, version, report)
        report.seconds["verify"] = time.monotonic() - started
        for endpoint in self._some_usable(report):
            endpoint.version = version
        return report

    def _send_all(self, tensors: Iterable, version: int, report: Report) -> None:
        """This rank's weights to all servers; returns when all ranks' are there."""
        live = self._usable()
        try:
            if self.route == "disk":
                sent = self._write(live, tensors, version, report)
            else:
                sent = self._stream(live, tensors, version, report)
        finally:
            for _ in tensors:  # gathering is collective: every rank must come to its end
                pass
        self._some_usable(report)
        if any(self.world.everyones(self._is_broken)):
            raise BrokenOff(f"refresh: a transfer of weights {version} broke off: {self._reasons(report)}")
        shares = self.world.everyones(sent)
        report.num_bytes = sum(shares) if self.takes_shares else shares[0]
        if self.route != "receivers":
            report.most_bytes, report.most_received = max(shares), report.num_bytes

    def close(self) -> None:
        """Leave the groups."""
        if self._delivery is not None:
            self._delivery.close()
        if self._group is not None:
            self._group.close()
            self._group = None

    # ------------------------------------------------------------------ what all ranks do together

    def _usable(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.endpoints if endpoint.is_usable]

    def _some_usable(self, report: Report) -> list[Endpoint]:
        usable = self._usable()
        if not usable:
            raise RuntimeError(f"refresh: no server took weights {report.version}: {self._reasons(report)}")
        return usable

    def _on_first(self, live: list[Endpoint], call: Callable[[Endpoint], object], report: Report) -> None:
        """The first rank calls for all at once; then all ranks know which servers are left."""
        self.world.from_first(lambda: self._each(live, call, report))
        agree(self.endpoints, self.world)

    def _reasons(self, report: Report) -> str:
        """Why servers failed, on any rank."""
        return "; ".join(dict.fromkeys(reason for own in self.world.everyones(report.failed) for reason in own))

    def _noting(self, weights: Iterable[tuple[str, torch.Tensor | None]], expected: Expected | None) -> Iterator:
        """The same tensors; their digests are noted on the way. Others' are named where rounds are cut by them."""
        for name, tensor in weights:
            if tensor is not None and expected is not None:
                expected.add(name, tensor)
            if tensor is not None or self.route == "receivers":
                yield name, tensor

    # ------------------------------------------------------------------ sending

    def _stream(self, live: list[Endpoint], tensors: Iterable, version: int, report: Report) -> int:
        """All weights of this rank to all servers; returns their bytes."""
        for endpoint in live:
            endpoint.version = None
        self._on_first(live, _begin, report)
        self._is_broken = False
        if self.route == "receivers":
            num_bytes = self._deliver(tensors, version, report)
        else:
            num_bytes = self._send_buckets(tensors, version, report)
        agree(self.endpoints, self.world)
        is_broken = any(self.world.everyones(self._is_broken))
        self._on_first(self._usable(), _interrupt if is_broken else _end, report)
        return num_bytes

    def _deliver(self, tensors: Iterable, version: int, report: Report) -> int:
        """By the receivers beside the servers' ranks."""
        if self._delivery is None:
            of_model, limit = sizes(self.arch, self.precision), self.bucket_bytes
            self._delivery = Delivery(
                self.endpoints, self.world, layout=self.layout, sizes=of_model, limit=limit, ports=self.ports
            )
        self._delivery.meet()
        sent = self._delivery.run(tensors, version)
        self._is_broken = self._delivery.is_broken
        report.failed += self._delivery.failed
        report.most_bytes = max(self.world.everyones(sent.to_a_server))
        report.most_received = max(sent.received)
        return sent.own

    def _send_buckets(self, tensors: Iterable, version: int, report: Report) -> int:
        """The same tensors to every server, a bucket at a time."""
        if self.route == "distributed":
            self._join_groups(report)
        num_bytes, kept = 0, None
        sending: Future[None] | None = None
        with ThreadPoolExecutor(1) as pool:
            for bucket in buckets(tensors, self.bucket_bytes):  # the next one is gathered while this one travels
                num_bytes += bucket.num_bytes
                bucket = order_by_alignment(bucket)
                flat = flatten(bucket)
                if sending is not None:
                    sending.result()
                texts = self.world.everyones(payload(bucket, flat)) if self.route == "handle" else []
                kept = flat  # the one before is read by no server any more: all ranks have waited for theirs
                sending = pool.submit(self._send, bucket, kept, texts, version, report)
                if self.route == "distributed" and flat.is_cuda:
                    sending.result()  # two NCCL communicators at once on one GPU may wait for each other
            if sending is not None:
                sending.result()
        return num_bytes

    def _send(self, bucket: Bucket, flat: torch.Tensor, texts: list[str], version: int, report: Report) -> None:
        """One bucket to the servers that this rank sends to; `flat` lives until they have answered.

        `texts` are all ranks' handles of the bucket, for the route "handle".
        """
        body = {"load_format": "flattened_bucket", "flush_cache": False, "weight_version": str(version)}
        usable = self._usable()
        if self.route == "handle":
            number, place = divmod(self.world.rank, self.layout.ranks)
            if place or not self.endpoints[number].is_usable:
                return  # another rank of these GPUs sends
            usable = [self.endpoints[number]]
            body["serialized_named_tensors"] = texts[self.world.rank :][: self.layout.ranks]
        elif self.route == "tensor":
            body["serialized_named_tensors"] = [payload(bucket, flat.cpu())] * self.layout.ranks
        elif self.route == "distributed":
            if usable and self._group is not None and not self._is_broken:
                with self.world.turn("refresh"):
                    self._broadcast(usable, bucket, flat, body, report)
            return
        path = "/update_weights_from_tensor"
        self._each(usable, lambda e: e.client.post(path, body, seconds=CONTROL_SECONDS), report)

    def _from_disk(self, client: Client, version: int) -> None:
        client.post("/pause_generation", {"mode": "retract"}, seconds=CONTROL_SECONDS)
        body = {"model_path": str(self.folder.folder.resolve()), "weight_version": str(version), "flush_cache": True}
        client.post("/update_weights_from_disk", body, seconds=CONTROL_SECONDS)
        client.post("/continue_generation", {}, seconds=CONTROL_SECONDS)

    def _write(self, live: list[Endpoint], tensors: Iterable, version: int, report: Report) -> int:
        """This rank's share into the folder, which all servers then read; returns its bytes."""
        have_last = all(endpoint.version == version - 1 for endpoint in live)  # so what changed since then is enough
        self.world.from_first(self.folder.clear)
        num_bytes = self.folder.write(tensors, limit=self.bucket_bytes, everything=not have_last, part=self.world.rank)
        self.world.everyones(None)  # all have written
        for endpoint in live:
            endpoint.version = None
        self._on_first(live, lambda e: self._from_disk(e.client, version), report)
        return num_bytes

    def _each(self, endpoints: list[Endpoint], call: Callable[[Endpoint], object], report: Report) -> None:
        """Call for all at once; one that fails is left out of the run, as nobody knows which weights it holds."""
        if not endpoints:
            return
        with ThreadPoolExecutor(len(endpoints)) as pool:
            futures = [(endpoint, pool.submit(call, endpoint)) for endpoint in endpoints]
        for endpoint, future in futures:
            error = future.exception()
            if isinstance(error, ServerError):
                self._fail(endpoint, error, report)
            elif error is not None:
                raise error

    def _fail(self, endpoint: Endpoint, error: BaseException, report: Report) -> None:
        endpoint.fail(f"in a refresh: {error}")
        report.failed.append(str(error))

    # ------------------------------------------------------------------ broadcast groups

    def _join_groups(self, report: Report) -> None:
        """Every rank has a group with all usable servers; made anew when a server has come, gone or failed since."""
        while True:
            members = [(endpoint.client.url, endpoint.failures) for endpoint in self._usable()]
            if not any(self.world.everyones(members != self._members)):
                return
            self._members = members
            for rank in range(self.world.size):  # one after the other: a server joins one group at a time
                if rank == self.world.rank:
                    self.close()
                    self._open_group(report)
                agree(self.endpoints, self.world)

    def _open_group(self, report: Report) -> None:
        usable = self._usable()
        if not usable:
            return
        try:
            self._group = BroadcastGroup([e.client for e in usable], self.layout.ranks, self.world.rank, self.ports)
        except Exception as error:  # that of a server names it; else nobody knows which one did not come
            at_fault = [e for e in usable if isinstance(error, ServerError) and e.client.url in str(error)]
            for endpoint in at_fault or usable:
                self._fail(endpoint, error, report)

    def _broadcast(
        self, usable: list[Endpoint], bucket: Bucket, flat: torch.Tensor, body: dict, report: Report
    ) -> None:
        """One bucket through this rank's group. A group of which a server fails is of no more use."""
        assert self._group is not None
        body |= {
            "names": bucket.names,
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in bucket.tensors],
            "shapes": [list(t.shape) for t in bucket.tensors],
            "group_name": self._group.name,
        }
        with ThreadPoolExecutor(1 + len(usable)) as pool:
            sending = pool.submit(self._group.broadcast, flat)
            path = "/update_weights_from_distributed"
            posts = [pool.submit(e.client.post, path, body, seconds=CONTROL_SECONDS) for e in usable]
        errors = {id(e): error for e, post in zip(usable, posts, strict=True) if (error := post.exception())}
        broke = sending.exception()
        if not errors and broke is None:
            return
        if unknown := next((error for error in errors.values() if not isinstance(error, ServerError)), None):
            raise unknown
        # What a server that ends takes with it are the broadcasts of the others, which answer all the same.
        self._is_broken = True
        ended = [e for e in usable if id(e) in errors and not e.client.answers()]
        for endpoint in ended or [e for e in usable if id(e) in errors] or usable:
            error = errors.get(id(endpoint)) or ServerError(f"{endpoint.client.url}: a broadcast failed ({broke})")
            self._fail(endpoint, error, report)

    # ------------------------------------------------------------------ verifying

    def _verify(self, expected: Expected | None, version: int, report: Report) -> None:
        """The first rank compares every server with what all ranks have noted."""
        if expected is not None and self.takes_shares and self.world.size > 1:
            expected.complete(self.world.everyones(expected.loose()))
            expected.take(self.world.everyones(expected.digests))

        def check(endpoint: Endpoint) -> None:
            assert expected is not None  # on the first rank
            self.verify_server(endpoint.client, expected, version)

        self._on_first(self._usable(), check, report)

    def verify_server(self, client: Client, expected: Expected, version: int) -> None:
        """Compare the checksums of all tensors.

        Raises:
            ServerError: the server does not tell.
            RuntimeError: naming the tensors that are not what was sent.
        """
        answer = client.post("/weights_checker", {"action": "checksum"}, seconds=CONTROL_SECONDS)
        try:
            checksums = [rank["checksums"] for rank in sorted(answer["ranks"], key=_tp_rank)]
        except (LookupError, TypeError) as error:
            raise ServerError(f"{client.url}/weights_checker: no checksums in {answer!r:.200}") from error
        if wrong := expected.compare(checksums):
            raise RuntimeError(
                f"refresh: {client.url} does not hold weights {version}: {len(wrong)} tensors are wrong: "
                f"{', '.join(wrong[:5])}"
            )


def _begin(endpoint: Endpoint) -> None:
    client = endpoint.client
    client.post("/pause_generation", {"mode": "retract"}, seconds=CONTROL_SECONDS)
    client.post("/begin_weight_update", {"selector": "all"}, seconds=CONTROL_SECONDS)


def _interrupt(endpoint: Endpoint) -> None:
    """It has a part of the weights; until it has all, it draws nothing."""
    endpoint.client.post("/end_weight_update", {}, seconds=CONTROL_SECONDS)


def _end(endpoint: Endpoint) -> None:
    client = endpoint.client
    client.post("/end_weight_update", {}, seconds=CONTROL_SECONDS)
    client.post("/flush_cache", {}, seconds=CONTROL_SECONDS)  # no sample mixes old and new keys
    client.post("/continue_generation", {}, seconds=CONTROL_SECONDS)


def _tp_rank(answer: dict) -> int:
    """Of one rank's checksums."""
    return answer["parallelism_info"][0]["tp_rank"]
