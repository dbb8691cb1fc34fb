"""A teacher that means other tokens, ends or chats differently is refused before anything is trained."""

import asyncio
import logging

import httpx
import pytest

from services.clients import RolloutClient, TeacherClient
from services.config import LossConfig, RunConfig, TeacherConfig
from services.errors import PeerError, StartupError
from services.models.causal_lm import chat_template_hash, chat_template_probe, tokenizer_fingerprint
from services.wire.teacher import TeacherInfo
from tests.servers import EOS, Servers, rollout_info, teacher_info
from tests.unit.trainer.attached import attached, teacher_of
from trainer.attach import preflight
from trainer.data.prompts import Prompt
from trainer.teachers import Teachers
from trainer.tiny.pair import build_tokenizer

KD_AT_2 = {"kd_temperature": 2}


def teachers(info: TeacherInfo, **named: TeacherInfo) -> Teachers:
    """The one without a name, and those with one."""
    return Teachers([attached(None, info), *(attached(None, info, name) for name, info in named.items())])


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
        await preflight.check_same_tokens(config, build_tokenizer(), EOS, attached(client, client.infos[0]))  # type: ignore[arg-type]
    assert "2 ids differ, first id 97 is 'a' here and 'b' there, id 98 is 'b' here and 'a' there" in str(error.value)
    assert "the-teacher" in str(error.value) and "the-student" in str(error.value)


async def test_a_padded_embedding_is_fine() -> None:
    tokenizer = build_tokenizer()
    info = teacher_info(tokenizer, padded_vocab_size=320, max_top_k=320)
    await preflight.check_same_tokens(RunConfig(), tokenizer, EOS, attached(None, info))


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
        await preflight.check_same_tokens(RunConfig(), tokenizer, EOS, attached(None, info))
    assert shown in str(error.value) and f"--teacher_client.accept_different '[\"{name}\"]'" in str(error.value)
    accepting = RunConfig(teacher_client={"accept_different": [name]})
    await preflight.check_same_tokens(accepting, tokenizer, EOS, attached(None, info))


def test_text_that_is_cut_differently_with_one_vocabulary_is_said() -> None:
    assert "cut into tokens differently" in preflight.first_differences({"a": 0}, {"a": 0})


def test_a_token_that_only_one_side_has_differs_and_only_the_first_few_are_shown() -> None:
    ours, theirs = {"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}
    assert preflight.first_differences(ours, theirs) == "1 ids differ, first id 2 is None here and 'c' there"
    many = preflight.first_differences({f"x{i}": i for i in range(9)}, {f"y{i}": i for i in range(9)})
    assert many.startswith("9 ids differ, first id 0 is") and many.count("here and") == 3 and "id 3" not in many


async def test_teachers_must_be_replicas() -> None:
    tokenizer = build_tokenizer()
    servers = Servers(teacher_info(tokenizer), teacher_info(tokenizer, fingerprint="g"))
    with pytest.raises(StartupError, match="do not serve the same model"):
        await preflight.attach(RunConfig(), Servers(rollout_info()), {None: servers})  # type: ignore[arg-type]


async def test_a_named_teacher_is_attached_with_the_tightest_limits_of_its_own_replicas() -> None:
    tokenizer = build_tokenizer()
    maths = Servers(teacher_info(tokenizer, max_top_k=9), teacher_info(tokenizer, max_model_len=32))
    clients = {None: Servers(teacher_info(tokenizer, fingerprint="other")), "maths": maths}
    _, found = await preflight.attach(RunConfig(), Servers(rollout_info()), clients)  # type: ignore[arg-type]
    limits = [(t.name, t.client, t.info.max_top_k, t.info.max_model_len) for t in found]
    assert limits == [(None, clients[None], 261, 128), ("maths", maths, 9, 32)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fingerprint": "g"},
            r"teacher_client\.named\.maths: the teachers at http://server-0, .* do not serve the same model",
        ),
        ({"protocol": 2}, r"teacher_client\.named\.maths: http://server-1 speaks protocol 2"),
    ],
)
async def test_what_is_wrong_with_a_named_teacher_says_its_name(changes: dict, message: str) -> None:
    tokenizer = build_tokenizer()
    good = teacher_info(tokenizer)
    clients = {None: Servers(good), "maths": Servers(good, teacher_info(tokenizer, **changes)), "code": Servers(good)}
    with pytest.raises(StartupError, match=f"^{message}"):
        await preflight.attach(RunConfig(), Servers(rollout_info()), clients)  # type: ignore[arg-type]


