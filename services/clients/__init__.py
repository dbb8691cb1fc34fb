"""The clients of both servers; they load neither torch nor vllm."""

from services.clients.blocking import BlockingTeacherClient
from services.clients.rollout import RolloutClient
from services.clients.teacher import TeacherClient

__all__ = ["BlockingTeacherClient", "RolloutClient", "TeacherClient"]
