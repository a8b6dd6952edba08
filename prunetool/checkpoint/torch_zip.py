"""Tensors of a PyTorch file (.pt), read as data: nothing in it can run.

Since version 1.6 torch saves a zip archive: a pickle of the objects, in which every tensor is a
reference to a storage, and each storage a member of its own, uncompressed. The pickle is read by
an unpickler in which no name resolves to code: a few names have inert stand-ins here, and all
others become `Opaque`, which takes anything and does nothing.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np

from prunetool.errors import CheckpointError, shown

MAGIC = b"PK"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P"  # how torch's older files begin
PICKLE_BYTES = 64 << 20  # the tensors are not in it
STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
MOST_AXES = 8
SAVE_AGAIN = "save it again: torch.save(state_dict, FILE) with torch 1.6 or newer"
DOWNLOAD = "download it again"


class Stored(NamedTuple):
    """A tensor in the file: where its elements are.

    Attributes:
      dtype: NumPy's name.
      shape: its extents.
      storage: name of its storage's member, without the directory.
      start: number of elements before it.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: str
    start: int


class Opaque:
    """Whatever is not a tensor or a plain container: taken in, and never run."""

    def __new__(cls, *_: object, **__: object) -> "Opaque":
        """Take any arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Take any state."""

    def __setitem__(self, _: object, __: object) -> None:
        """Take any item."""

    def append(self, _: object) -> None:
        """Take any item."""


class _Dict(dict[Any, Any]):
    """For OrderedDict: a state dict also carries an attribute, which is dropped."""

    def __setstate__(self, _: object) -> None: ...


class _Tensor:
    """For ``torch._utils._rebuild_tensor_v2``."""

    __slots__ = ()

    def __call__(
        self, storage: tuple[str, str], start: int, shape: Any, stride: Any, *_: object
    ) -> Stored:
        dtype, name = storage
        sizes = tuple(shape)
        if len(sizes) > MOST_AXES or not all(type(n) is int and n >= 0 for n in (start, *sizes)):
            raise ValueError("a tensor whose sizes are none")
        steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        if any(
            extent > 1 and given != step
            for extent, given, step in zip(sizes, stride, steps, strict=True)
        ):
            raise ValueError(f"a tensor that is not contiguous (strides {tuple(stride)})")
        return Stored(dtype, sizes, name, start)

    def __setstate__(self, _: object) -> None: ...


class _Parameter(_Tensor):
    """For ``torch._utils._rebuild_parameter``: the tensor in it."""

    __slots__ = ()

    def __call__(self, tensor: Stored, *_: object) -> Stored:  # type: ignore[override]
        return tensor


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """An inert stand-in for a name."""
        known = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
            ("torch._utils", "_rebuild_parameter"): _Parameter(),
        }
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return known.get((module, name), Opaque)

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """The dtype and the name of a storage."""
        kind, dtype, name, *_ = pid
        if kind != "storage" or dtype not in STORAGES.values() or not name.isalnum():
            raise ValueError(f"a reference to {shown(repr(pid), 40)}")
        return dtype, name


class TorchFile:
    """A PyTorch file, open for reading.

    Attributes:
      top: the object in it: containers, plain values, `Stored` and `Opaque`.

    Raises:
      CheckpointError: if it is not such a file, or holds what is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                begins = file.read(len(LEGACY))
        except OSError as error:
            raise CheckpointError(path, f"cannot be read ({error.strerror})", "check it") from error
        if begins == LEGACY:
            raise CheckpointError(path, "is a PyTorch file of before version 1.6", SAVE_AGAIN)
        if not begins.startswith(MAGIC):
            raise CheckpointError(path, "is not a PyTorch file: not a zip archive", SAVE_AGAIN)
        try:
            self._archive = zipfile.ZipFile(path)
            self.top = self._load()
        except CheckpointError:
            raise
        except Exception as error:  # a hostile pickle can raise anything
            what = f"cannot be read as a PyTorch file ({str(error) or type(error).__name__})"
            raise CheckpointError(path, what, DOWNLOAD) from error

    def _load(self) -> Any:
        members = {info.filename: info for info in self._archive.infolist()}
        found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("no data.pkl in it")
        self._root = found[0].removesuffix("data.pkl")
        if any(name.startswith(f"{self._root}code/") for name in members):
            what = "is a TorchScript program, not a file of weights"
            raise CheckpointError(self.path, what, "save the module's state_dict()")
        order = f"{self._root}byteorder"
        if order in members and self._bytes(members[order], 16) != b"little":
            raise CheckpointError(self.path, "is big-endian", "save it on another machine")
        data = self._bytes(members[found[0]], PICKLE_BYTES)
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            # The unpickler would take memory for every place before it.
            if "PUT" in opcode.name and int(argument or 0) not in range(count + 1):
                raise ValueError("a place in the memo out of order")
        return _Reader(io.BytesIO(data)).load()

    def _bytes(self, info: zipfile.ZipInfo, limit: int) -> bytes:
        if info.file_size > limit:
            raise ValueError(f"{info.filename} has {info.file_size:,} bytes")
        with self._archive.open(info) as file:
            return file.read(limit)

    def read(self, tensor: Stored, name: str) -> np.ndarray:
        """Read one tensor in its stored dtype.

        Args:
          tensor: which.
          name: its name, for messages.

        Raises:
          CheckpointError: if it is outside its storage, or damaged.
        """
        dtype = np.dtype(tensor.dtype)
        size = math.prod(tensor.shape) * dtype.itemsize
        member = f"{self._root}data/{tensor.storage}"
        try:
            info = self._archive.getinfo(member)
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError("compressed or encrypted")
            if tensor.start * dtype.itemsize + size > info.file_size:
                raise ValueError(f"of {size:,} bytes, and its storage has {info.file_size:,}")
            with self._archive.open(info) as file:
                file.seek(tensor.start * dtype.itemsize)
                data = file.read(size)
            if len(data) != size:
                raise ValueError("cut short")
        except Exception as error:  # from zipfile, for damage of any kind
            what = f"{shown(name)} cannot be read ({error or type(error).__name__})"
            raise CheckpointError(self.path, what, DOWNLOAD) from error
        return np.frombuffer(data, dtype).reshape(tensor.shape)

    def close(self) -> None:
        """Close the file."""
        self._archive.close()
