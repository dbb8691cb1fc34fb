"""The teacher's numbers against a float64 forward of the same model, sequence by sequence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.config import TeacherConfig
from services.errors import DistillServeError
from services.teacher.engine_transformers import EncodedSequence, TransformersEngine, log_mass_outside, top_k_ids
from tests.models import save_model

VOCAB = 261
ARRAYS = ("token_logprobs", "topk_logprobs", "tail_logprobs", "entropies")


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("teacher"), request.param)


def engine(folder: str, **options: object) -> TransformersEngine:
    return TransformersEngine(TeacherConfig(model=folder, **options))  # type: ignore[arg-type]


def sequences(seed: int = 0, count: int = 9) -> list[EncodedSequence]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(random.integers(2, 40))
        ids = random.integers(0, VOCAB, length).tolist()
        found.append(EncodedSequence(ids, int(random.integers(1, length))))
    return found


@torch.no_grad()
def reference(folder: str, sequence: EncodedSequence, temperature: float) -> torch.Tensor:
    """[rows, V] logprobs in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits = model(torch.tensor([sequence.token_ids])).logits[0] / temperature
    return logits.log_softmax(-1)[sequence.prompt_length - 1 : -1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_scores_are_those_of_a_float64_forward(folder: str, temperature: float) -> None:
    batch = sequences()
    scores = engine(folder, tokens_per_forward=64, rows_per_head_chunk=7).score(batch, top_k=5, temperature=temperature)
    for index, sequence in enumerate(batch):
        rows = slice(scores.row_offsets[index], scores.row_offsets[index + 1])
        exact = reference(folder, sequence, temperature)
        targets = torch.tensor(sequence.token_ids[sequence.prompt_length :])
        best, ids = exact.topk(5)
        rest = exact.scatter(1, ids, -torch.inf).logsumexp(-1)
        expected = {
            "token_logprobs": exact.gather(1, targets[:, None])[:, 0],
            "topk_logprobs": best,
            "tail_logprobs": rest,
            "entropies": -(exact.exp() * exact).sum(-1),
        }
        assert (scores.topk_ids[rows] == ids.numpy()).all()
        for name, value in expected.items():
            assert np.abs(getattr(scores, name)[rows] - value.numpy()).max() <= 1e-4, name


def test_what_else_is_in_the_batch_changes_nothing(folder: str) -> None:
    batch = sequences(count=12)
    together = engine(folder, tokens_per_forward=4096).score(batch, top_k=4, temperature=1.0)
    alone = engine(folder, tokens_per_forward=1, rows_per_head_chunk=1).score(batch, top_k=4, temperature=1.0)
    assert (together.row_offsets == alone.row_offsets).all() and (together.topk_ids == alone.topk_ids).all()
    for name in ARRAYS:
        assert np.abs(getattr(together, name) - getattr(alone, name)).max() <= 1e-5, name


def test_candidates_that_cover_the_vocabulary_leave_no_tail(folder: str) -> None:
    scores = engine(folder).score(sequences(count=2), top_k=VOCAB, temperature=1.0)
    assert np.isneginf(scores.tail_logprobs).all()
    assert np.exp(scores.topk_logprobs.astype(np.float64)).sum(1) == pytest.approx(1.0, abs=1e-5)
    assert (np.sort(scores.topk_ids, axis=1) == np.arange(VOCAB)).all()


def test_requested_ids_are_scored_beside_the_candidates(folder: str) -> None:
    plain = EncodedSequence([5, 6, 7, 8], 2)
    asked = EncodedSequence([5, 6, 7, 8], 2, support_ids=[[7, 100, 3], [0, 1, 2]])
    scores = engine(folder).score([asked], top_k=2, temperature=1.0)
    exact = reference(folder, plain, 1.0)
    ids = torch.tensor(asked.support_ids)
    assert scores.support_logprobs == pytest.approx(exact.gather(1, ids).numpy(), abs=1e-4)
    outside = 1 - exact.gather(1, ids).exp().sum(-1)
    assert np.exp(scores.support_tail_logprobs) == pytest.approx(outside.numpy(), abs=1e-4)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0, 2.0], [5.0, 1.0, 2.0, 3.0, 4.0]])
    assert top_k_ids(logits, 2).tolist() == [[1, 2], [0, 1], [0, 4]]
    assert top_k_ids(logits, 5).tolist() == [[1, 2, 3, 4, 0], [0, 1, 2, 3, 4], [0, 4, 3, 2, 1]]


def test_a_small_tail_keeps_its_digits() -> None:
    logprobs = torch.tensor([[0.0, -30.0, -31.0]]).log_softmax(-1)
    tail = float(log_mass_outside(logprobs, torch.tensor([[0]])))
    assert tail == pytest.approx(-30 + np.log1p(np.exp(-1)), abs=1e-5)  # 1 - p would be 0 in float32


def test_logits_that_are_not_finite_are_an_error(folder: str) -> None:
    broken = engine(folder)
    with torch.no_grad():
        broken._model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(DistillServeError, match="not finite"):
        broken.score(sequences(count=1), top_k=2, temperature=1.0)


def test_the_description_is_of_the_model(folder: str, tmp_path: Path) -> None:
    info = engine(folder, max_model_len=100, max_top_k=50).info
    assert (info.vocab_size, info.padded_vocab_size, info.max_model_len, info.max_top_k) == (VOCAB, VOCAB, 100, 50)
    assert info.eos_token_ids == [256]
    assert engine(folder).info.fingerprint == info.fingerprint
    assert engine(save_model(tmp_path, "qwen3", seed=1)).info.fingerprint != info.fingerprint
