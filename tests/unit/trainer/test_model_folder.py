"""Models that are objects: what is saved of them, and which are refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from services.errors import ConfigError, OutputError, StartupError
from tests.models import save_model
from trainer.model_folder import model_folder
from trainer.tiny.pair import build_tokenizer


def test_a_name_stays_what_it_is(tmp_path: Path) -> None:
    assert model_folder("student", "Qwen/Qwen3-0.6B", tmp_path / "s") == "Qwen/Qwen3-0.6B"
    assert model_folder("student", Path("a/b"), tmp_path / "s") == "a/b" and list(tmp_path.iterdir()) == []


def test_an_object_is_saved_in_its_dtype_and_replaces_what_was_there(tiny_model_folder: Any, tmp_path: Path) -> None:
    into = tmp_path / "models" / "student"
    into.mkdir(parents=True)
    (into / "of-another-run.safetensors").touch()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"), dtype=torch.bfloat16)
    assert model_folder("student", model, into) == str(into)
    loaded = AutoModelForCausalLM.from_pretrained(into, dtype="auto")
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not (into / "of-another-run.safetensors").exists() and [p.name for p in into.parent.iterdir()] == ["student"]


def loaded_from_nowhere(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return type(model)(model.config).eval()


def test_an_object_from_nowhere_needs_its_tokenizer(tiny_model_folder: Any, tmp_path: Path) -> None:
    model = loaded_from_nowhere(tiny_model_folder("llama"))
    model.name_or_path = ""
    with pytest.raises(ConfigError, match="student is an object that was loaded from nowhere; give its tokenizer"):
        model_folder("student", model, tmp_path / "s")
    model_folder("student", model, tmp_path / "s", build_tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path / "s").eos_token_id == 256
    model.name_or_path = str(tmp_path / "gone")
    with pytest.raises(StartupError, match="give the tokenizer as processing_class"):
        model_folder("student", model, tmp_path / "t")


def test_a_tokenizer_beside_a_name_must_be_the_one_that_is_there(tiny_model_folder: Any, tmp_path: Path) -> None:
    folder = tiny_model_folder("llama")
    same = AutoTokenizer.from_pretrained(folder)
    assert model_folder("student", folder, tmp_path, same) == folder
    same.add_tokens(["<more>"])
    with pytest.raises(ConfigError, match="processing_class is not the tokenizer of student"):
        model_folder("student", folder, tmp_path, same)
    with pytest.raises(ConfigError, match="processing_class is a str"):
        model_folder("student", folder, tmp_path, "gpt2")  # type: ignore[arg-type]


def on_meta(folder: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def adapted(folder: str) -> Any:
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(target_modules=["q_proj"]))


def injected(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    return model


def quantized(folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.is_quantized = True
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (on_meta, r"teacher has no weights: .* is on the meta device"),
        (adapted, r"teacher is a PeftModel with an adapter; give the merged model"),
        (injected, r"teacher is a LlamaForCausalLM with an adapter"),
        (quantized, r"teacher is a quantized LlamaForCausalLM"),
        (lambda folder: torch.nn.Linear(1, 1), r"teacher is a Linear; give a transformers\.PreTrainedModel"),
        (lambda folder: 3, r"teacher is a int"),
        (AutoModelForSequenceClassification.from_pretrained, "which has no language model head"),
        (lambda folder: type(AutoModelForCausalLM.from_pretrained(folder)), "teacher is the class LlamaForCausalLM"),
    ],
)
def test_what_is_no_plain_causal_lm_is_refused(make: Any, message: str, tiny_model_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        model_folder("teacher", make(tiny_model_folder("llama")), tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tiny_model_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    with pytest.raises(OutputError, match="models/student cannot be written"):
        model_folder("student", model, tmp_path / "models" / "student")


def test_a_teacher_of_another_architecture_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", "qwen3")
    model_folder("teacher", AutoModelForCausalLM.from_pretrained(folder), tmp_path / "t")
    assert (tmp_path / "t" / "tokenizer.json").read_text() == (tmp_path / "m" / "tokenizer.json").read_text()
