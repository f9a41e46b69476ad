"""A Headrace scheduler whose control channel misbehaves when it is told to. Serving itself is the product's, untouched.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.faults.channel_orders import FOLDER_VARIABLE, GARBAGE, LATE, SILENT, told
from scheduler.engine.channel import ChannelServer
from scheduler.vllm_scheduler import HeadraceScheduler

_LATE_S = 3.0
_POLL_S = 0.2


class FaultyChannelScheduler(HeadraceScheduler):
    """`HeadraceScheduler` with the channel's answers going through `told`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        whole = ChannelServer._answer
        folder = os.environ.get(FOLDER_VARIABLE)

        def answer(channel: ChannelServer, question: bytes) -> bytes:
            way = told(folder, os.getpid())
            if way == LATE:
                time.sleep(_LATE_S)
            while told(folder, os.getpid()) == SILENT:
                time.sleep(_POLL_S)
            return b"\xff\x00 no JSON {" if way == GARBAGE else whole(channel, question)

        ChannelServer._answer = answer  # type: ignore[method-assign]  # in this engine's process only
        super().__init__(*args, **kwargs)
