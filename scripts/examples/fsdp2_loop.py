"""A plain loop under torchrun with FSDP2 that may be killed at any moment, and go on with another number of processes.

torchrun --nproc-per-node 2 scripts/examples/fsdp2_loop.py
"""

from __future__ import annotations

import argparse
import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt

STEPS, POINTS = 60, 64


def main() -> None:
    called = argparse.ArgumentParser()
    called.add_argument("--out", default="runs/fsdp2")
    out = called.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    with distckpt.Checkpointer(out, {"model": model, "optimizer": optimizer}, interval=10, max_keep_ckpts=2) as ckpt:
        for step in ckpt.steps(STEPS):
            # The points of a step are the same however many ranks there are: each takes its share of them.
            drawn = torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(step)) * 2 - 1
            points = drawn[rank::ranks]
            loss = nn.functional.mse_loss(model(points).squeeze(1), points.square().sum(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    norms = [one.full_tensor().detach().norm().item() for one in model.parameters()]
    if rank == 0:
        print(f"done, with weights whose norms sum up to {sum(norms):.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
