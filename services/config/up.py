"""`[up]`: what `distillserve up` does when one of its processes dies."""

from pydantic import Field

from services.config.section import Section


class UpConfig(Section):
    """What `distillserve up` does when a process dies: how often it is started again, and after which pause."""

    restart_servers: int = Field(3, ge=0)
    """How often in a row a server that dies after it was ready is started again; ten minutes of health begin a new count. Beyond
    it, or with 0 at once, the run ends in order."""
    restart_trainer: int = Field(0, ge=0)
    """How often in a run the trainer is started again from its checkpoint when one of its ranks is killed, or its servers were
    away for too long (outage_s)."""
    restart_backoff_s: float = Field(1.0, gt=0, le=60)
    """Pause before the first start again, seconds; doubled for each that follows, up to one minute."""
