"""One rule for student and teacher: a model compared with itself shows the same figure on both sides.

The models of these tests have learned what they answer by heart, with white space around some of the answers, and in
characters that some tokenizers normalise. What they generate comes from transformers, a token at a time.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from services.config import RunConfig
from services.errors import DataError
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutSampling
from tests.pushing import learner_of
from tests.tokenizers import FAMILIES
from tests.unit.trainer.attached import CallersLoop, measured, teacher_of
from tests.unit.trainer.generating import Generator
from trainer.data.prompts import Prompt, PromptRows, read_prompts
from trainer.evaluation.evaluate import Evaluator
from trainer.evaluation.exact_match import ExactMatch, check_answers, count_teacher_matches
from trainer.teachers import Teachers
from trainer.weights.policy_versions import PolicyVersions

# What the model says, and the answer in the file.
LEARNED = [
    ("47 + 85 =", " 132", "132"),
    ("2+2=", "4", "4"),
    ("10 * 12 =", " 120\n", "120"),
    ("Hello,", " World!", "World!"),
    ("the dog", " doesn't mind", " doesn't mind\n"),
    ("der", " naïver Café-Besuch", "naïver Café-Besuch"),
    ("What?", " ﬁve ①", "ﬁve ①"),
    ("Сколько?", " сорок два", "сорок два"),
    ("こんにちは", "世界。", "世界。"),
    ("3.14 is", " about pi", "about e"),
    ("Question:", " yes", "no"),
    ("Answer:", " 120 and 4", "120"),
    ("print(", "1, 2", "1, 2, 3"),
]


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Its EOS, or where it has none of its own what a model's configuration would name."""
    candidates = (tokenizer.eos_token_id, tokenizer.sep_token_id, len(tokenizer) - 1)
    return next(token for token in candidates if token is not None)


def learn(family: str, folder: Path) -> str:
    """A model that answers the prompts as LEARNED says, and ends."""
    tokenizer = FAMILIES[family]()
    end = end_of(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    rows = [learned_ids(tokenizer, prompt, said, end) for prompt, said, _ in LEARNED]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in rows])
    labels = torch.tensor([[*labels, *[-100] * (longest - len(labels))] for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(150):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 1e-2:
            break
    assert loss.item() < 0.05, f"{family} has not learned its answers: {loss.item()}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def learned_ids(tokenizer: Any, prompt: str, said: str, end: int) -> tuple[list[int], list[int]]:
    """Ids of both together, as whoever trains on whole texts has them, and the labels of what is said."""
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + said))
    added = len(whole) - len(tokenizer(prompt + said, add_special_tokens=False)["input_ids"])
    if added and whole[-1] in tokenizer.all_special_ids:  # what stands behind a text is no part of it
        behind = next(i for i in range(len(whole)) if whole[-1 - i] not in tokenizer.all_special_ids)
        before, whole = before[:-behind], whole[:-behind]
    same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    ids = (
        [*before, *whole[same:], end]
        if same == len(before)
        else [*before, *tokenizer(said, add_special_tokens=False)["input_ids"], end]
    )
    return ids, [*[-100] * len(before), *ids[len(before) :]]


def rows_file(folder: Path) -> str:
    path = folder / "held-out.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, _, a in LEARNED))
    return str(path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
async def test_a_model_compared_with_itself_shows_the_same_on_both_sides(family: str, tmp_path: Path) -> None:
    folder, tokenizer = learn(family, tmp_path / "model"), FAMILIES[family]()
    end = end_of(tokenizer)
    config = RunConfig(data={"eval_path": "e"}, evaluation={"max_new_tokens": 40})
    prompts = read_prompts(rows_file(tmp_path), config.data, tokenizer).used()
    learner = learner_of(folder)
    async with teacher_of(folder) as teacher:
        assert teacher.info.eos_token_ids == sorted({end, *({tokenizer.eos_token_id} - {None})})
        versions = PolicyVersions("mine")
        versions.set_live(PolicyLabel(0, 1, "mine"))
        rollouts: Any = Generator(learner.student.model, [end])
        evaluator = Evaluator(config, CallersLoop(), prompts, tokenizer, rollouts, Teachers([teacher]), [end], versions)
        found = await measured(evaluator, learner, 0)
        alone = [await count_teacher_matches(teacher, [prompt], rule(tokenizer, end)) for prompt in prompts]
    assert found.exact_match == found.teacher_exact_match
    # By hand: all but the last four answers are what it says, as far as the tokenizer can say it.
    assert found.exact_match == pytest.approx(sum(alone) / len(LEARNED))
    can_be_said = [tokenizer.unk_token_id not in tokenizer(answer)["input_ids"] for _, _, answer in LEARNED[:-4]]
    assert alone == [*can_be_said, *[False] * 4] and sum(alone) >= len(LEARNED) - 5


def rule(tokenizer: Any, end: int, max_new_tokens: int = 40) -> ExactMatch:
    return ExactMatch(tokenizer, [end], max_new_tokens)


@pytest.mark.parametrize("family", ["gpt2", "llama2", "t5", "bert"])
async def test_what_random_models_say_is_found_without_generating(family: str, tmp_path: Path) -> None:
    """They say nonsense in tokens that no tokenizer would choose; the answers are what they say, and what they do not."""
    tokenizer = FAMILIES[family]()
    torch.manual_seed(3)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "head_dim": 32}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "initializer_range": 1.0}
    model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None, bos_token_id=None, pad_token_id=None)).eval()
    end = end_of(tokenizer)
    sampling, prompts, expected = RolloutSampling(max_new_tokens=12, temperature=0), [], []
    with torch.no_grad():
        model.lm_head.weight[end] *= 3.0  # or they hardly ever end
    model.config.eos_token_id = end
    model.generation_config.eos_token_id = end
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for first in range(10, 90):
        ids = Generator(model, [end]).complete([first, 7], sampling)
        text = tokenizer.decode(ids[:-1], skip_special_tokens=True)
        answer = text if first % 2 else text + "x"
        answer_ids = tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(first, [first, 7], "", answer, answer_token_ids=answer_ids))
        expected.append(bool(first % 2) and ids[-1] == end)
    assert 3 < sum(expected) < 40
    async with teacher_of(str(tmp_path)) as teacher:
        found = [await count_teacher_matches(teacher, [prompt], rule(tokenizer, end, 12)) for prompt in prompts]
        together = await count_teacher_matches(teacher, prompts, rule(tokenizer, end, 12))
    assert found == expected and together == sum(expected)


