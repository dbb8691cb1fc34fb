"""Options that are passed on to transformers, vLLM and chat templates, and what may not be among them.

Refused is what has an option of its own, what the receiver cannot do here, and secrets, which would be saved with the
run. A refused secret is never shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_TOKEN_FIX = "it would be saved with the model and the run; set HF_TOKEN in the environment instead"
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "tp_plan", "tp_size", "device_mesh")
_REVISION_FIX = "the tokenizer and the other roles would not follow; download that revision and name its folder"
# How a name shows that its value is nobody's business.
_SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "auth", "credentials"}

# Of from_pretrained; {section} is student or teacher.
_RESERVED_INIT_KWARGS = {
    "dtype": "{section}.dtype says that; set it instead",
    "torch_dtype": "{section}.dtype says that; set it instead",
    "trust_remote_code": "{section}.trust_remote_code says that; set it instead",
    "use_safetensors": "weights are read from safetensors alone; leave it out",
    "token": _TOKEN_FIX,
    "use_auth_token": _TOKEN_FIX,
    **dict.fromkeys(("revision", "code_revision", "subfolder"), _REVISION_FIX),
    "output_loading_info": "nobody reads it; leave it out",
    **dict.fromkeys(
        ("config", "state_dict", "pretrained_model_name_or_path"), "{section}.model says that; set it instead"
    ),
}
_PLACEMENT_FIXES = {
    "student": "the student is trained on one device; choose it with student.cuda_devices",
    "teacher": "the model is moved to teacher.device; to spread it over GPUs use teacher.engine = vllm with "
    "teacher.tensor_parallel_size",
}

# Fields of vLLM's AsyncEngineArgs.
_RESERVED_TEACHER_ENGINE_ARGS = {
    **{
        name: f"teacher.{name} says that; set it instead"
        for name in (
            "model",
            "dtype",
            "trust_remote_code",
            "max_model_len",
            "tensor_parallel_size",
            "gpu_memory_utilization",
        )
    },
    "kv_cache_memory_bytes": "teacher.kv_cache_gib says that; set it instead",
    "max_logprobs": "teacher.max_top_k says that; set it instead",
    "logprobs_mode": "scores must be raw log-probabilities; leave it out",
    "tokenizer": "the scores of texts would be those of other tokens; leave it out",
    "tokenizer_revision": _REVISION_FIX,
    "model_weights": "teacher.model says that; set it instead",
    **dict.fromkeys(("runner", "convert"), "the teacher scores with its output head; leave it out"),
    "weight_transfer_config": "a teacher receives no weights; leave it out",
    "hf_token": _TOKEN_FIX,
    **dict.fromkeys(("revision", "code_revision"), _REVISION_FIX),
}

_HTTP_FIX = "the server speaks http at rollout.host and rollout.port; put a proxy before it and name that in rollout_client.urls"
_WEB_FIX = "requests of web pages are refused; leave it out"
_ONE_SERVER_FIX = (
    "weights are pushed to all workers of one server; start several servers and name them in rollout_client.urls"
)

# Flags of vLLM's server, without the dashes of the long ones: what services/rollout/server.py sets or relies on.
_RESERVED_ROLLOUT_ARGS = {
    "model": "student.model says that; set it instead",
    "trust-remote-code": "student.trust_remote_code says that; set it instead",
    **{
        name: f"rollout.{name.replace('-', '_')} says that; set it instead"
        for name in (
            "host",
            "port",
            "dtype",
            "seed",
            "max-num-seqs",
            "max-logprobs",
            "max-model-len",
            "tensor-parallel-size",
            "data-parallel-size",
            "gpu-memory-utilization",
        )
    },
    "kv-cache-memory-bytes": "rollout.kv_cache_gib says that; set it instead",
    "weight-transfer-config": "weight_sync.backend says that; set it instead",
    "scheduling-policy": "the canary of a push goes first with it; leave it out",
    "logprobs-mode": "logprobs must be those of the policy that samples; leave it out",
    "device-memory-utilization": "rollout.gpu_memory_utilization says that; set it instead",
    "load-format": "weights are read from safetensors alone, quantised ones too; leave it out",
    **dict.fromkeys(("runner", "convert"), "the server samples completions; leave it out"),
    **dict.fromkeys(("revision", "code-revision", "tokenizer-revision"), _REVISION_FIX),
    "tokenizer": "prompts come as ids of the student's tokenizer; leave it out",
    **dict.fromkeys(("worker-cls", "worker-extension-cls"), "weight updates are set with it; leave it out"),
    "api-server-count": "one process answers, and its boot id tells a restart; start several servers and name them in rollout_client.urls",
    **dict.fromkeys(("headless", "grpc", "grpc-port"), "one process answers http; leave it out"),
    **dict.fromkeys(
        (
            "data-parallel-rank",
            "data-parallel-start-rank",
            "data-parallel-external-lb",
            "data-parallel-hybrid-lb",
            "data-parallel-multi-port-external-lb",
        ),
        _ONE_SERVER_FIX,
    ),
    **dict.fromkeys(
        (
            "uds",
            "ssl-keyfile",
            "ssl-certfile",
            "ssl-ca-certs",
            "ssl-cert-reqs",
            "ssl-ciphers",
            "enable-ssl-refresh",
            "root-path",
        ),
        _HTTP_FIX,
    ),
    **dict.fromkeys(("allowed-origins", "allowed-methods", "allowed-headers", "allow-credentials"), _WEB_FIX),
    "middleware": "the guard of the server is set with it; leave it out",
    "uvicorn-log-level": "the server's log is kept to warnings; leave it out",
    "disable-uvicorn-access-log": "it is set already; leave it out",
    "disable-fastapi-docs": "it is set already; leave it out",
    "config": "a file could change what the run says; give its options one by one",
    "api-key": "it would be saved with the run; set DISTILLSERVE_ROLLOUT_KEY in the environment instead",
    "hf-token": _TOKEN_FIX,
}
_SHORT_FLAGS = {
    "-tp": "tensor-parallel-size",
    "-dp": "data-parallel-size",
    "-asc": "api-server-count",
    "-dpn": "data-parallel-rank",
    "-dpr": "data-parallel-start-rank",
    "-dpe": "data-parallel-external-lb",
    "-dph": "data-parallel-hybrid-lb",
    "-dpm": "data-parallel-multi-port-external-lb",
}
_RESERVED_ROLLOUT_ARGS |= {short: _RESERVED_ROLLOUT_ARGS[name] for short, name in _SHORT_FLAGS.items()}

# What apply_chat_template is given for every prompt, or must not be.
_RESERVED_TEMPLATE_KWARGS = {
    **dict.fromkeys(("conversation", "messages"), "a row says that; leave it out"),
    **dict.fromkeys(
        (
            "tokenize",
            "add_generation_prompt",
            "return_dict",
            "return_tensors",
            "return_assistant_tokens_mask",
            "padding",
            "truncation",
            "max_length",
        ),
        "prompts are rendered to text that ends where the answer begins; leave it out",
    ),
}
# Texts that somebody meant as a value: every text but the empty one is true to a template.
_MEANT_VALUES = {"true": "true", "false": "false", "none": "null", "null": "null"}


def check_init_kwargs(section: str, option: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of from_pretrained.

    Args:
        section: "student" or "teacher".
        option: dotted name of the option.

    Raises:
        ValueError: names the first of them, and the fix.
    """
    reasons = _RESERVED_INIT_KWARGS | dict.fromkeys(_PLACEMENT, _PLACEMENT_FIXES[section])
    _refuse_reserved(option, kwargs, {name: reason.format(section=section) for name, reason in reasons.items()})


