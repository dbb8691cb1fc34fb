"""A learner and its weight pushes, without the rest of a run."""

from dataclasses import dataclass, replace
from typing import Any

from services.config import RunConfig
from services.weight_transfer.source import WeightSource
from trainer.learner import Learner
from trainer.student import load_student
from trainer.weights.policy_versions import PolicyVersions
from trainer.weights.snapshot import WeightSnapshot
from trainer.weights.weight_sync import WeightSync


def learner_of(folder: str, **sections: dict[str, Any]) -> Learner:
    """A learner of the model in a folder, on the CPU."""
    config = RunConfig(**{**sections, "student": {"model": folder, **sections.get("student", {})}})
    return Learner(config, load_student(config.student, lora=config.lora), num_steps=10)


@dataclass
class Pushing:
    sync: WeightSync
    learner: Learner

    @property
    def versions(self) -> PolicyVersions:
        return self.sync.versions

    async def snapshot(self, version: int, source: WeightSource | None = None) -> WeightSnapshot:
        """Of the learner; what is sent comes from another source where one is given."""
        found = self.learner.snapshot(version, self.sync.rollout_dtype, await self.sync.canary())
        return found if source is None else replace(found, source=source)

    async def push(self, version: int) -> dict[str, float]:
        """As a run pushes."""
        return await self.sync.publish(await self.snapshot(version))

    async def push_once(self, version: int, source: WeightSource | None = None) -> dict[str, float]:
        """A single attempt."""
        return await self.sync._publish_once(await self.snapshot(version, source))
