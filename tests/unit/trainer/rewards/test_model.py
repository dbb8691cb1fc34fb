"""A sequence-classification model as a reward, alone and in a process of the pool."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from services.config import RewardConfig
from services.errors import ConfigError
from tests.models import save_model
from tests.unit.trainer.rewards.test_pool import HERE, RewardCall
from trainer.rewards.model import RewardModel
from trainer.rewards.pool import RewardPool
from trainer.tiny.pair import build_tokenizer

TEXTS = ["a", "much longer than the others", "bc", "x" * 60]
PROMPTS = ["1+1="] * len(TEXTS)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 3,
    "max_tokens": None,
    "trust_remote_code": False,
}


def save_classifier(folder: Path, num_labels: int = 1, *, pads: bool = True) -> str:
    tokenizer = build_tokenizer()
    if not pads:
        tokenizer.pad_token = None
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(
        **shape,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=num_labels,
    )
    torch.manual_seed(0)
    model = Qwen3ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def alone(folder: str, ids: list[int]) -> float:
    """Of one sequence without padding."""
    model = Qwen3ForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def rewards(model: RewardModel, prompts: list[Any], completions: list[Any]) -> list[float]:
    return model.call({"prompts": prompts, "completions": completions})


@pytest.mark.parametrize("pads", [True, False])
def test_each_completion_has_the_score_it_has_alone(pads: bool, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model", pads=pads)
    found = rewards(RewardModel(folder, **OPTIONS), PROMPTS, TEXTS)
    assert found == pytest.approx([alone(folder, [*b"1+1=", *text.encode()][-64:]) for text in TEXTS], abs=1e-5)
    assert len({round(one, 3) for one in found}) == len(TEXTS)
    one_by_one = RewardModel(folder, **OPTIONS | {"batch_size": 1})
    assert rewards(one_by_one, PROMPTS, TEXTS) == pytest.approx(found, abs=1e-5)


def test_a_long_text_keeps_its_end(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    model = RewardModel(folder, **OPTIONS | {"max_tokens": 5})
    assert rewards(model, PROMPTS, TEXTS) == pytest.approx(
        [alone(folder, [*b"1+1=", *text.encode()][-5:]) for text in TEXTS], abs=1e-5
    )


def test_a_conversation_is_what_the_models_own_template_makes_of_it(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    prompt, completion = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "yes"}]
    model = RewardModel(folder, **OPTIONS)
    text = build_tokenizer().apply_chat_template(prompt + completion, tokenize=False)
    ids = build_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert rewards(model, [prompt], [completion]) == pytest.approx([alone(folder, ids)], abs=1e-5)


def test_a_bidirectional_model_does_not_see_padding(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**shape, vocab_size=len(tokenizer), num_labels=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    together = rewards(RewardModel(str(folder), **OPTIONS), PROMPTS, TEXTS)
    apart = rewards(RewardModel(str(folder), **OPTIONS | {"batch_size": 1}), PROMPTS, TEXTS)
    assert together == pytest.approx(apart, abs=1e-5)


async def test_models_and_functions_work_side_by_side_each_in_its_process(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    pool = RewardPool(RewardConfig(functions=[f"{HERE}:length", folder], num_workers=1, model_batch_size=2))
    try:
        await pool.start()
        arguments = {"prompts": PROMPTS, "completions": TEXTS, "trainer_state": {"step": 1, "num_steps": 1}}
        calls = [RewardCall(index, arguments, 1, range(4)) for index in (0, 1)]
        assert await pool.call(calls[0]) == [float(len(text)) for text in TEXTS]
        expected = rewards(RewardModel(folder, **OPTIONS), PROMPTS, TEXTS)
        assert await pool.call(calls[1]) == pytest.approx(expected, abs=1e-5)
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("language model", "it holds no score.weight: it is no model that was trained to classify sequences"),
        ("two labels", "cannot be loaded: .*; give a folder or hub id of a sequence-classification model"),
        ("pickled", r"cannot be loaded: OSError: .*safetensors"),
    ],
)
async def test_what_is_no_reward_model_is_said_at_the_start(kind: str, message: str, tmp_path: Path) -> None:
    if kind == "language model":
        folder = save_model(tmp_path / "model", "qwen3")
    else:
        folder = save_classifier(tmp_path / "model", 2 if kind == "two labels" else 1)
    if kind == "pickled":
        (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    pool = RewardPool(RewardConfig(functions=[folder]))
    try:
        with pytest.raises(ConfigError, match=message) as raised:
            await pool.start()
        assert "\n" not in str(raised.value)
    finally:
        await pool.close()
