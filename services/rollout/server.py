"""`distillserve rollout`: become vLLM's stock OpenAI server, with our plugin, our guard and our route.

This process checks what can be checked cheaply and then replaces itself, so that signals, exit codes and
memory are vLLM's own and no wrapper stays behind.
"""

import json
import os
import sys
from pathlib import Path

import torch

from services.config import DEFAULT_NUM_SEQS, RunConfig
from services.config.keys import Secrets, require_key_beyond_loopback
from services.config.own_key import check_own_key_folder, own_key_path
from services.config.passed_on import quantisation_flag
from services.gpus.cards import check_driver
from services.gpus.options import ALONE_UTILIZATION, computed
from services.http.connections import SERVER_IDLE_S
from services.models.causal_lm import load_model_config
from services.models.vllm_environment import (
    KV_CACHE_VARIABLE,
    check_libnuma,
    float32_head,
    kv_cache_bytes,
    vllm_defaults,
)
from services.process.startup import check_port, check_socket_folder, check_weights
from services.rollout.settings import RolloutSettings
from services.weight_transfer.plugin import engine_name

_MODULE = "services.rollout.process"
_MIDDLEWARE = "services.rollout.middleware.RolloutGuard"
_WORKER_EXTENSION = "services.weight_transfer.worker.WeightUpdates"
_OVERRIDES = "--hf-overrides"


def run(config: RunConfig) -> None:
    """Replace this process by the rollout server; does not return.

    Raises:
        ConfigError: no student, a public address without a key, or no room on the GPU.
        StartupError: the port is taken, the model folder is missing, or the GPU cannot be used.
    """
    config.require("rollout")
    key = Secrets().rollout_key
    require_key_beyond_loopback("rollout", config.rollout.host, key)
    check_port("rollout", config.rollout.host, config.rollout.port)
    model = config.student.model or ""
    check_weights("student.model", model)
    if not Path(model).exists():  # a hub id; vLLM would end with pages of traceback
        load_model_config(model, trust_remote_code=config.student.trust_remote_code, key="student.model")
    check_driver(torch.cuda.is_available(), runs_on_cpu=False)
    check_libnuma()
    check_socket_folder()
    config = computed(config, "rollout")
    if key is None:
        check_own_key_folder(config.rollout.port)
        print(
            f"DISTILLSERVE_ROLLOUT_KEY is not set: this server makes a key in {own_key_path(config.rollout.port)}, where "
            "trainers of this user on this machine find it"
        )
    command = vllm_command(config)
    sys.stdout.flush()
    os.execve(command[0], command, vllm_environment(config))


def vllm_command(config: RunConfig) -> list[str]:
    """The argument vector of vLLM's server."""
    rollout, student = config.rollout, config.student
    options: dict[str, object] = {
        "--model": student.model,
        "--host": rollout.host,
        "--port": rollout.port,
        "--dtype": rollout.dtype,
        "--seed": rollout.seed,
        "--max-num-seqs": rollout.max_num_seqs or DEFAULT_NUM_SEQS,
        "--max-logprobs": rollout.max_logprobs,
        "--tensor-parallel-size": rollout.tensor_parallel_size,
        "--data-parallel-size": rollout.data_parallel_size,
        # The policy that sampled is the one after temperature, top-p and top-k.
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": json.dumps({"backend": engine_name(config.weight_sync_backend())}),
        "--scheduling-policy": "priority",  # the canary of a push goes first
        "--load-format": "safetensors",  # "auto" falls back to pickled weights
        "--middleware": _MIDDLEWARE,
        "--worker-extension-cls": _WORKER_EXTENSION,
        "--uvicorn-log-level": "warning",
    }
    if rollout.max_model_len is not None:
        options["--max-model-len"] = rollout.max_model_len
    if (cache := kv_cache_bytes(rollout.kv_cache_gib)) is not None:
        options["--kv-cache-memory-bytes"] = cache
    if torch.cuda.is_available():
        options["--gpu-memory-utilization"] = rollout.gpu_memory_utilization or ALONE_UTILIZATION
    flags = ["--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if not torch.cuda.is_available():
        flags.append("--enforce-eager")  # compiling for CPU costs minutes and gains nothing on short completions
    if student.trust_remote_code:
        flags.append("--trust-remote-code")
    pairs = [text for key, value in options.items() for text in (key, str(value))]
    engine_args = list(rollout.engine_args)
    is_quantised = quantisation_flag(engine_args) is not None
    head = float32_head(rollout.float32_head, rollout.dtype, is_quantised=is_quantised)
    return [sys.executable, "-m", _MODULE, *pairs, *flags, *with_overrides(engine_args, head)]


def with_overrides(engine_args: list[str], ours: dict[str, str]) -> list[str]:
    """vLLM's arguments with further --hf-overrides, beside the user's, which win: vLLM itself keeps the last ones only,
    unless all have a name of their own (--hf-overrides.name value)."""
    if not ours:
        return engine_args
    dotted = [text for name, value in ours.items() for text in (f"{_OVERRIDES}.{name}", value)]
    for index, argument in enumerate(engine_args):
        flag, equals, value = argument.partition("=")
        name = flag.replace("_", "-")
        if name.startswith("--hf-o") and _OVERRIDES.startswith(name):
            last = index + (0 if equals else 1)
            value = value if equals else "".join(engine_args[last : last + 1])
            return [*engine_args[:index], _OVERRIDES, _merged(ours, value), *engine_args[last + 1 :]]
    return [*dotted, *engine_args]


def _merged(ours: dict[str, str], theirs: str) -> str:
    try:
        return json.dumps(ours | json.loads(theirs))
    except (ValueError, TypeError):  # vLLM will say what is wrong with it
        return theirs


def vllm_environment(config: RunConfig) -> dict[str, str]:
    """The environment of vLLM's server: ours, plus what its command line cannot say."""
    fixed = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(SERVER_IDLE_S),
        **RolloutSettings.from_config(config).to_environment(),
    }
    environment = {**vllm_defaults(config.rollout.dtype), **os.environ, **fixed}
    environment.pop(KV_CACHE_VARIABLE, None)
    return environment
