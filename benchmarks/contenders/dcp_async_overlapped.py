"""dcp.async_save in a thread, staged beside forward and backward ("zero overhead"), awaited before the optimizer."""

from __future__ import annotations

from contenders import Contender
from contenders.dcp_async import DcpAsync

contender: Contender = DcpAsync(is_staged_beside=True)
