"""Text files -> text, part by part: decompressed, decoded, fields of JSON lines extracted.

A file is read once, in order and only as far as its text is used, so that it may be a pipe; errors
after that are not seen. Memory does not grow with the file: it is used for the beginning that
identifies the format (`HEAD`, or the first line if that begins with a brace), one line of JSON
lines, and a decompressor's window.
"""

import bz2
import codecs
import importlib.util
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from prunetool.errors import CorpusError, shown

JSON_NAME = re.compile(r"\.(json|jsonl|ndjson)(\.(gz|gzip|zst|zstd|bz2|xz))?$", re.IGNORECASE)
ARRAY_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
AS_OBJECTS = 'give JSON lines: {"text": "…"} in each line'
TO_LINES = "make lines of it: jq -c {} FILE > FILE.jsonl"
HEAD = 1 << 18  # characters by which a file's format is identified
READ_BYTES = 1 << 18
BEGINNING = 512  # bytes by which a format is recognised: tar's name is at byte 257
# Input for a decompressor at a time. All output of zlib and Zstandard for it is in memory: 512 KiB,
# and for blocks of one repeated byte 16 MiB at most.
SLICE_BYTES = 1 << 9
BLANK = " \t\r\n"  # JSON's
ROWS = "\n\n"  # between the texts of two rows
BATCH = 1000  # rows of Parquet at a time


class Column(NamedTuple):
    """Which text the rows of JSON lines and Parquet have, and how they are joined.

    Attributes:
      field: the field, and the column of Parquet.
      between: what joins the rows of a file.
      render: makes a row's text of a value that is not text; raises CorpusError, which names where
        the value is. Files without rows are then refused.
    """

    field: str = "text"
    between: str = ROWS
    render: Callable[[object, Any], str] | None = None

    def text(self, where: object, value: Any, todo: str) -> str:
        """A row's text.

        Raises:
          CorpusError: if it has none.
        """
        if self.render:
            value = self.render(where, value)
        if not isinstance(value, str):
            raise CorpusError(
                where,
                f"has no text in field {shown(self.field, 40)!r}: {shown(json.dumps(value), 40)}",
                todo,
            )
        if half := re.search("[\ud800-\udfff]", value):
            raise CorpusError(
                where,
                f"has half of a surrogate pair ({half[0]}), which is not a character",
                "write that text again from its source",
            )
        return value


def read_text(
    paths: Iterable[Path], column: Column, where: object = "--text", *, rows: bool = False
) -> Iterator[str]:
    """The text of files joined as they are, in parts; of JSON lines and Parquet, one field.

    A file is JSON lines if its first line is a JSON object or its name says JSON. It may be
    compressed by gzip, Zstandard, bzip2 or xz, whatever its name. A byte-order mark is not text.

    Args:
      paths: the files, each taken when the one before is used up.
      column: what the rows of JSON lines and Parquet have.
      where: what to name if there is no text.
      rows: whether all files have rows, so that files are joined as rows are.

    Raises:
      CorpusError: if a file cannot be read, is not UTF-8 text, is one JSON array of objects, or
        lacks the field in a line; or if there is no text at all.
    """
    blank: list[str] | None = []  # white space, until something else follows
    for number, path in enumerate(paths):
        parts = _text_of(path, column)
        for part in chain([column.between], parts) if rows and number else parts:
            if blank is None:
                yield part
            elif part.strip():
                yield "".join([*blank, part])
                blank = None
            else:
                blank.append(part)
    if blank is not None:
        raise CorpusError(where, "holds no text", "give another")


def _text_of(path: Path, column: Column) -> Iterator[str]:
    with _Bytes(path) as source:
        if source.begins(PARQUET) and path.is_file():
            yield from _parquet(path, column)
            return
        parts = _decoded(path, _decompressed(path, source))
        head, whole = _more("", parts, HEAD)
        while not whole and head.lstrip(BLANK).startswith("{") and "\n" not in head.lstrip(BLANK):
            head, whole = _more(head, parts, 2 * len(head))
        if JSON_NAME.search(path.name) or _is_object(head.lstrip(BLANK).partition("\n")[0]):
            yield from _json_lines(path, head, whole, parts, column)
            return
        if ARRAY_OF_OBJECTS.match(head):
            _refuse_document(path, head, whole)
        if column.render:
            raise CorpusError(path, "is plain text, without conversations", "omit --chat")
        yield head
        yield from parts


def _more(text: str, parts: Iterator[str], size: int) -> tuple[str, bool]:
    """Extend ``text`` to at least ``size`` characters; also returns whether nothing is left."""
    found, have = [text], len(text)
    while have < size:
        part = next(parts, None)
        if part is None:
            return "".join(found), True
        found.append(part)
        have += len(part)
    return "".join(found), False


