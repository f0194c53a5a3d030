"""Measures how late the event loop runs timers. Code that blocks the loop delays every client."""

import asyncio
from typing import Final

from specserve.server.metrics import ServerMetrics

INTERVAL: Final = 0.1  # seconds


async def watch_lag(metrics: ServerMetrics) -> None:
    """Observe `metrics.event_loop_lag` (seconds) every `INTERVAL` until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL
        await asyncio.sleep(INTERVAL)
        metrics.event_loop_lag.observe(max(0.0, loop.time() - due))
