"""What no single field can refuse: options that contradict each other, or that another one makes meaningless.

Every message names the keys, their values, the constraint and the fix.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from services.config import data_checks, lora_checks, loss_checks, passed_on, reward_checks
from services.config.addresses import checked_urls, is_wildcard
from services.config.cuda_devices import overlap, parse_devices
from services.config.roles import Role
from services.config.section import refuse_changed

if TYPE_CHECKING:
    from services.config import RunConfig

# Options of one engine that the other does not look at.
_ENGINE_OPTIONS = {
    "transformers": ["teacher_model_init_kwargs", "device", "tokens_per_forward", "rows_per_head_chunk"],
    "vllm": ["tensor_parallel_size", "kv_cache_gib", "gpu_memory_utilization", "float32_head", "engine_args"],
}


def check(config: "RunConfig", role: Role | None = "up") -> None:
    """Refuse a config whose sections do not fit together.

    Args:
        role: whose command reads it: what only another one minds is not checked. None: nothing is.

    Raises:
        ValueError: of the first misfit.
    """
    for roles, check_one in _CHECKS:
        if role in roles:
            check_one(config)


def _check_work(config: "RunConfig") -> None:
    pipeline, optimizer = config.pipeline, config.optimizer
    if pipeline.steps is not None and pipeline.epochs is not None:
        raise ValueError(
            f"pipeline.steps = {pipeline.steps} and pipeline.epochs = {pipeline.epochs} contradict each other; give one of them"
        )
    if pipeline.steps is not None and optimizer.warmup_steps > pipeline.steps:
        raise ValueError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is above pipeline.steps = {pipeline.steps}; "
            "warm up for fewer steps"
        )


def _check_restarts(config: "RunConfig") -> None:
    if config.up.restart_trainer and config.output.save_every_steps == 0:
        raise ValueError(
            f"up.restart_trainer = {config.up.restart_trainer} lets the trainer go on from a checkpoint, and "
            "output.save_every_steps = 0 makes none; set it above 0, or leave up.restart_trainer out"
        )


def _check_master_weights(config: "RunConfig") -> None:
    if config.student.dtype == "bfloat16" and config.student.compute_dtype == "float32":
        raise ValueError(
            "student.compute_dtype = float32 with student.dtype = bfloat16: the weights have no more digits; set "
            "student.dtype = float32, or leave student.compute_dtype out"
        )
    if config.student.dtype == "float16":
        raise ValueError(
            "student.dtype = float16 cannot be trained: AdamW's squared gradients underflow and within some steps the logits are "
            "not finite; use float32 (rollout.dtype and teacher.dtype may be float16)"
        )


def _check_urls(config: "RunConfig") -> None:
    """A URL is that of one server, which is one thing: a rollout server, or the replica of one teacher."""
    rollout, teacher = config.rollout_client, config.teacher_client
    owners = dict.fromkeys(checked_urls("rollout_client.urls", rollout.urls), "rollout_client.urls")
    named = {f"teacher_client.named.{name}": urls for name, urls in teacher.named.items()}
    teachers = {"teacher_client.urls": teacher.urls} | named
    for option, urls in teachers.items():
        for url in checked_urls(option, urls, base_path=True):
            if (owner := owners.setdefault(url, option)) != option:
                raise ValueError(
                    f"{option} and {owner} both name {url}; a server has one model: give each its own server"
                )


def _check_min_rollout_servers(config: "RunConfig") -> None:
    least, urls = config.pipeline.min_rollout_servers, config.rollout_client.urls
    num_servers, option = (
        (len(urls), "rollout_client.urls") if urls else (config.rollout.num_servers, "rollout.num_servers")
    )
    if least > num_servers:
        raise ValueError(
            f"pipeline.min_rollout_servers = {least} is above the number of rollout servers, {num_servers} ({option}); lower the "
            "one or raise the other"
        )


def _check_rollout_host(config: "RunConfig") -> None:
    host = config.rollout.host
    if "%" in host:
        raise ValueError(f"rollout.host = {host}: vLLM listens on no address of a single link; give another one, or ::")


def _check_master_address(config: "RunConfig") -> None:
    address = config.weight_sync.master_address
    if is_wildcard(address):
        raise ValueError(
            f"weight_sync.master_address = {address} is no address at which rollout servers reach the trainer; give one of "
            "this machine"
        )
    if ":" in address and config.weight_sync_backend() == "nccl":
        raise ValueError(
            f"weight_sync.master_address = {address} cannot be used by nccl, whose rendezvous in vLLM is over IPv4 alone; give "
            "an IPv4 address, or weight_sync.backend = gloo"
        )


def _check_devices(config: "RunConfig") -> None:
    """Lists of GPUs can be read: each role compares its own with those of the others."""
    for name in ("student", "rollout", "teacher"):
        parse_devices(f"{name}.cuda_devices", getattr(config, name).cuda_devices or "")


def _check_rollout_devices(config: "RunConfig") -> None:
    rollout = config.rollout
    sizes = {name: getattr(rollout, name) for name in ("tensor_parallel_size", "data_parallel_size")}
    _check_enough_devices("rollout", rollout.cuda_devices, sizes)


def _check_teacher_devices(config: "RunConfig") -> None:
    teacher = config.teacher
    _check_enough_devices("teacher", teacher.cuda_devices, {"tensor_parallel_size": teacher.tensor_parallel_size})


def _check_enough_devices(name: str, given: str | None, sizes: dict[str, int]) -> None:
    devices, needed = parse_devices(f"{name}.cuda_devices", given or ""), math.prod(sizes.values())
    if 0 < len(devices) < needed:
        said = " and ".join(f"{name}.{option} = {size}" for option, size in sizes.items() if size > 1)
        raise ValueError(f"{said} need {needed} GPUs, but {name}.cuda_devices = {given!r}; name more, or lower it")


def _check_nccl(config: "RunConfig") -> None:
    """What nccl connects is on different cards."""
    lists = [section.cuda_devices for section in (config.student, config.rollout)]
    if config.weight_sync.backend == "nccl" and overlap(*(parse_devices("cuda_devices", one or "") for one in lists)):
        raise ValueError(
            f"weight_sync.backend = nccl cannot connect the trainer and the rollout server on one card, but student.cuda_devices = "
            f"{lists[0]!r} and rollout.cuda_devices = {lists[1]!r}; give them different GPUs, "
            "or leave weight_sync.backend out"
        )


def _check_trainer_passes_on(config: "RunConfig") -> None:
    passed_on.check_init_kwargs("student", "student.model_init_kwargs", config.student.model_init_kwargs)
    passed_on.check_template_kwargs("data.chat_template_kwargs", config.data.chat_template_kwargs)


def _check_teacher_passes_on(config: "RunConfig") -> None:
    teacher = config.teacher
    passed_on.check_init_kwargs("teacher", "teacher.teacher_model_init_kwargs", teacher.teacher_model_init_kwargs)
    passed_on.check_teacher_engine_args(teacher.engine_args)
    quantised = "quantization" if "quantization" in teacher.engine_args else None
    _check_float32_head("teacher", teacher.float32_head, quantised)


def _check_rollout_passes_on(config: "RunConfig") -> None:
    rollout = config.rollout
    passed_on.check_rollout_engine_args(rollout.engine_args)
    _check_float32_head("rollout", rollout.float32_head, passed_on.quantisation_flag(rollout.engine_args))


def _check_float32_head(section: str, float32_head: bool | None, quantised: str | None) -> None:
    """Refuse a float32 head of a quantised model; `quantised` is the engine's argument that asks for one, or None."""
    if float32_head and quantised is not None:
        raise ValueError(
            f"{section}.float32_head = True with {quantised} in {section}.engine_args: vLLM computes a quantised head in its "
            "own dtype alone; leave one of the two out"
        )


