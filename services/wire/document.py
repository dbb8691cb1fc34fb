"""A safetensors document with JSON in its metadata: every answer and file with arrays. Nothing here unpickles."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from services.errors import PeerError

SAFETENSORS_MEDIA_TYPE = "application/x-safetensors"
_HEADER = struct.Struct("<Q")


def encode_document(arrays: Mapping[str, np.ndarray | None], metadata: dict[str, Any]) -> bytes:
    """One safetensors document; absent arrays are left out, metadata values are stored as JSON."""
    present = {name: np.asarray(array, order="C") for name, array in arrays.items() if array is not None}
    return save(present, metadata={name: json.dumps(value) for name, value in metadata.items()})


def decode_document(document: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Inverse of `encode_document`.

    Raises:
        PeerError: the bytes are not a safetensors document.
    """
    try:
        arrays = load(document)
        (header_bytes,) = _HEADER.unpack_from(document)
        header = json.loads(document[_HEADER.size : _HEADER.size + header_bytes])
        metadata = {name: json.loads(value) for name, value in header.get("__metadata__", {}).items()}
    except (SafetensorError, ValueError, struct.error, KeyError) as error:
        raise PeerError(f"the answer is not a safetensors document: {error}") from error
    return arrays, metadata
