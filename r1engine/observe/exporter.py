"""The newest metrics of a run for Prometheus: http://HOST:PORT/metrics on the first rank."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from typing import Any


class Exporter:
    """Serves what was logged last, each metric as a gauge `r1engine_<name>` with the label `run`.

    `r1engine_step` and `r1engine_logged_timestamp_seconds` (Unix time of the last row) tell whether the run moves.
    """

    def __init__(self, host: str, port: int, run: str) -> None:
        """
        Args:
            host: address to listen on; the metrics are readable by whoever reaches it.
            port: 0 picks a free one; see `port`.
            run:  value of the label.

        Raises:
            RuntimeError: the port cannot be opened.
        """
        from prometheus_client import CollectorRegistry, start_http_server

        self._run, self._row = run, {"step": 0.0}
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]  # what it needs is `collect`
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise RuntimeError(f"log.prometheus_port: cannot listen on {host}:{port}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self._server.server_port)

    def log(self, step: int, row: dict[str, float]) -> None:
        """The newest row. Keys that it lacks keep their values: an evaluation has others than a stride."""
        new = {"step": float(step), "logged_timestamp_seconds": time.time()} | row
        self._row = self._row | {key: float(value) for key, value in new.items()}  # replaced, as a scrape may read it

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Prometheus takes numbers only."""

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks for."""
        from prometheus_client.core import GaugeMetricFamily

        for key, value in self._row.items():
            if math.isnan(value):
                continue  # unknown is left out
            name = "r1engine_" + re.sub(r"[^a-zA-Z0-9_]", "_", key)
            gauge = GaugeMetricFamily(name, f"{key} of docs/metrics.md", labels=["run"])
            gauge.add_metric([self._run], value)
            yield gauge

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