async def test_a_named_teacher_that_does_not_become_ready_says_its_name() -> None:
    class Absent(Servers):
        async def wait_ready(self, timeout_s: float, on_wait: object) -> None:
            raise PeerError(f"http://a:1 is not ready after {timeout_s:.0f} s")

    with pytest.raises(PeerError, match=r"^teacher_client\.named\.maths: http://a:1 is not ready after 600 s"):
        await preflight.attach(RunConfig(), Servers(rollout_info()), {"maths": Absent()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"eos_token_ids": [257]}, {}, "the teacher ends completions with [257]"),
        ({"chat_template_probe": "?"}, {}, "the chat templates differ"),
        (
            {"temperature_support": "one"},
            {"loss": KD_AT_2, "sampling": {"temperature": 2}},
            "loss.kd_temperature = 2.0",
        ),
    ],
)
async def test_every_teacher_is_checked_and_the_one_that_fails_says_its_name(
    changes: dict, config: dict, message: str
) -> None:
    tokenizer = build_tokenizer()
    good, bad = teacher_info(tokenizer), teacher_info(tokenizer, **changes)
    await preflight.check_teachers(RunConfig(**config), tokenizer, EOS, teachers(good, maths=good))
    with pytest.raises(StartupError) as error:
        await preflight.check_teachers(RunConfig(**config), tokenizer, EOS, teachers(good, maths=good, code=bad))
    assert str(error.value).startswith(f"teacher_client.named.code: {message}")
    with pytest.raises(StartupError) as error:
        await preflight.check_teachers(RunConfig(**config), tokenizer, EOS, teachers(bad, maths=good))
    assert str(error.value).startswith(message)


async def test_other_tokens_of_a_named_teacher_are_shown_from_its_own_vocabulary() -> None:
    tokenizer, other = build_tokenizer(), swapped_tokenizer()
    own = attached(Servers(vocabulary=tokenizer.get_vocab()), teacher_info(tokenizer))
    maths = attached(Servers(vocabulary=other.get_vocab()), teacher_info(other), "maths")
    with pytest.raises(StartupError, match=r"^teacher_client\.named\.maths: .* 2 ids differ, first id 97"):
        await preflight.check_teachers(RunConfig(), tokenizer, EOS, Teachers([own, maths]))


async def test_another_protocol_is_refused() -> None:
    servers = Servers(teacher_info(build_tokenizer()))
    with pytest.raises(StartupError, match="http://server-0 speaks protocol 2, this trainer 1"):
        await preflight.attach(RunConfig(), Servers(rollout_info(protocol=2)), {None: servers})  # type: ignore[arg-type]


async def test_a_teacher_that_does_not_tell_its_tokenizer_is_taken_at_its_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    info = teacher_info(build_tokenizer(), tokenizer_fingerprint=None, eos_token_ids=[], chat_template_probe=None)
    with caplog.at_level("INFO"):
        await preflight.check_same_tokens(RunConfig(), build_tokenizer(), EOS, attached(None, info))
    (record,) = caplog.records
    assert "'the-teacher' does not tell its tokenizer" in record.getMessage() and "teacher.model" in record.getMessage()


async def test_a_named_teacher_that_does_not_tell_its_tokenizer_is_not_compared_with_the_folder_of_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    info = teacher_info(build_tokenizer(), tokenizer_fingerprint=None, eos_token_ids=[], chat_template_probe=None)
    with caplog.at_level("INFO"):
        await preflight.check_same_tokens(RunConfig(), build_tokenizer(), EOS, attached(None, info, "maths"))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "teacher_client.named.maths: the teacher 'the-teacher' does not tell its tokenizer"
    )
    assert "teacher.model" not in record.getMessage()


