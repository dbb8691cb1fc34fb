"""What the student can take of a text: so many tokens, of so many kinds. Known before a file is read and weights are loaded."""

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from services.config import RunConfig
from services.errors import DataError
from services.models.causal_lm import load_model_config
from services.models.text import TooLongError, check_can_fit

# Tokenising takes about 1.5 s and 0.2 GiB a million characters. A long novel has three.
MAX_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class TextLimits:
    """None: not known."""

    max_tokens: int | None = None
    """Longest sequence that the student and its server take."""
    vocab_size: int | None = None
    """Rows of the student's embedding."""

    @classmethod
    def of(cls, config: RunConfig) -> "TextLimits":
        """The limits that the student's configuration on disk and the run's options tell.

        Raises:
            StartupError: the student has no configuration.
        """
        student = config.student
        model = load_model_config(student.model or "", trust_remote_code=student.trust_remote_code).get_text_config()
        limits = cls(getattr(model, "max_position_embeddings", None), getattr(model, "vocab_size", None))
        return limits.at_most(config.rollout.max_model_len)

    def at_most(self, max_tokens: int | None) -> "TextLimits":
        """These limits, with a lower one of tokens if `max_tokens` is lower."""
        known = [limit for limit in (self.max_tokens, max_tokens) if limit is not None]
        return replace(self, max_tokens=min(known, default=None))

    def check_length(self, name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse, before it is tokenised, a text whose characters cannot be few enough tokens.

        Raises:
            TooLongError: names `name`, its characters and how many there may be.
        """
        if self.max_tokens is not None:
            check_can_fit(name, text, self.max_tokens, tokenizer)
        check_characters(name, text)

    def check_ids(self, name: str, token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse ids that the student has no embedding for.

        Raises:
            DataError: names `name`, the largest id, its token and the size of the embedding.
        """
        largest = max(token_ids, default=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{name} holds {token!r}, token id {largest}, beyond the {self.vocab_size} rows of the student's embedding; "
                "leave that token out or take a student that has it"
            )


NO_LIMITS = TextLimits()


def check_characters(name: str, text: str) -> None:
    """Refuse a text that takes gigabytes to tokenise.

    Raises:
        TooLongError: names `name` and its characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLongError(f"{name} has {len(text)} characters, more than {MAX_CHARACTERS}; cut it into rows")
