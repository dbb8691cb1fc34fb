"""What the options `cuda_devices` say: lists as CUDA_VISIBLE_DEVICES takes them, read without a driver.

"0,1" are numbers of GPUs, "GPU-8932f937" is a UUID or the beginning of one, "MIG-..." a part of a GPU; "", "-1" and
Slurm's "NoDevFiles" are no GPU at all. None is an option that is not set: the first GPU that the process sees.
"""

import re

_DEVICE = re.compile(r"\d+|(GPU|MIG)-[0-9a-zA-Z/-]+", re.ASCII)
_NONE = ("", "-1", "NoDevFiles")


def parse_devices(option: str, value: str) -> tuple[str, ...]:
    """The devices of a list, each as one spelling.

    Args:
        option: name of what holds the list, for errors.

    Raises:
        ValueError: it is not a list of numbers or of UUIDs, or names a device twice.
    """
    if value.strip() in _NONE:
        return ()
    words = [word.strip() for word in value.split(",")]
    wrong = next((word for word in words if not _DEVICE.fullmatch(word)), None)
    if wrong is not None:
        raise ValueError(
            f'{option} = {value!r}: {wrong!r} is no GPU; give numbers or UUIDs as `nvidia-smi -L` shows them, e.g. "0,1" '
            'or "GPU-8932f937", or "" for none'
        )
    devices = [str(int(word)) if word.isdecimal() else word[:4] + word[4:].lower() for word in words]
    if len({device.isdecimal() for device in devices}) > 1:
        raise ValueError(f"{option} = {value!r} mixes numbers and UUIDs, which CUDA does not read; give one kind")
    if any(are_equal(a, b) for index, a in enumerate(devices) for b in devices[:index]):
        raise ValueError(f"{option} = {value!r} names a GPU twice; give each once")
    return tuple(devices)


def are_equal(a: str, b: str) -> bool | None:
    """Whether two devices are one card; None when only its driver could tell: a number beside a UUID, parts of GPUs."""
    if a.isdecimal() or b.isdecimal():
        return a == b if a.isdecimal() and b.isdecimal() else None
    if a.startswith(b) or b.startswith(a):
        return True
    return None if "MIG-" in (a[:4], b[:4]) else False


def overlap(ours: tuple[str, ...], theirs: tuple[str, ...]) -> bool | None:
    """Whether two lists have a card in common; None when that cannot be told from the lists."""
    answers = {are_equal(a, b) for a in ours for b in theirs}
    return True if True in answers else None if None in answers else False
