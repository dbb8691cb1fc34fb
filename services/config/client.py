"""What `[rollout_client]` and `[teacher_client]` have in common."""

from pydantic import Field

from services.config.addresses import checked_url
from services.config.section import Section
from services.config.server import ServerSection


class ClientSection(Section):
    """What the trainer knows of servers of one kind."""

    urls: list[str] = []
    """Servers to attach to, e.g. ["http://10.0.0.5:8100"]; default: the host and port of the servers' own section."""
    startup_timeout_s: float = Field(600.0, gt=0)
    """How long the trainer and `up` wait for such a server to become ready, seconds."""
    request_timeout_s: float = Field(300.0, gt=0)
    """How long the trainer waits for the answer to one request, seconds."""
    outage_s: float = Field(300.0, gt=0)
    """How long the trainer goes on asking while such a server does not answer, nor a replica of it, seconds; then the run
    stops."""

    def server_urls(self, server: ServerSection) -> list[str]:
        """The URLs to attach to, each in its one spelling.

        Args:
            server: section of the servers, which are at its host and port unless URLs are given.
        """
        return [checked_url(url, base_path=True) for url in self.urls or [server.url()]]
