"""The control plane's end in every worker of a rollout server, what vLLM gets as --worker-extension-cls.

No method that is called in several workers at once may raise: vLLM's executor stops at the first failure and leaves the
answers of the other workers in their queues, from where every later call reads the answer of the one before. So each
method returns a dict that JSON can hold, with the key "problem": what went wrong, or None.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from vllm.config import set_current_vllm_config

from services.weight_transfer.channel import Rendezvous, Update
from services.weight_transfer.receiver import WeightReceiver


class WeightUpdates:
    """Methods that vLLM adds to its workers' class; `self` is the worker."""

    def weights_connect(self, rendezvous: dict[str, Any]) -> dict[str, Any]:
        """Join the trainer's group (`Rendezvous`); an old group is left."""
        return _run(self, lambda receiver: receiver.init_transfer_engine(Rendezvous(**rendezvous)))

    def weights_start(self) -> dict[str, Any]:
        """Begin an update; one that was not finished is discarded."""
        return _run(self, lambda receiver: receiver.start_weight_update())

    def weights_receive(self, update: dict[str, Any]) -> dict[str, Any]:
        """Receive and load an `Update`; also answers the fields of `Receipt`, as far as it came."""
        report = _run(self, lambda receiver: receiver.receive_weights(Update(**update)))
        return {**_run(self, lambda receiver: asdict(receiver.receipt)), **report}

    def weights_finish(self, label: str) -> dict[str, Any]:
        """Compute with the new weights from now on, whose label it is; refused when not everything came."""
        return _run(self, lambda receiver: _finish(self, receiver, label))

    def weights_discard(self) -> dict[str, Any]:
        """Forget an update that was not finished; `changed` says whether some layers hold its weights already."""
        return {"changed": False, **_run(self, lambda receiver: {"changed": receiver.discard()})}

    def weights_disconnect(self) -> dict[str, Any]:
        """Leave the trainer's group."""
        return _run(self, lambda receiver: receiver.shutdown())

    def weights_status(self) -> dict[str, Any]:
        """What this worker holds; `problem` is the last one since an update was started."""
        return _run(self, _status)


def _finish(worker: Any, receiver: WeightReceiver, label: str) -> None:
    receiver.finish_weight_update(label)
    worker.model_runner.reset_lora_state()


def _status(receiver: WeightReceiver) -> dict[str, Any]:
    return {
        "boot_id": receiver.boot_id,
        "label": receiver.label,
        "update": receiver.state,
        "connected": receiver.is_connected,
        "bytes_received": receiver.receipt.bytes_received,
        "parameters_received": receiver.receipt.parameters_received,
        "problem": receiver.problem,
    }


def _run(worker: Any, work: Callable[[WeightReceiver], dict[str, Any] | None]) -> dict[str, Any]:
    """What `work` returns, and what went wrong in it."""
    receiver: WeightReceiver | None = None
    try:
        receiver = worker.weight_transfer_engine
        with set_current_vllm_config(worker.vllm_config), torch.no_grad():
            return {"problem": None, **(work(receiver) or {})}
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        problem = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        if receiver is not None:
            receiver.problem = problem
        return {"problem": problem}
