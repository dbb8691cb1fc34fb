"""Options that are computed where a run does not set them: what a role may take of its GPU, filled in before it loads."""

import logging

from services.config import RolloutConfig, RunConfig, TeacherConfig
from services.gpus.advice import updated
from services.gpus.memory import GIB
from services.gpus.plan import MemoryPlan, default_length, plan
from services.gpus.sharing import check_nccl, may_use_a_gpu

logger = logging.getLogger(__name__)

# Of a GPU that one vLLM has for itself.
ALONE_UTILIZATION = 0.9


def computed(config: RunConfig, role: str) -> RunConfig:
    """The run with what a role that is about to load its model may take, which is logged.

    Raises:
        ConfigError: of `plan` and of `check_nccl`.
    """
    check_nccl(config, role)
    found = plan(config, role)
    for line in found.lines() if found is not None else ():
        logger.info(line)
    if found is None and may_use_a_gpu(config, role):
        reason = "set the options of docs/gpu.md where it does not fit"
        logger.warning(
            "the %s's share of the GPU is not computed, for want of nvidia-smi or a readable config.json; %s",
            role,
            reason,
        )
    return with_shares(config, role, found)


def with_shares(config: RunConfig, role: str, found: MemoryPlan | None) -> RunConfig:
    """The run with what was computed for one role in the place of options that are not set."""
    sizes = found.sizes if found is not None else None
    if role == "trainer":
        tokens = config.pipeline.tokens_per_micro_batch or (sizes.tokens_per_micro_batch if sizes else None)
        return updated(config, "pipeline", tokens_per_micro_batch=tokens)
    if role == "teacher" and config.teacher.engine == "transformers":
        if sizes is None:
            return config
        section = config.teacher
        return updated(
            config,
            "teacher",
            tokens_per_forward=section.tokens_per_forward or sizes.tokens_per_forward,
            rows_per_head_chunk=section.rows_per_head_chunk or sizes.rows_per_head_chunk,
        )
    if role == "teacher":
        longest = config.teacher.max_model_len
        if longest is None and sizes is not None and _is_shared(role, found):
            # vLLM wants room in its cache for one sequence, by default the model's longest.
            longest = sizes.max_model_len
        return updated(config, "teacher", max_model_len=longest, **_of_vllm(config.teacher, role, found))
    longest = config.rollout.max_model_len or (sizes.max_model_len if sizes else default_length(config))
    seqs = config.rollout.max_num_seqs or (sizes.max_num_seqs if sizes else None)
    options = _of_vllm(config.rollout, role, found)
    return updated(config, "rollout", max_model_len=longest, max_num_seqs=seqs, **options)


def _of_vllm(section: RolloutConfig | TeacherConfig, role: str, found: MemoryPlan | None) -> dict[str, float]:
    """The share of a vLLM's GPUs, and its cache: of a shared GPU both are said, for each bounds what the other does not."""
    parts = found.share(role) if found is not None else []
    if not parts or section.gpu_memory_utilization is not None:
        return {}
    # vLLM asks for its share of each GPU to be free, and compares with a total that is a little less than the driver's.
    utilization = max(share.total / gpu.total_bytes for gpu, share, _ in parts)
    options = {"gpu_memory_utilization": min(1.0, -(-utilization * 1000 // 1) / 1000)}
    if _is_shared(role, found):
        return options | {"kv_cache_gib": section.kv_cache_gib or min(share.kv_cache for _, share, _ in parts) / GIB}
    return options if utilization > ALONE_UTILIZATION else {}


def _is_shared(role: str, found: MemoryPlan | None) -> bool:
    return found is not None and any(shared for _, _, shared in found.share(role))
