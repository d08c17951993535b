"""Which format a run is saved in, where nobody said so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
    sizes = [size.spread_bytes, size.whole_bytes]
    spread_bytes, whole_bytes = together(ranks, "choice of a format", lambda: sizes, _most_of_each)
    if spread_bytes:
        why = "tensors are spread over ranks"
    elif ranks.world_size > 1 and whole_bytes > _LARGE_BYTES:
        why = f"the state has {whole_bytes / 1e9:.1f} GB, which the ranks share among them"
    else:
        return Full()
    if is_leader(ranks):
        _log.info("checkpoints are sharded: %s", why)
    return sharded


def _most_of_each(told: Sequence[Sequence[int]]) -> list[int]:
    return [max(of) for of in zip(*told, strict=True)]