def check_teacher_engine_args(arguments: Mapping[str, Any]) -> None:
    """Refuse fields of AsyncEngineArgs.

    Raises:
        ValueError: names the first of them, and the fix.
    """
    _refuse_reserved("teacher.engine_args", arguments, _RESERVED_TEACHER_ENGINE_ARGS)


def check_rollout_engine_args(arguments: Sequence[str]) -> None:
    """Refuse flags of vLLM's server, however they are spelled: --max_model_len, --max-model-len=9, --max-model, -tp,
    --weight-transfer-config.backend.

    Raises:
        ValueError: names the first of them, and the fix; or the first word is no flag, and vLLM would take it for a model.
    """
    if arguments and not arguments[0].startswith("-"):
        raise ValueError(
            "rollout.engine_args begins with a word that is no flag, which vLLM takes for a model; leave it out"
        )
    for argument in arguments:
        flag = argument.partition("=")[0]
        meant = _reserved_flag(flag)
        if meant is not None:
            raise ValueError(f"rollout.engine_args: {flag} is refused: {_RESERVED_ROLLOUT_ARGS[meant]}")


def _reserved_flag(flag: str) -> str | None:
    """The reserved flag that vLLM takes `flag` for: long ones may be cut short, and parts of a table are named behind dots."""
    if not flag.startswith("--"):
        return flag if flag in _SHORT_FLAGS else None
    name = flag.partition(".")[0].removeprefix("--").removesuffix("+").replace("_", "-").removeprefix("no-")
    return next((full for full in _RESERVED_ROLLOUT_ARGS if name and full.startswith(name)), None)


def quantisation_flag(arguments: Sequence[str]) -> str | None:
    """The argument of vLLM's server that asks for quantised weights, where there is one."""
    return next((argument for argument in arguments if argument.startswith(("-q", "--quant"))), None)


def check_template_kwargs(option: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of a chat template that would fail or mean their opposite.

    Raises:
        ValueError: names the first of them, and the fix.
    """
    _refuse_reserved(option, kwargs, _RESERVED_TEMPLATE_KWARGS)
    _refuse_meant_values(option, kwargs)


def _refuse_meant_values(name: str, value: Any) -> None:
    if isinstance(value, str) and (meant := _MEANT_VALUES.get(value.strip().lower())) is not None:
        raise ValueError(
            f"{name} = {value!r} is a text, and every text is true to a chat template; write {meant} without quotes"
            + (" (TOML has no null: leave it out)" if meant == "null" else "")
        )
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        _refuse_meant_values(f"{name}.{key}", part)


def _refuse_reserved(option: str, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    for name, value in given.items():
        if name in reasons:
            raise ValueError(f"{option}.{name}{shown_value(name, value)} is refused: {reasons[name]}")


def shown_value(name: str, value: Any) -> str:
    """ " = value" for an error, or nothing where the name says that the value is a secret."""
    words = set(name.lower().replace("-", "_").split("_"))
    return "" if words & _SECRET_WORDS else f" = {value!r}"
