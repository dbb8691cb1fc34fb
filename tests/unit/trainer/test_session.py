"""Which client the trainer talks to its teacher with."""

from services.clients import TeacherClient
from services.config import TeacherConfig
from services.vllm_teacher_client import VllmTeacherClient
from trainer.session import _teacher_client


async def test_the_protocol_decides_the_client() -> None:
    ours = _teacher_client(TeacherConfig(), "key")
    plain = _teacher_client(TeacherConfig(protocol="vllm", urls=["http://a:1/"]), "key")
    assert type(ours) is TeacherClient and ours.urls == ["http://127.0.0.1:8101"]
    assert type(plain) is VllmTeacherClient and plain.urls == ["http://a:1"]
    await ours.close()
    await plain.close()
