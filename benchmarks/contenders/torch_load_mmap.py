"""As torch_save_fsync, but restored by torch.load(mmap=True): what is loaded lies in the page cache."""

from __future__ import annotations

from contenders import Contender
from contenders.torch_save import TorchSave

contender: Contender = TorchSave(is_durable=True, mmap=True)
