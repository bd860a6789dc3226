"""examples/benchmark_coverage.py: what it draws and measures."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from hf_tgpt import TOY_CLIP


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_coverage", ROOT / "examples" / "benchmark_coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_picture_is_in_two_parts_and_the_shots_are_at_most_half(benchmark):
    labels = torch.arange(40) % 4
    parts = benchmark.drawn(labels, 16, 3, seed=0)
    assert [len(part) for part in parts] == [20, 12, 8]
    assert sorted(torch.cat(parts).tolist()) == list(range(40))
    assert not torch.equal(parts[0], benchmark.drawn(labels, 16, 3, seed=1)[0])
    assert benchmark.drawn(labels, 16, 5, seed=0) == []


def test_it_prints_a_row_for_each_data_set_and_number_of_held_out_pictures(benchmark, tmp_path, capsys):
    noise = np.random.default_rng(0)
    for folder in ("a", "b"):
        for name in ("lime", "tomato"):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(8):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{i}.png")
    few = ["--held_out", "2", "20", "--seeds", "2", "--coverage", "0.5", "0.9", "--model", str(TOY_CLIP)]
    benchmark.main(["--datasets", str(tmp_path / "a"), str(tmp_path / "b"), *few])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + 2 * 2
    assert all(re.fullmatch(r"[01]\.\d{3} ± 0\.\d{3}", rows[2][column]) for column in (2, 3, 7, 8, 9, 10))
    assert rows[2][5:7] == ["-", "-"]  # four pictures cannot tell 0.9
    assert set(rows[3][2:]) == {"-"}  # 20 of 8 pictures
