"""The teacher's engine against a full float64 forward pass."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config import TeacherConfig
from services.errors import DistillServeError, RequestError, StartupError
from services.models import causal_lm
from services.models.causal_lm import OutputHead
from services.models.padding import cut_by_padded_tokens
from services.teacher.jobs import EncodedSequence, ScoreJob
from services.teacher.transformers.engine import TransformersEngine
from services.wire.teacher import TeacherScores
from tests.models import save_model
from tests.scoring import score_alone
from trainer.tiny.pair import build_tokenizer

VOCABULARY = 261  # 256 bytes and five special tokens
ARCHITECTURES = ["qwen3", "llama"]
PER_ROW = ("token_logprobs", "topk_ids", "topk_logprobs", "tail_logprobs", "entropies")


@pytest.fixture(scope="module")
def engines(tiny_model_folder: Callable[[str], str]) -> Callable[..., TransformersEngine]:
    """Engines by architecture and options, each loaded once."""
    loaded: dict[Any, TransformersEngine] = {}

    def engine(architecture: str = "qwen3", **options: Any) -> TransformersEngine:
        key = (architecture, *sorted(options.items()))
        if key not in loaded:
            config = TeacherConfig(model=tiny_model_folder(architecture), device="cpu", **options)
            loaded[key] = TransformersEngine(config)
        return loaded[key]

    return engine


def random_sequences(seed: int, *shapes: tuple[int, int], support: int | None = None) -> list[EncodedSequence]:
    """One sequence per (prompt length, completion length)."""
    rng = np.random.default_rng(seed)
    return [
        EncodedSequence(
            rng.integers(0, VOCABULARY, prompt + rows).tolist(),
            prompt,
            None if support is None else [rng.permutation(VOCABULARY)[:support].tolist() for _ in range(rows)],
        )
        for prompt, rows in shapes
    ]


def exact_logprobs(folder: str, sequence: EncodedSequence, temperature: float) -> torch.Tensor:
    """[rows, V] from the model's own forward pass over this sequence alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([sequence.token_ids])).logits[0]
    assert logits.dtype == torch.float64
    return (logits[sequence.prompt_length - 1 : -1] / temperature).log_softmax(-1)


