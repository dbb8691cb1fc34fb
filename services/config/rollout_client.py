"""`[rollout_client]`: how the trainer attaches to rollout servers."""

from pydantic import Field

from services.config.client import ClientSection


class RolloutClientConfig(ClientSection):
    """How the trainer attaches to rollout servers."""

    request_timeout_s: float = Field(300.0, gt=10)
    """How long the trainer waits while a server says nothing, seconds; every 10 s a server says that it lives, however long
    its completions are."""