class _Bytes:
    """The bytes of a file or pipe in order; the last bytes read can be put back.

    Raises:
      CorpusError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.ahead, self.position = path, b"", 0

    def __enter__(self) -> "_Bytes":
        try:
            self.file: IO[bytes] = self.path.open("rb")
        except OSError as error:
            raise self._unreadable(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _unreadable(self, error: OSError) -> CorpusError:
        return CorpusError(self.path, f"cannot be read ({error.strerror})", "check --text")

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only at the end."""
        data, self.ahead = self.ahead[:size], self.ahead[size:]
        if len(data) < size:
            try:
                data += self.file.read(size - len(data))
            except OSError as error:
                raise self._unreadable(error) from error
        self.position += len(data)
        return data

    def put_back(self, data: bytes) -> None:
        """Put back these bytes, the last ones read, to be read again."""
        self.ahead = data + self.ahead
        self.position -= len(data)

    def begins(self, beginning: re.Pattern[bytes]) -> bool:
        """Whether the next bytes match a short pattern."""
        data = self.read(BEGINNING)
        self.put_back(data)
        return beginning.match(data) is not None


def _decoded(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    """Decode UTF-8 as it is: no newline is translated."""
    beginning = b""
    for chunk in chunks:
        beginning += chunk
        if len(beginning) >= BEGINNING:
            break
    for foreign, what, todo in FOREIGN:
        if foreign.match(beginning):
            raise CorpusError(path, what, todo)
    decoder = codecs.getincrementaldecoder("utf-8")()
    first = beginning.removeprefix(codecs.BOM_UTF8)
    position = len(beginning) - len(first)
    for data in chain([first], chunks, [None]):
        waiting = decoder.getstate()[0]  # the bytes of an incomplete character
        try:
            text = decoder.decode(data or b"", final=data is None)
        except UnicodeDecodeError as error:
            if path.suffix.lower() == ".br":  # Brotli data has no magic number
                raise CorpusError(
                    path,
                    "is compressed by Brotli",
                    "decompress it first: brotli -dc FILE > FILE.txt",
                ) from error
            raise CorpusError(
                path,
                f"is not UTF-8 ({error.reason} at byte {position - len(waiting) + error.start:,})",
                "convert it first",
            ) from error
        position += len(data or b"")
        if "\0" in text:
            raise CorpusError(
                path,
                "has NUL bytes: a binary file, or UTF-16 without its mark",
                "give plain UTF-8 text or JSON lines",
            )
        if text:
            yield text


# Magic bytes, name, padding, and decompressor of one stream.
COMPRESSED: list[tuple[re.Pattern[bytes], str, bytes, Callable[[], Any]]] = [
    (re.compile(rb"\x1f\x8b\x08"), "gzip", b"\0", lambda: zlib.decompressobj(wbits=31)),
    (
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        "Zstandard",
        b"",
        lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2", b"", bz2.BZ2Decompressor),
    (re.compile(rb"\xfd7zXZ\0"), "xz", b"\0", lzma.LZMADecompressor),
]


def _decompressed(path: Path, source: _Bytes) -> Iterator[bytes]:
    for beginning, name, padding, new in COMPRESSED:
        if source.begins(beginning):
            try:
                yield from _streams(source, beginning, padding, new)
            except (
                OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError,
            ) as error:  # fmt: skip
                raise CorpusError(
                    path, f"is damaged {name} ({error})", "download it again"
                ) from error
            return
    while data := source.read(READ_BYTES):
        yield data


def _streams(
    source: _Bytes, beginning: re.Pattern[bytes], padding: bytes, new: Callable[[], Any]
) -> Iterator[bytes]:
    """Decompress concatenated streams, which must be complete and followed by nothing else."""
    while True:
        if not source.begins(beginning):
            raise ValueError(f"other data follows at byte {source.position:,}")
        stream = new()
        while not stream.eof:
            if not (data := source.read(SLICE_BYTES)):
                raise EOFError("it ends too early")
            yield from _output(stream, data)
        source.put_back(stream.unused_data)
        while data := source.read(SLICE_BYTES):
            if rest := data.lstrip(padding) if padding else data:
                source.put_back(rest)
                break
        else:
            return


def _output(stream: Any, data: bytes) -> Iterator[bytes]:
    """A decompressor's output for ``data``, `READ_BYTES` at a time."""
    if hasattr(stream, "needs_input"):  # bzip2 and xz can make gigabytes from a slice
        yield stream.decompress(data, READ_BYTES)
        while not (stream.eof or stream.needs_input):
            yield stream.decompress(b"", READ_BYTES)
    else:
        made = stream.decompress(data)
        for start in range(0, len(made), READ_BYTES):
            yield made[start : start + READ_BYTES]


def _foreign(beginning: bytes, what: str, todo: str) -> tuple[re.Pattern[bytes], str, str]:
    return re.compile(beginning, re.DOTALL), what, todo


AS_LINES = (
    "write its text column as JSON lines first (pandas: to_json, orient='records', lines=True)"
)
AS_TOKENS = "if it holds token ids, give it with --tokens"
NOT_TEXT = rb"(?![ -~\s])"
PARQUET = re.compile(rb"PAR1" + NOT_TEXT)
UNPACK = "unpack it, and give the text files inside"
# Formats other than text: magic bytes, what it is, what to do.
FOREIGN = [
    _foreign(rb"\xff\xfe\0\0|\0\0\xfe\xff",
             "is not UTF-8 but UTF-32", "convert it: iconv -f UTF-32 -t UTF-8 FILE > FILE.txt"),
    _foreign(rb"\xff\xfe|\xfe\xff",
             "is not UTF-8 but UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"),
    _foreign(rb"PAR1" + NOT_TEXT, "is a Parquet file in a pipe or compressed",
             "give the file itself"),
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


def _lines(parts: Iterator[str]) -> Iterator[str]:
    """Split into lines at newlines only: JSON strings may contain other separators."""
    line: list[str] = []
    for part in parts:
        for number, piece in enumerate(part.split("\n")):
            if number:
                yield "".join(line)
                line = []
            line.append(piece)
    yield "".join(line)


def _json_lines(
    path: Path, head: str, whole: bool, parts: Iterator[str], column: Column
) -> Iterator[str]:
    """The field of every line, joined."""
    between, begun, field = "", False, column.field
    for number, line in enumerate(_lines(chain([head], parts)), 1):
        if not line.strip(" \t\r"):
            continue
        where = f"{path}: line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not begun:
                _refuse_document(path, head, whole)
            raise CorpusError(
                where, f"is not JSON ({error})", "give JSON lines: one object per line"
            ) from error
        if not isinstance(fields, dict):
            if not begun:
                _refuse_document(path, head, whole)
            todo = f'give {{"{field}": [...]}} in each line' if column.render else AS_OBJECTS
            raise CorpusError(where, f"is JSON but not an object ({shown(line, 40)})", todo)
        if field not in fields:
            names = shown(", ".join(map(str, fields)), 80) or "none"
            raise CorpusError(
                where,
                f"has no text field {shown(field, 40)!r} (its fields: {names})",
                "name it with --text-field",
            )
        text = column.text(
            where, fields[field], "name another with --text-field, or delete the line"
        )
        yield between + text
        between, begun = column.between, True


def _parquet(path: Path, column: Column) -> Iterator[str]:
    """The column of every row, joined; only that column is read, some rows at a time."""
    if importlib.util.find_spec("pyarrow") is None:
        raise CorpusError(
            path, "is a Parquet file, for which pyarrow is missing", "pip install 'prunetool[data]'"
        )
    import pyarrow
    from pyarrow import parquet

    field = column.field
    try:
        with parquet.ParquetFile(path) as file:
            names = [each.name for each in file.schema_arrow]
            if names.count(field) != 1:
                raise CorpusError(
                    path,
                    f"has {names.count(field) or 'no'} column {shown(field, 40)!r} (its columns: "
                    f"{shown(', '.join(names), 80)})",
                    "name it with --text-field",
                )
            kind = file.schema_arrow.field(field).type
            if not (
                column.render
                or pyarrow.types.is_string(kind)
                or pyarrow.types.is_large_string(kind)
            ):
                raise CorpusError(
                    path,
                    f"has {kind}, not text, in column {shown(field, 40)!r}",
                    "name another with --text-field",
                )
            between, batches = "", file.iter_batches(BATCH, columns=[field])
            rows = (value for batch in batches for value in batch.column(0).to_pylist())
            for row, value in enumerate(rows, 1):
                if value is not None:
                    yield between + column.text(f"{path}: row {row}", value, "delete the row")
                    between = column.between
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise CorpusError(path, f"is damaged Parquet ({reason})", "download it again") from error


def _refuse_document(path: Path, head: str, whole: bool) -> None:
    """Raise CorpusError if a file is one JSON document, or several that span many lines.

    A file longer than ``head`` counts as a document if nothing before the cut contradicts it.
    """
    text = head.strip(BLANK)
    value: Any
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        if whole or not isinstance(error, json.JSONDecodeError) or not _is_cut(error):
            return
        first = text[1:].lstrip(BLANK)[:1]
        value = {} if text[0] == "{" else {"{": [{}], '"': [""]}.get(first, [])
        end = len(text)
    if isinstance(value, list) and end == len(text):
        todo = AS_OBJECTS
        for kind, program in ((dict, "'.[]'"), (str, "'.[] | {text: .}'")):
            if value and all(isinstance(element, kind) for element in value):
                todo = TO_LINES.format(program)
        raise CorpusError(path, "is one JSON array, not JSON lines", todo)
    if isinstance(value, dict) and "\n" in text[:end]:
        raise CorpusError(
            path, "is JSON over several lines, not one object per line", TO_LINES.format(".")
        )


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether a document's only fault may be that it is cut off."""
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - len(
        "\\ud83d"
    )
