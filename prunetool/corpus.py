"""Text or token files -> sequences of token ids, and nothing that the user did not give.

All text is one string (files joined as they are), tokenised whole; sequences are consecutive
windows from its start, or with a seed drawn at random positions as the papers do. With a BOS,
each window is the BOS and one token of text fewer: the text is still used without gaps.
"""

import bz2
import hashlib
import json
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from safetensors import safe_open

from prunetool.errors import CorpusError, shown
from prunetool.tokenizer import tokenize

JSON_NAME = re.compile(r"\.(json|jsonl|ndjson)(\.(gz|gzip|zst|zstd|bz2|xz))?$", re.IGNORECASE)
ARRAY_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
AS_OBJECTS = 'give JSON lines: {"text": "…"} in each line'
TO_LINES = "make lines of it: jq -c {} FILE > FILE.jsonl"


def load(
    directory: Path,
    vocab_size: int,
    texts: Sequence[Path],
    field: str,
    tokens_path: Path | None,
    *,
    samples: int | None,
    length: int,
    shuffle: int | None = None,
    bos: int | None = None,
) -> np.ndarray:
    """The sequences of text files or of a token file, (samples, length), int32.

    See `read_text`, `tokenize`, `read_tokens` and `sequences`, which raise CorpusError.
    """
    if tokens_path is not None:
        ids = read_tokens(tokens_path)
    else:
        ids = tokenize(read_text(texts, field), directory)
    where = tokens_path or ", ".join(map(str, texts))
    return sequences(ids, samples, length, vocab_size, where, shuffle, bos)


def read_text(paths: Sequence[Path], field: str) -> str:
    """Join text files, and the given field of every line of files of JSON lines.

    A file is JSON lines if its first line is a JSON object or its name says JSON. It may be
    compressed by gzip, Zstandard, bzip2 or xz, whatever its name; it is read once, and so may be
    a pipe. A byte-order mark is not text.

    Raises:
      CorpusError: a file that cannot be read, is not UTF-8 text, is one JSON array of objects, or
        lacks the field in a line; no text at all.
    """
    joined = "".join(_text_of(path, field) for path in paths)
    if not joined.strip():
        raise CorpusError(", ".join(map(str, paths)), "holds no text", "give another --text")
    return joined


