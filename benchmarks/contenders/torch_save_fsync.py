"""torch.save to a draft, fsynced, renamed, the folder fsynced: durable when it returns; torch.load."""

from __future__ import annotations

from contenders import Contender
from contenders.torch_save import TorchSave

contender: Contender = TorchSave(is_durable=True)