def _check_room_for_a_prompt(config: "RunConfig") -> None:
    max_len, new = config.rollout.max_model_len, config.longest_completion()
    if max_len is not None and new >= max_len:
        raise ValueError(
            f"max_new_tokens = {new} leaves no room for a prompt in rollout.max_model_len = {max_len}; lower the one or raise the other"
        )


def _check_ports(config: "RunConfig") -> None:
    rollout, teacher = config.rollout, config.teacher
    if rollout.port == teacher.port and rollout.host == teacher.host:
        raise ValueError(f"rollout.port and teacher.port are both {teacher.port}; give the two servers different ports")


def _check_top_k(config: "RunConfig") -> None:
    """The servers answer with as many candidates as the loss looks at."""
    loss = config.loss
    limits = {
        "teacher_topk": ("teacher.max_top_k", config.teacher.max_top_k),
        "student_topk": ("rollout.max_logprobs", config.rollout.max_logprobs),
    }
    name, limit = limits[loss.support]
    if limit is not None and loss.top_k > limit and loss.single_step_estimator != "full":
        raise ValueError(
            f"loss.top_k = {loss.top_k} with loss.support = {loss.support} is above {name} = {limit}; lower the one or raise the other"
        )


def _check_teacher_engine(config: "RunConfig") -> None:
    teacher = config.teacher
    for engine, names in _ENGINE_OPTIONS.items():
        if engine != teacher.engine:
            refuse_changed(teacher, "teacher", names, f"teacher.engine = {teacher.engine}")


