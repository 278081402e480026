"""A stand-in for an SGLang server: no model, but the calls that bring weights, with SGLang 0.5.23's rules.

It keeps the tensors that came, under their Hugging Face names, and answers the checksums of a server that holds them.
`fault(path, number of the call)` says whether the server ends: it leaves its groups and never answers again.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from r1engine.hf.architecture import Architecture
from r1engine.rollout.sglang.checksum import Expected

TIMEOUT = timedelta(seconds=20)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        return _Metadata if name == "FlattenedTensorMetadata" else super().find_class(module, name)


class _Metadata(SimpleNamespace):
    pass


class WeightServer:
    """Runs in a thread of this process until `close`."""

    def __init__(
        self,
        arch: Architecture,
        ranks: int = 1,
        fault: Callable[[str, int], bool] = lambda path, n: False,
        *,
        expert: int = 1,
    ):
        self.arch, self.ranks, self.fault, self.expert = arch, ranks, fault, expert
        self.held: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]  # of each rank, what came to it
        self.calls: Counter[str] = Counter()
        self.groups: dict[str, list[dist.ProcessGroup]] = {}
        self.problems: list[str] = []
        self.is_gone = False
        self._has_session, self._one = False, threading.Lock()  # SGLang's scheduler takes one call after the other
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    with outer._one:
                        answer = outer.answer(self.path, body) or {"success": True}
                    self.send_response(200)
                except ConnectionAbortedError:
                    self.close_connection = True
                    return
                except Exception as error:
                    outer.problems.append(f"{self.path}: {error}")
                    answer = {"success": False, "message": str(error)}
                    self.send_response(400)
                data = json.dumps(answer).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if not outer.is_gone:
                    self.send_response(200)
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What came to any rank."""
        return {name: tensor for own in self.held for name, tensor in own.items()}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: dict) -> dict | None:
        self.calls[path] += 1
        if self.is_gone or self.fault(path, self.calls[path]):
            self.is_gone = True
            self.groups.clear()
            raise ConnectionAbortedError("ended")
        if path.startswith("/update_weights_from_") and path != "/update_weights_from_disk" and not self._has_session:
            raise RuntimeError("must run between begin_weight_update() and end_weight_update()")
        if path == "/begin_weight_update":
            if self._has_session:
                raise RuntimeError("a weight-update session is already open")
            self._has_session = True
        elif path == "/end_weight_update":
            self._has_session = False
        elif path == "/init_weights_update_group":
            self._join(**body)
        elif path == "/destroy_weights_update_group":
            self.groups.pop(body["group_name"])
        elif path == "/update_weights_from_tensor":
            self._from_texts(body["serialized_named_tensors"])
        elif path == "/update_weights_from_distributed":
            self._from_group(body)
        elif path == "/update_weights_from_disk":
            self._from_disk(body["model_path"])
        elif path == "/weights_checker":
            return self._checksums()
        return None

    def _join(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        def member(rank: int) -> dist.ProcessGroup:
            store: dist.Store = dist.TCPStore(master_address, master_port, world_size, False, TIMEOUT)
            for prefix in (group_name, f"{group_name}/", "cpu/"):  # PyTorch's own, which the sender's group has
                store = dist.PrefixStore(prefix, store)
            return dist.ProcessGroupGloo(store, rank, world_size, timeout=TIMEOUT)

        with ThreadPoolExecutor(self.ranks) as pool:
            self.groups[group_name] = list(pool.map(member, range(rank_offset, rank_offset + self.ranks)))

    def _from_texts(self, texts: list[str]) -> None:
        assert len(texts) == self.ranks, "one entry a rank"
        for own, text in zip(self.held, texts, strict=True):
            found = _Unpickler(io.BytesIO(base64.b64decode(text))).load()
            self._take(own, found["flattened_tensor"], found["metadata"])

    def _from_group(self, body: dict) -> None:
        metadata, start = [], 0
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            metadata.append(SimpleNamespace(name=name, dtype=getattr(torch, dtype), shape=shape, start_idx=start))
            start += size
        flats = [torch.empty(start, dtype=torch.uint8) for _ in range(self.ranks)]
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0

        def receive(group: dist.ProcessGroup, flat: torch.Tensor) -> None:
            group.broadcast([flat], options).wait()

        with ThreadPoolExecutor(self.ranks) as pool:
            list(pool.map(receive, self.groups[body["group_name"]], flats))
        assert all(torch.equal(flat, flats[0]) for flat in flats)
        for own in self.held:
            self._take(own, flats[0], metadata)

    def _take(self, own: dict[str, torch.Tensor], flat: torch.Tensor, metadata: list) -> None:
        for meta in metadata:
            size = torch.Size(meta.shape).numel() * meta.dtype.itemsize
            piece = flat[meta.start_idx : meta.start_idx + size]
            own[meta.name] = piece.view(meta.dtype).reshape(meta.shape).clone()

    def _from_disk(self, folder: str) -> None:
        for file in Path(folder).glob("*.safetensors"):
            for own in self.held:
                own |= load_file(file)

    def _checksums(self) -> dict:
        ranks = []
        for rank, own in enumerate(self.held):
            expected = Expected(self.arch, self.ranks, expert=self.expert)
            for name, tensor in (self.tensors | own).items():  # of another rank's expert nothing counts here
                expected.add(name, tensor)
            ranks.append({"checksums": expected.digests[rank], "parallelism_info": [{"tp_rank": rank}]})
        return {"success": True, "ranks": ranks}
