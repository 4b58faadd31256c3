"""Processes that stay, each a rank of one job, and run what they are given: starting them takes longer than most of what they do."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import queue
import socket
import traceback
from datetime import timedelta
from typing import Any

TIMEOUT = 120.0  # seconds for what is run


class RankProcesses:
    """Processes of one gloo job.

    Args:
        count: how many.
        patience: seconds that gloo waits within a collective.
    """

    def __init__(self, count: int, patience: float = 60.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._asked = [context.SimpleQueue() for _ in range(count)]
        self._told: list[Any] = [context.Queue() for _ in range(count)]
        self.processes = [
            context.Process(target=_serve, args=(rank, count, port, patience, self._asked[rank], self._told[rank]), daemon=True)
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def run(self, function: str, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """`function(rank, *args)` on every rank, named "module:function".

        Returns what each gave; the text of its error where it raised; None where it did not come back in time or was killed.
        """
        for asked in self._asked:
            asked.put((function, args))
        found = []
        for told, process in zip(self._told, self.processes, strict=True):
            try:
                found.append(pickle.loads(told.get(timeout=timeout if process.is_alive() else 1.0)))
            except queue.Empty:
                found.append(None)
        return found


def _serve(rank: int, count: int, port: int, patience: float, asked: Any, told: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count, timeout=timedelta(seconds=patience)
    )
    while True:
        name, args = asked.get()
        module, _, function = name.partition(":")
        try:
            with torch.no_grad():
                told.put(pickle.dumps(getattr(importlib.import_module(module), function)(rank, *args)))
        except Exception:  # noqa: BLE001 — whatever it is, the test is told
            told.put(pickle.dumps(traceback.format_exc()))
