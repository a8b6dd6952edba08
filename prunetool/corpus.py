"""Text or token files -> sequences of token ids, and nothing that the user did not give.

All text is one string (files joined as they are), tokenised whole, without a BOS; sequences are
consecutive windows from its start, or with a seed drawn at random positions as the papers do.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from prunetool.errors import CorpusError


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
) -> np.ndarray:
    """The sequences of text files or of a token file, (samples, length), int32.

    See `read_text`, `tokenize`, `read_tokens` and `sequences`, which raise CorpusError.
    """
    if tokens_path is not None:
        ids = read_tokens(tokens_path)
    else:
        ids = tokenize(read_text(texts, field), directory)
    where = tokens_path or ", ".join(map(str, texts))
    return sequences(ids, samples, length, vocab_size, where, shuffle)


def read_text(paths: Sequence[Path], field: str) -> str:
    """Join text files, and the given field of every line of ``.jsonl`` files.

    Raises:
      CorpusError: a file that is not there, not UTF-8, or lacks the field; no text at all.
    """
    parts = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")  # as it lies there: no newline translation
        except OSError as error:
            raise CorpusError(path, f"cannot be read ({error.strerror})", "check --text") from error
        except UnicodeDecodeError as error:
            raise CorpusError(path, f"is not UTF-8 ({error})", "convert it first") from error
        parts.append(_json_lines(path, text, field) if path.suffix == ".jsonl" else text)
    joined = "".join(parts)
    if not joined.strip():
        raise CorpusError(", ".join(map(str, paths)), "holds no text", "give another --text")
    return joined


def _json_lines(path: Path, text: str, field: str) -> str:
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError):
            value = None
        if not isinstance(value, str):
            raise CorpusError(
                f"{path}: line {number}", f"has no text field {field!r}", "name it by --text-field"
            )
        values.append(value)
    return "\n\n".join(values)


def tokenize(text: str, directory: Path) -> np.ndarray:
    """Token ids of ``text`` by the checkpoint's tokenizer.json, (n,), int32.

    Raises:
      CorpusError: where there is no tokenizer.json or it cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise CorpusError(path, "no such file", "give token ids by --tokens instead of --text")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CorpusError(path, f"is no tokenizer ({error})", "get it again") from error
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def read_tokens(path: Path) -> np.ndarray:
    """Token ids from a .npy file, or the only tensor of a .safetensors file, as stored.

    Raises:
      CorpusError: where it cannot be read or holds no whole numbers.
    """
    try:
        if path.suffix == ".safetensors":
            arrays = list(load_file(path).values())
            if len(arrays) != 1:
                raise ValueError(f"{len(arrays)} tensors where one is wanted")
            ids = arrays[0]
        else:
            ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise CorpusError(path, f"cannot be read as token ids ({error})", "check it") from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        raise CorpusError(
            path, f"is {ids.dtype} of shape {ids.shape}", "give whole numbers, (n,) or (n, length)"
        )
    return ids


def sequences(
    ids: np.ndarray,
    samples: int | None,
    length: int,
    vocab_size: int,
    where: object,
    shuffle: int | None = None,
) -> np.ndarray:
    """Cut token ids into sequences.

    Args:
      ids: (n,), or (n, length) which is taken as it is.
      samples: how many sequences; None takes all that are there.
      length: tokens in each.
      vocab_size: every id must be below it.
      where: what the ids came from, for messages.
      shuffle: a seed, to draw windows at random positions instead of consecutive ones.

    Returns:
      (samples, length), int32.

    Raises:
      CorpusError: where there are too few; says how many are missing.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise CorpusError(
            where, f"has token ids up to {ids.max()} for a vocabulary of {vocab_size}",
            "use this model's tokenizer",
        )  # fmt: skip
    if ids.ndim == 2:
        if ids.shape[1] != length:
            raise CorpusError(
                where, f"has sequences of {ids.shape[1]}", f"give --sequence-length {ids.shape[1]}"
            )
    elif shuffle is None:
        ids = ids[: len(ids) // length * length].reshape(-1, length)
    wanted = samples if samples is not None else max(len(ids), 1)
    have = ids.shape[0] if ids.ndim == 2 else ids.size // length
    if have < wanted:
        raise CorpusError(
            where,
            f"gives {have} of {wanted} sequences of {length} tokens, "
            f"{(wanted - have) * length:,} tokens short",
            "give more text, fewer --samples or a shorter --sequence-length",
        )
    if shuffle is None:
        return np.ascontiguousarray(ids[:wanted], np.int32)
    random = np.random.default_rng(shuffle)
    if ids.ndim == 2:
        return np.ascontiguousarray(ids[random.permutation(len(ids))[:wanted]], np.int32)
    starts = random.integers(0, ids.size - length + 1, wanted)
    return np.stack([ids[start : start + length] for start in starts]).astype(np.int32)


def fingerprint(tokens: np.ndarray) -> str:
    """SHA-256 of the sequences' shape and ids, in hexadecimal."""
    return hashlib.sha256(repr(tokens.shape).encode() + tokens.tobytes()).hexdigest()
