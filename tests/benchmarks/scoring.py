"""What the teacher's benchmarks share: two models, sequences to score, and the loop that somebody would write by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from services.models.causal_lm import OutputHead, load_causal_lm, output_head
from services.teacher.transformers.head import ScoringHead
from tests.integration.processes import KEY
from trainer.tiny.pair import build_tokenizer

TOP_K = 32
SHORTEST, LONGEST = 16, 512
HEADERS = {"Authorization": f"Bearer {KEY}"}

Sequence = tuple[list[int], int]
"""Token ids of prompt and completion, length of the prompt."""
Head = Callable[[torch.Tensor, torch.Tensor], object]
"""Of the hidden states [R, H] and the tokens that follow [R]."""


@dataclass(frozen=True)
class Model:
    """A Qwen3 with random weights; weights do not change what a forward pass costs."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int

    def save(self, folder: Path) -> str:
        """Write it with the byte-level tokenizer of the tiny pair; returns the folder."""
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        shape = Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=LONGEST + 1,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        Qwen3ForCausalLM(shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)


MODELS = {
    "small": Model(261, 160, 2, 5, 32, 640),  # the tiny pair's teacher, 0.8 M parameters
    "large": Model(151_936, 512, 8, 8, 64, 1536),  # 105 M parameters, Qwen's vocabulary
}


def random_sequences(count: int, *, seed: int = 0, shortest: int = SHORTEST, longest: int = LONGEST) -> list[Sequence]:
    """Of uniform lengths, a quarter of each the prompt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count).tolist()
    return [(rng.integers(0, 256, length).tolist(), length // 4) for length in lengths]


def num_rows(sequences: list[Sequence]) -> int:
    """Tokens that are scored."""
    return sum(len(ids) - prompt for ids, prompt in sequences)


def load(folder: str) -> tuple[PreTrainedModel, OutputHead]:
    model = load_causal_lm(folder, dtype="float32").eval()
    return model, output_head(model)


@torch.inference_mode()
def score_offline(model: PreTrainedModel, head: Head, sequences: list[Sequence], tokens_per_forward: int) -> None:
    """Everything in one process: sort by length, pad, run the body, project the completions' positions."""
    rest = sorted(sequences, key=lambda s: len(s[0]), reverse=True)
    while rest:
        longest = len(rest[0][0])
        size = max(1, tokens_per_forward // longest)
        batch, rest = rest[:size], rest[size:]
        ids, mask = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), longest)
        wanted = torch.zeros(len(batch), longest, dtype=torch.bool)
        for row, (tokens, prompt) in enumerate(batch):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
            wanted[row, prompt - 1 : len(tokens) - 1] = True
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[wanted]
        head(hidden, torch.cat([torch.tensor(tokens[prompt:]) for tokens, prompt in batch]))


ROWS_PER_CHUNK = 512


def our_head(output: OutputHead) -> Head:
    """The work of the server's head, by the server's code."""
    return partial(ScoringHead(output, ROWS_PER_CHUNK).score, support=None, top_k=TOP_K, temperature=1.0)


def plain_head(output: OutputHead) -> Head:
    """The same results, as torch spells them."""

    def head(hidden: torch.Tensor, targets: torch.Tensor) -> list[list[np.ndarray]]:
        answer = []
        for start in range(0, len(hidden), ROWS_PER_CHUNK):
            part = slice(start, start + ROWS_PER_CHUNK)
            logprobs = (hidden[part] @ output.weight.t()).log_softmax(-1)
            top = logprobs.topk(TOP_K, dim=-1)
            token = logprobs.gather(1, targets[part].unsqueeze(1))
            tail = logprobs.scatter(1, top.indices, -torch.inf).logsumexp(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            answer.append([values.numpy() for values in (top.values, top.indices, token, tail, entropy)])
        return answer

    return head
