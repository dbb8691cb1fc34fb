"""Teachers as they are after the preflight, over any client."""

from services.wire.teacher import TeacherInfo
from tests.scripted_teacher import INFO
from trainer.teachers import Teacher, Teachers


def attached(client: object, info: TeacherInfo = INFO, name: str | None = None) -> Teacher:
    return Teacher(name, client, info)  # type: ignore[arg-type]


def alone(client: object, info: TeacherInfo = INFO) -> Teachers:
    """A run's only teacher."""
    return Teachers([attached(client, info)])
