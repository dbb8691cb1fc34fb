"""Copies of one model have one fingerprint, wherever and whenever they are; other models have another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import chat_template_utils

from services.clients.teacher_answers import first_replica_problem, replica_problem
from services.config import TeacherConfig
from services.models import causal_lm
from services.models import fingerprint as model_fingerprint
from services.models.causal_lm import chat_template_hash, chat_template_probe, load_tokenizer, tokenizer_fingerprint
from services.teacher.transformers.engine import TransformersEngine
from services.teacher.vllm import info as vllm_info
from services.wire.teacher import MODEL_DIGITS
from tests.models import save_model
from tests.scripted_teacher import INFO
from tests.unit.services.clients.answers import scores_for
from trainer.tiny.pair import build_tokenizer


def by_transformers(folder: str | Path, **options: Any) -> str:
    return TransformersEngine(TeacherConfig(model=str(folder), device="cpu", **options)).info.fingerprint


def by_vllm(folder: str | Path, **options: Any) -> str:
    config = TeacherConfig(model=str(folder), engine="vllm", **options)
    tokenizer = load_tokenizer(str(folder))
    return vllm_info.describe(config, tokenizer, vocab_size=261, max_model_len=64, scores_support_ids=False).fingerprint


BOTH = pytest.mark.parametrize("fingerprint", [by_transformers, by_vllm])


def copy_of(folder: str | Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in Path(folder).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@BOTH
def test_a_copy_is_the_same_model_whatever_its_folder_is_called(
    fingerprint: Callable[..., str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(folder)
    # A name that occurs all over the configuration.
    monkeypatch.chdir(copy_of(folder, tmp_path / "x" / "e").parent)
    assert fingerprint("e") == fingerprint(tmp_path / "x" / "e") == expected


@BOTH
def test_what_is_not_of_the_model_makes_no_other_one(
    fingerprint: Callable[..., str], folder: str, tmp_path: Path
) -> None:
    expected = fingerprint(folder)
    changes: dict[str, Any] = {
        "transformers_version": "4.40.0",
        "_name_or_path": "/home/somebody/llama",
        "torch_dtype": "float32",
        "use_cache": False,
        "_attn_implementation": "eager",
    }
    for index, (name, value) in enumerate(changes.items()):
        other = change_config(copy_of(folder, tmp_path / str(index)), **{name: value})
        assert fingerprint(other) == expected, name
    beside = copy_of(folder, tmp_path / "beside")
    (beside / "training_args.bin").write_bytes(b"x")
    save_file({"x": torch.ones(2)}, beside / "adapter_model.safetensors")
    assert fingerprint(beside) == expected


def test_how_attention_is_computed_makes_no_other_model(folder: str) -> None:
    assert by_transformers(folder) == by_transformers(
        folder, teacher_model_init_kwargs={"attn_implementation": "eager"}
    )


@BOTH
def test_sharding_and_a_wider_dtype_on_disk_make_no_other_model(
    fingerprint: Callable[..., str], folder: str, tmp_path: Path
) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    narrow, wide, shards = (copy_of(folder, tmp_path / name) for name in ("narrow", "wide", "shards"))
    half.save_pretrained(narrow)
    half.float().save_pretrained(wide)
    (shards / "model.safetensors").unlink()
    half.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    assert len({fingerprint(path) for path in (narrow, wide, shards)}) == 1
    assert fingerprint(narrow) != fingerprint(folder)  # which was rounded


@pytest.mark.parametrize("whole", [True, False])
def test_a_change_of_any_tensor_makes_another_model(
    whole: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first values of the embedding stay: they are all that two fine-tunes may have in common."""
    if not whole:
        monkeypatch.setattr(model_fingerprint, "_WHOLE", 16)
    weights = load_file(Path(folder) / "model.safetensors")
    prints = {by_vllm(folder)}
    for index, name in enumerate(weights):
        other = copy_of(folder, tmp_path / str(index))
        rows = weights[name].clone()
        rows[-1 if whole else slice(None)] += 1e-3
        save_file({**weights, name: rows}, other / "model.safetensors", metadata={"format": "pt"})
        prints.add(by_vllm(other))
    assert len(prints) == len(weights) + 1


@BOTH
def test_another_configuration_tokenizer_or_dtype_makes_another_fingerprint(
    fingerprint: Callable[..., str], folder: str, tmp_path: Path
) -> None:
    other = change_config(copy_of(folder, tmp_path / "config"), rms_norm_eps=1e-3)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    words = copy_of(folder, tmp_path / "tokens")
    tokenizer.save_pretrained(words)
    prints = [fingerprint(folder), fingerprint(other), fingerprint(words), fingerprint(folder, dtype="bfloat16")]
    assert len(set(prints)) == 4
    assert [p[:MODEL_DIGITS] == prints[0][:MODEL_DIGITS] for p in prints] == [True, False, False, True]


