"""Dtypes by their names: ours are NumPy's and ml_dtypes', the container's are safetensors'."""

from typing import Any

import ml_dtypes
import numpy as np

from sparsejax.storage._errors import BrokenError

# Of ml_dtypes those that this version of it has.
_NAMES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
    *("int2", "int4", "uint2", "uint4"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
)
_BY_NAME = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in _NAMES
    if hasattr(ml_dtypes, name) or name in np.sctypeDict
}

# Those whose entries have as many bytes there as here: F4 and F6 are packed tighter.
_CONTAINER = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_FROM_CONTAINER = {theirs: _BY_NAME[ours] for ours, theirs in _CONTAINER.items()}


def known(dtype: Any) -> bool:
    """Whether a dtype can be stored."""
    return np.dtype(dtype) in _BY_NAME.values()


def by_name(name: str) -> np.dtype:
    """The dtype of one of our names."""
    if name not in _BY_NAME:
        raise BrokenError(f"the dtype {name[:40]!r} is none that can be stored")
    return _BY_NAME[name]


def from_container(name: str) -> np.dtype:
    """The dtype of a name of safetensors."""
    if name not in _FROM_CONTAINER:
        names = ", ".join(_FROM_CONTAINER)
        raise BrokenError(f"its dtype is {name[:40]!r}, of which NumPy has none; known are {names}")
    return _FROM_CONTAINER[name]


def to_container(dtype: np.dtype) -> str | None:
    """The name that safetensors has for a dtype; None where it has none."""
    return _CONTAINER.get(dtype.name)
