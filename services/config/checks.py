"""What no single field can refuse: options that contradict each other, or that another one makes meaningless.

Every message names the keys, their values, the constraint and the fix.
"""

import math
from typing import TYPE_CHECKING, Any

from services.config import passed_on
from services.config.addresses import checked_urls, is_wildcard
from services.config.cuda_devices import overlap, parse_devices

if TYPE_CHECKING:
    from services.config import RunConfig, TeacherConfig

# Options of one engine that the other does not look at.
_ENGINE_OPTIONS = {
    "transformers": ["teacher_model_init_kwargs", "device", "tokens_per_forward", "rows_per_head_chunk"],
    "vllm": ["tensor_parallel_size", "kv_cache_gib", "gpu_memory_utilization", "float32_head", "engine_args"],
}


def check(config: "RunConfig") -> None:
    """Refuse a config whose sections do not fit together.

    Raises:
        ValueError: of the first misfit.
    """
    _check_something_to_learn(config)
    _check_work(config)
    _check_master_weights(config)
    _check_urls(config)
    _check_addresses(config)
    _check_passed_on(config)
    _check_float32_heads(config)
    _check_devices(config)
    _check_servers(config)
    _check_sampled_policy(config)
    _check_student_support(config)
    _check_teacher_engine(config.teacher)
    _check_named_teachers(config)
    _check_columns(config)
    _refuse_ignored_loss_options(config)
    _refuse_ignored_text_options(config)
    _refuse_ignored_chat_options(config)
    if config.optimizer.schedule == "constant":
        _refuse_changed(
            config.optimizer, "optimizer", ["min_lr_ratio"], "optimizer.schedule = constant stays at the peak"
        )


def _check_something_to_learn(config: "RunConfig") -> None:
    loss = config.loss
    if not loss.uses_rkl_advantage and not loss.uses_single_step:
        raise ValueError(
            f"loss.rkl_advantage = {loss.rkl_advantage} (alpha_rkl = {loss.alpha_rkl}) and loss.single_step_decomposition = "
            f"{loss.single_step_decomposition} (alpha_single_step = {loss.alpha_single_step}) leave nothing to learn; "
            "set one of them to true, with a weight above 0"
        )
    if not loss.has_policy_gradient and not loss.uses_single_step:
        raise ValueError(
            "loss.reward_to_go = exclusive with loss.gamma = 0 and no single-step term leaves nothing to learn; use inclusive"
        )


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
    rollout, teacher = config.rollout, config.teacher
    owners = dict.fromkeys(checked_urls("rollout.urls", rollout.urls), "rollout.urls")
    teachers = {"teacher.urls": teacher.urls} | {f"teacher.named.{name}": urls for name, urls in teacher.named.items()}
    for option, urls in teachers.items():
        for url in checked_urls(option, urls, base_path=True):
            if (owner := owners.setdefault(url, option)) != option:
                raise ValueError(
                    f"{option} and {owner} both name {url}; a server has one model: give each its own server"
                )


def _check_addresses(config: "RunConfig") -> None:
    """Addresses that one of the programs in use does not take."""
    address, host = config.weight_sync.master_address, config.rollout.host
    if "%" in host:
        raise ValueError(f"rollout.host = {host}: vLLM listens on no address of a single link; give another one, or ::")
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
    """Lists of GPUs can be read, are long enough, and lie apart where nccl connects them."""
    devices = {}
    for name in ("student", "rollout", "teacher"):
        section = getattr(config, name)
        if section.cuda_devices is None:
            continue
        devices[name] = parse_devices(f"{name}.cuda_devices", section.cuda_devices)
        sizes = {option: getattr(section, option, 1) for option in ("tensor_parallel_size", "data_parallel_size")}
        if 0 < len(devices[name]) < math.prod(sizes.values()):
            said = " and ".join(f"{name}.{option} = {size}" for option, size in sizes.items() if size > 1)
            raise ValueError(
                f"{said} need {math.prod(sizes.values())} GPUs, but {name}.cuda_devices = {section.cuda_devices!r}; name more, "
                "or lower it"
            )
    both = devices.get("student", ()), devices.get("rollout", ())
    if config.weight_sync.backend == "nccl" and overlap(*both):
        raise ValueError(
            f"weight_sync.backend = nccl cannot connect the trainer and the rollout server on one card, but student.cuda_devices = "
            f"{config.student.cuda_devices!r} and rollout.cuda_devices = {config.rollout.cuda_devices!r}; give them different GPUs, "
            "or leave weight_sync.backend out"
        )


