"""What `hf-tgpt serve` gains by batches of concurrent requests, and by adapters that share a base model's memory.

Example: python examples/benchmark_serve.py runs/mine cat.jpg
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, float]]:
    """The address of a server in a process of its own, and the MB of memory that it takes when it is ready."""
    command = [sys.executable, "-m", "hf_tgpt", "serve", *arguments, "--port", "0", "--json", "--max_queue", "10000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = urlsplit(json.loads(process.stdout.readline())["url"]).netloc
        status = Path(f"/proc/{process.pid}/status").read_text()
        yield address, int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1000
    finally:
        process.terminate()
        process.wait()


def pictures_per_second(address: str, picture: bytes, requests: int, clients: int) -> float:
    """The rate at which so many clients, each one request after the other, are answered."""

    def ask(count: int) -> None:
        connection = HTTPConnection(address)
        for _ in range(count):
            connection.request("POST", "/predict?model=a0", picture, {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise SystemExit(answer.read().decode())
            answer.read()

    ask(3)
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, [requests // clients] * clients))
    return requests // clients * clients / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="a folder that training wrote")
    parser.add_argument("picture", help="a JPEG file")
    parser.add_argument("--requests", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="at a time (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=5, help="whose memory is measured (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    picture, one = Path(args.picture).read_bytes(), [f"a0={args.adapter}", "--device", args.device]
    rates = {}
    for batch in (1, 32):
        with server(*one, "--max_batch", str(batch)) as (address, memory):
            if batch == 1:
                rates["one client"] = pictures_per_second(address, picture, args.requests // 4, 1)
            name = f"{args.clients} clients, batches of at most {batch}"
            rates[name] = pictures_per_second(address, picture, args.requests, args.clients)
    first = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} pictures a second, {rate / first:.2f} times the first")
    with server(*(f"a{number}={args.adapter}" for number in range(args.adapters)), *one[1:]) as (_, together):
        print(f"memory: {memory:.0f} MB with one adapter, {together:.0f} MB with {args.adapters} on one base model")
