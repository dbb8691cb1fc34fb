"""What the rollout server says of itself."""

from types import SimpleNamespace
from typing import Any

from services.rollout.completions import get_info
from services.rollout.settings import RolloutSettings
from services.rollout.state import RolloutState
from services.wire.rollout import RolloutInfo


async def test_info_tells_the_limit_that_clients_cut_their_work_to() -> None:
    model = SimpleNamespace(dtype="torch.float32", max_model_len=64, get_vocab_size=lambda: 9)
    parallel = SimpleNamespace(world_size_across_dp=2)

    async def version() -> str:
        return "3"

    engine: Any = SimpleNamespace(
        model_config=model, vllm_config=SimpleNamespace(parallel_config=parallel), get_weight_version=version
    )
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(engine_client=engine)))
    settings = RolloutSettings("m", "gloo", max_logprobs=4, max_completions_per_request=77, max_body_bytes=1)
    response = await get_info(request, RolloutState(settings))
    info = RolloutInfo.model_validate_json(bytes(response.body))
    assert (info.max_completions_per_request, info.max_logprobs, info.world_size) == (77, 4, 2)
