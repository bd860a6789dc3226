"""Long runs: memory and open files stay as they are, and what is written on the way is whole.

In the suite for seconds; `HF_TGPT_SOAK=3600 pytest -s tests/training/test_soak.py` is the campaign, and prints what it
measured.
"""

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from inference.test_classifier import base, classifier, picture, save  # noqa: F401
from test_faults import readable

from hf_tgpt.training.checkpoint import find_checkpoint

SECONDS = float(os.environ.get("HF_TGPT_SOAK", 5))
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


class Meter:
    """Resident memory and open files of a process, ten times a second or, in long runs, every second."""

    def __init__(self, process: int):
        self.folder, self.rows = Path(f"/proc/{process}"), []
        self.pause = 0.1 if SECONDS < 60 else 1

    def read(self) -> None:
        """A row, if it is time for one."""
        if self.rows and time.monotonic() < self.rows[-1][0] + self.pause:
            return
        pages = int((self.folder / "statm").read_text().split()[1])
        files = len(list((self.folder / "fd").iterdir()))
        self.rows.append((time.monotonic(), pages * os.sysconf("SC_PAGESIZE") / 2**20, files))

    def settled(self, what: str) -> None:
        """Checks the second half of the time: no more files, and not even 20 MiB more, by the straight line through it.

        What is measured is printed.
        """
        times, memory, files = np.array(self.rows[len(self.rows) // 2 :]).T
        slope = np.polyfit(times, memory, 1)[0]
        low, high = f"{memory.min():.0f}", f"{memory.max():.0f}"
        print(f"\n{what}: {self.rows[-1][0] - self.rows[0][0]:.0f} s; in its second half {low} to {high} MiB,")
        print(f"{3600 * slope:+.2f} MiB an hour, {files.min():.0f} to {files.max():.0f} files")
        assert slope * (times[-1] - times[0]) < 20
        assert np.median(files[: len(files) // 4]) == np.median(files[-len(files) // 4 :])


def test_a_long_training_keeps_its_memory_its_files_and_its_output(tmp_path):
    command = [sys.executable, "-m", "hf_tgpt", "train", "--method", "maple", "--max_steps", "100000000"]
    command += ["--dataset", "toyworld:shapes", "--shots", "4", "--output_dir", tmp_path / "run"]
    terminal, end = pty.openpty()  # so that there is a progress bar
    termios.tcsetwinsize(end, (24, 80))
    process = subprocess.Popen(list(map(str, command)), stdout=end, stderr=end, text=True)
    os.close(end)
    printed = bytearray()
    reader = threading.Thread(target=_read, args=(terminal, printed))
    reader.start()
    while find_checkpoint(tmp_path / "run") is None:
        assert process.poll() is None, printed.decode()
        time.sleep(0.1)
    meter, until = Meter(process.pid), time.monotonic() + SECONDS
    while time.monotonic() < until:
        meter.read()
        time.sleep(meter.pause)
        assert process.poll() is None, printed.decode()[-2000:]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    reader.join()
    os.close(terminal)
    meter.settled("training")
    readable(tmp_path / "run")
    text = printed.decode()
    assert "training:   0%" in text
    assert "Traceback" not in text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("Stopped by SIGTERM at step")
    step = int(find_checkpoint(tmp_path / "run").name.removeprefix("checkpoint-"))
    assert f"at step {step} of" in last
    print(f"{step} steps, the last checkpoint is of the last one")


def test_a_long_prediction_keeps_its_memory_and_its_files(classifier):  # noqa: F811
    meter, until = Meter(os.getpid()), time.monotonic() + SECONDS

    def pictures():
        i = 0
        while time.monotonic() < until:
            yield picture(i, (40 + i % 30, 50))
            i += 1
            if i % 64 == 0:
                meter.read()

    count = sum(1 for _ in classifier.stream(pictures(), 2))
    meter.settled(f"prediction, {count} pictures")


def _read(terminal: int, into: bytearray) -> None:
    """All that is printed, until the program has ended."""
    try:
        while chunk := os.read(terminal, 4096):
            into += chunk
    except OSError:  # what Linux says at the end
        return
