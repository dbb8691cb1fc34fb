"""vLLM's own models receive a push, alone and as two tensor-parallel workers: exact, and what never came is named."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from services.models.vllm_environment import vllm_defaults
from tests.models import save_model

pytestmark = pytest.mark.integration

# The experts' width per worker, 16 for two, is one that vLLM pads on CPU.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def save(folder: Path, architecture: str, seed: int) -> str:
    if architecture != "qwen2":
        return save_model(folder, architecture, seed=seed, **(EXPERTS if architecture == "qwen3_moe" else {}))
    save_model(folder, "qwen3")  # for its tokenizer
    torch.manual_seed(seed)
    shape = {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():  # its biases begin as zeros
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return str(folder)


def run_workers(size: int, old: str, new: str, folder: Path) -> list[dict[str, Any]]:
    identity = f"distillserve-test-{uuid.uuid4().hex}"
    environment = {**os.environ, **vllm_defaults("float32"), "OMP_NUM_THREADS": "1", "VLLM_DIST_IDENT": identity}
    module = "tests.integration.weight_worker"
    workers = [
        subprocess.Popen([sys.executable, "-m", module, str(rank), str(size), old, new, str(folder)], env=environment)
        for rank in range(size)
    ]
    try:
        assert [worker.wait(180.0) for worker in workers] == [0] * size
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for left in Path("/dev/shm").glob(f"{identity}*"):  # vLLM's, which a worker that is killed leaves behind
            left.unlink()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("qwen3", 1),
        ("qwen2", 1),
        ("qwen3_moe", 2),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("qwen3", 2), ("qwen2", 2), ("qwen3_moe", 1))),
    ],
)
def test_vllms_model_holds_what_was_pushed_and_names_what_was_not(architecture: str, size: int, tmp_path: Path) -> None:
    old, new = (save(tmp_path / name, architecture, seed) for seed, name in enumerate(("old", "new")))
    for found in run_workers(size, old, new, tmp_path):
        assert len(found["before"]) > 10
        assert found["report"]["problem"] is None and found["report"]["missing"] == []
        assert found["finish"] == {"problem": None} and found["after"] == []
        assert {name: missing for name, missing in found["missing"].items() if missing != [name]} == {}
        assert found["broken_off"] and found["discard"] == {"problem": None, "changed": True}
        assert found["mixed"] and found["after_all"] == []
