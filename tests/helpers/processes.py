"""A few processes that stay alive and run functions of tests, each time in a new process group (gloo, CPU)."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def _packed(value: Any) -> bytes:
    """Write a value with its tensors: torch's own queues share their memory, which needs both processes to be there."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=False)


def _serve(rank: int, tasks: Any, results: Any) -> None:
    os.environ.update(LOOPBACK)
    torch.set_num_threads(1)
    for packed in iter(tasks.get, None):
        function, args, size, meeting = _unpacked(packed)
        said: list[str] = []
        try:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found, error = function(rank, *args), None
            said = [str(one.message) for one in caught]
        except Exception as problem:
            found, error = None, f"{type(problem).__name__}: {problem}\n{traceback.format_exc()}"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        results.put(_packed((meeting, rank, found, error, said)))


class Processes:
    """Processes, one per rank. Each is started when it is needed first, or when the one before it has died.

    Args:
        folder: a folder for the files by which they meet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.context = folder, multiprocessing.get_context("spawn")
        self.results = self.context.Queue()
        self.tasks: list[Any] = []
        self.started: list[Any] = []
        self.said: list[list[str]] = []

    def _start(self, ranks: int) -> None:
        for rank in range(ranks):
            if rank < len(self.started) and self.started[rank].is_alive():
                continue
            del self.started[rank:], self.tasks[rank:]
            self.tasks.append(self.context.Queue())
            self.started.append(self.context.Process(target=_serve, args=(rank, self.tasks[rank], self.results), daemon=True))
            self.started[rank].start()

    def errors_and_results(
        self, function: Callable[..., Any], *args: Any, ranks: int, dies: int | None = None
    ) -> tuple[list[Any], list[str | None]]:
        """Run a function of a module in each rank; it gets the rank and the arguments.

        Args:
            dies: a rank whose process the function ends; it gives no answer.
        """
        self._start(ranks)
        meeting = str(self.folder / uuid.uuid4().hex)
        for tasks in self.tasks[:ranks]:
            tasks.put(_packed((function, args, ranks, meeting)))
        answers: dict[int, Any] = {}
        while len(answers) < ranks - (dies is not None):
            of, rank, *answer = _unpacked(self.results.get(timeout=300))
            if of == meeting:  # else it is a late answer to a test that gave up
                answers[rank] = answer
        if dies is not None:
            self.started[dies].join(60)
        found, errors, self.said = ([answers[rank][i] for rank in sorted(answers)] for i in range(3))
        return found, errors

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
        """Run a function in each rank, and return what it returns there."""
        found, errors = self.errors_and_results(function, *args, ranks=ranks)
        if any(errors):
            pytest.fail("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
        return found

    def errors(self, function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[str]:
        """Run a function that has to fail in each rank, and return the messages."""
        _, errors = self.errors_and_results(function, *args, ranks=ranks)
        assert all(errors), f"expected an error in each rank, found {errors}"
        return [str(error) for error in errors]

    def end(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.started:
            process.join(20)
            if process.is_alive():
                process.terminate()