def prompt(answer: str, tokenizer: Any) -> Prompt:
    ids = tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
    return Prompt(1, [5], "x", answer, answer_token_ids=ids)


def test_a_completion_matches_only_if_it_ends_by_itself_in_time() -> None:
    tokenizer = FAMILIES["bytes"]()
    of_rule, asked = rule(tokenizer, 256, 4), prompt("12", tokenizer)
    assert of_rule.matches(asked, [*b"12", 256]) and of_rule.matches(asked, [*b" 12", 256])
    assert not of_rule.matches(asked, [*b"12"]) and not of_rule.matches(asked, [*b"13", 256])
    assert not of_rule.matches(asked, [*b" 12 ", 256])  # the fifth token
    assert of_rule.matches(asked, [*b"12", 256, *b"34"])  # nothing counts behind an end


def test_an_end_token_that_is_no_special_token_is_no_part_of_the_text() -> None:
    tokenizer = FAMILIES["bytes"]()
    assert rule(tokenizer, ord("\n")).matches(prompt("12", tokenizer), [*b"12\n"])
    assert rule(tokenizer, ord(".")).matches(prompt("12", tokenizer), [*b"12."])


@pytest.mark.parametrize("family", ["t5", "xlnet", "bert"])
@pytest.mark.parametrize("answer", ["5 龘", "龘", "🤖"])
def test_what_a_tokenizer_does_not_know_is_not_left_out_of_an_answer(family: str, answer: str) -> None:
    tokenizer = FAMILIES[family]()
    end, said = end_of(tokenizer), tokenizer("5", add_special_tokens=False)["input_ids"]
    assert not rule(tokenizer, end).matches(prompt(answer, tokenizer), [*said, end])
    assert not rule(tokenizer, end).matches(prompt(answer, tokenizer), [end])


def test_an_answer_with_an_end_token_inside_is_found_by_its_row() -> None:
    tokenizer = FAMILIES["llama2"]()
    rows = PromptRows("f.jsonl", RunConfig().data, [prompt("a</s>b", tokenizer)], {})
    with pytest.raises(DataError, match=r"row 1: the answer holds the end token 2, where every completion ends"):
        check_answers(rows, [2], 50)


def test_half_a_character_may_still_become_the_answer() -> None:
    tokenizer = FAMILIES["bytes"]()
    asked = prompt("für", tokenizer)
    assert rule(tokenizer, 256).can_match(asked, [*"fü".encode()[:2]])
    assert not rule(tokenizer, 256).can_match(asked, [*b"fa"])


def checked(tokenizer: Any, ends: list[int], most: int, on_bad_row: str = "stop") -> list[int]:
    config = RunConfig(data={"on_bad_row": on_bad_row}).data
    prompts = [replace(prompt(answer, tokenizer), row=row) for row, answer in enumerate(["1", "123", "12345"], start=1)]
    prompts.append(Prompt(4, [5], "x"))
    return [p.row for p in check_answers(PromptRows("f.jsonl", config, prompts, {}), ends, most).used()]


def test_an_answer_that_cannot_fit_is_found_by_its_row() -> None:
    tokenizer = FAMILIES["bytes"]()
    assert checked(tokenizer, [256], 6) == [1, 2, 3, 4]
    reason = r"f\.jsonl, row 3: the answer and its end are 6 tokens, more than the 5 of evaluation\.max_new_tokens"
    with pytest.raises(DataError, match=reason):
        checked(tokenizer, [256], 5)
    assert checked(tokenizer, [256], 5, "skip") == [1, 2, 4]


def test_an_answer_without_any_end_token_is_found_by_its_row() -> None:
    tokenizer = FAMILIES["bytes"]()
    with pytest.raises(DataError, match=r"row 1: it has an answer, but neither .* names an end token.*set eos_token"):
        checked(tokenizer, [], 50)
    assert checked(tokenizer, [], 50, "skip") == [4]
