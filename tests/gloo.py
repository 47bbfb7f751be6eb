"""Ranks for tests: fresh processes that communicate over gloo, on the CPU.

A rank must be a fresh process, because DeepSpeed replaces `F.linear` for the whole process. Importing torch, DeepSpeed
and transformers takes seconds, so the ranks are forked from a server that has imported them and done nothing else.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_slm.dist import World

PRELOADED = [
    "tests.without_mlflow",
    "pytest",
    "hypothesis.strategies",
    "transformers.models.auto.modeling_auto",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "mistral", "qwen3")),
    "megatron_slm.backend.deepspeed",
    "megatron_slm.models.causal_lm",
    "megatron_slm.build.run",
    # Libraries import these late, and every rank would do it again.
    "transformers.models.auto.tokenization_auto",
    "megatron.core.datasets.helpers",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "tests.warm",
]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RankError(Exception):
    """The failure of a rank: its traceback, its death, or a missing answer."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(world, *args)` on every rank, and return what each rank returned.

    Args:
        function: defined in a module, because it is sent by name; `world` is the `World` of the rank.
        world_size: number of ranks.
        args: the same on all ranks. Ranks do not inherit the environment of this process.
        timeout: seconds until ranks without an answer are killed.

    Raises:
        RankError: a rank raised, died or did not answer; the other ranks are killed.
    """
    context = _forkserver()
    call = pickle.dumps((function, args))
    deadline = time.monotonic() + timeout
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_rank, args=(rank, world_size, folder, timeout, theirs, call))
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
            return _answers(processes, connections, deadline)
        finally:
            # Ranks that answered wait to be killed: an exit would close connections that others still read.
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()


def _answers(processes: list[BaseProcess], connections: list[Connection], deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(connections):
        silent = [connection for rank, connection in enumerate(connections) if rank not in answers]
        ready = wait(silent, max(0.0, deadline - time.monotonic()))
        failures = []
        for rank in (connections.index(connection) for connection in ready):
            try:
                answers[rank], failure = pickle.loads(connections[rank].recv_bytes())
            except EOFError:
                processes[rank].join(10)
                failure = f"died with exit code {processes[rank].exitcode}"
            if failure is not None:
                failures.append(f"rank {rank} of {len(connections)} {failure}")
        if not ready:
            ranks = [connections.index(connection) for connection in silent]
            failures.append(f"ranks {ranks} did not answer in time: their stacks are on stderr")
        if failures:
            # The errors of ranks that lost a connection may come before the end of the rank that died.
            time.sleep(0.2)
            died = [(rank, process.exitcode) for rank, process in enumerate(processes) if (process.exitcode or 0) < 0]
            failures += [f"rank {rank} died with exit code {status}" for rank, status in died if rank not in answers]
            raise RankError("\n".join(failures))
    return [answers[rank] for rank in range(len(connections))]


def _rank(rank: int, world_size: int, folder: str, timeout: float, connection: Connection, call: bytes) -> None:
    """Join the other ranks, call the function, send its result, and wait to be killed."""
    # DeepSpeed collects garbage at its start, which would copy every page that is shared with the server.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A rank that hangs prints its stack before it is killed, and ends even if the test run was killed.
    faulthandler.dump_traceback_later(0.9 * timeout)
    signal.alarm(int(timeout) + 5)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    answer = failure = None
    try:
        store = dist.FileStore(str(Path(folder, "store")), world_size)  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        function, args = pickle.loads(call)
        answer = function(World(rank, world_size, rank, torch.device("cpu")), *args)
        message = pickle.dumps((answer, None))
    except BaseException:
        failure = f"raised\n{traceback.format_exc()}"
        message = pickle.dumps((None, failure))
    connection.send_bytes(message)
    connection.poll(None)


@cache
def _forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context
