"""A teacher that means other tokens, ends or chats differently is refused before anything is trained."""

import pytest

from services.causal_lm import chat_template_probe, tokenizer_fingerprint
from services.config import LossConfig, RunConfig, TeacherConfig
from services.errors import StartupError
from services.schemas import RolloutInfo, TeacherInfo
from trainer import preflight
from trainer.tiny_pair import build_tokenizer

EOS = [256]


def teacher_info(tokenizer, **changes) -> TeacherInfo:  # type: ignore[no-untyped-def]
    fields = {
        "protocol": 1,
        "model": "the-teacher",
        "fingerprint": "f",
        "vocab_size": len(tokenizer),
        "padded_vocab_size": len(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "eos_token_ids": EOS,
        "chat_template_probe": chat_template_probe(tokenizer),
        "dtype": "float32",
        "max_model_len": 128,
        "max_top_k": len(tokenizer),
        "max_tokens_per_request": 1,
        "max_sequences_per_request": 1,
        "max_answer_mib": 1,
        "temperature_support": "any",
    }
    return TeacherInfo(**{**fields, **changes})


def rollout_info(**changes) -> RolloutInfo:  # type: ignore[no-untyped-def]
    fields = {
        "protocol": 1,
        "model": "the-student",
        "boot_id": "b",
        "policy_version": "default",
        "dtype": "float32",
        "max_model_len": 64,
        "vocab_size": 261,
        "max_logprobs": 64,
        "world_size": 1,
        "weight_transfer_backend": "gloo",
    }
    return RolloutInfo(**{**fields, **changes})


class Servers:
    """Stands for either client."""

    def __init__(self, *infos: object, vocabulary: dict[str, int] | None = None) -> None:
        self.infos, self._vocabulary = list(infos), vocabulary
        self.urls = [f"http://server-{index}" for index in range(len(infos))]

    async def wait_ready(self, timeout_s: float, on_wait: object) -> None:
        pass

    async def info(self) -> list[object]:
        return self.infos

    async def vocabulary(self) -> dict[str, int] | None:
        return self._vocabulary


def swapped_tokenizer():  # type: ignore[no-untyped-def]
    """The same tokens, but the ids of "a" (97) and "b" (98) the other way round."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(build_tokenizer().backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>")


async def test_swapped_tokens_are_refused_with_the_first_ids_that_differ() -> None:
    other = swapped_tokenizer()
    client = Servers(teacher_info(other), vocabulary=other.get_vocab())
    config = RunConfig(student={"model": "the-student"})
    with pytest.raises(StartupError) as error:
        await preflight.check_same_tokens(config, build_tokenizer(), EOS, client.infos[0], client)  # type: ignore[arg-type]
    assert "2 ids differ, first id 97 is 'a' here and 'b' there, id 98 is 'b' here and 'a' there" in str(error.value)
    assert "the-teacher" in str(error.value) and "the-student" in str(error.value)


async def test_a_padded_embedding_is_fine() -> None:
    tokenizer = build_tokenizer()
    info = teacher_info(tokenizer, padded_vocab_size=320, max_top_k=320)
    await preflight.check_same_tokens(RunConfig(), tokenizer, EOS, info, Servers())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "name", "shown"),
    [
        ({"eos_token_ids": [256, 257]}, "eos", "[256, 257]"),
        ({"chat_template_probe": "[INST]2+2=[/INST]"}, "chat_template", "[INST]2+2=[/INST]"),
        ({"chat_template_probe": None}, "chat_template", "None"),
    ],
)
async def test_other_ends_and_chat_formats_are_shown_and_must_be_accepted(change: dict, name: str, shown: str) -> None:
    tokenizer = build_tokenizer()
    info = teacher_info(tokenizer, **change)
    with pytest.raises(StartupError) as error:
        await preflight.check_same_tokens(RunConfig(), tokenizer, EOS, info, Servers())  # type: ignore[arg-type]
    assert shown in str(error.value) and f"--teacher.accept_different '[\"{name}\"]'" in str(error.value)
    accepting = RunConfig(teacher={"accept_different": [name]})
    await preflight.check_same_tokens(accepting, tokenizer, EOS, info, Servers())  # type: ignore[arg-type]


def test_text_that_is_cut_differently_with_one_vocabulary_is_said() -> None:
    assert "cut into tokens differently" in preflight.first_differences({"a": 0}, {"a": 0})


def test_a_token_that_only_one_side_has_differs_and_only_the_first_few_are_shown() -> None:
    ours, theirs = {"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}
    assert preflight.first_differences(ours, theirs) == "1 ids differ, first id 2 is None here and 'c' there"
    many = preflight.first_differences({f"x{i}": i for i in range(9)}, {f"y{i}": i for i in range(9)})
    assert many.startswith("9 ids differ, first id 0 is") and many.count("here and") == 3 and "id 3" not in many


async def test_teachers_must_be_replicas() -> None:
    tokenizer = build_tokenizer()
    teachers = Servers(teacher_info(tokenizer), teacher_info(tokenizer, fingerprint="g"))
    with pytest.raises(StartupError, match="do not serve the same model"):
        await preflight.attach(RunConfig(), Servers(rollout_info()), teachers)  # type: ignore[arg-type]


async def test_another_protocol_is_refused() -> None:
    teachers = Servers(teacher_info(build_tokenizer()))
    with pytest.raises(StartupError, match="http://server-0 speaks protocol 2, this trainer 1"):
        await preflight.attach(RunConfig(), Servers(rollout_info(protocol=2)), teachers)  # type: ignore[arg-type]


async def test_a_teacher_that_does_not_tell_its_tokenizer_is_taken_at_its_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    info = teacher_info(build_tokenizer(), tokenizer_fingerprint=None, eos_token_ids=[], chat_template_probe=None)
    with caplog.at_level("INFO"):
        await preflight.check_same_tokens(RunConfig(), build_tokenizer(), EOS, info, Servers())  # type: ignore[arg-type]
    (record,) = caplog.records
    assert "'the-teacher' does not tell its tokenizer" in record.getMessage() and "teacher.model" in record.getMessage()


def test_a_folder_tells_what_a_plain_vllm_server_does_not(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    tokens = preflight.teacher_tokens(TeacherConfig(model=tiny_model_folder("llama")))
    tokenizer = build_tokenizer()
    assert tokens is not None and tokens.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert (tokens.eos_token_ids, tokens.vocabulary) == (EOS, tokenizer.get_vocab())
    assert tokens.chat_template_probe == chat_template_probe(tokenizer)
    assert preflight.teacher_tokens(TeacherConfig(model="owner/name")) is None
    assert preflight.teacher_tokens(TeacherConfig()) is None


def test_an_evaluation_needs_the_whole_vocabulary() -> None:
    info = teacher_info(build_tokenizer(), max_top_k=20)
    preflight.check_evaluation(RunConfig(), info)
    evaluating = RunConfig(data={"eval_path": "e.jsonl"})
    preflight.check_evaluation(evaluating, teacher_info(build_tokenizer()))
    with pytest.raises(StartupError, match=r"needs all 261 tokens.* returns 20 at most; .*--max-logprobs -1"):
        preflight.check_evaluation(evaluating, info)


def test_the_shortest_context_counts_and_must_leave_room() -> None:
    info = teacher_info(build_tokenizer())
    rollouts = [rollout_info(), rollout_info(max_model_len=32)]
    assert preflight.max_model_len(RunConfig(sampling={"max_new_tokens": 31}), rollouts, info) == 32
    with pytest.raises(StartupError, match="max_new_tokens = 32 leaves no room"):
        preflight.max_model_len(RunConfig(sampling={"max_new_tokens": 32}), rollouts, info)


def test_a_teacher_that_cannot_apply_the_temperature_is_refused() -> None:
    info = teacher_info(build_tokenizer(), temperature_support="one")
    preflight.check_temperature(LossConfig(), info)
    preflight.check_temperature(LossConfig(kd_temperature=2.0), teacher_info(build_tokenizer()))
    with pytest.raises(
        StartupError, match=r"kd_temperature = 2\.0.*'the-teacher' computes logprobs at temperature 1 only"
    ):
        preflight.check_temperature(LossConfig(kd_temperature=2.0), info)


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "expected"),
    [
        ({}, 261, 261, ("teacher_topk", 32, True)),
        ({"top_k": 9999}, 261, 320, ("teacher_topk", 260, True)),
        ({"top_k": 9999}, 320, 261, ("teacher_topk", 260, True)),
        ({"support": "student_topk", "top_k": 5}, 261, 320, ("student_topk", 5, True)),
        ({"single_step_estimator": "full"}, 261, 261, ("teacher_topk", 261, False)),
    ],
)
def test_the_support_is_as_large_as_asked_or_leaves_one_token_outside(
    loss: dict, student: int, teacher: int, expected: tuple[str, int, bool]
) -> None:
    info = teacher_info(build_tokenizer(), padded_vocab_size=teacher, max_top_k=teacher)
    support = preflight.choose_support(LossConfig(**loss), student, [rollout_info()], info)
    assert (support.kind, support.size, support.has_tail) == expected
    assert support.vocab_size == student


@pytest.mark.parametrize(
    ("loss", "student", "limits", "message"),
    [
        ({"single_step_estimator": "full"}, 300, {}, "the student has 300 rows, the teacher 261"),
        ({"support": "student_topk"}, 300, {}, "ids up to 300, the teacher scores those below 261"),
        ({"top_k": 20}, 261, {"max_top_k": 19}, "needs 20 tokens per position, teacher.max_top_k = 19"),
        ({"single_step_estimator": "full"}, 261, {"max_top_k": 19}, "needs 261 tokens per position"),
        (
            {"support": "student_topk", "top_k": 20},
            261,
            {"max_logprobs": 19},
            r"20 tokens .* rollout.max_logprobs = 19",
        ),
        (
            {"support": "student_topk"},
            261,
            {"scores_support_ids": False, "engine": "vllm"},
            r"support = student_topk, but the teacher 'the-teacher' \(engine vllm\) scores no tokens",
        ),
    ],
)
def test_a_support_that_the_servers_do_not_return_is_refused(
    loss: dict, student: int, limits: dict, message: str
) -> None:
    rollouts = [rollout_info(), rollout_info(max_logprobs=limits.pop("max_logprobs", 64))]
    with pytest.raises(StartupError, match=message):
        preflight.choose_support(LossConfig(**loss), student, rollouts, teacher_info(build_tokenizer(), **limits))
