"""What `[rollout]` and `[teacher]` have in common."""

from services.config import addresses
from services.config.section import Dtype, Host, Port, Section


class ServerSection(Section):
    """What both servers have in common."""

    host: Host = "127.0.0.1"
    """Address to listen on, of either family; anything beyond loopback requires a key in the environment."""
    port: Port
    """TCP port to listen on; `up` takes the next free one when it is in use."""
    dtype: Dtype = "float32"
    """Dtype of the weights on this server."""
    cuda_devices: str | None = None
    """GPUs of this server, as CUDA_VISIBLE_DEVICES takes them, e.g. "0,1" or "GPU-8932f937"; "": none. Default: the first."""

    def url(self) -> str:
        """Where this server is reached from the same machine, in its one spelling."""
        return addresses.checked_url(addresses.url_of(addresses.reachable(self.host), self.port))
