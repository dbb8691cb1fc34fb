"""Entry point of `vllm.general_plugins`: makes the gloo engine known to vLLM's factories.

vLLM calls `register` in every one of its processes, more than once; the trainer calls it before it builds
its own end. Only names are registered, the engine's module is imported when it is used; and vLLM's CPU communicator gets
what it lacks (services/weight_transfer/cpu_collectives.py).
"""

GLOO_BACKEND = "gloo"
_ENGINES = "services.weight_transfer.gloo"


def register() -> None:
    """Register both ends of the gloo engine; registering twice is harmless."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    from services.weight_transfer.cpu_collectives import add_collectives

    add_collectives()
    if GLOO_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(GLOO_BACKEND, _ENGINES, "GlooWeightTransferEngine")
    if GLOO_BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(GLOO_BACKEND, _ENGINES, "GlooTrainerWeightTransferEngine")
