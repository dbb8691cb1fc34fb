"""The control plane's end in every worker of a rollout server, what vLLM gets as --worker-extension-cls.

No method that is called in several workers at once may raise: vLLM's executor stops at the first failure and leaves the
answers of the other workers in their queues, from where every later call reads the answer of the one before. So what
goes wrong is returned, and services/rollout/weights.py makes an error of it.
"""

from typing import Any

import torch
from vllm.config import set_current_vllm_config

from services.weight_transfer.reload import discard_partial_update, is_reloading


class WeightUpdates:
    """Methods that vLLM adds to its workers' class; `self` is the worker."""

    def run_weight_stage(self, stage: str, arguments: dict[str, Any]) -> str | None:
        """Call vLLM's own method of that name; returns what went wrong in it."""
        return _problem(lambda: getattr(self, stage)(**arguments))

    def clear_weight_updates(self) -> str | None:
        """Forget an update that was not finished, and leave the group of the trainer that began it; once more does nothing.

        Layers that were complete keep the new weights: the model is whole again with the next full push.
        """
        return _problem(lambda: _clear(self))

    def weight_update_status(self) -> dict[str, bool]:
        """Whether an update is under way, for vLLM and in the layers themselves."""
        worker: Any = self
        return {"update_active": worker._weight_update_active, "reloading": is_reloading(worker.get_model())}


def _clear(worker: Any) -> None:
    engine = worker.weight_transfer_engine
    # A failed update is no longer active for vLLM, but may have left half-filled layers all the same.
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        if is_reloading(engine.model):
            discard_partial_update(engine.model, engine.model_config)
    engine.reset_weight_update_target()
    worker._weight_update_active = False
    engine.shutdown()


def _problem(work: Any) -> str | None:
    try:
        work()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]  # gloo adds the stack of its C++
        return f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return None
