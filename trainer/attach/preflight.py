"""Before anything is trained: the servers are there, speak our protocol, and mean the same tokens.

waits for  every server's /ready
produces   what each server says of itself, or an error that names the difference
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from services.clients import RolloutClient, TeacherClient
from services.clients.base import ServerClient, all_or_first_error
from services.clients.plain_vllm import TeacherTokens
from services.clients.teacher_answers import first_replica_problem
from services.clients.teacher_probe import probe_sequences
from services.config import ClientSection, LossConfig, RunConfig, TeacherConfig
from services.errors import StartupError
from services.models.causal_lm import (
    chat_template_hash,
    chat_template_probe,
    eos_token_ids_on_disk,
    load_tokenizer,
    tokenizer_fingerprint,
)
from services.wire.message import PROTOCOL_VERSION
from services.wire.rollout import RolloutInfo
from services.wire.teacher import TeacherInfo
from trainer.data.prompts import Prompt
from trainer.teacher_scores import Support
from trainer.teachers import Teacher, Teachers, naming, option_prefix

logger = logging.getLogger(__name__)


async def attach(
    config: RunConfig, rollout_client: RolloutClient, teacher_clients: Mapping[str | None, TeacherClient]
) -> tuple[list[RolloutInfo], Teachers]:
    """Wait for all servers and read what they say of themselves.

    Args:
        teacher_clients: by the name of the teacher.

    Raises:
        PeerError: a server does not become ready in time.
        StartupError: a server speaks another protocol, or the servers of a teacher are not replicas of one model.
    """
    waits = [_wait_ready(rollout_client, config.rollout_client)]
    for name, client in teacher_clients.items():
        waits.append(_wait_ready(client, config.teacher_client, name))
    await all_or_first_error(waits)  # all at once: a wrong URL of one must not wait for the model of another
    rollouts = await rollout_client.info()
    _check_protocol(rollout_client.urls, rollouts)
    return rollouts, Teachers([await _attach_teacher(*named) for named in teacher_clients.items()])


async def _wait_ready(client: ServerClient, section: ClientSection, name: str | None = None) -> None:
    with naming(name):
        await client.wait_ready(section.startup_timeout_s, lambda url: logger.info("waiting for %s", url))


async def _attach_teacher(name: str | None, client: TeacherClient) -> Teacher:
    with naming(name):
        infos = await client.info()
        _check_protocol(client.urls, infos)
        if (problem := first_replica_problem(client.urls, infos)) is not None:
            raise StartupError(f"{problem}; give the URLs of replicas of one")
    limits = {limit: min(getattr(info, limit) for info in infos) for limit in ("max_model_len", "max_top_k")}
    return Teacher(name, client, infos[0].model_copy(update=limits))  # replicas may be configured differently


def _check_protocol(urls: list[str], infos: Sequence[RolloutInfo | TeacherInfo]) -> None:
    for url, info in zip(urls, infos, strict=True):
        if info.protocol != PROTOCOL_VERSION:
            raise StartupError(
                f"{url} speaks protocol {info.protocol}, this trainer {PROTOCOL_VERSION}; install the same version on both"
            )


async def check_teachers(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int], teachers: Teachers
) -> None:
    """Refuse a run of which one teacher cannot score what it would be asked.

    Raises:
        StartupError: of `check_same_tokens` or `check_temperature`; says which teacher it is.
    """
    for teacher in teachers:
        with naming(teacher.name):
            await check_same_tokens(config, tokenizer, eos_token_ids, teacher)
            check_temperature(config.loss, teacher.info)


async def check_same_tokens(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int], teacher: Teacher
) -> None:
    """Refuse a teacher whose token ids, end tokens or chat format are not the student's.

    Raises:
        StartupError: the vocabularies differ (with the first ids that do), or the end tokens or rendered
            chat templates differ and `teacher_client.accept_different` does not name that.
    """
    info = teacher.info
    if info.tokenizer_fingerprint is None:
        # No option tells that of a named one.
        fix = "; name the folder of its model with teacher.model to have it checked" if teacher.name is None else ""
        text = "%sthe teacher %r does not tell its tokenizer: whether it means the student's tokens is not checked%s"
        logger.info(text, option_prefix(teacher.name), info.model, fix)
        return
    if info.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        theirs = await teacher.client.vocabulary()
        raise StartupError(
            f"teacher {info.model!r} and student {config.student.model!r} do not have the same tokenizer: "
            f"{first_differences(tokenizer.get_vocab(), theirs)}; scores of one's ids mean nothing to the other"
        )
    accepted = config.teacher_client.accept_different
    if info.eos_token_ids != eos_token_ids and "eos" not in accepted:
        raise StartupError(
            f"the teacher ends completions with {info.eos_token_ids}, the student with {eos_token_ids}; if that is "
            "meant, pass --teacher_client.accept_different '[\"eos\"]'"
        )
    ours = chat_template_probe(tokenizer)
    # One source is one template, should two hosts render it differently.
    same_source = info.chat_template_hash is not None and info.chat_template_hash == chat_template_hash(tokenizer)
    if info.chat_template_probe != ours and not same_source and "chat_template" not in accepted:
        raise StartupError(
            f"the chat templates differ: the teacher renders a probe as {info.chat_template_probe!r}, the student as "
            f"{ours!r}; if that is meant, pass --teacher_client.accept_different '[\"chat_template\"]'"
        )


async def keep_probes(config: RunConfig, teachers: Teachers, prompts: Sequence[Prompt]) -> None:
    """Let every replica of every teacher score a few tokens of the data, by which it is known again later.

    Raises:
        StartupError: one answers differently twice, unlike its replicas, or as if it had no weights.
    """
    sequences = probe_sequences([prompt.token_ids for prompt in prompts])
    for teacher in teachers:
        with naming(teacher.name):
            await teacher.client.keep_probe(sequences, config.teacher_client.probe_tolerance)


def teacher_tokens(teacher: TeacherConfig) -> TeacherTokens | None:
    """What the folder `teacher.model` says of the tokens of a teacher that tells nothing itself; None without a folder."""
    if teacher.model is None or not Path(teacher.model).is_dir():
        return None
    trust = teacher.trust_remote_code
    tokenizer = load_tokenizer(teacher.model, trust_remote_code=trust, key="teacher.model")
    return TeacherTokens(
        tokenizer_fingerprint(tokenizer),
        eos_token_ids_on_disk(teacher.model, tokenizer, trust_remote_code=trust),
        chat_template_probe(tokenizer),
        tokenizer.get_vocab(),
        chat_template_hash(tokenizer),
    )


def first_differences(ours: dict[str, int], theirs: dict[str, int], count: int = 3) -> str:
    """The lowest ids that stand for different tokens, as text."""
    our_tokens = {index: token for token, index in ours.items()}
    their_tokens = {index: token for token, index in theirs.items()}
    differing = [i for i in sorted({*our_tokens, *their_tokens}) if our_tokens.get(i) != their_tokens.get(i)]
    if not differing:
        return "the same vocabulary, but text is cut into tokens differently"
    shown = [f"id {i} is {our_tokens.get(i)!r} here and {their_tokens.get(i)!r} there" for i in differing[:count]]
    return f"{len(differing)} ids differ, first " + ", ".join(shown)


def max_model_len(config: RunConfig, rollouts: list[RolloutInfo], teachers: Teachers) -> int:
    """Longest sequence that every server takes.

    Raises:
        StartupError: it leaves no room for a prompt; names the option that is the tightest.
    """
    limits = [("rollout.max_model_len", r.max_model_len) for r in rollouts]
    limits += [(f"{option_prefix(t.name)}teacher.max_model_len", t.info.max_model_len) for t in teachers]
    name, shortest = min(limits, key=lambda limit: limit[1])
    if config.longest_completion() >= shortest:
        raise StartupError(
            f"max_new_tokens = {config.longest_completion()} leaves no room for a prompt: the servers take {shortest} "
            f"tokens ({name}); lower the one or raise the other"
        )
    return shortest


def check_rope_switch(switch: int | None, urls: list[str], rollouts: list[RolloutInfo]) -> None:
    """Refuse rollout servers that give a longrope student the frequencies of long sequences for short ones too.

    vLLM decides once, by the longest sequence that it takes (its `Phi3LongRoPEScaledRotaryEmbedding`); the trainer, as
    transformers, by each sequence.

    Args:
        switch: `services.models.causal_lm.rope_switch` of the student.

    Raises:
        StartupError: names the server and the option.
    """
    for url, info in zip(urls, rollouts, strict=True):
        if switch is not None and info.max_model_len > switch:
            raise StartupError(
                f"{url} takes {info.max_model_len} tokens, more than the {switch} at which this student's rotary frequencies "
                f"switch (longrope): vLLM then uses those of long sequences for all; start it with --rollout.max_model_len {switch}"
            )


def check_temperature(loss: LossConfig, teacher: TeacherInfo) -> None:
    """Refuse a kd_temperature that the teacher cannot apply where its logits are.

    Raises:
        StartupError: log-probabilities of a few tokens at temperature 1 do not determine those at another one.
    """
    if loss.kd_temperature != 1.0 and teacher.temperature_support == "one":
        raise StartupError(
            f"loss.kd_temperature = {loss.kd_temperature}, but the teacher {teacher.model!r} computes logprobs at temperature 1 "
            "only; set loss.kd_temperature = 1 or use a teacher server with the transformers engine"
        )


def choose_support(loss: LossConfig, student_vocab: int, rollouts: list[RolloutInfo], teachers: Teachers) -> Support:
    """The support of the single-step term, as large as asked for or as the smallest vocabulary allows.

    Args:
        student_vocab: rows of the student's output embedding.

    Raises:
        StartupError: a server does not return that many tokens, or the vocabularies do not fit.
    """
    if loss.single_step_estimator == "full":
        support = Support("teacher_topk", student_vocab, student_vocab)
    else:
        # One token stays outside, so that teacher and student both have a tail, however their embeddings are padded.
        smallest_vocab = min(student_vocab, *(teacher.info.padded_vocab_size for teacher in teachers))
        support = Support(loss.support, min(loss.top_k, smallest_vocab - 1), student_vocab)
    limit = min(r.max_logprobs for r in rollouts)
    if support.student_top_k > limit:
        raise _too_many(support, "rollout.max_logprobs", limit)
    for teacher in teachers:
        with naming(teacher.name):
            check_support(support, teacher.info)
    return support


def check_support(support: Support, teacher: TeacherInfo) -> None:
    """Refuse a support that the teacher does not score.

    Raises:
        StartupError: it returns fewer tokens, not those of the caller's choice, or its vocabulary does not fit.
    """
    if not support.has_tail and support.vocab_size != teacher.padded_vocab_size:
        raise StartupError(
            f"loss.single_step_estimator = full needs embeddings of equal size, the student has {support.vocab_size} rows, the "
            f"teacher {teacher.padded_vocab_size}; use hybrid"
        )
    if support.kind == "teacher_topk":
        if support.size > teacher.max_top_k:
            raise _too_many(support, "teacher.max_top_k", teacher.max_top_k, teacher.server)
        return
    if not teacher.scores_support_ids:
        raise StartupError(
            f"loss.support = student_topk, but the teacher {teacher.model!r} (engine {teacher.engine}) scores no tokens "
            "of the caller's choice; use teacher_topk or a teacher server with the transformers engine"
        )
    if support.vocab_size > teacher.padded_vocab_size:
        raise StartupError(
            f"loss.support = student_topk may name ids up to {support.vocab_size}, the teacher scores those below "
            f"{teacher.padded_vocab_size}; use teacher_topk"
        )


def _too_many(support: Support, name: str, limit: int, server: str = "distillserve") -> StartupError:
    fix = " (of a plain vLLM server: --max-logprobs)" if server == "vllm" else ""
    return StartupError(
        f"the loss needs {support.size} tokens per position, {name} = {limit}; raise it at the server{fix}"
    )
