"""Which clients the trainer talks to its teachers with."""

import re
from pathlib import Path
from typing import Any

import pytest

from services.clients import TeacherClient
from services.clients.plain_vllm import VllmTeacherClient
from services.config import RunConfig
from services.config.keys import Secrets
from services.errors import ConfigError
from trainer.checkpoint.facts import check_facts
from trainer.checkpoint.folder import Checkpoint
from trainer.data.stream import RowStream
from trainer.open_session import _move_on, _teacher_client, count_steps


async def test_the_protocol_decides_the_client() -> None:
    ours = _teacher_client(RunConfig(), None, ["http://b:1"], Secrets())
    speaks_vllm = RunConfig(teacher_client={"protocol": "vllm", "urls": ["http://a:1"]})
    plain = _teacher_client(speaks_vllm, None, ["http://a:1/"], Secrets())
    assert type(ours) is TeacherClient and ours.urls == ["http://b:1"]
    assert type(plain) is VllmTeacherClient and plain.urls == ["http://a:1"]
    await ours.close()
    await plain.close()


async def test_teacher_model_tells_the_tokenizer_of_the_sections_own_servers_alone(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    client = {"protocol": "vllm", "urls": ["http://a:1"]}
    config = RunConfig(teacher={"model": tiny_model_folder("llama")}, teacher_client=client)
    own, maths = (_teacher_client(config, name, ["http://a:1"], Secrets()) for name in (None, "maths"))
    assert isinstance(own, VllmTeacherClient) and isinstance(maths, VllmTeacherClient)
    assert own._tokens is not None and maths._tokens is None
    await own.close()
    await maths.close()


async def test_all_teachers_share_key_and_times_of_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLSERVE_TEACHER_KEY", "k")
    config = RunConfig(teacher_client={"outage_s": 7, "request_timeout_s": 5})
    client = _teacher_client(config, "maths", ["http://a:1"], Secrets())
    assert client._http.headers["Authorization"] == "Bearer k"
    assert (client._outage_s, client._http.timeout.read) == (7, 5)
    await client.close()


@pytest.mark.parametrize(
    ("epochs", "warmup", "fits"), [(1.0, 4, True), (1.0, 5, False), (2.0, 8, True), (0.01, 2, False)]
)
def test_a_warm_up_is_no_longer_than_the_run_that_epochs_come_to(epochs: float, warmup: int, fits: bool) -> None:
    config = RunConfig(pipeline={"epochs": epochs, "prompts_per_step": 10}, optimizer={"warmup_steps": warmup})
    if fits:
        assert count_steps(config, 40) == epochs * 4
    else:
        message = rf"optimizer\.warmup_steps = {warmup} is above the \d+ steps that pipeline\.epochs = {epochs} comes to with 40"
        with pytest.raises(ConfigError, match=message):
            count_steps(config, 40)


TEACHER = {
    "model": "m",
    "fingerprint": "0123456789aa",
    "tells_model": True,
    "question": "q",
    "logprobs": [-1.0, -2.0],
    "tolerance": 0.01,
}
FACTS: dict[str, Any] = {
    "rows": [["d.jsonl", "a"], ["data.lm_path", "b"]],
    "tokenizer": "t",
    "base": None,
    "num_steps": 9,
    "versions": {"torch": "1"},
    "teachers": {"teacher_client": TEACHER, "teacher_client.named.maths": TEACHER | {"tells_model": False}},
}


def teachers(option: str, **changes: Any) -> dict[str, Any]:
    """One teacher is another one."""
    return {"teachers": FACTS["teachers"] | {option: FACTS["teachers"][option] | changes}}


def check(**changes: Any) -> None:
    check_facts(FACTS | changes, Checkpoint(Path("out/checkpoints/step-4"), 4, 1, FACTS))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rows": [["e.jsonl", "x"], ["data.lm_path", "b"]]}, "e.jsonl holds other rows than d.jsonl did for out/"),
        ({"rows": [["d.jsonl", "a"]]}, "nothing holds other rows than data.lm_path did"),
        ({"tokenizer": "u"}, "the tokenizer of student.model is another one than it was for out/"),
        ({"base": "x"}, "the model in student.model is another one than it was for out/"),
        (
            teachers("teacher_client", model="n", fingerprint="9123456789aa"),
            "of teacher_client is not the one of out/checkpoints/step-4: it is another model: n (9123456789aa), was m (0123456789aa)",
        ),
        (
            teachers("teacher_client", logprobs=[-1.0, -2.03]),
            "it scores the same tokens differently: by 0.015 nats on average, more than 0.01",
        ),
        (
            teachers("teacher_client.named.maths", logprobs=[-1.2, -2.0]),
            "the teacher of teacher_client.named.maths is not the one of out/",
        ),
        ({"num_steps": 3}, "pipeline.epochs comes to 3 steps, and out/checkpoints/step-4 has 4; raise it"),
    ],
    ids=str,
)
def test_a_run_goes_on_with_the_rows_and_models_that_it_had(changes: dict[str, Any], named: str) -> None:
    check()
    check(rows=[["elsewhere.jsonl", "a"], ["data.lm_path", "b"]], num_steps=20)
    check(**teachers("teacher_client", fingerprint="0123456789bb", logprobs=[-1.0, -2.01]))  # computed in another way
    check(
        **teachers("teacher_client", logprobs=[-1.0, -2.03], tolerance=0.1)
    )  # teacher_client.probe_tolerance was raised
    check(**teachers("teacher_client.named.maths", model="n", fingerprint="f"))  # a plain vLLM server's path
    check(**teachers("teacher_client", question="of other rows", logprobs=[-3.0]))
    check(teachers={})
    with pytest.raises(ConfigError, match=re.escape(named)):
        check(**changes)


def test_other_versions_of_libraries_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check(versions={"torch": "2"})
    assert "written with {'torch': '1'}, this run has {'torch': '2'}" in caplog.text


def test_the_data_goes_on_behind_what_was_used() -> None:
    state = {"positions": {"prompts": 12, "texts": 5}}
    prompts: RowStream[Any] = RowStream(range(7), seed=0, shuffle=True)
    texts: RowStream[Any] = RowStream(range(3), seed=0, shuffle=True)
    expected = [prompts.take(14)[12:], texts.take(7)[5:]]
    prompts.position = texts.position = 0
    _move_on(Checkpoint(Path("out/checkpoints/step-4"), 4, 1, state), prompts, texts)
    assert [prompts.take(2), texts.take(2)] == expected
