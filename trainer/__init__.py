"""What programs import: `from trainer import DistillationTrainer, RunConfig`; each is loaded when it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.config import RunConfig
    from trainer.callbacks.callback import Callback, RunControl, RunState
    from trainer.distillation_trainer import DistillationTrainer
    from trainer.rollout_function import StudentClient

__all__ = ["Callback", "DistillationTrainer", "RunConfig", "RunControl", "RunState", "StudentClient"]

_MODULES = {
    "Callback": "trainer.callbacks.callback",
    "DistillationTrainer": "trainer.distillation_trainer",
    "RunConfig": "services.config",
    "RunControl": "trainer.callbacks.callback",
    "RunState": "trainer.callbacks.callback",
    "StudentClient": "trainer.rollout_function",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
