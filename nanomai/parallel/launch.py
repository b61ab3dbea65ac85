"""Starting and ending the processes of a job: under torchrun, or a few of them from a test or a notebook."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanomai.config import ConfigError
from nanomai.files import allow_open_files
from nanomai.parallel.mesh import Mesh, RankFailed

A_DAY = 86_400.0  # as long as rank 0 may prepare data while the others wait; death is noticed at once, see `watch.py`


@contextlib.contextmanager
def process_group(device_type: str = "cpu", timeout_s: float = A_DAY) -> Iterator[Mesh]:
    """The mesh that torchrun's environment describes, joined for the length of the block; one process without it.

    A rank whose peer has ended raises RankFailed.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Mesh()
        return
    if "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE is {world_size} and RANK is not set; start with torchrun, or unset WORLD_SIZE")
    mesh = Mesh(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    joined_here = not dist.is_initialized()
    try:
        if joined_here:
            allow_open_files()  # gloo connects every pair of ranks, for messages and for checkpoints
            # gloo serves CPU tensors (flags, preparation) beside nccl's GPU tensors
            backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
            if device_type == "cuda":
                torch.cuda.set_device(mesh.local_rank)
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s), rank=mesh.rank,
                                    world_size=world_size, store=_fresh_store(mesh, timeout_s))
        yield mesh
        mesh.barrier()  # no rank tears its connections down while another still waits for an answer
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo/" in str(error)
        if not lost and not isinstance(error, RankFailed):
            raise
        time.sleep(1)  # torchrun ends every rank as soon as one has failed: the one that knows why speaks first
        raise RankFailed("another rank ended while this one waited for it" if lost else str(error)) from None
    finally:
        if joined_here and dist.is_initialized():
            dist.destroy_process_group()


def meeting_point(timeout_s: float = 60) -> dist.Store:
    """A connection to the store at which the ranks of this job meet: torchrun's own, or that of rank 0 without it."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         timeout=datetime.timedelta(seconds=timeout_s))


def is_first_to_say(message: str) -> bool:
    """Whether no other rank has said this since the job started: what all ranks refuse is told once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # no store from before the ranks meet
        return True
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart
    try:
        return meeting_point(5).add(f"nanomai/said/{start}/{message}", 1) == 1
    except dist.DistError:  # whoever kept it has ended
        return True


def _fresh_store(mesh: Mesh, timeout_s: float) -> dist.Store | None:
    """A store for the process groups of this start alone, in rank 0; None where nothing is kept from start to start.

    torchrun's lives through restarts (seen in torch 2.13) with addresses that dead ranks left there, and who reads them
    before they are overwritten connects to nobody.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    kept, host, key = meeting_point(timeout_s), os.environ["MASTER_ADDR"], "nanomai/port"
    if mesh.is_main:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False,
                              timeout=datetime.timedelta(seconds=timeout_s))
        kept.set(key, str(store.port))
        return store
    while True:
        port = int(kept.get(key))
        with contextlib.suppress(dist.DistError):  # the port of an earlier start: nobody is there
            store = dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=2))
            store.set_timeout(datetime.timedelta(seconds=timeout_s))
            return store


def may_restart() -> bool:
    """Whether torchrun would start this command line again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


class StopSignal:
    """Asks a loop to end well: after the first Ctrl-C or SIGTERM `name` is set; another one stops at once."""

    ONE_REQUEST = 2.0  # seconds: torchrun hands on the Ctrl-C that the terminal has already sent to every rank

    def __init__(self, tell: bool = False):
        self.tell = tell  # the person who asked: a step may take long to end
        self.name: str | None = None
        self.asked = 0.0

    def __enter__(self) -> StopSignal:
        here = threading.current_thread() is threading.main_thread()  # Python lets no other thread handle signals
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)} if here else {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.asked = signal.Signals(number).name, time.monotonic()
            if self.tell:
                os.write(2, b"\nfinishing this step and saving; once more stops at once, without saving\n")
        elif time.monotonic() - self.asked > self.ONE_REQUEST:
            raise KeyboardInterrupt


def launch(function: Callable, world_size: int, *arguments, timeout_s: float = 120) -> None:
    """Runs `function(rank, *arguments)` in `world_size` fresh processes, joined over gloo; raises if one fails.

    `function` must be importable (a spawned process cannot see a notebook's cells). Never fork: a forked child of a
    process that has run PyTorch with two threads hangs for ever.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.start_processes(_worker, (function, world_size, port, arguments), nprocs=world_size, join=False,
                                 start_method="spawn")
    deadline = time.monotonic() + timeout_s
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} on {world_size} processes did not end within {timeout_s:.0f} s")


def _worker(rank: int, function: Callable, world_size: int, port: int, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with process_group():
        function(rank, *arguments)
