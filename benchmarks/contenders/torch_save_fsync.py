"""torch.save to a draft, fsynced, renamed, the folder fsynced: durable when it returns."""

from __future__ import annotations

from contenders import Contender
from contenders.torch_save import TorchSave

contender: Contender = TorchSave(durable=True)
