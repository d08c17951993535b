"""torch.distributed.checkpoint.save with four threads."""

from __future__ import annotations

from contenders import Contender
from contenders.dcp_save import DcpSave

contender: Contender = DcpSave(threads=4)
