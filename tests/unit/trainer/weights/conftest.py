"""A push to stand-ins of rollout servers."""

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from services.errors import WeightSyncError
from tests.models import save_model
from tests.pushing import Pushing, learner_of
from tests.servers import rollout_info
from tests.unit.trainer.weights.push_servers import CPU, PROMPT, Attach, Servers
from trainer.data.prompts import Prompt
from trainer.weights import weight_sync
from trainer.weights.weight_sync import WeightSync


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("m"), "llama")


@pytest.fixture
def attach(folder: str, monkeypatch: pytest.MonkeyPatch) -> Attach:
    compared = monkeypatch.setattr

    def attach(servers: Servers, info: dict[str, Any] | None = None, **sections: Any) -> Pushing:
        learner = learner_of(folder, **sections)
        compared(weight_sync, "WeightControlClient", servers.control)
        compared(weight_sync, "WeightSender", servers.sender)

        def check_arrival(update: Any, checksums: Any, reports: Any, urls: Any) -> None:
            servers.events.append("compare")
            assert (checksums, reports, urls) == (["a checksum"], [["a report"]], servers.urls)
            if servers.trouble == "loses a byte":
                raise WeightSyncError("http://rollout, worker 0: other bytes")

        compared(weight_sync, "check_arrival", check_arrival)
        servers.model = AutoModelForCausalLM.from_pretrained(folder)
        canaries = [Prompt(1, PROMPT, ""), Prompt(2, [*PROMPT, 3], "")]
        infos = [rollout_info(**{"boot_id": url} | (info or {})) for url in servers.urls]
        sync = WeightSync(learner.config, CPU, servers, infos, canaries, None, "mine")  # type: ignore[arg-type]
        return Pushing(sync, learner)

    return attach
