"""The output head under the name by which others import it; it is in trainer/loss/head.py."""

from trainer.loss.head import HeadOutput, support_logprobs

__all__ = ["HeadOutput", "support_logprobs"]