def test_two_engines_have_one_model_and_are_no_replicas(folder: str) -> None:
    ours, theirs = by_transformers(folder), by_vllm(folder)
    assert ours[:MODEL_DIGITS] == theirs[:MODEL_DIGITS] and ours != theirs


def test_options_of_vllm_count_where_they_change_the_logits(folder: str) -> None:
    plain = by_vllm(folder)
    same: dict[str, Any] = {"pipeline_parallel_size": 2, "enable_prefix_caching": True, "max_num_seqs": 4}
    assert by_vllm(folder, engine_args=same, tensor_parallel_size=2) == plain
    assert by_vllm(folder, engine_args={"quantization": "fp8"}) != plain


def test_weights_of_other_formats_count(folder: str, tmp_path: Path) -> None:
    prints = set()
    for content in (b"a" * 100_000, b"a" * 99_999 + b"b"):
        other = copy_of(folder, tmp_path / content[-1:].decode())
        (other / "model.safetensors").unlink()
        (other / "pytorch_model.bin").write_bytes(content)
        prints.add(by_vllm(other))
    assert len(prints) == 2


def test_models_whose_files_are_not_here_are_told_apart_by_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(folder)
    prints = {
        model_fingerprint.model_fingerprint(name, config, "t", {}, cache_dir="/nowhere")
        for name in ("ours/a", "ours/b")
    }
    assert len(prints) == 2


def test_a_hub_id_has_the_fingerprint_of_its_snapshot(folder: str, tmp_path: Path) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--ours--llama"
    copy_of(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    config = AutoConfig.from_pretrained(folder)
    prints = {
        model_fingerprint.model_fingerprint(name, config, "t", {}, cache_dir=str(tmp_path))
        for name in ("ours/llama", folder)
    }
    assert len(prints) == 1


# ------------------------------------------------------------------------------------------ what is compared and said


class _Day(chat_template_utils.datetime):
    day = 1

    @classmethod
    def now(cls, tz: Any = None) -> "_Day":
        return cls(2031, 5, cls.day)


def test_the_same_template_renders_the_same_probe_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today Date: {{ date_string }}|{{ messages[0]['content'] }}"
    )
    monkeypatch.setattr(chat_template_utils, "datetime", _Day)
    probes = set()
    for day in (1, 2):
        monkeypatch.setattr(_Day, "day", day)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert rendered == f"Today Date: 0{day} May 2031|x"  # the clock is where this test turns it
        probes.add(chat_template_probe(tokenizer))
    assert probes == {"Today Date: 26 Jul 2024|2+2="}


def test_the_source_of_a_template_and_its_special_tokens_have_a_hash() -> None:
    tokenizer = build_tokenizer()
    assert chat_template_hash(tokenizer) == chat_template_hash(build_tokenizer())
    hashes = {chat_template_hash(tokenizer)}
    tokenizer.eos_token = "b"
    hashes.add(chat_template_hash(tokenizer))
    tokenizer.chat_template += " "
    hashes.add(chat_template_hash(tokenizer))
    tokenizer.chat_template = None
    assert len(hashes) == 3 and chat_template_hash(tokenizer) is None


@pytest.mark.parametrize("text", causal_lm._PROBE_TEXTS)
def test_tokenizers_that_cut_any_probe_differently_differ(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    expected = tokenizer_fingerprint(tokenizer)
    assert expected == tokenizer_fingerprint(build_tokenizer())
    encode = type(tokenizer).__call__

    def other(self: Any, given: str, **options: Any) -> Any:
        encoded = encode(self, given, **options)
        return {"input_ids": [*encoded["input_ids"], 1]} if given == text else encoded

    monkeypatch.setattr(type(tokenizer), "__call__", other)
    assert tokenizer_fingerprint(tokenizer) != expected


def test_what_differs_between_servers_is_said_truly() -> None:
    one = INFO.model_copy(update={"fingerprint": "0123456789aaaaaa"})
    served = INFO.model_copy(update={"fingerprint": "0123456789bbbbbb", "engine": "vllm"})
    other = INFO.model_copy(update={"fingerprint": "9876543210aaaaaa"})
    assert first_replica_problem(["u", "v", "w"], [one, one, one]) is None
    how = first_replica_problem(["u", "v", "w"], [one, one, served]) or ""
    assert how.startswith("the teachers at u, v, w do not compute their one model in the same way (engine, dtype")
    what = first_replica_problem(["u", "v"], [one, other]) or ""
    assert what.startswith(
        "the teachers at u, v do not serve the same model: scripted (0123456789aaaaaa) answered from u"
    )
    scores = scores_for({"sequences": [{"token_ids": [1, 2], "prompt_length": 1}], "top_k": 1, "temperature": 1.0})
    assert (replica_problem(("u", one), ("u", scores)) or "").startswith("do not serve the same model: scripted (0123")
    plain = [i.model_copy(update={"server": "vllm"}) for i in (one, other)]
    assert "start replicas with the same --served-model-name" in (first_replica_problem(["u", "v"], plain) or "")