def _text_of(path: Path, field: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(path, f"cannot be read ({error.strerror})", "check --text") from error
    data = _decompressed(path, data)
    for beginning, what, todo in FOREIGN:
        if beginning.match(data):
            raise CorpusError(path, what, todo)
    try:
        text = data.decode("utf-8-sig")  # as it lies there: no newline translation
    except UnicodeDecodeError as error:
        if path.suffix.lower() == ".br":  # nothing in Brotli's data says what they are
            raise CorpusError(
                path, "is compressed by Brotli", "decompress it first: brotli -dc FILE > FILE.txt"
            ) from error
        raise CorpusError(path, f"is not UTF-8 ({error})", "convert it first") from error
    if "\0" in text:
        raise CorpusError(
            path, "has NUL bytes: a binary file, or UTF-16 without its mark",
            "give plain UTF-8 text or JSON lines",
        )  # fmt: skip
    if JSON_NAME.search(path.name) or _is_object(text.lstrip(" \t\r\n").partition("\n")[0]):
        return _json_lines(path, text, field)
    if ARRAY_OF_OBJECTS.match(text):
        _refuse_document(path, text)
    return text


# How it begins, its name, what may pad it, and what decompresses one of the streams in it.
COMPRESSED: list[tuple[re.Pattern[bytes], str, bytes, Callable[[], Any]]] = [
    (re.compile(rb"\x1f\x8b\x08"), "gzip", b"\0", lambda: zlib.decompressobj(wbits=31)),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "Zstandard", b"",
     lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2", b"", bz2.BZ2Decompressor),
    (re.compile(rb"\xfd7zXZ\0"), "xz", b"\0", lzma.LZMADecompressor),
]  # fmt: skip


def _decompressed(path: Path, data: bytes) -> bytes:
    for beginning, name, padding, new in COMPRESSED:
        if beginning.match(data):
            try:
                return _streams(data, beginning, padding, new)
            except (
                OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError,
            ) as error:  # fmt: skip
                raise CorpusError(path, f"is damaged {name} ({error})", "get it again") from error
    return data


def _streams(
    data: bytes, beginning: re.Pattern[bytes], padding: bytes, new: Callable[[], Any]
) -> bytes:
    """Decompress streams that lie one after the other, all of them whole and nothing else there."""
    parts, view, start = [], memoryview(data), 0
    while start < len(data):
        if not beginning.match(data, start):
            raise ValueError(f"other data follows at byte {start:,}")
        # A decompressor copies what it is given beyond its stream. Slices that double are never
        # much longer than what was used of them, so that many short streams take linear time.
        stream, step = new(), 1 << 10
        while not stream.eof:
            if start >= len(data):
                raise EOFError("it ends too early")
            parts.append(stream.decompress(view[start : start + step]))
            start, step = min(start + step, len(data)), 2 * step
        start -= len(stream.unused_data)
        while padding and data.startswith(padding, start):
            start += len(padding)
    return b"".join(parts)


def _foreign(beginning: bytes, what: str, todo: str) -> tuple[re.Pattern[bytes], str, str]:
    return re.compile(beginning, re.DOTALL), what, todo


AS_LINES = (
    "write its text column as JSON lines first (pandas: to_json, orient='records', lines=True)"
)
AS_TOKENS = "if it holds token ids, give it by --tokens"
NOT_TEXT = rb"(?![ -~\s])"
UNPACK = "unpack it, and give the text files inside"
# What people have beside text: how it begins, what it is, what to do.
FOREIGN = [
    _foreign(rb"\xff\xfe\0\0|\0\0\xfe\xff",
             "is not UTF-8 but UTF-32", "convert it: iconv -f UTF-32 -t UTF-8 FILE > FILE.txt"),
    _foreign(rb"\xff\xfe|\xfe\xff",
             "is not UTF-8 but UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"),
    _foreign(rb"PAR1" + NOT_TEXT, "is a Parquet file, not text", AS_LINES),
    _foreign(rb"(ARROW1|FEA1)" + NOT_TEXT + rb"|\xff\xff\xff\xff.{2}\0\0",
             "is an Arrow file, not text", AS_LINES),
    _foreign(rb"\x89HDF\r\n\x1a\n", "is an HDF5 file, not text", "write its text to a file first"),
    _foreign(rb"SQLite format 3\0", "is an SQLite database, not text",
             "write its text to a file first"),
    _foreign(rb"%PDF-", "is a PDF, not text", "extract its text first: pdftotext FILE FILE.txt"),
    _foreign(rb"PK\x03\x04", "is a zip archive (zip, npz, docx, …), not text", UNPACK),
    _foreign(rb".{257}ustar[\0 ]", "is a tar archive, not text", UNPACK),
    _foreign(rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "is a 7z or RAR archive, not text", UNPACK),
    _foreign(rb"\x04\x22\x4d\x18", "is compressed by LZ4", "decompress it first: lz4 -d FILE"),
    _foreign(rb"\x1f\x9d", "is compressed by compress (.Z)",
             "decompress it first: gzip -dc FILE > FILE.txt"),
    _foreign(rb"\x93NUMPY", "is a NumPy array, not text", AS_TOKENS),
    _foreign(rb".{7}\0\{", "is a safetensors file, not text", AS_TOKENS),
    _foreign(rb"\x5d\0\0", "is compressed by LZMA (.lzma)",
             "decompress it first: xz --format=lzma -dc FILE > FILE.txt"),
    _foreign(rb"GGUF" + NOT_TEXT, "is a GGUF model, not text", "give a file of text"),
    _foreign(rb"Obj\x01", "is an Avro file, not text", "write its text column as JSON lines first"),
    _foreign(rb"\{\\rtf", "is rich text (RTF), not plain text", "save it as plain text first"),
    _foreign(rb"%!PS", "is PostScript, not text",
             "extract its text first: ps2ascii FILE FILE.txt"),
    _foreign(rb"WARC/1\.", "is a web archive (WARC), not text",
             "write the text of its records to a file first"),
    _foreign(rb"version https://git-lfs", "is a Git LFS pointer, not the file itself",
             "fetch the file: git lfs pull"),
]  # fmt: skip


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, text: str, field: str) -> str:
    """The field of every line; only \\n ends a line, as JSON strings may hold other separators."""
    values: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t\r"):
            continue
        where = f"{path}: line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not values:
                _refuse_document(path, text)
            raise CorpusError(
                where, f"is not JSON ({error})", "give JSON lines: one object a line"
            ) from error
        if not isinstance(fields, dict):
            if not values:
                _refuse_document(path, text)
            raise CorpusError(where, f"is JSON but not an object ({shown(line, 40)})", AS_OBJECTS)
        if field not in fields:
            names = shown(", ".join(map(str, fields)), 80) or "none"
            raise CorpusError(
                where, f"has no text field {shown(field, 40)!r} (its fields: {names})",
                "name it by --text-field",
            )  # fmt: skip
        value = fields[field]
        if not isinstance(value, str):
            raise CorpusError(
                where, f"has no text in field {shown(field, 40)!r}: {shown(json.dumps(value), 40)}",
                "name another by --text-field, or leave the line out",
            )  # fmt: skip
        if half := re.search("[\ud800-\udfff]", value):
            raise CorpusError(
                where, f"has half of a surrogate pair ({half[0]}), which is not a character",
                "write that text again from its source",
            )  # fmt: skip
        values.append(value)
    return "\n\n".join(values)


