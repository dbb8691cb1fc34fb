"""A channel from GPU to GPU: vLLM's communicator for nccl, with the deadlines that it lacks.

A call of nccl that waits for a lost peer waits for ever, in a kernel or inside the library. So each call is made in a thread
of its own; the caller waits for it until the deadline, then aborts the group, which ends the kernels. The threads also keep
vLLM's streams away from the caller: vLLM's communicator changes the current stream of a thread that uses it.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from threading import Lock, Thread

import torch
from torch.distributed import Store
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.utils.nccl import unpinned_nccl_env
from vllm.utils.torch_utils import current_stream

from services.weight_transfer.channel import GroupLostError, Rendezvous


class NcclChannel:
    """A group of the trainer's GPU and the GPUs of all workers, each of them another one.

    Args:
        store: to which all ranks have come.
        device: this rank's GPU, with its index.

    Raises:
        TimeoutError: joining took longer than the rendezvous' `timeout_s`.
        RuntimeError: nccl is missing or has failed.
    """

    def __init__(self, store: Store, rendezvous: Rendezvous, rank: int, device: torch.device) -> None:
        self.device = device
        self._timeout_s = rendezvous.timeout_s
        self._communicator: PyNcclCommunicator | None = None
        self._left: Future[None] = Future()
        self._lock = Lock()
        group = StatelessProcessGroup(rank, rendezvous.world_size, store)
        self._within_deadline("joining the group", lambda: self._join(group))

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Send from rank 0, or receive into, a contiguous uint8 tensor on `device`.

        Raises:
            TimeoutError: it took longer than the rendezvous' `timeout_s`; the group has been left.
            GroupLostError: nccl failed, or the channel was aborted.
        """
        self._within_deadline(f"a broadcast of {buffer.numel()} bytes", lambda: self._broadcast(buffer))

    def abort(self) -> None:
        """Leave the group; a broadcast that runs in another thread ends with a GroupLostError. Safe to call twice."""
        with self._lock:
            if self._left.done():
                return
            # First: an aborted broadcast returns as if all had arrived.
            self._left.set_result(None)
            communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.destroy()  # it calls ncclCommAbort, which frees the group: never twice

    def _join(self, group: StatelessProcessGroup) -> None:
        with unpinned_nccl_env():
            communicator = PyNcclCommunicator(group, self.device)
        if communicator.disabled:  # it would broadcast nothing, and say nothing
            raise RuntimeError(
                "vLLM finds no nccl, or VLLM_DISABLE_PYNCCL is set; unset it, let VLLM_NCCL_SO_PATH name libnccl.so.2, or set "
                "weight_sync.backend = gloo"
            )
        with self._lock:
            if not self._left.done():
                self._communicator = communicator
                return
        communicator.destroy()

    def _broadcast(self, buffer: torch.Tensor) -> None:
        communicator = self._communicator
        if communicator is None:  # left meanwhile, of which the caller is told
            return
        if self.device.type == "cuda":
            # The optimizer, what fills the buffer and what still reads it run on streams that nccl's would not wait for.
            torch.cuda.synchronize(self.device)
        try:
            communicator.broadcast(buffer, src=0)
            current_stream().synchronize()
        except RuntimeError as error:
            raise GroupLostError(str(error)) from error

    def _within_deadline(self, what: str, call: Callable[[], None]) -> None:
        done: Future[None] = Future()
        # A daemon: one that hangs for ever must not keep the process from ending.
        Thread(target=self._run, args=(call, done), name="nccl", daemon=True).start()
        wait((done, self._left), self._timeout_s, FIRST_COMPLETED)
        if self._left.done():
            raise GroupLostError(f"{what} over nccl did not take place: the group of this push has been left")
        if not done.done():
            self.abort()
            raise TimeoutError(
                f"{what} over nccl took longer than {self._timeout_s:g} s: a worker is gone, or the network is slow; see "
                "what the servers and NCCL_DEBUG=INFO say, or raise weight_sync.stage_timeout_s"
            )
        done.result()

    def _run(self, call: Callable[[], None], done: "Future[None]") -> None:
        try:
            with torch.accelerator.device_index(self.device.index):  # a new thread's is 0
                call()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)
