"""Tensors of a checkpoint, one at a time, as NumPy arrays."""

import numpy as np
from safetensors import SafetensorError, safe_open

from prunetool.checkpoint.index import DTYPES, Index, TensorInfo
from prunetool.errors import CheckpointError

ROWS_BYTES = 1 << 24  # compared at a time


def read_tensor(index: Index, name: str) -> np.ndarray:
    """Read one tensor in its stored dtype.

    The file is read, not mapped: mapped pages would count in the peak memory.

    Raises:
      CheckpointError: if the tensor is unreadable, or contains NaN or infinity.
    """
    info = index[name]
    try:
        with safe_open(info.shard, "numpy", backend="pread") as file:
            array: np.ndarray = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            info.shard, f"{name} cannot be read ({error})", "download the shard again"
        ) from error
    if not _all_finite(array):
        raise CheckpointError(
            info.shard, f"{name} holds NaN or infinity", "download the shard again or fix the model"
        )
    return array


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are equal; stops reading at the first rows that differ.

    Raises:
      CheckpointError: if one cannot be read.
    """
    for info in (one, other):
        dtype_of(info)
    if one.shape != other.shape:
        return False
    rows = one.shape[0] if one.shape else 1
    step = max(1, ROWS_BYTES * rows // max(one.size_bytes, 1))
    try:
        with (
            safe_open(one.shard, "numpy", backend="pread") as first,
            safe_open(other.shard, "numpy", backend="pread") as second,
        ):
            parts = first.get_slice(one.name), second.get_slice(other.name)
            for start in range(0, rows, step):
                a, b = (part[start : min(start + step, rows)] for part in parts)
                if not np.array_equal(a.astype(np.float64), b.astype(np.float64)):
                    return False
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            one.shard, f"cannot be read ({error})", "download the shard again"
        ) from error
    return True


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype.name != "bfloat16":
        return bool(np.isfinite(array).all())
    # NumPy would widen bfloat16 element by element; all exponent bits set means NaN or infinity.
    exponent = np.uint16(0x7F80)
    return bool(((array.view(np.uint16) & exponent) != exponent).all())


def dtype_of(info: TensorInfo) -> str:
    """NumPy's name of a tensor's dtype (``bfloat16`` from ml_dtypes).

    Raises:
      CheckpointError: if the dtype is not a supported floating-point type.
    """
    if info.dtype not in DTYPES:
        raise CheckpointError(
            info.shard,
            f"stores the dtype {info.dtype}",
            "give an unquantised checkpoint (bf16, f16, f32)",
        )
    return DTYPES[info.dtype]
