"""A server's counters, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

KIND = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Counters:
    """The counters of one server, which several threads may increase."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter(
            "hf_tgpt_requests", "Requests for predictions by HTTP status.", ["status"], registry=own
        )
        self.pictures = Counter(
            "hf_tgpt_pictures", "Pictures by model and outcome: answered or unreadable.", ["model", "outcome"],
            registry=own,
        )  # fmt: skip
        self.seconds = Histogram(
            "hf_tgpt_request_seconds", "Seconds from a request for predictions to its answer.", buckets=_SECONDS,
            registry=own,
        )  # fmt: skip
        self.batch = Histogram(
            "hf_tgpt_batch_pictures", "Pictures that went through the model together.", buckets=_SIZES, registry=own
        )
        self.queue = Gauge("hf_tgpt_queue_pictures", "Pictures that have arrived and are not answered.", registry=own)

    def text(self) -> bytes:
        """All counts."""
        return generate_latest(self._registry)