def rows_of(scores: TeacherScores, index: int) -> slice:
    return slice(int(scores.row_offsets[index]), int(scores.row_offsets[index + 1]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_a_full_float64_forward(
    architecture: str,
    temperature: float,
    engines: Callable[..., TransformersEngine],
    tiny_model_folder: Callable[[str], str],
) -> None:
    sequences = random_sequences(1, (3, 5), (1, 1), (7, 20), (2, 11), support=4)
    scores = score_alone(engines(architecture), sequences, top_k=6, temperature=temperature)
    assert scores.row_offsets.tolist() == [0, 5, 6, 26, 37]
    assert scores.token_ids.tolist() == [i for s in sequences for i in s.token_ids[s.prompt_length :]]
    for index, sequence in enumerate(sequences):
        part = rows_of(scores, index)
        exact = exact_logprobs(tiny_model_folder(architecture), sequence, temperature)
        targets = torch.tensor(sequence.token_ids[sequence.prompt_length :])
        order = exact.argsort(-1, descending=True)
        support = torch.tensor(sequence.support_ids)
        inside = torch.zeros_like(exact, dtype=torch.bool).scatter(1, order[:, :6], True)
        supported = torch.zeros_like(inside).scatter(1, support, True)
        expected = {
            "token_logprobs": exact.gather(1, targets[:, None])[:, 0],
            "topk_ids": order[:, :6],
            "topk_logprobs": exact.gather(1, order[:, :6]),
            "tail_logprobs": exact.masked_fill(inside, -math.inf).logsumexp(-1),
            "entropies": -(exact.exp() * exact).sum(-1),
            "support_logprobs": exact.gather(1, support),
            "support_tail_logprobs": exact.masked_fill(supported, -math.inf).logsumexp(-1),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(scores, name)[part], values.numpy(), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_company_in_a_batch_changes_nothing(architecture: str, engines: Callable[..., TransformersEngine]) -> None:
    sequences = random_sequences(2, (4, 9), (1, 3), (30, 40), (2, 1), (4, 9))
    together = score_alone(engines(architecture), sequences, top_k=5, temperature=1.0)
    backwards = score_alone(engines(architecture), sequences[::-1], top_k=5, temperature=1.0)
    for index, sequence in enumerate(sequences):
        alone = score_alone(engines(architecture), [sequence], top_k=5, temperature=1.0)
        for name in PER_ROW:
            mine = getattr(alone, name)
            for batch, place in ((together, index), (backwards, len(sequences) - 1 - index)):
                np.testing.assert_allclose(getattr(batch, name)[rows_of(batch, place)], mine, rtol=0, atol=1e-5)


def test_forward_passes_at_the_same_time_change_nothing(engines: Callable[..., TransformersEngine]) -> None:
    engine = engines()
    jobs = [ScoreJob(random_sequences(seed, (4, 9), (20, 30)), top_k=5, temperature=1.0) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda job: engine.forward(job.items()), jobs))
    for job in jobs:
        alone, beside = score_alone(engine, job.sequences, top_k=5, temperature=1.0), job.scores(engine.info)
        for name in PER_ROW:
            np.testing.assert_allclose(getattr(beside, name), getattr(alone, name), rtol=0, atol=1e-5, err_msg=name)


def test_small_models_on_a_cpu_run_forward_passes_side_by_side(engines: Callable[..., TransformersEngine]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        assert engines(max_model_len=250).parallel_forwards == 4
        assert engines(tokens_per_forward=1 << 20).parallel_forwards == 1  # a thread has work enough
        assert engines(trust_remote_code=True).parallel_forwards == 1  # who knows what state that code keeps
    finally:
        torch.set_num_threads(threads)


def test_sequences_with_other_rotary_frequencies_share_no_forward_pass(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 16, "long_factor": [8.0] * 16, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, **factors}
    engine = TransformersEngine(TeacherConfig(model=save_model(tmp_path, "llama", rope_parameters=rope), device="cpu"))
    sequences = random_sequences(8, (3, 5), (10, 20), (8, 8), (8, 9))
    together = score_alone(engine, sequences, top_k=5, temperature=1.0)
    for index, sequence in enumerate(sequences):
        alone = score_alone(engine, [sequence], top_k=5, temperature=1.0)
        exact = exact_logprobs(str(tmp_path), sequence, 1.0)
        mine = exact.gather(1, torch.tensor(sequence.token_ids[sequence.prompt_length :])[:, None])[:, 0].numpy()
        for scores, rows in ((together, rows_of(together, index)), (alone, slice(None))):
            np.testing.assert_allclose(scores.token_logprobs[rows], mine, rtol=0, atol=1e-4)
    assert engine.parallel_forwards == 1  # the frequencies lie in buffers of the model


def test_jobs_that_ask_for_different_things_share_a_forward_pass(engines: Callable[..., TransformersEngine]) -> None:
    engine = engines()
    asked = [
        (random_sequences(3, (4, 9), (2, 3)), 5, 1.0),
        (random_sequences(4, (1, 3), support=2), 5, 1.0),
        (random_sequences(5, (30, 4)), 2, 0.5),
    ]
    jobs = [ScoreJob(sequences, top_k=k, temperature=t) for sequences, k, t in asked]
    engine.forward([item for job in jobs for item in job.items()][::-1])
    for job, (sequences, k, t) in zip(jobs, asked, strict=True):
        alone, together = score_alone(engine, sequences, top_k=k, temperature=t), job.scores(engine.info)
        for name, values in alone.columns().items():
            np.testing.assert_allclose(getattr(together, name), values, rtol=0, atol=1e-5, err_msg=name)


def test_sizes_of_forward_and_head_change_nothing(engines: Callable[..., TransformersEngine]) -> None:
    sequences = random_sequences(3, (4, 9), (1, 3), (10, 20), (2, 1), support=3)
    whole = score_alone(engines(), sequences, top_k=5, temperature=0.7)
    in_pieces = score_alone(engines(tokens_per_forward=31, rows_per_head_chunk=4), sequences, top_k=5, temperature=0.7)
    for name in (*PER_ROW, "support_logprobs", "support_tail_logprobs"):
        np.testing.assert_allclose(getattr(whole, name), getattr(in_pieces, name), rtol=0, atol=1e-5, err_msg=name)


def test_scoring_twice_gives_the_same_bits(engines: Callable[..., TransformersEngine]) -> None:
    sequences = random_sequences(4, (4, 9), (1, 3))
    first, second = (score_alone(engines(), sequences, top_k=5, temperature=1.0) for _ in range(2))
    for name in PER_ROW:
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


def test_types_and_shapes_are_those_of_the_contract(engines: Callable[..., TransformersEngine]) -> None:
    scores = score_alone(engines(), random_sequences(5, (2, 3), (1, 1), support=2), top_k=4, temperature=2.0)
    described = {n: (v.dtype.name, v.shape) for n, v in vars(scores).items() if isinstance(v, np.ndarray)}
    assert described == {
        "row_offsets": ("int64", (3,)),
        "token_ids": ("int32", (4,)),
        "token_logprobs": ("float32", (4,)),
        "topk_ids": ("int32", (4, 4)),
        "topk_logprobs": ("float32", (4, 4)),
        "tail_logprobs": ("float32", (4,)),
        "entropies": ("float32", (4,)),
        "support_logprobs": ("float32", (4, 2)),
        "support_tail_logprobs": ("float32", (4,)),
    }
    assert (scores.temperature, scores.top_k, scores.fingerprint) == (2.0, 4, engines().info.fingerprint)


def test_candidates_and_tail_add_up_to_one(engines: Callable[..., TransformersEngine]) -> None:
    scores = score_alone(engines(), random_sequences(6, (2, 30)), top_k=8, temperature=1.0)
    mass = np.exp(scores.topk_logprobs.astype(np.float64)).sum(-1) + np.exp(scores.tail_logprobs.astype(np.float64))
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    assert (np.diff(scores.topk_logprobs, axis=1) <= 0).all()


def test_the_whole_vocabulary_leaves_no_tail(engines: Callable[..., TransformersEngine]) -> None:
    sequences = random_sequences(7, (2, 6))
    scores = score_alone(engines(), sequences, top_k=VOCABULARY, temperature=1.0)
    assert (scores.tail_logprobs == -np.inf).all()
    assert (np.sort(scores.topk_ids, axis=1) == np.arange(VOCABULARY)).all()
    one_short = score_alone(engines(), sequences, top_k=VOCABULARY - 1, temperature=1.0)
    np.testing.assert_allclose(one_short.tail_logprobs, scores.topk_logprobs[:, -1], atol=1e-6)


def test_support_of_the_sampled_token_is_its_logprob(engines: Callable[..., TransformersEngine]) -> None:
    (sequence,) = random_sequences(8, (2, 4))
    support = [[token, token, 0] for token in sequence.token_ids[2:]]
    scores = score_alone(engines(), [EncodedSequence(sequence.token_ids, 2, support)], top_k=1, temperature=1.0)
    assert scores.support_logprobs is not None
    assert (scores.support_logprobs[:, 0] == scores.token_logprobs).all()
    assert (scores.support_logprobs[:, 0] == scores.support_logprobs[:, 1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.25, 30.0, True), (2.0, None, True)])
def test_logits_of_a_half_precision_head_are_not_rounded(
    dtype: torch.dtype, scale: float, softcap: float | None, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "_WEIGHT_BLOCK_ROWS", 7)  # 50 rows: seven blocks and a rest
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 64, generator=generator).to(dtype)
    weight = torch.randn(50, 64, generator=generator).to(dtype)
    bias = torch.randn(50, generator=generator).to(dtype) if biased else None
    exact = hidden.double() @ weight.double().t()
    exact = (exact if bias is None else exact + bias.double()) * scale
    exact = exact if softcap is None else torch.tanh(exact / softcap) * softcap
    logits = OutputHead(weight, bias, scale, softcap).float32_logits(hidden)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), exact.numpy(), rtol=0, atol=1e-4)


