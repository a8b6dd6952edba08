"""Tensors of a PyTorch file (.pt), read as data: nothing in it can run.

Since version 1.6 torch saves a zip archive: a pickle of the objects, in which every tensor is a
reference to a storage, and each storage a member of its own, uncompressed. The pickle is not given
to Python's unpickler: a few of its instructions are followed here, which make containers, plain
values and `Stored`. Names lead to no code, and what they would make is `OPAQUE`.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np

from prunetool.errors import CheckpointError, shown

MAGIC = b"PK"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P"  # how torch's older files begin
PICKLE_BYTES = 8 << 20  # the tensors are not in it
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
MOST_AXES, MOST_ARGUMENTS = 8, 8
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


OPAQUE = object()  # whatever is not a tensor, a container or a plain value


class _Name(NamedTuple):
    """A name in a pickle, which leads nowhere."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: str
    member: str


def _storage(pid: Any) -> _Storage:
    kind, of, member, _, _ = pid
    if kind != "storage" or not isinstance(of, _Name) or of.module != "torch":
        raise ValueError("a reference to something else than a storage")
    if of.name not in STORAGES:
        raise ValueError(f"tensors of {shown(of.name, 40)}")
    if not isinstance(member, str) or not member.isalnum():
        raise ValueError("a storage without a name")
    return _Storage(STORAGES[of.name], member)


def _tensor(storage: Any, start: Any, shape: Any, stride: Any, *_: object) -> Stored:
    if not isinstance(storage, _Storage) or not type(shape) is type(stride) is tuple:
        raise ValueError("a tensor without a storage")
    numbers = (start, *shape, *stride)
    if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError("a tensor whose shape is not one")
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(n > 1 and given != step for n, given, step in zip(shape, stride, steps, strict=True)):
        raise ValueError(f"a tensor that is not contiguous (strides {stride})")
    return Stored(storage.dtype, shape, storage.member, start)


def _called(what: Any, arguments: Any) -> Any:
    """What calling a name would make, of the three that matter."""
    if len(arguments) > MOST_ARGUMENTS:
        return OPAQUE
    match what:
        case _Name("torch._utils", "_rebuild_tensor_v2"):
            return _tensor(*arguments)
        case _Name("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        case _Name("collections", "OrderedDict"):
            return {}
    return OPAQUE


def _unpickled(data: bytes) -> Any:
    """Follow a pickle's instructions, of those that torch.save writes.

    Every instruction makes at most one object, and nothing is hashed but strings and numbers, so
    that time and memory are those of the bytes.

    Raises:
      ValueError: if it has another instruction. Damaged pickles raise other errors too.
    """
    stack: list[Any] = []
    marks: list[int] = []  # places in the stack
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        first = marks.pop()
        found = stack[first:]
        del stack[first:]
        return found

    def tuple_of(count: int) -> Callable[[Any], None]:
        def make(_: Any) -> None:
            found = tuple(stack[len(stack) - count :])
            if len(found) < count:
                raise ValueError("too few values")
            del stack[len(stack) - count :]
            stack.append(found)

        return make

    def set_items(items: list[Any]) -> None:
        if isinstance(stack[-1], dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) in (str, int):
                    stack[-1][key] = value

    def add(items: list[Any]) -> None:
        if type(stack[-1]) is list:
            stack[-1].extend(items)

    def call(_: Any) -> None:
        arguments = stack.pop()
        stack.append(_called(stack.pop(), arguments))

    def new_object(_: Any) -> None:
        del stack[-2:]
        stack.append(OPAQUE)

    def stack_global(_: Any) -> None:
        name, module = stack.pop(), stack.pop()
        if not type(name) is type(module) is str:
            raise ValueError("a name that is no text")
        stack.append(_Name(module, name))

    def set_item(_: Any) -> None:
        value, key = stack.pop(), stack.pop()
        set_items([key, value])

    def add_one(_: Any) -> None:
        value = stack.pop()
        add([value])

    push = stack.append
    does: dict[str, Callable[[Any], object]] = {
        "MARK": lambda _: marks.append(len(stack)),
        "NONE": lambda _: push(None),
        "NEWTRUE": lambda _: push(True),
        "NEWFALSE": lambda _: push(False),
        "EMPTY_DICT": lambda _: push({}),
        "EMPTY_LIST": lambda _: push([]),
        "EMPTY_TUPLE": lambda _: push(()),
        "TUPLE": lambda _: push(tuple(pop_to_mark())),
        "SETITEM": set_item,
        "SETITEMS": lambda _: set_items(pop_to_mark()),
        "APPEND": add_one,
        "APPENDS": lambda _: add(pop_to_mark()),
        "GLOBAL": lambda said: push(_Name(*said.split(" "))),
        "STACK_GLOBAL": stack_global,
        "REDUCE": call,
        "NEWOBJ": new_object,
        "BUILD": lambda _: stack.pop(),  # a state: attributes, which nobody reads
        "BINPERSID": lambda _: push(_storage(stack.pop())),
        "MEMOIZE": lambda _: memo.update({len(memo): stack[-1]}),
        "STOP": lambda _: None,
    }
    does |= dict.fromkeys(_CONSTANTS, push)
    does |= {f"TUPLE{count}": tuple_of(count) for count in (1, 2, 3)}
    does |= dict.fromkeys(("PROTO", "FRAME"), lambda _: None)
    does |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda at: memo.update({at: stack[-1]}))
    does |= dict.fromkeys(("BINGET", "LONG_BINGET"), lambda at: push(memo[at]))
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in does:
            raise ValueError(f"the instruction {opcode.name}, which torch does not write")
        does[opcode.name](argument)
    (made,) = stack
    return made


_CONSTANTS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES",
)  # fmt: skip


class TorchFile:
    """A PyTorch file, open for reading.

    Attributes:
      top: the object in it: containers, plain values, `Stored` and `OPAQUE`.

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
        return _unpickled(self._bytes(members[found[0]], PICKLE_BYTES))

    def _bytes(self, info: zipfile.ZipInfo, limit: int) -> bytes:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise ValueError(f"{info.filename}: compressed, or of {info.file_size:,} bytes")
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
