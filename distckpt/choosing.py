"""Which format a run is saved in, where nobody said so."""

from __future__ import annotations

import logging
from typing import cast

from torch.distributed.checkpoint.planner import SavePlanner

from distckpt.engine.memory import Size
from distckpt.formats import Format
from distckpt.formats.dcp_planner import check_planner
from distckpt.formats.full import Full
from distckpt.formats.sharded import Sharded
from distckpt.ranks import Ranks, is_leader, together

_log = logging.getLogger("distckpt")

FORMATS = ("auto", "full", "sharded")

_LARGE_BYTES = 2_000_000_000


def choose_format(
    word: str, size: Size, ranks: Ranks, *, planner: object = None, writers_per_node: int | None = None
) -> Format:
    """The format that ``word``, one of `FORMATS`, asks for. Collective where it is ``"auto"`` and there is no planner.

    Raises:
        TypeError: where ``planner`` is none that can be used.
        ValueError: where the format has no use for it.
    """
    if planner is not None:
        check_planner(planner)
        if word == "full":
            raise ValueError('planner: rank 0 writes the full format without one; it is for format="sharded"')
        return Sharded(cast(SavePlanner, planner), writers_per_node=writers_per_node)
    sharded = Sharded(writers_per_node=writers_per_node)
    if word != "auto":
        return Full() if word == "full" else sharded
    told = together(ranks, "choice of a format", lambda: [size.spread_bytes, size.whole_bytes])
    if any(spread for spread, _ in told):
        why = "tensors are spread over ranks"
    elif ranks.world_size > 1 and max(whole for _, whole in told) > _LARGE_BYTES:
        why = f"the state has {max(whole for _, whole in told) / 1e9:.1f} GB, which the ranks share among them"
    else:
        return Full()
    if is_leader(ranks):
        _log.info("checkpoints are sharded: %s", why)
    return sharded
