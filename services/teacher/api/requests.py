"""What a score request may ask, checked in full before anything is allocated; text becomes token ids here."""

from transformers import PreTrainedTokenizerBase

from services.config import TeacherConfig
from services.errors import RequestError
from services.models.text import (
    TextError,
    TooLongError,
    check_can_fit,
    check_is_text,
    cut_behind_end,
    cut_behind_turn,
    encode_completion,
    encode_prompt,
    render_messages,
)
from services.teacher.jobs import EncodedSequence
from services.wire.teacher import BYTES_PER_CANDIDATE, TeacherInfo, TeacherRequest, TeacherSequence


def encode_request(
    request: TeacherRequest, info: TeacherInfo, config: TeacherConfig, tokenizer: PreTrainedTokenizerBase
) -> list[EncodedSequence]:
    """Token ids of every sequence, within every limit.

    Raises:
        RequestError: names the field, its value and the limit.
    """
    if len(request.sequences) > config.max_sequences_per_request:
        raise _refusal("sequences", f"{len(request.sequences)} sequences", config.max_sequences_per_request, status=413)
    if request.top_k > info.max_top_k:
        raise _refusal("top_k", f"top_k = {request.top_k}", info.max_top_k)
    _check_engine(request, info)
    encoded = _encode_all(request, info, config, tokenizer)
    widths = {None if s.support_ids is None else len((s.support_ids or [[]])[0]) for s in encoded}
    if len(widths) > 1:
        raise RequestError(
            422,
            "Uneven support",
            "support_ids must be given for all sequences or none, equally wide",
            field="sequences",
        )
    for index, sequence in enumerate(encoded):
        _check_sequence(index, sequence, info)
    width = request.top_k + (next(iter(widths)) or 0)
    answer_bytes = sum(s.num_rows for s in encoded) * width * BYTES_PER_CANDIDATE
    if answer_bytes > config.max_answer_mib << 20:
        raise RequestError(
            413,
            "Answer too large",
            f"rows x candidates come to {answer_bytes >> 20} MiB, above max_answer_mib = {config.max_answer_mib}; "
            "lower top_k or send fewer sequences",
            field="top_k",
        )
    return encoded


def _encode_all(
    request: TeacherRequest, info: TeacherInfo, config: TeacherConfig, tokenizer: PreTrainedTokenizerBase
) -> list[EncodedSequence]:
    encoded: list[EncodedSequence] = []
    total = 0
    for index, sequence in enumerate(request.sequences):
        encoded.append(_encode(index, sequence, info, tokenizer))
        total += len(encoded[-1].token_ids)
        if total > config.max_tokens_per_request:  # before more text is tokenized
            raise _refusal("sequences", f"at least {total} tokens", config.max_tokens_per_request, status=413)
    return encoded


def _check_engine(request: TeacherRequest, info: TeacherInfo) -> None:
    """Refuse what the engine would ignore or cannot do."""
    if info.temperature_support == "one" and request.temperature != 1.0:
        detail = f"temperature = {request.temperature}, but this engine computes at temperature 1 only"
        raise _unsupported("temperature", detail, info)
    if not info.scores_support_ids:
        for index, sequence in enumerate(request.sequences):
            if sequence.support_ids is not None:
                field = f"sequences.{index}.support_ids"
                raise _unsupported(
                    field, f"{field} is given, but this engine scores no tokens of the caller's choice", info
                )


def _unsupported(field: str, detail: str, info: TeacherInfo) -> RequestError:
    title, fix = "Not supported by the engine", "ask a teacher with teacher.engine = transformers"
    return RequestError(422, title, f"{detail} (teacher.engine = {info.engine}); {fix}", field=field)


def _encode(
    index: int, sequence: TeacherSequence, info: TeacherInfo, tokenizer: PreTrainedTokenizerBase
) -> EncodedSequence:
    field = f"sequences.{index}"
    forms = {
        "token_ids": sequence.token_ids is not None,
        "prompt and completion": sequence.prompt is not None or sequence.completion is not None,
        "messages": sequence.messages is not None,
    }
    given = [name for name, present in forms.items() if present]
    if len(given) != 1:
        raise RequestError(
            422,
            "One form of input",
            f"{field} gives {', '.join(given) or 'nothing'}; give exactly one of token_ids, prompt + completion, messages",
            field=field,
        )
    if sequence.token_ids is not None:
        if sequence.prompt_length is None:
            raise RequestError(422, "Missing field", f"{field}.prompt_length is required with token_ids", field=field)
        return EncodedSequence(sequence.token_ids, sequence.prompt_length, sequence.support_ids)
    if sequence.messages is not None:
        return _encode_messages(field, sequence, info, tokenizer)
    if sequence.prompt is None or sequence.completion is None:
        raise RequestError(422, "Missing field", f"{field} needs both prompt and completion", field=field)
    texts = sequence.prompt, sequence.completion
    names = f"{field}.prompt", f"{field}.completion"
    return _encode_texts(names, texts, sequence, info, tokenizer, special=True)


