"""The clients of both servers; they load neither torch nor vllm."""

from services.rollout_client import RolloutClient
from services.teacher_client import TeacherClient

__all__ = ["RolloutClient", "TeacherClient"]
