"""distckpt.Checkpointer(snapshot="lazy"): the state is copied beside the next forward and backward."""

from __future__ import annotations

from contenders import Contender
from contenders.distckpt_eager import Distckpt

contender: Contender = Distckpt("lazy")
