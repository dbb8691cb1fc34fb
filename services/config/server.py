"""What `[rollout]` and `[teacher]` have in common."""

from pydantic import Field

from services.config import addresses
from services.config.section import Dtype, Host, Port, Section


class ServerSection(Section):
    """What both servers have in common."""

    urls: list[str] = []
    """Servers the trainer attaches to, e.g. ["http://10.0.0.5:8100"]; default: the host and port of this section."""
    host: Host = "127.0.0.1"
    """Address to listen on, of either family; anything beyond loopback requires a key in the environment."""
    port: Port
    """TCP port to listen on; `up` takes the next free one when it is in use."""
    dtype: Dtype = "float32"
    """Dtype of the weights on this server."""
    cuda_devices: str | None = None
    """GPUs of this server, as CUDA_VISIBLE_DEVICES takes them, e.g. "0,1" or "GPU-8932f937"; "": none. Default: the first."""
    startup_timeout_s: float = Field(600.0, gt=0)
    """How long the trainer and `up` wait for this server to become ready, seconds."""
    request_timeout_s: float = Field(300.0, gt=0)
    """How long the trainer waits for the answer to one request, seconds."""

    def server_urls(self) -> list[str]:
        """The URLs to attach to, each in its one spelling."""
        own = addresses.url_of(addresses.reachable(self.host), self.port)
        return [addresses.checked_url(url, base_path=True) for url in self.urls or [own]]
