"""Puts the trainer's weights into running servers, in place, and proves that they arrived.

    pause -> begin -> buckets -> end -> flush -> continue -> compare checksums

Every refresh carries a version; a server that fails any step is left out, and one that holds other weights than were
sent stops the run. All ranks of the trainer take part, since gathering the weights is collective; the first one sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from r1engine.hf.architecture import Architecture
from r1engine.rollout.sglang.buckets import Bucket, buckets, flatten, order_by_alignment, payload
from r1engine.rollout.sglang.checksum import Expected
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.rollout.sglang.digest import CpuDigest, CudaDigest
from r1engine.rollout.sglang.disk import WeightFolder
from r1engine.rollout.sglang.dispatch import Endpoint
from r1engine.rollout.sglang.group import BroadcastGroup

CONTROL_SECONDS = 300.0  # of one control call: a bucket, a checksum of all weights


@dataclass
class Report:
    """What a refresh took."""

    version: int
    num_bytes: int = 0  # sent to each server
    seconds: dict[str, float] = field(default_factory=dict)  # gather and send, verify
    canary_difference: float = 0.0  # largest |log-probability difference| of the canaries (generator.py)
    failed: list[str] = field(default_factory=list)  # servers left out, with the reason


class Refresher:
    """Refreshes the servers of a run; lives on the first rank."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        arch: Architecture,
        *,
        ranks: int,
        route: str,
        bucket_bytes: int,
        folder: WeightFolder,
        digest: type[CpuDigest] | type[CudaDigest] | None,
    ) -> None:
        """
        Args:
            endpoints:        of the servers; those that fail are marked.
            arch:             of the model.
            ranks:            tensor-parallel size of each server.
            route:            "tensor": inside HTTP, or by CUDA IPC on a shared GPU; "distributed": broadcast by NCCL
                              or gloo; "disk": safetensors in `folder`.
            bucket_bytes:     sent at once.
            folder:           for the disk route; the servers must see it.
            digest:           the servers' hash of a tensor, to compare all of them after each refresh; None: do not.
        """
        self.endpoints, self.arch, self.ranks, self.route = endpoints, arch, ranks, route
        self.bucket_bytes, self.folder, self.digest = bucket_bytes, folder, digest
        self._group: BroadcastGroup | None = None

    def refresh(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: int,
    ) -> Report:
        """Send all weights to all servers and verify them.

        Args:
            weights: full tensors under their Hugging Face names, consumed to the end whatever happens.
            version: number of these weights.

        Raises:
            RuntimeError: a server holds other weights than were sent, naming the tensors; or no server is left.
        """
        report = Report(version)
        started = time.monotonic()
        expected = Expected(self.arch, self.ranks, self.digest) if self.digest is not None else None
        tensors = self._noting(weights, expected)
        live = [endpoint for endpoint in self.endpoints if endpoint.is_usable]
        have_last = all(endpoint.version == version - 1 for endpoint in live)  # so what changed since then is enough
        for endpoint in live:
            endpoint.version = None
        if self.route == "disk":
            report.num_bytes = self.folder.write(tensors, limit=self.bucket_bytes, everything=not have_last)
            self._each(live, lambda e: self._from_disk(e.client, version), report)
        else:
            self._stream(live, tensors, version, report)
        for _ in tensors:  # gathering is collective: every rank must come to its end
            pass
        report.seconds["send"] = time.monotonic() - started
        live = [endpoint for endpoint in live if endpoint.is_usable]
        if expected is not None:
            started = time.monotonic()
            self._each(live, lambda e: self.verify_server(e.client, expected, version), report)
            report.seconds["verify"] = time.monotonic() - started
        for endpoint in live:
            if endpoint.is_usable:
                endpoint.version = version
        if not any(endpoint.version == version for endpoint in self.endpoints):
            raise RuntimeError(f"refresh: no server took weights {version}: {'; '.join(report.failed)}")
        return report

    def close(self) -> None:
        """Leave the broadcast group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    # ------------------------------------------------------------------ sending

    def _noting(self, weights: Iterable[tuple[str, torch.Tensor]], expected: Expected | None) -> Iterator:
        """The same tensors; their digests are noted on the way."""
        for name, tensor in weights:
            if expected is not None:
                expected.add(name, tensor)
            yield name, tensor

    def _stream(self, live: list[Endpoint], tensors: Iterable, version: int, report: Report) -> None:
        def begin(endpoint: Endpoint) -> None:
            client = endpoint.client
            client.post("/pause_generation", {"mode": "retract"}, seconds=CONTROL_SECONDS)
            client.post("/begin_weight_update", {"selector": "all"}, seconds=CONTROL_SECONDS)

        def end(endpoint: Endpoint) -> None:
            client = endpoint.client
            client.post("/end_weight_update", {}, seconds=CONTROL_SECONDS)
            client.post("/flush_cache", {}, seconds=CONTROL_SECONDS)  # no sample mixes old and new keys
            client.post("/continue_generation", {}, seconds=CONTROL_SECONDS)

        self._each(live, begin, report)
        if self.route == "distributed":
            self._join_group([e for e in live if e.is_usable], report)
        with ThreadPoolExecutor(1) as pool:
            sending = None
            for bucket in buckets(tensors, self.bucket_bytes):  # the next one is gathered while this one travels
                report.num_bytes += bucket.num_bytes
                if sending is not None:
                    sending.result()
                sending = pool.submit(self._send, [e for e in live if e.is_usable], bucket, version, report)
                if self.route == "distributed":
                    sending.result()  # two NCCL communicators at once on one GPU may wait for each other
            if sending is not None:
                sending.result()
        self._each([e for e in live if e.is_usable], end, report)

    def _join_group(self, usable: list[Endpoint], report: Report) -> None:
        clients = [e.client for e in usable]
        if self._group is not None and self._group.clients != clients:
            self.close()
        if self._group is None and clients:
            self._group = BroadcastGroup(clients, self.ranks)

    def _send(self, usable: list[Endpoint], bucket: Bucket, version: int, report: Report) -> None:
        """One bucket to all usable servers."""
        if not usable:
            return
        if self.route == "distributed":
            self._broadcast(usable, bucket, version, report)
            return
        bucket = order_by_alignment(bucket)
        flat = flatten(bucket)  # lives until the servers have answered
        # Over CUDA IPC every rank needs a handle of its own.
        texts = [payload(bucket, flat) for _ in range(self.ranks if flat.is_cuda else 1)]
        body = {
            "serialized_named_tensors": texts if flat.is_cuda else texts * self.ranks,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "weight_version": str(version),
        }
        self._post_each(usable, "/update_weights_from_tensor", body, report)

    def _broadcast(self, usable: list[Endpoint], bucket: Bucket, version: int, report: Report) -> None:
        assert self._group is not None
        bucket = order_by_alignment(bucket)
        body = {
            "names": bucket.names,
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in bucket.tensors],
            "shapes": [list(t.shape) for t in bucket.tensors],
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "weight_version": str(version),
        }
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(self._group.broadcast, flatten(bucket))
            self._post_each(usable, "/update_weights_from_distributed", body, report)
            sending.result()

    def _from_disk(self, client: Client, version: int) -> None:
        client.post("/pause_generation", {"mode": "retract"}, seconds=CONTROL_SECONDS)
        body = {"model_path": str(self.folder.folder.resolve()), "weight_version": str(version), "flush_cache": True}
        client.post("/update_weights_from_disk", body, seconds=CONTROL_SECONDS)
        client.post("/continue_generation", {}, seconds=CONTROL_SECONDS)

    def _post_each(self, endpoints: list[Endpoint], path: str, body: dict, report: Report) -> None:
        self._each(endpoints, lambda e: e.client.post(path, body, seconds=CONTROL_SECONDS), report)

    def _each(self, endpoints: list[Endpoint], call: Callable[[Endpoint], object], report: Report) -> None:
        """Call for all at once; one that fails is left out of the run, as nobody knows which weights it holds."""
        if not endpoints:
            return
        with ThreadPoolExecutor(len(endpoints)) as pool:
            futures = [(endpoint, pool.submit(call, endpoint)) for endpoint in endpoints]
        for endpoint, future in futures:
            error = future.exception()
            if isinstance(error, ServerError):
                endpoint.fail(f"in a refresh: {error}")
                report.failed.append(str(error))
            elif error is not None:
                raise error

    # ------------------------------------------------------------------ verifying

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


def _tp_rank(answer: dict) -> int:
    """Of one rank's checksums."""
    return answer["parallelism_info"][0]["tp_rank"]
