"""dcp.async_save in a thread, staged beside forward and backward ("zero overhead"), awaited before the optimizer.

What the forward changes, the statistics of batch norms, it may save as they are after it: 4 times in 59 here.
"""

from __future__ import annotations

from contenders import Contender
from contenders.dcp_async import DcpAsync

contender: Contender = DcpAsync(is_staged_beside=True)
