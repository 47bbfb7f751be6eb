"""How a value a token is written: in two bytes by default, or as it is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEP = 2.0**-11
"""Nats between two codes of `fixed16`."""


@dataclass(frozen=True)
class Encoding:
    """What a value costs and loses.

    dtype      of the codes, little-endian
    largest    value that can be written, in nats; what lies above is written as this one
    max_error  of a value up to `largest`, in nats
    """

    dtype: str
    largest: float
    max_error: float


ENCODINGS = {
    # Equal steps, for what counts is a difference of losses: a float16 errs by 0.002 nats at a loss of 5.
    "fixed16": Encoding("<u2", 65535 * STEP, STEP / 2),
    "float32": Encoding("<f4", float(np.finfo(np.float32).max), 0.0),
}


def encode(values: NDArray[np.float32], encoding: str) -> NDArray[np.generic]:
    """Codes of finite values, in nats and of any shape; round-off below zero is zero."""
    kind = ENCODINGS[encoding]
    if encoding == "float32":
        return values.astype(kind.dtype)
    return np.rint(values.clip(0.0, kind.largest) / STEP).astype(kind.dtype)


def decode(codes: NDArray[np.generic], encoding: str) -> NDArray[np.float32]:
    """The values of these codes, float32."""
    values = codes.astype(np.float32)
    return values if encoding == "float32" else values * np.float32(STEP)
