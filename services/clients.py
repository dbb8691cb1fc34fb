"""The clients of both servers; they load neither torch nor vllm."""

from services.blocking_teacher_client import BlockingTeacherClient
from services.rollout_client import RolloutClient
from services.teacher_client import TeacherClient

__all__ = ["BlockingTeacherClient", "RolloutClient", "TeacherClient"]
