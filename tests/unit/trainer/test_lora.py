"""An adapter is what is trained: against dense autograd, on disk, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.config import OutputConfig, RunConfig
from services.errors import ConfigError, DistillServeError, StartupError
from tests.models import save_model
from tests.unit.trainer.adapters import ATTENTION, LINEAR, disturb, learner_of
from tests.unit.trainer.samples import BATCH
from trainer.lora import save_adapter, trained_parameters
from trainer.loss.head import support_logprobs
from trainer.output.saving import SavedStudents
from trainer.student import load_student
from trainer.tiny.pair import build_tokenizer

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("qwen3", {"use_dora": True}),
    ("qwen3", {"use_rslora": True, "modules_to_save": ["norm"], "target_modules": r".*\.(up|down)_proj"}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": ["v_proj", "lm_head"], "use_dora": True}),
    ("gpt2", {"bias": "all"}),
    ("gpt2", {"use_dora": True, "target_modules": LINEAR["gpt2"]}),
    (
        "phi3",
        {
            "peft_kwargs": {"rank_pattern": {"o_proj": 7}, "layers_to_transform": [1], "layers_pattern": "layers"},
            "target_modules": LINEAR["phi3"],
        },
    ),
    ("qwen3_moe", {"target_modules": ATTENTION}),
]
IDS = [f"{architecture}-{'-'.join(options) or 'default'}" for architecture, options in KINDS]


@pytest.mark.parametrize(("architecture", "options"), KINDS, ids=IDS)
def test_the_weights_of_the_base_are_the_same_bits_after_training(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path, architecture)
    learner = learner_of(folder, **options)
    before = {name: p.detach().clone() for name, p in learner.student.model.named_parameters()}
    for _ in range(3):
        assert learner.step(BATCH)["grad_norm"] > 0
    trained = trained_parameters(learner.student.model)
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    for name, parameter in learner.student.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    held = {p for group in learner.optimizer.param_groups for p in group["params"]}
    assert held == set(trained.values())


@pytest.mark.parametrize(("architecture", "options"), KINDS, ids=IDS)
def test_the_saved_adapter_and_the_merged_model_answer_as_the_student(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", architecture)
    learner = disturb(learner_of(base, **options))
    model = learner.student.model
    SavedStudents(OutputConfig(dir=str(tmp_path)), model, build_tokenizer()).save(learner.state())
    ids = torch.randint(1, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert (plain(input_ids=ids).logits - ours).abs().max() > 0.05
        adapter = tmp_path / "student" / "adapter"
        loaded = PeftModel.from_pretrained(plain, str(adapter)).eval()
        assert loaded.peft_config["default"].base_model_name_or_path == str(Path(base).resolve())
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        largest = max(float(ours.abs().max()), 1.0)
        assert (loaded(input_ids=ids).logits - ours).abs().max() <= 1e-5 * largest
        assert (merged(input_ids=ids).logits - ours).abs().max() <= 1e-5 * largest


def dense_logits(model: Any, hidden: Tensor) -> Tensor:
    """Of peft's own forward pass of the head."""
    found: Tensor = model.lm_head(hidden)
    return found


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapted_head_has_the_gradients_of_dense_autograd(use_dora: bool, tmp_path: Path) -> None:
    options = {"target_modules": ["lm_head"], "use_dora": use_dora}
    learner = disturb(learner_of(save_model(tmp_path, "llama"), **options))
    model = learner.student.model.double()
    ids, positions = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([1, 3])
    tokens = torch.tensor([7, 9])
    support = torch.tensor([[1, 2], [3, -1]])
    output = learner.student(ids, positions, tokens, support, 1.3)
    output.token_logprobs.sum().add(2 * output.tail_logprob.sum()).backward()
    ours = {name: p.grad for name, p in trained_parameters(model).items()}
    model.zero_grad()
    logits = dense_logits(model, model.get_decoder()(input_ids=ids).last_hidden_state[0, positions]) / 1.3
    logprobs = logits.log_softmax(-1)
    outside = torch.ones_like(logprobs, dtype=torch.bool)
    outside[0, 1], outside[0, 2], outside[1, 3] = False, False, False
    tail = logprobs.masked_fill(~outside, -torch.inf).logsumexp(-1)
    logprobs.gather(1, tokens[:, None]).sum().add(2 * tail.sum()).backward()
    assert len(ours) == (3 if use_dora else 2)
    for name, parameter in trained_parameters(model).items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_base_in_bfloat16_has_an_adapter_in_float32(tmp_path: Path) -> None:
    learner = learner_of(save_model(tmp_path, "qwen3"), steps=2, student={"dtype": "bfloat16"})
    trained = trained_parameters(learner.student.model)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for name, p in learner.student.model.named_parameters() if name not in trained} == {torch.bfloat16}
    moments = [m for state in learner.optimizer.state.values() for m in state.values() if m.ndim]
    assert moments and {m.dtype for m in moments} == {torch.float32}