def _check_passed_on(config: "RunConfig") -> None:
    student, teacher = config.student, config.teacher
    passed_on.check_init_kwargs("student", "student.model_init_kwargs", student.model_init_kwargs)
    passed_on.check_init_kwargs("teacher", "teacher.teacher_model_init_kwargs", teacher.teacher_model_init_kwargs)
    passed_on.check_teacher_engine_args(teacher.engine_args)
    passed_on.check_rollout_engine_args(config.rollout.engine_args)
    passed_on.check_template_kwargs("data.chat_template_kwargs", config.data.chat_template_kwargs)


def _check_float32_heads(config: "RunConfig") -> None:
    rollout, teacher = config.rollout, config.teacher
    given = {
        "rollout": passed_on.quantisation_flag(rollout.engine_args) if rollout.float32_head else None,
        "teacher": "quantization" if teacher.float32_head and "quantization" in teacher.engine_args else None,
    }
    for section, argument in given.items():
        if argument is not None:
            raise ValueError(
                f"{section}.float32_head = True with {argument} in {section}.engine_args: vLLM computes a quantised head in its "
                "own dtype alone; leave one of the two out"
            )


def _check_servers(config: "RunConfig") -> None:
    loss, rollout, teacher = config.loss, config.rollout, config.teacher
    max_len, new = rollout.max_model_len, config.longest_completion()
    if max_len is not None and new >= max_len:
        raise ValueError(
            f"max_new_tokens = {new} leaves no room for a prompt in rollout.max_model_len = {max_len}; lower the one or raise the other"
        )
    if rollout.port == teacher.port and rollout.host == teacher.host:
        raise ValueError(f"rollout.port and teacher.port are both {teacher.port}; give the two servers different ports")
    limits = {
        "teacher_topk": ("teacher.max_top_k", teacher.max_top_k),
        "student_topk": ("rollout.max_logprobs", rollout.max_logprobs),
    }
    name, limit = limits[loss.support]
    if limit is not None and loss.top_k > limit and loss.single_step_estimator != "full":
        raise ValueError(
            f"loss.top_k = {loss.top_k} with loss.support = {loss.support} is above {name} = {limit}; lower the one or raise the other"
        )


def _check_teacher_engine(teacher: "TeacherConfig") -> None:
    if teacher.protocol == "vllm" and not teacher.urls and not teacher.named:
        raise ValueError(
            "teacher.protocol = vllm without teacher.urls: servers of that kind are started by others; give their URLs"
        )
    for engine, names in _ENGINE_OPTIONS.items():
        if engine != teacher.engine:
            _refuse_changed(teacher, "teacher", names, f"teacher.engine = {teacher.engine}")


def _check_named_teachers(config: "RunConfig") -> None:
    """A name has servers, and rows that can give it."""
    teacher, data = config.teacher, config.data
    if not teacher.named:
        _refuse_changed(data, "data", ["teacher_column"], "teacher.named names no teachers")
        return
    for name, urls in teacher.named.items():
        if not urls:
            raise ValueError(
                f"teacher.named.{name} = [] has no server; give the URLs of its replicas or leave the name out"
            )


def _check_columns(config: "RunConfig") -> None:
    """A column says one thing."""
    data = config.data
    options = ["prompt_column", "messages_column", "answer_column"]
    options += ["teacher_column"] if config.teacher.named else []
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
        _refuse_changed(config.data, "data", ["last_assistant_turn"], reason)


def _check_sampled_policy(config: "RunConfig") -> None:
    """Terms that are expectations over the sampled token need it to come from the policy that learns."""
    loss, sampling = config.loss, config.sampling
    if not loss.uses_sampled_tokens:
        return
    without = "make them equal"
    if loss.uses_single_step:
        without += ", or set loss.rkl_advantage = false and loss.single_step_estimator = truncated"
    is_cut = sampling.top_p < 1.0 or sampling.top_k > 0
    if loss.kd_temperature != 1.0:
        if sampling.temperature != loss.kd_temperature:
            raise ValueError(
                f"loss.kd_temperature = {loss.kd_temperature} with sampling.temperature = {sampling.temperature}: the policy "
                f"gradient needs the logprobs of the policy that sampled; {without}"
            )
        if is_cut:
            raise ValueError(
                f"loss.kd_temperature = {loss.kd_temperature} needs sampling.top_p = 1 and sampling.top_k = 0 "
                f"(got {sampling.top_p} and {sampling.top_k}): the policy that samples must be the one that learns"
            )
    elif loss.importance_sampling == "none" and (is_cut or sampling.temperature != 1.0):
        raise ValueError(
            f"loss.importance_sampling = none with sampling.temperature = {sampling.temperature}, top_p = {sampling.top_p} and "
            f"top_k = {sampling.top_k}: nothing corrects for the other policy that samples; use tis, or sample at 1, 1 and 0"
        )