def test_a_folder_tells_what_a_plain_vllm_server_does_not(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    tokens = preflight.teacher_tokens(TeacherConfig(model=tiny_model_folder("llama")))
    tokenizer = build_tokenizer()
    assert tokens is not None and tokens.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert (tokens.eos_token_ids, tokens.vocabulary) == (EOS, tokenizer.get_vocab())
    assert tokens.chat_template_probe == chat_template_probe(tokenizer)
    assert preflight.teacher_tokens(TeacherConfig(model="owner/name")) is None
    assert preflight.teacher_tokens(TeacherConfig()) is None


def test_the_shortest_context_counts_and_must_leave_room() -> None:
    info = teacher_info(build_tokenizer())
    rollouts = [rollout_info(), rollout_info(max_model_len=32)]
    assert preflight.max_model_len(RunConfig(sampling={"max_new_tokens": 31}), rollouts, teachers(info)) == 32
    with pytest.raises(StartupError, match="max_new_tokens = 32 leaves no room"):
        preflight.max_model_len(RunConfig(sampling={"max_new_tokens": 32}), rollouts, teachers(info))


def test_the_shortest_context_of_all_teachers_counts_and_is_named() -> None:
    tokenizer = build_tokenizer()
    both = teachers(teacher_info(tokenizer), code=teacher_info(tokenizer, max_model_len=16))
    assert preflight.max_model_len(RunConfig(sampling={"max_new_tokens": 15}), [rollout_info()], both) == 16
    with pytest.raises(StartupError, match=r"take 16 tokens \(teacher_client\.named\.code: teacher\.max_model_len\)"):
        preflight.max_model_len(RunConfig(sampling={"max_new_tokens": 16}), [rollout_info()], both)
    with pytest.raises(StartupError, match=r"take 9 tokens \(rollout\.max_model_len\)"):
        preflight.max_model_len(RunConfig(), [rollout_info(max_model_len=9)], both)


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
    support = preflight.choose_support(LossConfig(**loss), student, [rollout_info()], teachers(info))
    assert (support.kind, support.size, support.has_tail) == expected
    assert support.vocab_size == student


def test_the_support_fits_into_the_smallest_vocabulary_of_all_teachers() -> None:
    tokenizer = build_tokenizer()
    both = teachers(teacher_info(tokenizer, padded_vocab_size=320), code=teacher_info(tokenizer, padded_vocab_size=100))
    assert preflight.choose_support(LossConfig(top_k=9999), 261, [rollout_info()], both).size == 99


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        ({"single_step_estimator": "full"}, {"padded_vocab_size": 320}, "the student has 261 rows, the teacher 320"),
        ({"top_k": 20}, {"max_top_k": 19}, "needs 20 tokens per position, teacher.max_top_k = 19"),
        ({"support": "student_topk"}, {"scores_support_ids": False}, "scores no tokens of the caller's choice"),
        ({"support": "student_topk"}, {"padded_vocab_size": 260}, "ids up to 261, the teacher scores those below 260"),
    ],
)
def test_a_support_that_one_teacher_does_not_score_is_refused_with_its_name(
    loss: dict, changes: dict, message: str
) -> None:
    good, bad = (teacher_info(build_tokenizer(), **c) for c in ({}, changes))
    preflight.choose_support(LossConfig(**loss), 261, [rollout_info()], teachers(good, code=good))
    with pytest.raises(StartupError, match=rf"^teacher_client\.named\.code: .*{message}"):
        preflight.choose_support(LossConfig(**loss), 261, [rollout_info()], teachers(good, code=bad))
    with pytest.raises(StartupError, match=message):
        preflight.choose_support(LossConfig(**loss), 261, [rollout_info()], teachers(bad, code=good))


