"""distckpt.Checkpointer with async_save=False: durable when save() returns."""

from __future__ import annotations

from contenders import Contender
from contenders.distckpt_checkpointer import DistckptCheckpointer

contender: Contender = DistckptCheckpointer(async_save=False)
