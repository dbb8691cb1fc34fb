"""`distillserve score`: a file of prompts and completions in, shards of the teacher's logprobs out."""

from services.score.shards import read_shards

__all__ = ["read_shards"]
