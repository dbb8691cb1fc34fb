"""What is the same in all checkpoints of a run, and is compared before it goes on: rows, tokenizer, models, options."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedTokenizerBase

from services.clients.teacher_probe import ProbeAnswer
from services.config import RunConfig
from services.errors import ConfigError
from services.models.causal_lm import tokenizer_fingerprint
from services.models.fingerprint import model_fingerprint
from trainer.checkpoint.attempt import Attempt
from trainer.checkpoint.folder import Checkpoint

logger = logging.getLogger(__name__)


def facts_of_run(
    config: RunConfig,
    attempt: Attempt,
    num_steps: int,
    rows: Sequence[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    teachers: Mapping[str, ProbeAnswer],
) -> dict[str, Any]:
    """The facts of a run, as state.json has them.

    Args:
        config: as it was given.
        rows: option and fingerprint of each source of rows.
        teachers: what each has answered to its probe, by its option.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    return {
        "run": attempt.run,
        "attempt": attempt.number,
        "num_steps": num_steps,
        "rows": list(rows),
        "tokenizer": fingerprint,
        "base": _base_fingerprint(config, fingerprint),
        "teachers": {option: asdict(answer) for option, answer in teachers.items()},
        "config": config.model_dump(mode="json"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _base_fingerprint(config: RunConfig, tokenizer: str) -> str | None:
    """Of the model in student.model, where a run that goes on still reads its weights."""
    if not config.lora.is_on and config.loss.alpha_reference_kl == 0:
        return None
    name, trust = config.student.model or "", config.student.trust_remote_code
    model_config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    return model_fingerprint(name, model_config, tokenizer, {})


def check_facts(facts: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse to go on with other rows, with another tokenizer or model, or without a step that is left to do.

    Raises:
        ConfigError: names what differs.
    """
    before = checkpoint.state
    for (name, now), (old_name, was) in zip_longest(facts["rows"], before["rows"], fillvalue=("nothing", "")):
        if now != was:
            raise ConfigError(
                f"{name} holds other rows than {old_name} did for {checkpoint.path}, or in another order; give the same rows, or "
                "begin anew with --output.overwrite true"
            )
    for name, what in (("tokenizer", "the tokenizer of student.model"), ("base", "the model in student.model")):
        if facts[name] != before[name]:
            raise ConfigError(
                f"{what} is another one than it was for {checkpoint.path}; give the same, or begin anew with "
                "--output.overwrite true"
            )
    for option, answer in facts["teachers"].items():
        was = before["teachers"].get(option)
        how = None if was is None else ProbeAnswer(**was).changed(ProbeAnswer(**answer))
        if how is not None:
            raise ConfigError(
                f"the teacher of {option} is not the one of {checkpoint.path}: it {how}; give the same, or begin anew with "
                "--output.overwrite true"
            )
    output_dir = checkpoint.path.parents[1]
    if facts["num_steps"] == checkpoint.step and (output_dir / "summary.json").exists():
        raise ConfigError(
            f"output.dir = {str(output_dir)!r} holds a complete run of the {checkpoint.step} steps that pipeline.epochs comes to; "
            "raise that to train on, or begin anew with --output.overwrite true"
        )
    if facts["num_steps"] < checkpoint.step:
        raise ConfigError(
            f"pipeline.epochs comes to {facts['num_steps']} steps, and {checkpoint.path} has {checkpoint.step}; raise it"
        )
    if facts["versions"] != before["versions"]:
        logger.warning("the checkpoint was written with %s, this run has %s", before["versions"], facts["versions"])
