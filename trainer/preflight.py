"""Before anything is trained: the servers are there, speak our protocol, and mean the same tokens.

waits for  every server's /ready
produces   what each server says of itself, or an error that names the difference
"""

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from services.causal_lm import chat_template_probe, eos_token_ids_on_disk, load_tokenizer, tokenizer_fingerprint
from services.clients import RolloutClient, TeacherClient
from services.config import LossConfig, RunConfig, TeacherConfig
from services.errors import StartupError
from services.schemas import PROTOCOL_VERSION, RolloutInfo, TeacherInfo
from services.vllm_teacher_client import TeacherTokens
from trainer.teacher_scores import Support

logger = logging.getLogger(__name__)


async def attach(
    config: RunConfig, rollout_client: RolloutClient, teacher_client: TeacherClient
) -> tuple[list[RolloutInfo], TeacherInfo]:
    """Wait for all servers and read what they say of themselves.

    Raises:
        PeerError: a server does not become ready in time.
        StartupError: a server speaks another protocol, or the teachers are not replicas of one model.
    """
    await rollout_client.wait_ready(config.rollout.startup_timeout_s, lambda url: logger.info("waiting for %s", url))
    await teacher_client.wait_ready(config.teacher.startup_timeout_s, lambda url: logger.info("waiting for %s", url))
    rollouts, teachers = await rollout_client.info(), await teacher_client.info()
    answers: list[tuple[str, RolloutInfo | TeacherInfo]] = [
        *zip(rollout_client.urls, rollouts, strict=True),
        *zip(teacher_client.urls, teachers, strict=True),
    ]
    for url, info in answers:
        if info.protocol != PROTOCOL_VERSION:
            raise StartupError(
                f"{url} speaks protocol {info.protocol}, this trainer {PROTOCOL_VERSION}; install the same version on both"
            )
    if len({t.fingerprint for t in teachers}) > 1:
        raise StartupError(f"the teachers at {', '.join(teacher_client.urls)} do not serve the same model")
    limits = {name: min(getattr(t, name) for t in teachers) for name in ("max_model_len", "max_top_k")}
    return rollouts, teachers[0].model_copy(update=limits)  # replicas of one model may be configured differently


async def check_same_tokens(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    teacher: TeacherInfo,
    teacher_client: TeacherClient,
) -> None:
    """Refuse a teacher whose token ids, end tokens or chat format are not the student's.

    Raises:
        StartupError: the vocabularies differ (with the first ids that do), or the end tokens or rendered
            chat templates differ and `teacher.accept_different` does not name that.
    """
    if teacher.tokenizer_fingerprint is None:
        logger.info(
            "the teacher %r does not tell its tokenizer: whether it means the student's tokens is not checked; name the "
            "folder of its model with teacher.model to have it checked",
            teacher.model,
        )
        return
    if teacher.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        theirs = await teacher_client.vocabulary()
        raise StartupError(
            f"teacher {teacher.model!r} and student {config.student.model!r} do not have the same tokenizer: "
            f"{first_differences(tokenizer.get_vocab(), theirs)}; scores of one's ids mean nothing to the other"
        )
    accepted = config.teacher.accept_different
    if teacher.eos_token_ids != eos_token_ids and "eos" not in accepted:
        raise StartupError(
            f"the teacher ends completions with {teacher.eos_token_ids}, the student with {eos_token_ids}; if that is "
            "meant, pass --teacher.accept_different '[\"eos\"]'"
        )
    ours = chat_template_probe(tokenizer)
    if teacher.chat_template_probe != ours and "chat_template" not in accepted:
        raise StartupError(
            f"the chat templates differ: the teacher renders a probe as {teacher.chat_template_probe!r}, the student as "
            f"{ours!r}; if that is meant, pass --teacher.accept_different '[\"chat_template\"]'"
        )


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


def max_model_len(config: RunConfig, rollouts: list[RolloutInfo], teacher: TeacherInfo) -> int:
    """Longest sequence that every server takes.

    Raises:
        StartupError: it leaves no room for a prompt.
    """
    shortest = min([teacher.max_model_len, *(r.max_model_len for r in rollouts)])
    if config.longest_completion() >= shortest:
        raise StartupError(
            f"max_new_tokens = {config.longest_completion()} leaves no room for a prompt: the servers take {shortest} "
            "tokens (rollout.max_model_len, teacher.max_model_len); lower the one or raise the others"
        )
    return shortest


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


def check_evaluation(config: RunConfig, teacher: TeacherInfo) -> None:
    """Refuse an evaluation that the teacher cannot score: its reverse KL is over the whole vocabulary.

    Raises:
        StartupError: the teacher returns fewer tokens per position.
    """
    if config.data.eval_path is not None and teacher.max_top_k < teacher.padded_vocab_size:
        raise StartupError(
            f"the evaluation on data.eval_path needs all {teacher.padded_vocab_size} tokens per position, the teacher "
            f"{teacher.model!r} returns {teacher.max_top_k} at most; leave data.eval_path out, or raise the limit at the "
            "server (teacher.max_top_k; of a plain vLLM server: --max-logprobs -1)"
        )


def choose_support(loss: LossConfig, student_vocab: int, rollouts: list[RolloutInfo], teacher: TeacherInfo) -> Support:
    """The support of the single-step term, as large as asked for or as the vocabulary allows.

    Args:
        student_vocab: rows of the student's output embedding.

    Raises:
        StartupError: a server does not return that many tokens, or the vocabularies do not fit.
    """
    name, limit = "teacher.max_top_k", teacher.max_top_k
    if loss.single_step_estimator == "full":
        if student_vocab != teacher.padded_vocab_size:
            raise StartupError(
                f"loss.single_step_estimator = full needs embeddings of equal size, the student has {student_vocab} rows, the "
                f"teacher {teacher.padded_vocab_size}; use hybrid"
            )
        support = Support("teacher_topk", student_vocab, student_vocab)
    else:
        # One token stays outside, so that teacher and student both have a tail, however their embeddings are padded.
        size = min(loss.top_k, student_vocab - 1, teacher.padded_vocab_size - 1)
        support = Support(loss.support, size, student_vocab)
        if loss.support == "student_topk":
            name, limit = "rollout.max_logprobs", min(r.max_logprobs for r in rollouts)
            if not teacher.scores_support_ids:
                raise StartupError(
                    f"loss.support = student_topk, but the teacher {teacher.model!r} (engine {teacher.engine}) scores no tokens "
                    "of the caller's choice; use teacher_topk or a teacher server with the transformers engine"
                )
            if student_vocab > teacher.padded_vocab_size:
                raise StartupError(
                    f"loss.support = student_topk may name ids up to {student_vocab}, the teacher scores those below "
                    f"{teacher.padded_vocab_size}; use teacher_topk"
                )
    if support.size > limit:
        raise StartupError(
            f"the loss needs {support.size} tokens per position, {name} = {limit}; raise it at the server"
            f"{' (of a plain vLLM server: --max-logprobs)' if teacher.engine == 'vllm serve' else ''}"
        )
    return support