@pytest.mark.parametrize(("architecture", "options"), KINDS, ids=IDS)
def test_an_adapter_goes_on_from_a_saved_one(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", architecture)
    first = disturb(learner_of(base, **options))
    save_adapter(first.student.model, first.state().adapter or {}, tmp_path / "adapter")
    second = learner_of(base, adapter=str(tmp_path / "adapter"), **options)
    for name, parameter in trained_parameters(first.student.model).items():
        assert torch.equal(parameter, trained_parameters(second.student.model)[name]), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 8}, r"lora\.r = 8 .* come to: .* is \(4, 128\) there and \(8, 128\) here"),
        ({"lora_alpha": 5}, r"trained with lora_alpha = 32.*, but this run has 5"),
        ({"target_modules": ["q_proj"]}, r"has other parts than .* and missing here"),
        ({"use_dora": True}, "trained with use_dora = False"),
    ],
)
def test_a_saved_adapter_of_other_options_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen3")
    first = learner_of(base)
    save_adapter(first.student.model, first.state().adapter or {}, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=said):
        learner_of(base, adapter=str(tmp_path / "adapter"), **options)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b"[1]", b'{"peft_type": "LORA", "r": "x"}'])
def test_a_folder_without_a_readable_adapter_is_refused(content: bytes | None, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen3")
    (tmp_path / "adapter").mkdir()
    if content is not None:
        (tmp_path / "adapter" / "adapter_config.json").write_bytes(content)
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DistillServeError, match=r"^lora\.adapter = .*adapter'[^\n]*$"):
        learner_of(base, adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        ("qwen3", {"target_modules": ["nowhere"]}, "nowhere"),
        ("qwen3", {"target_modules": "nowhere.*"}, "nowhere"),
        ("qwen3", {"target_modules": ["norm"]}, r"target_modules = \['norm'\]"),
        (
            "qwen3",
            {"target_modules": ["lm_head"]},
            "lm_head is to be trained, but the student's output head is its emb",
        ),
        ("qwen3", {"target_modules": ["embed_tokens"]}, "embed_tokens is to be trained, but"),
        ("qwen3", {"modules_to_save": ["embed_tokens"]}, "embed_tokens is to be trained, but"),
        ("gpt2", {"modules_to_save": ["lm_head"]}, "lm_head is to be trained, but"),
        ("qwen3", {"modules_to_save": ["nowhere"]}, "lora.modules_to_save names 'nowhere'"),
        ("qwen3_moe", {}, r"experts is a ParamWrapper, .*q_proj"),
        ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, "another form than a checkpoint"),
        ("qwen3", {"peft_kwargs": {"rank_pattern": {"q_proj": 0}}}, "rank_pattern"),
        ("qwen3", {"peft_kwargs": {"rank_pattern": {"nowhere": 2}}}, "keys did not match .*nowhere"),
        ("qwen3", {"peft_kwargs": {"rank_pattern": "x"}}, "are refused by peft"),
        ("qwen3", {"peft_kwargs": {"layers_to_transform": [0]}}, "are refused by peft"),
        ("qwen3", {"peft_kwargs": {"exclude_modules": 3}}, "are refused by peft"),
        ("qwen3", {"peft_kwargs": {"exclude_modules": "("}}, "are refused by peft"),
        ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "embed_tokens, an embedding"),
        (
            "llama",
            {"target_modules": ["lm_head"], "lora_dropout": 0.1, "student": {"disable_dropout": False}},
            "an adapter on lm_head",
        ),
    ],
)
def test_what_could_not_be_trained_or_pushed_is_refused_in_a_line(
    architecture: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        learner_of(save_model(tmp_path, architecture), **options)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("lora")


def test_dropout_of_an_adapter_is_one_of_training_alone(tmp_path: Path) -> None:
    learner = disturb(learner_of(save_model(tmp_path, "qwen3"), lora_dropout=0.5, student={"disable_dropout": False}))
    ids = torch.arange(9)[None]
    training, measured = ([learner.student.model(input_ids=ids).logits for _ in range(2)] for _ in "ab")
    assert not torch.equal(*training)
    learner.student.eval()
    measured = [learner.student.model(input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*measured)


def test_four_bits_without_their_package_are_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = RunConfig(student={"model": save_model(tmp_path, "qwen3")}, lora={"r": 4, "load_in_4bit": True})
    with pytest.raises(StartupError, match=r"lora\.load_in_4bit = true needs the package bitsandbytes"):
        load_student(config.student, lora=config.lora)


def test_the_head_of_a_student_without_an_adapter_is_its_weight(tmp_path: Path) -> None:
    student = load_student(RunConfig(student={"model": save_model(tmp_path, "llama")}).student)
    hidden = torch.randn(1, 64)
    (token, support) = torch.tensor([3]), torch.tensor([[1]])
    direct = support_logprobs(hidden, student.model.lm_head.weight, token, support).token_logprobs
    assert torch.allclose(direct, student.model.lm_head(hidden).log_softmax(-1)[0, 3])