def _check_teacher_protocol(config: "RunConfig") -> None:
    client = config.teacher_client
    if client.protocol == "vllm" and not client.urls and not client.named:
        raise ValueError(
            "teacher_client.protocol = vllm without teacher_client.urls: servers of that kind are started by others; give "
            "their URLs"
        )


def _check_named_teachers(config: "RunConfig") -> None:
    """A name has servers, and rows that can give it."""
    named, data = config.teacher_client.named, config.data
    if not named:
        refuse_changed(data, "data", ["teacher_column"], "teacher_client.named names no teachers")
        return
    for name, urls in named.items():
        if not urls:
            raise ValueError(
                f"teacher_client.named.{name} = [] has no server; give the URLs of its replicas or leave the name out"
            )


def _check_columns(config: "RunConfig") -> None:
    """A column says one thing."""
    data = config.data
    options = ["prompt_column", "messages_column", "answer_column"]
    options += ["teacher_column"] if config.teacher_client.named else []
    owners = {"tools": "a conversation's tools"}
    for option in options:
        column = getattr(data, option)
        if column in owners:
            raise ValueError(
                f"data.{option} = {column} is also the column of {owners[column]}; give each a column of its own"
            )
        owners[column] = f"data.{option}"


def _refuse_ignored_chat_options(config: "RunConfig") -> None:
    if config.data.continues_final_message:
        reason = "data.chat_template_kwargs has continue_final_message"
        refuse_changed(config.data, "data", ["last_assistant_turn"], reason)


def _refuse_ignored_schedule_options(config: "RunConfig") -> None:
    if config.optimizer.schedule == "constant":
        reason = "optimizer.schedule = constant stays at the peak"
        refuse_changed(config.optimizer, "optimizer", ["min_lr_ratio"], reason)


def check_evaluation_is_used(config: "RunConfig") -> None:
    """Refuse options of an evaluation that a run does not have.

    Raises:
        ValueError: names the first of them.
    """
    if not config.data.has_held_out_rows:
        names = list(type(config.evaluation).model_fields)
        refuse_changed(
            config.evaluation, "evaluation", names, "there is no data.eval_path, data.eval_split or data.held_out"
        )


_ROLLOUT: tuple[Role, ...] = ("up", "rollout")
_TEACHER: tuple[Role, ...] = ("up", "teacher")
_TRAINER: tuple[Role, ...] = ("up", "train")
_CHECKS: list[tuple[tuple[Role, ...], Callable[["RunConfig"], None]]] = [
    (_TRAINER, loss_checks.check_something_to_learn),
    (_TRAINER, _check_work),
    (("up",), _check_restarts),
    (_TRAINER, _check_master_weights),
    (_TRAINER, lora_checks.check_lora),
    (_TRAINER, _check_urls),
    (_TRAINER, _check_min_rollout_servers),
    (_ROLLOUT, _check_rollout_host),
    (_TRAINER, _check_master_address),
    (_TRAINER, _check_trainer_passes_on),
    (_TEACHER, _check_teacher_passes_on),
    (_ROLLOUT, _check_rollout_passes_on),
    ((*_TRAINER, "rollout", "teacher"), _check_devices),
    (_ROLLOUT, _check_rollout_devices),
    (_TEACHER, _check_teacher_devices),
    ((*_TRAINER, "rollout"), _check_nccl),
    ((*_TRAINER, "rollout"), _check_room_for_a_prompt),
    (_TRAINER, _check_ports),
    (_TRAINER, _check_top_k),
    (_TRAINER, loss_checks.check_sampled_policy),
    (_TRAINER, loss_checks.check_student_support),
    (_TEACHER, _check_teacher_engine),
    (_TRAINER, _check_teacher_protocol),
    (_TRAINER, _check_named_teachers),
    (_TRAINER, _check_columns),
    (_TRAINER, data_checks.check_sources),
    (_TRAINER, data_checks.check_filters),
    (_TRAINER, loss_checks.refuse_ignored_loss_options),
    (_TRAINER, loss_checks.refuse_ignored_text_options),
    (_TRAINER, reward_checks.check_rewards_can_teach),
    (_TRAINER, reward_checks.refuse_ignored_reward_options),
    (_TRAINER, _refuse_ignored_chat_options),
    (_TRAINER, _refuse_ignored_schedule_options),
]
"""Checks and the commands that mind them."""