def test_a_bfloat16_teacher_tells_candidates_apart(engines: Callable[..., TransformersEngine]) -> None:
    scores = score_alone(engines(dtype="bfloat16"), random_sequences(10, (4, 40)), top_k=32, temperature=1.0)
    equal_neighbours = (np.diff(scores.topk_logprobs, axis=1) == 0).mean()
    assert equal_neighbours < 0.01  # rounded to bfloat16, most neighbours are equal


@pytest.mark.parametrize(
    ("sequences", "field"),
    [
        ([EncodedSequence([1, 2], 1), EncodedSequence([1, 2], 2)], "sequences.1.prompt_length"),
        ([EncodedSequence([1, 2], 0)], "sequences.0.prompt_length"),
        ([], "sequences"),
    ],
)
def test_what_cannot_be_scored_makes_no_job(sequences: list[EncodedSequence], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        ScoreJob(sequences, top_k=1, temperature=1.0)
    assert (caught.value.status, caught.value.field) == (422, field)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta:what"])
def test_a_device_that_is_not_there_is_named(device: str, tiny_model_folder: Callable[[str], str]) -> None:
    with pytest.raises(StartupError, match=f"teacher.device = '{device}' cannot be used"):
        TransformersEngine(TeacherConfig(model=tiny_model_folder("qwen3"), device=device))


def test_weights_that_are_not_finite_are_refused(tiny_model_folder: Callable[[str], str]) -> None:
    broken = TransformersEngine(TeacherConfig(model=tiny_model_folder("qwen3"), device="cpu"))
    with torch.no_grad():
        broken._model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(DistillServeError, match="not finite"):
        score_alone(broken, random_sequences(9, (1, 2)), top_k=2, temperature=1.0)


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([3, 9, 3, 8], 18, [[1, 3], [0, 2]]),
        ([3, 9, 3, 8], 1000, [[1, 3, 0, 2]]),
        ([3, 9, 3, 8], 1, [[1], [3], [0], [2]]),
        ([50, 2, 2, 2], 6, [[0], [1, 2, 3]]),
    ],
)
def test_groups_are_sorted_by_length_and_bounded(lengths: list[int], tokens: int, expected: list[list[int]]) -> None:
    assert cut_by_padded_tokens(lengths, tokens) == expected


