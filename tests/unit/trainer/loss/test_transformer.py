"""The whole path, model, fused head and loss, on a transformer small enough to enumerate everything it can say."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from services.config import LossConfig
from services.models.padding import pad_sequences
from tests.unit.trainer.policies import DECOMPOSED, F64, PURE_PG, assert_close, exact
from trainer.loss import LossInputs, minillm_loss
from trainer.loss.head import HeadOutput
from trainer.student import Student

VOCAB, END, LONGEST, PROMPT = 4, 3, 3, [1, 2]
COMPLETIONS = [
    list(c)
    for length in range(1, LONGEST + 1)
    for c in itertools.product(range(VOCAB), repeat=length)
    if END not in c[:-1] and (c[-1] == END or length == LONGEST)
]


def small_transformer(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(  # of the small architectures, one whose norms stay in float64
        vocab_size=VOCAB,
        n_embd=8,
        n_inner=16,
        n_layer=1,
        n_head=2,
        n_positions=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=END,
        initializer_range=0.5,
    )
    return GPT2LMHeadModel(config).to(F64)


def head_output(model: PreTrainedModel, support_ids: Tensor) -> HeadOutput:
    """All completions as one padded batch, through the trainer's own path."""
    batch = pad_sequences([[*PROMPT, *c] for c in COMPLETIONS], [len(PROMPT)] * len(COMPLETIONS))
    return Student(model)(batch.input_ids, batch.positions, batch.token_ids, support_ids)


def exact_reverse_kl(student: PreTrainedModel, teacher: PreTrainedModel) -> Tensor:
    """Over all completions, one at a time, through the models' own heads."""
    total = torch.zeros((), dtype=F64)
    for completion in COMPLETIONS:
        ids = torch.tensor([[*PROMPT, *completion]])
        q, p = (
            model(input_ids=ids).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None]).sum()
            for model in (student, teacher)
        )  # fmt: skip
        total = total + q.exp() * (q - p.detach())
    return total


def expected_loss(student: PreTrainedModel, teacher: PreTrainedModel, config: LossConfig, top_k: int) -> Tensor:
    """The loss in expectation over the student's completions, each weighed by its probability."""
    num_positions = sum(map(len, COMPLETIONS))
    everything = torch.arange(VOCAB).expand(num_positions, VOCAB)
    with torch.no_grad():
        support_ids = head_output(teacher, everything).support_logprobs.topk(top_k).indices
        teacher_output = head_output(teacher, support_ids)
    output = head_output(student, support_ids)
    total = torch.zeros((), dtype=F64)
    start = 0
    for completion in COMPLETIONS:
        rows = slice(start, start + len(completion))
        start = rows.stop
        inputs = LossInputs(
            student_token_logprobs=output.token_logprobs[rows],
            student_support_logprobs=output.support_logprobs[rows],
            student_tail_logprob=output.tail_logprob[rows],
            rollout_logprobs=output.token_logprobs[rows].detach(),
            teacher_token_logprobs=teacher_output.token_logprobs[rows],
            teacher_support_logprobs=teacher_output.support_logprobs[rows],
            teacher_tail_logprob=teacher_output.tail_logprob[rows],
            support_ids=support_ids[rows],
            token_ids=torch.tensor(completion),
            loss_mask=torch.ones(len(completion), dtype=torch.bool),
            cu_seqlens=torch.tensor([0, len(completion)]),
        )
        probability = output.token_logprobs[rows].sum().exp().detach()
        total = total + probability * minillm_loss(inputs, config)[0]
    return total


def flat_gradient(value: Tensor, model: PreTrainedModel) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


@pytest.mark.parametrize(("options", "top_k"), [(PURE_PG, 1), (DECOMPOSED, 1), (DECOMPOSED, 2), (DECOMPOSED, VOCAB)])
def test_expected_gradient_of_a_transformer_is_that_of_the_exact_reverse_kl(options: dict, top_k: int) -> None:
    student, teacher = small_transformer(0), small_transformer(1)
    wanted = flat_gradient(exact_reverse_kl(student, teacher), student)
    got = flat_gradient(expected_loss(student, teacher, exact(**options), top_k), student)
    assert wanted.abs().max() > 0.1
    assert_close(got, wanted, 1e-9)


def test_truncated_has_another_gradient() -> None:
    student, teacher = small_transformer(0), small_transformer(1)
    wanted = flat_gradient(exact_reverse_kl(student, teacher), student)
    config = exact(**DECOMPOSED, single_step_estimator="truncated")
    assert (flat_gradient(expected_loss(student, teacher, config, 1), student) - wanted).abs().max() > 1e-3


def test_expected_gradient_equals_finite_differences_of_the_exact_reverse_kl() -> None:
    student, teacher = small_transformer(0), small_transformer(1)
    gradient = flat_gradient(expected_loss(student, teacher, exact(**DECOMPOSED), 1), student)
    generator = torch.Generator().manual_seed(2)
    start = torch.nn.utils.parameters_to_vector(student.parameters()).detach()
    for _ in range(3):
        direction = torch.randn(len(start), generator=generator, dtype=F64)
        values = []
        for step in (1e-5, -1e-5):
            torch.nn.utils.vector_to_parameters(start + step * direction, student.parameters())
            values.append(float(exact_reverse_kl(student, teacher).detach()))
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float(gradient @ direction), rel=1e-6)


def test_all_completions_are_there() -> None:
    student = small_transformer(0)
    none = torch.zeros(sum(map(len, COMPLETIONS)), 1, dtype=torch.int64)
    per_token = head_output(student, none).token_logprobs.detach()
    per_completion = [part.sum() for part in per_token.split([len(c) for c in COMPLETIONS])]
    assert_close(torch.stack(per_completion).exp().sum(), 1.0, 1e-12)