def _check_student_support(config: "RunConfig") -> None:
    loss, sampling = config.loss, config.sampling
    if loss.support != "student_topk":
        return
    if sampling.top_p < 1.0 or 0 < sampling.top_k < loss.top_k:
        raise ValueError(
            f"loss.support = student_topk with loss.top_k = {loss.top_k} needs the student's whole distribution, but sampling.top_p = "
            f"{sampling.top_p} and sampling.top_k = {sampling.top_k} cut it; sample at 1 and 0, or use teacher_topk"
        )


def _refuse_ignored_loss_options(config: "RunConfig") -> None:
    """An option that another one makes meaningless is a mistake.

    Two are spared: rkl_advantage, which is on by default and has no effect at the default gamma = 0, and top_k, on which
    metrics and costs depend in any case.
    """
    loss = config.loss
    rules: list[tuple[bool, str, list[str]]] = [
        (not loss.uses_rkl_advantage, "the policy-gradient term is off", ["gamma", "reward_to_go"]),
        (
            not loss.has_policy_gradient,
            "the policy-gradient term is silent (off, or loss.gamma = 0 beside the single-step term)",
            ["advantage_clip", "clip_low", "clip_high"],
        ),
        (
            loss.uses_rkl_advantage and not loss.has_policy_gradient,
            "loss.gamma = 0 beside the single-step term",
            ["alpha_rkl"],
        ),
        (
            loss.gamma == 0 or not loss.uses_rkl_advantage,
            "loss.gamma = 0 looks at one token, or the policy-gradient term is off",
            ["length_normalization"],
        ),
        (
            not loss.uses_single_step,
            "the single-step term is off",
            ["single_step_divergence", "jsd_beta", "single_step_estimator", "support"],
        ),
        (
            loss.single_step_estimator == "full",
            "loss.single_step_estimator = full looks at every token",
            ["top_k", "support"],
        ),
        (not loss.rkl_advantage, "loss.rkl_advantage = False", ["alpha_rkl"]),
        (not loss.single_step_decomposition, "loss.single_step_decomposition = False", ["alpha_single_step"]),
        (loss.single_step_divergence != "jsd", "loss.single_step_divergence is not jsd", ["jsd_beta"]),
        (
            not loss.uses_sampled_tokens,
            "no term looks at the sampled token",
            ["importance_sampling", "importance_cap", "icepop_low", "icepop_high"],
        ),
        (loss.importance_sampling != "tis", "loss.importance_sampling is not tis", ["importance_cap"]),
        (loss.importance_sampling != "icepop", "loss.importance_sampling is not icepop", ["icepop_low", "icepop_high"]),
        (True, "a run has no rewards besides the teacher", ["alpha_reward"]),
        (
            config.pipeline.updates_per_batch == 1,
            "pipeline.updates_per_batch = 1 never clips the policy ratio",
            ["clip_low", "clip_high"],
        ),
    ]
    for applies, reason, names in rules:
        if applies:
            _refuse_changed(loss, "loss", names, reason)


def _refuse_ignored_text_options(config: "RunConfig") -> None:
    loss, data = config.loss, config.data
    if (loss.alpha_lm > 0) != (data.lm_path is not None):
        raise ValueError(
            f"loss.alpha_lm = {loss.alpha_lm} with data.lm_path = {data.lm_path!r}: the cross-entropy on texts needs "
            "a weight above 0 and a file; give both or neither"
        )
    if data.lm_path is None:
        reason = "there is no data.lm_path"
        _refuse_changed(data, "data", ["text_column", "max_text_tokens"], reason)
        _refuse_changed(config.pipeline, "pipeline", ["texts_per_step"], reason)


def check_evaluation_is_used(config: "RunConfig") -> None:
    """Refuse options of an evaluation that a run does not have.

    Raises:
        ValueError: names the first of them.
    """
    if config.data.eval_path is None:
        names = list(type(config.evaluation).model_fields)
        _refuse_changed(config.evaluation, "evaluation", names, "there is no data.eval_path")


def _refuse_changed(section: Any, prefix: str, names: list[str], reason: str) -> None:
    """Refuse options that differ from their default although they have no effect."""
    for name in names:
        value = getattr(section, name)
        if value != type(section).model_fields[name].default:
            shown = list(value) if isinstance(value, dict) else value  # a table may hold a secret
            raise ValueError(f"{prefix}.{name} = {shown} would be ignored: {reason}; leave it out")
