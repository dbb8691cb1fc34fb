"""What of `[lora]` does not fit together, or not with the rest of a run; and which model `teacher.model = "base"` is."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.config.lora import LoraConfig
from services.config.section import refuse_changed

if TYPE_CHECKING:
    from services.config import RunConfig

BASE = "base"
"""As teacher.model: the student's own model, as it is before it is trained."""
# Fields of peft's LoraConfig that choose modules, and their ranks and scales; all others are refused.
_PASSED_ON = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
_REASONS = {
    **dict.fromkeys(
        ("task_type", "peft_type", "inference_mode", "base_model_name_or_path", "fan_in_fan_out", "auto_mapping"),
        "it is set by itself; leave it out",
    ),
    "target_parameters": "fused parameters, e.g. those of experts, are stored under other names than they are trained under; "
    "leave it out",
    "lora_bias": "a layer without a bias could not be merged; leave it out",
    "ensure_weight_tying": "tied embeddings cannot be adapted here; leave it out",
    "trainable_token_indices": "it cannot be merged layer by layer; put the embedding into lora.modules_to_save instead",
}


def check_lora(config: "RunConfig") -> None:
    """Refuse an adapter that cannot be trained, merged and pushed.

    Raises:
        ValueError: names the first option that is in the way.
    """
    lora = config.lora
    if not lora.is_on:
        names = [name for name in type(lora).model_fields if name != "r"]
        refuse_changed(lora, "lora", names, "lora.r = 0 trains all weights")
        return
    _check_targets(lora)
    _check_peft_kwargs(lora)
    if lora.lora_dropout > 0 and config.student.disable_dropout:
        raise ValueError(
            f"lora.lora_dropout = {lora.lora_dropout} with student.disable_dropout = True contradict each other; set "
            "student.disable_dropout = false, or leave lora.lora_dropout out"
        )
    if lora.init_lora_weights == "orthogonal" and lora.r % 2:
        raise ValueError(
            f"lora.init_lora_weights = orthogonal needs an even rank, but lora.r = {lora.r}; give an even one"
        )
    if lora.load_in_4bit:
        _check_4bit(config)


def _check_targets(lora: LoraConfig) -> None:
    target = lora.target_modules
    if not target or (isinstance(target, list) and not all(target)):
        raise ValueError(
            f'lora.target_modules = {target!r} names no modules; give "all-linear", or names such as ["q_proj", "v_proj"]'
        )
    if not all(lora.modules_to_save):
        raise ValueError(f"lora.modules_to_save = {lora.modules_to_save!r} has an empty name; leave it out")
    if isinstance(target, str):
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(
                f"lora.target_modules = {target!r} is no regular expression ({error}); a list of names is given as JSON"
            ) from error
        return
    if both := sorted(set(target) & set(lora.modules_to_save)):
        raise ValueError(
            f"lora.target_modules and lora.modules_to_save both name {both[0]!r}; a module is adapted or trained whole: "
            "name it in one of them"
        )


def _check_peft_kwargs(lora: LoraConfig) -> None:
    for name in lora.peft_kwargs:
        if name in _PASSED_ON:
            continue
        if name in type(lora).model_fields:
            reason = f"lora.{name} says that; set it instead"
        else:
            reason = _REASONS.get(name, f"what may be passed on is {', '.join(_PASSED_ON)}; leave it out")
        raise ValueError(f"lora.peft_kwargs.{name} is refused: {reason}")


def _check_4bit(config: "RunConfig") -> None:
    trainer = config.trainer
    if trainer.num_processes > 1 or trainer.cpu_offload:
        name = "num_processes" if trainer.num_processes > 1 else "cpu_offload"
        raise ValueError(
            f"lora.load_in_4bit = True with trainer.{name} = {getattr(trainer, name)}: weights of four bits are on one rank and "
            f"stay on its GPU; leave trainer.{name} out, or set lora.load_in_4bit = false"
        )
    student = config.student
    if student.compute_dtype not in ("auto", student.dtype):
        raise ValueError(
            f"lora.load_in_4bit = True computes in student.dtype = {student.dtype}, but student.compute_dtype = "
            f"{student.compute_dtype}; set student.dtype instead"
        )
    if config.lora.use_dora:
        raise ValueError(
            "lora.load_in_4bit = True with lora.use_dora = True is not supported: the length of a row of four-bit weights is not "
            "that of what is pushed; leave one of the two out"
        )


def with_base_resolved(given: Any) -> Any:
    """What RunConfig is made of, with the student's model in the place of `teacher.model = "base"`.

    Raises:
        ValueError: there is no student.model.
    """
    if not isinstance(given, Mapping) or _model(given, "teacher") != BASE:
        return given
    student = _model(given, "student")
    if not isinstance(student, str) or not student:
        raise ValueError(
            "teacher.model = base is the model of student.model, which is not given; give it, or name the teacher's own folder "
            "(a folder of the name base is ./base)"
        )
    teacher = given["teacher"]
    if isinstance(teacher, Mapping):
        return {**given, "teacher": {**teacher, "model": student}}
    return {**given, "teacher": teacher.model_copy(update={"model": student})}


def _model(given: Mapping[str, Any], section: str) -> Any:
    found = given.get(section)
    return found.get("model") if isinstance(found, Mapping) else getattr(found, "model", None)