@pytest.mark.parametrize(
    ("most_padding", "expected"),
    [
        (0, [[1], [3], [0, 2]]),
        (1, [[1, 3], [0, 2]]),
        (6, [[1, 3], [0, 2]]),
        (7, [[1, 3, 0], [2]]),
        (13, [[1, 3, 0, 2]]),
    ],
)
def test_groups_with_much_padding_are_cut(most_padding: int, expected: list[list[int]]) -> None:
    assert cut_by_padded_tokens([3, 9, 3, 8], 1000, most_padding) == expected


def test_lengths_on_both_sides_of_a_boundary_are_never_in_one_group() -> None:
    assert cut_by_padded_tokens([5, 9, 6, 4, 5], 1000, boundary=5) == [[1, 2], [0, 4, 3]]
    assert cut_by_padded_tokens([5, 9, 6], 1000, boundary=4) == cut_by_padded_tokens([5, 9, 6], 1000, boundary=9)
    assert cut_by_padded_tokens([5, 9, 6], 12, boundary=5) == [[1], [2], [0]]


# ------------------------------------------------------------------------------------------ description


def test_info_describes_model_tokenizer_and_limits(
    engines: Callable[..., TransformersEngine], tiny_model_folder: Callable[[str], str]
) -> None:
    info = engines(max_model_len=100, max_top_k=7).info
    assert (info.model, info.dtype, info.protocol) == (tiny_model_folder("qwen3"), "float32", 1)
    assert (info.vocab_size, info.padded_vocab_size, info.max_top_k) == (VOCABULARY, VOCABULARY, 7)
    assert info.eos_token_ids == [256]
    assert info.chat_template_probe == "<|user|>2+2=<|assistant|>"
    assert info.max_model_len == 100
    assert engines().info.max_model_len == engines(max_model_len=9999).info.max_model_len == 256
    assert engines(max_top_k=9999).info.max_top_k == VOCABULARY


def test_fingerprints_tell_models_and_dtypes_apart_but_not_folders(
    engines: Callable[..., TransformersEngine], tiny_model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in Path(tiny_model_folder("qwen3")).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    same = TransformersEngine(TeacherConfig(model=str(copy), device="cpu")).info
    assert same.fingerprint == engines().info.fingerprint
    assert same.model != engines().info.model
    other_weights = save_model(tmp_path / "other", "qwen3", seed=1)
    fingerprints = {
        TransformersEngine(TeacherConfig(model=other_weights, device="cpu")).info.fingerprint,
        engines().info.fingerprint,
        engines("llama").info.fingerprint,
        engines(dtype="bfloat16").info.fingerprint,
    }
    assert len(fingerprints) == 4
    assert engines("llama").info.tokenizer_fingerprint == engines().info.tokenizer_fingerprint


def test_a_chat_template_that_fails_is_named() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[1]['content'] + 1 }}"
    with pytest.raises(StartupError, match=r"refuses a user's message: .*has no element 1"):
        causal_lm.chat_template_probe(tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ({}, "no config.json"), ({"config.json": "{}"}, "cannot load the tokenizer")],
)
def test_a_folder_without_a_model_is_named(content: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(StartupError, match=message) as caught:
        TransformersEngine(TeacherConfig(model=str(folder), device="cpu"))
    assert str(folder) in str(caught.value)


def test_weights_that_are_missing_are_named(tiny_model_folder: Callable[[str], str], tmp_path: Path) -> None:
    for file in Path(tiny_model_folder("llama")).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(StartupError, match=r"cannot load the model.*safetensors"):
        TransformersEngine(TeacherConfig(model=str(tmp_path), device="cpu"))
