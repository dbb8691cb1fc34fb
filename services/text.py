"""Text before it becomes token ids: what no tokenizer takes is refused, messages go through the chat template.

Shared by the trainer, which reads prompts from a file, and the teacher, which gets them in requests.
"""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


class TextError(ValueError):
    """What cannot become token ids, with its name and the reason; callers make it their own kind of error."""


def check_is_text(name: str, text: str) -> None:
    """Refuse half a surrogate pair: JSON can spell it, no tokenizer takes it.

    Raises:
        TextError: names `name` and the position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{name} holds half a surrogate pair at {error.start}, which is no text") from error


def render_messages(
    name: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, /, **template_kwargs: Any
) -> str:
    """The text that the tokenizer's chat template, which must be there, makes of `messages`.

    Raises:
        TextError: names `name` and, in the template's words, why it refuses them.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    except TemplateError as error:  # many templates refuse roles or their order this way
        raise TextError(f"the chat template refuses {name}: {error}") from error
    except Exception as error:  # a template is a program that comes with the model: it may fail in any way
        raise TextError(f"the chat template refuses {name}: {type(error).__name__}: {error}") from error
