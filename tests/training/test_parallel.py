"""Processes that share a class list compute what one process computes."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from conftest import METHODS, ROOT
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel

from hf_tgpt.encoders.shares import in_shares
from hf_tgpt.training.batches import check_engine

CONFIGS = ROOT / "examples" / "accelerate"
COUNTS = {"maple": 71, "coop": 70}  # one that two processes cannot share evenly
NAMES = [f"{'abcdefgh'[i % 8]} {i}" for i in range(71)]


def trained(folder, name, rank, processes):
    """Losses and weights after two steps of two batches each, every process with its share of the pictures."""
    torch.manual_seed(1)
    clip = CLIPModel.from_pretrained(folder)
    fields = {"class_specific": True} if name == "coop" else {}
    config = METHODS[name].config(NAMES[: COUNTS[name]], text_chunk_size=20, **fields)
    model = get_peft_model(clip, config).double().train()
    encoded, tower = [], type(model.learner).text_features
    type(model.learner).text_features = lambda self, clip, ids, *rest: (
        encoded.append(len(ids)) or tower(self, clip, ids, *rest)
    )
    run = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pictures = torch.randn(2, 2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    labels = torch.arange(16).view(2, 2, 4) * 4
    mine, losses = slice(rank * 4 // processes, (rank + 1) * 4 // processes), []
    try:
        for batches, targets in zip(pictures, labels, strict=True):
            for part, (x, y) in enumerate(zip(batches, targets, strict=True)):
                run.require_backward_grad_sync = part == 1  # what DDP's no_sync sets: gradients are accumulated
                loss = run(pixel_values=x[mine], labels=y[mine]).loss / 2
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    finally:
        type(model.learner).text_features = tower
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, weights, sum(encoded)


def work(rank, folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    torch.save([trained(folder, name, rank, 2) for name in COUNTS], f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_classes_and_train_like_one(clip_folders, tmp_path):
    mp.spawn(work, (clip_folders["plain"], tmp_path), nprocs=2)
    for name, *two in zip(COUNTS, *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True):
        losses, weights, encoded = trained(clip_folders["plain"], name, 0, 1)
        mean = [(a + b) / 2 for a, b in zip(two[0][0], two[1][0], strict=True)]
        assert mean == pytest.approx(losses, abs=1e-10)
        for _, found, its in two:
            for key in weights:
                torch.testing.assert_close(found[key], weights[key], atol=1e-10, rtol=1e-10)
            assert its < 0.6 * encoded  # half of the classes, or one more


def test_few_classes_and_processes_of_their_own_are_not_shared(monkeypatch):
    asked = []

    def rows(share):
        asked.append(share)
        return torch.arange(100)[share]

    assert torch.equal(in_shares(rows, 100), torch.arange(100))  # no DDP forward around it
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", type("DDP", (), {"process_group": None}))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    assert torch.equal(in_shares(rows, 100), torch.arange(100))  # 25 classes each
    assert asked == [slice(0, 100)] * 2


def test_engines_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="`distributed_type`=FSDP cannot shard a CLIPModel; train with DDP"):
        check_engine(SimpleNamespace(distributed_type=DistributedType.FSDP), 1)
    engine = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    check_engine(engine, 1)
    with pytest.raises(ValueError, match="`gradient_accumulation_steps`=2 under DeepSpeed"):
        check_engine(engine, 2)


def test_what_is_refused_of_fsdp_is_what_torch_and_transformers_refuse(load_clip, tmp_path):
    """When this fails, FSDP may be worth another try."""
    with pytest.raises(NotImplementedError, match="get_input_embeddings"):
        load_clip().get_input_embeddings()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"doesn't support scalar parameters\. Change logit_scale"):
            fully_shard(load_clip(), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_config_files_are_ones_that_accelerate_reads(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == 2 * config.num_machines
    assert config.distributed_type == (DistributedType.DEEPSPEED if "deepspeed" in file.stem else "MULTI_GPU")