@pytest.mark.parametrize(
    ("loss", "student", "limits", "message"),
    [
        ({"single_step_estimator": "full"}, 300, {}, "the student has 300 rows, the teacher 261"),
        ({"support": "student_topk"}, 300, {}, "ids up to 300, the teacher scores those below 261"),
        ({"top_k": 20}, 261, {"max_top_k": 19}, "needs 20 tokens per position, teacher.max_top_k = 19"),
        ({"single_step_estimator": "full"}, 261, {"max_top_k": 19}, "needs 261 tokens per position"),
        ({"top_k": 20}, 261, {"max_top_k": 19, "server": "vllm"}, r"server \(of a plain vLLM server: --max-logprobs\)"),
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
        preflight.choose_support(
            LossConfig(**loss), student, rollouts, teachers(teacher_info(build_tokenizer(), **limits))
        )


@pytest.mark.parametrize(("switch", "fits"), [(None, True), (64, True), (63, False)])
def test_vllm_must_not_give_short_sequences_the_frequencies_of_long_ones(switch: int | None, fits: bool) -> None:
    infos = [rollout_info(max_model_len=10), rollout_info(max_model_len=64)]
    if fits:
        preflight.check_rope_switch(switch, ["http://a", "http://b"], infos)
    else:
        message = r"http://b takes 64 tokens, more than the 63 .* --rollout\.max_model_len 63"
        with pytest.raises(StartupError, match=message):
            preflight.check_rope_switch(switch, ["http://a", "http://b"], infos)


async def test_a_template_of_the_same_source_is_the_same_template_however_a_host_renders_it() -> None:
    tokenizer = build_tokenizer()
    info = teacher_info(tokenizer, chat_template_probe="rendered elsewhere")
    with pytest.raises(StartupError, match="the chat templates differ"):
        await preflight.check_same_tokens(RunConfig(), tokenizer, EOS, attached(Servers(info), info))
    info = info.model_copy(update={"chat_template_hash": chat_template_hash(tokenizer)})
    await preflight.check_same_tokens(RunConfig(), tokenizer, EOS, attached(Servers(info), info))
    info = info.model_copy(update={"chat_template_hash": "other"})
    with pytest.raises(StartupError, match="the chat templates differ"):
        await preflight.check_same_tokens(RunConfig(), tokenizer, EOS, attached(Servers(info), info))


async def test_a_wrong_url_does_not_wait_for_the_model_of_another_server(caplog: pytest.LogCaptureFixture) -> None:
    """Servers are waited for all at once, and the error says whose URL it is."""
    caplog.set_level(logging.INFO)
    rollout = RolloutClient(["http://loading"], transport=httpx.MockTransport(lambda _: httpx.Response(503)))
    teachers = {"maths": TeacherClient(["http://other"], transport=httpx.MockTransport(lambda _: httpx.Response(404)))}
    async with asyncio.timeout(20.0):
        with pytest.raises(
            PeerError, match=r"teacher_client\.named\.maths: http://other answers /ready with 404: it is not"
        ):
            await preflight.attach(RunConfig(), rollout, teachers)
    assert "waiting for http://loading" in caplog.text


async def test_the_probe_of_each_teacher_is_a_few_tokens_of_the_data() -> None:
    class Keeping:
        def __init__(self) -> None:
            self.kept: list[tuple[object, float | None]] = []

        async def keep_probe(self, sequences: object, tolerance: float | None) -> None:
            self.kept.append((sequences, tolerance))

    own, maths = Keeping(), Keeping()
    info = teacher_info(build_tokenizer())
    prompts = [Prompt(row, list(range(10 * row, 10 * row + 8)), "") for row in (1, 2)]
    config = RunConfig(teacher_client={"probe_tolerance": 0.3})
    await preflight.keep_probes(config, Teachers([attached(own, info), attached(maths, info, "maths")]), prompts)
    pieces = [[10, 11, 12, 13], [14, 15, 16, 17], [20, 21, 22, 23], [24, 25, 26, 27]]
    assert own.kept == maths.kept == [([(piece, 1) for piece in pieces], 0.3)]


async def test_a_named_teacher_whose_probe_fails_is_named() -> None:
    class Refused:
        async def keep_probe(self, sequences: object, tolerance: float | None) -> None:
            raise StartupError("its weights are not loaded")

    teachers = Teachers([attached(Refused(), teacher_info(build_tokenizer()), "maths")])
    with pytest.raises(StartupError, match=r"^teacher_client\.named\.maths: its weights are not loaded"):
        await preflight.keep_probes(RunConfig(), teachers, [Prompt(1, [1, 2], "")])


async def test_a_real_teacher_keeps_a_probe_and_scores_after_it(tiny_model_folder) -> None:  # type: ignore[no-untyped-def]
    async with teacher_of(tiny_model_folder("qwen3"), max_model_len=16) as teacher:
        await preflight.keep_probes(RunConfig(), Teachers([teacher]), [Prompt(1, list(range(40, 120)), "")])
        teacher.client.distrust()
        scores = await teacher.score([([40, 41, 42], 1)], top_k=4)
    assert scores.row_offsets.tolist() == [0, 2]
