"""Text sent to the teacher scores as the ids do that a rollout server is sent and the model writes behind them."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from services.config import DataConfig
from tests.models import save_model
from tests.teacher_app import score, serving
from tests.tokenizers import FAMILIES
from trainer.data.prompts import Prompt, read_prompts

PAIRS = [
    ("47+85=", "132"),
    ("Answer:", " yes"),
    ("Answer: ", "yes"),
    ("the do", "g."),
    ("你好", "世界"),
    ("x(", "\ty\n"),
]
CHATS = [name for name, build in FAMILIES.items() if build().chat_template]
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


async def scored(client: httpx.AsyncClient, *sequences: dict[str, Any]) -> list[dict[str, Any]]:
    response = await score(client, {"sequences": list(sequences), "top_k": 2})
    assert response.status_code == 200, response.text
    return response.json()["sequences"]


def read(folder: Path, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Prompt:
    (folder / "rows.jsonl").write_text(json.dumps(row))
    return read_prompts(str(folder / "rows.jsonl"), DataConfig(**options), tokenizer).prompts[0]


def as_ids(prompt_ids: list[int], completion_ids: list[int]) -> dict[str, Any]:
    return {"token_ids": [*prompt_ids, *completion_ids], "prompt_length": len(prompt_ids)}


@pytest.mark.parametrize("family", FAMILIES)
async def test_text_scores_as_the_trainers_ids_do(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    async with serving(save_model(tmp_path / "model", "qwen3", tokenizer=tokenizer)) as client:
        for prompt, completion in PAIRS:
            row = read(tmp_path, {"prompt": prompt}, tokenizer)
            (text,) = await scored(client, {"prompt": prompt, "completion": completion})
            assert text == (await scored(client, as_ids(row.token_ids, text["token_ids"])))[0]
            if completion == completion.strip():
                answer = read(tmp_path, {"prompt": prompt, "answer": completion}, tokenizer).answer_token_ids
                assert text["token_ids"] == answer


@pytest.mark.parametrize("family", CHATS)
async def test_messages_score_as_the_trainers_ids_do_up_to_the_end_of_the_turn(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    row = read(tmp_path, {"messages": HI, "answer": "yes"}, tokenizer, last_assistant_turn="drop")
    async with serving(save_model(tmp_path / "model", "qwen3", tokenizer=tokenizer)) as client:
        (chat,) = await scored(client, {"messages": HI})
        assert chat == (await scored(client, as_ids(row.token_ids, chat["token_ids"])))[0]
    *answer, end = chat["token_ids"]
    assert tokenizer.convert_ids_to_tokens(end) in ("<|im_end|>", tokenizer.eos_token)  # not ChatML's line end
    if family in ("llama2", "mistral"):  # whose template writes spaces around it
        assert tokenizer.decode(answer).split() == ["yes"]
    else:
        assert answer == row.answer_token_ids


@pytest.mark.parametrize("family", [name for name, build in FAMILIES.items() if build().eos_token])
async def test_nothing_behind_an_end_token_is_scored(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    async with serving(save_model(tmp_path / "model", "qwen3", tokenizer=tokenizer)) as client:
        ended = {"prompt": "a", "completion": f"b{tokenizer.eos_token}"}
        (first,) = await scored(client, ended)
        (second,) = await scored(client, {**ended, "completion": f"b{tokenizer.eos_token} and more"})
    assert first == second and first["token_ids"][-1] == tokenizer.eos_token_id


@pytest.fixture
def chat_folder(tmp_path: Path) -> str:
    return save_model(tmp_path / "model", "qwen3", tokenizer=FAMILIES["qwen"]())


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"x": None}}}]


async def test_tools_and_tool_calls_reach_the_template(chat_folder: str, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}
    messages = [HI[0], call, {"role": "tool", "content": "1", "tool_call_id": "t", "name": "add"}, HI[1]]
    row = read(tmp_path, {"messages": messages[:3], "tools": TOOLS}, FAMILIES["qwen"]())
    assert '"parameters": {"x": null}' in row.text and '[{"name": "add", "arguments": {"x": 1}}]' in row.text
    async with serving(chat_folder) as client:
        chats = [{"messages": messages, "tools": tools} for tools in (TOOLS, json.dumps(TOOLS), None)]
        # Each alone: sequences of one batch differ in their last bits.
        as_list, as_text, without = [(await scored(client, chat))[0] for chat in chats]
        (ids,) = await scored(client, as_ids(row.token_ids, as_list["token_ids"]))
        (asked,) = await scored(client, {"messages": messages[:2], "tools": TOOLS})
    assert as_list == as_text == ids != without
    assert FAMILIES["qwen"]().decode(asked["token_ids"]) == '[{"name": "add", "arguments": {"x": 1}}]<|im_end|>'


@pytest.mark.parametrize(
    ("sequence", "field", "said"),
    [
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "sequences.0", "tools belong to messages"),
        ({"messages": HI, "tools": [1]}, "sequences.0.tools.0", "valid dictionary"),
        ({"messages": HI, "tools": "{"}, "sequences.0.tools", "Expecting property name"),
        ({"messages": HI, "tools": '[{"a": 1, "a": 2}]'}, "sequences.0.tools", "a is given twice"),
        ({"messages": [HI[0], {"role": "assistant"}]}, "sequences.0.messages.1", "content must be text"),
        ({"messages": [HI[0], {**HI[1], "content": 3}]}, "sequences.0.messages.1.content", "valid string"),
        ({"prompt": "a" * 4000, "completion": "b"}, "sequences.0.prompt", "4000 characters, at most"),
        ({"prompt": "a", "completion": "b" * 4000}, "sequences.0.completion", "4000 characters, at most"),
        ({"messages": [{**HI[0], "content": "a" * 4000}, HI[1]]}, "sequences.0.messages", "characters, at most"),
    ],
)
async def test_what_cannot_be_scored_is_a_problem(
    sequence: dict[str, Any], field: str, said: str, chat_folder: str
) -> None:
    async with serving(chat_folder) as client:
        response = await score(client, {"sequences": [sequence], "top_k": 1})
    problem = response.json()
    assert (response.status_code, problem["field"]) == (422, field) and said in problem["detail"]


async def test_a_completion_that_cannot_be_told_from_its_prompt_is_a_problem(tmp_path: Path) -> None:
    async with serving(save_model(tmp_path / "model", "qwen3", tokenizer=FAMILIES["t5"]())) as client:
        response = await score(client, {"sequences": [{"prompt": "中", "completion": "文"}], "top_k": 1})
    problem = response.json()
    assert (response.status_code, problem["field"]) == (422, "sequences.0.completion")
    assert "send token_ids" in problem["detail"]
