"""dcp.async_save in a process, with a stager in shared memory that is kept and cached plans."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.optim import Optimizer

from contenders import Contender
from contenders.dcp_async import DcpAsync


class DcpProcess(DcpAsync):
    def open(self, directory: Path, model: nn.Module, optimizer: Optimizer) -> None:
        super().open(directory, model, optimizer)
        os.environ["MASTER_ADDR"] = "localhost"
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def close(self) -> None:
        super().close()
        torch.distributed.destroy_process_group()


contender: Contender = DcpProcess(AsyncCheckpointerType.PROCESS, is_shared=True)