def _refuse_document(path: Path, text: str) -> None:
    """Raise CorpusError if ``text`` is one JSON document, or several over many lines each."""
    try:
        text = text.strip(" \t\r\n")
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and end == len(text):
        todo = AS_OBJECTS
        for kind, program in ((dict, "'.[]'"), (str, "'.[] | {text: .}'")):
            if value and all(isinstance(element, kind) for element in value):
                todo = TO_LINES.format(program)
        raise CorpusError(path, "is one JSON array, not JSON lines", todo)
    if isinstance(value, dict) and "\n" in text[:end]:
        raise CorpusError(
            path, "is JSON over several lines, not one object a line", TO_LINES.format(".")
        )


def read_tokens(path: Path) -> np.ndarray:
    """Token ids from a .npy file, or the only tensor of a .safetensors file, as stored.

    Raises:
      CorpusError: if it cannot be read or does not hold whole numbers.
    """
    if path.exists() and not path.is_file():  # a pipe cannot be mapped
        raise CorpusError(
            path, "is not a regular file", "write the ids by numpy.save('ids.npy', ids)"
        )
    try:
        ids = _safetensors_ids(path) if path.suffix.lower() == ".safetensors" else _npy_ids(path)
    except OSError as error:
        why = error.strerror or error
        raise CorpusError(path, f"cannot be read ({why})", "check --tokens") from error
    except Exception as error:  # NumPy lets its header's parser raise whatever it likes
        raise CorpusError(
            path, f"cannot be read as token ids ({str(error) or type(error).__name__})",
            "write the ids by numpy.save('ids.npy', ids); give text by --text",
        ) from error  # fmt: skip
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        raise CorpusError(
            path, f"is {ids.dtype} of shape {ids.shape}", "give whole numbers, (n,) or (n, length)"
        )
    return ids


def _safetensors_ids(path: Path) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"{len(names)} tensors, and one is wanted")
        return np.asarray(file.get_tensor(names[0]))


def _npy_ids(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it is neither .npy nor .safetensors")
    with warnings.catch_warnings(action="ignore"):
        # Mapped, so that the shape is held against the file's size before memory is taken.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def sequences(
    ids: np.ndarray,
    samples: int | None,
    length: int,
    vocab_size: int,
    where: object,
    shuffle: int | None = None,
    bos: int | None = None,
) -> np.ndarray:
    """Cut token ids into sequences.

    Args:
      ids: (n,), or (n, length) which is taken as it is.
      samples: how many sequences; None takes all that are there.
      length: tokens in each.
      vocab_size: every id must be below it.
      where: what the ids came from, for messages.
      shuffle: a seed, to draw windows at random positions instead of consecutive ones.
      bos: the token that each sequence begins with, before ``length - 1`` of the ids.

    Returns:
      (samples, length), int32.

    Raises:
      CorpusError: if there are too few (it says how many are missing), if one is outside the
        vocabulary, or if there is a BOS for sequences that are already whole.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        worst = f"the token id {ids.min()}" if ids.min() < 0 else f"token ids up to {ids.max()}"
        raise CorpusError(
            where, f"has {worst} for a vocabulary of {vocab_size}", "use this model's tokenizer"
        )
    own = length if bos is None else length - 1
    if ids.ndim == 2:
        if bos is not None:
            raise CorpusError(
                where, "holds whole sequences, which a BOS would lengthen",
                "put it into the file, or give --bos auto",
            )  # fmt: skip
        if ids.shape[1] != length:
            raise CorpusError(
                where, f"has sequences of {ids.shape[1]}", f"give --sequence-length {ids.shape[1]}"
            )
    elif shuffle is None:
        ids = ids[: len(ids) // own * own].reshape(-1, own)
    wanted = samples if samples is not None else max(len(ids), 1)
    have = ids.shape[0] if ids.ndim == 2 else ids.size // own
    if have < wanted:
        raise CorpusError(
            where,
            f"gives {have} of {wanted} sequences of {length} tokens, "
            f"{(wanted - have) * own:,} tokens short",
            "give more text, fewer --samples or a shorter --sequence-length",
        )
    if shuffle is None:
        windows = ids[:wanted]
    elif ids.ndim == 2:
        windows = ids[np.random.default_rng(shuffle).permutation(len(ids))[:wanted]]
    else:
        starts = np.random.default_rng(shuffle).integers(0, ids.size - own + 1, wanted)
        windows = np.stack([ids[start : start + own] for start in starts])
    if bos is not None:
        windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=bos)
    return np.ascontiguousarray(windows, np.int32)


def fingerprint(tokens: np.ndarray) -> str:
    """SHA-256 of the sequences' shape and ids, in hexadecimal."""
    return hashlib.sha256(repr(tokens.shape).encode() + tokens.tobytes()).hexdigest()