def _encode_messages(
    field: str, sequence: TeacherSequence, info: TeacherInfo, tokenizer: PreTrainedTokenizerBase
) -> EncodedSequence:
    if tokenizer.chat_template is None:
        raise RequestError(422, "No chat template", "this teacher's tokenizer has no chat template", field=field)
    messages = [message.for_template() for message in sequence.messages or []]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RequestError(
            422, "Nothing to score", f"{field}.messages must end with an assistant message after a prompt", field=field
        )
    name = f"{field}.messages"
    try:
        before = render_messages(name, messages[:-1], tokenizer, tools=sequence.tools, add_generation_prompt=True)
        whole = render_messages(name, messages, tokenizer, tools=sequence.tools)
    except TextError as error:
        raise RequestError(422, "Chat template", str(error), field=name) from error
    if not whole.startswith(before):
        raise RequestError(
            422,
            "Chat template",
            f"{field}: the template rewrites earlier messages; send token_ids instead",
            field=field,
        )
    turn = cut_behind_turn(tokenizer, whole[len(before) :])
    return _encode_texts((name, name), (before, turn), sequence, info, tokenizer, special=False)


def _encode_texts(
    fields: tuple[str, str],
    texts: tuple[str, str],
    sequence: TeacherSequence,
    info: TeacherInfo,
    tokenizer: PreTrainedTokenizerBase,
    *,
    special: bool,
) -> EncodedSequence:
    """Prompt and completion, whose names are `fields`, as token ids; nothing behind an end token is scored."""
    for field, text in zip(fields, texts, strict=True):
        _check_text(field, text, info, tokenizer)
    prompt, completion = texts
    try:
        prompt_ids = encode_prompt(tokenizer, prompt, special=special)
        scored = encode_completion(tokenizer, prompt, prompt_ids, completion, special=special)
    except TextError as error:
        raise RequestError(422, "Invalid text", f"{fields[1]}: {error}; send token_ids", field=fields[1]) from error
    scored = cut_behind_end(scored, info.eos_token_ids)
    return EncodedSequence([*prompt_ids, *scored], len(prompt_ids), sequence.support_ids)


def _check_text(field: str, text: str, info: TeacherInfo, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        check_is_text(field, text)
        check_can_fit(field, text, info.max_model_len, tokenizer)
    except TooLongError as error:
        raise RequestError(422, "Over a limit", str(error), field=field) from error
    except TextError as error:
        raise RequestError(422, "Invalid text", str(error), field=field) from error


def _check_sequence(index: int, sequence: EncodedSequence, info: TeacherInfo) -> None:
    field = f"sequences.{index}"
    length = len(sequence.token_ids)
    if not 1 <= sequence.prompt_length < length:
        raise RequestError(
            422,
            "Nothing to score",
            f"{field}.prompt_length = {sequence.prompt_length} must be between 1 and the {length} tokens less one",
            field=f"{field}.prompt_length",
        )
    if length > info.max_model_len:
        raise _refusal(f"{field}.token_ids", f"{length} tokens", info.max_model_len)
    _check_ids(f"{field}.token_ids", sequence.token_ids, info.padded_vocab_size)
    if sequence.support_ids is None:
        return
    if len(sequence.support_ids) != sequence.num_rows or len({len(row) for row in sequence.support_ids}) != 1:
        raise RequestError(
            422,
            "Wrong shape",
            f"{field}.support_ids must have {sequence.num_rows} rows of equal length, one per completion token",
            field=f"{field}.support_ids",
        )
    for row in sequence.support_ids:
        _check_ids(f"{field}.support_ids", row, info.padded_vocab_size)


def _check_ids(field: str, ids: list[int], vocab: int) -> None:
    if ids and max(ids) >= vocab:
        raise RequestError(
            422, "Token id out of range", f"{field} holds id {max(ids)}, the vocabulary has {vocab}", field=field
        )


def _refusal(field: str, got: str, limit: int, *, status: int = 422) -> RequestError:
    return RequestError(status, "Over a limit", f"{got} in {field}, at most {limit} are served", field=field)
