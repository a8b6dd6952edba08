"""Text or token files -> sequences of token ids, without anything that the user did not give.

All text is one string (files joined as they are) whose ids come part by part, so that only the
sequences are in memory. They are consecutive windows from its start, and no more text is read than
needed; or, with a seed, windows at random positions of all of it, as in the papers. With a BOS,
each window is the BOS and one token of text fewer: the text is still used without gaps.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from prunetool.chat import conversation_text
from prunetool.dataset import Dataset
from prunetool.errors import CorpusError
from prunetool.text import ROWS, Column, read_text
from prunetool.tokenizer import bos_id, tokenize

DEFAULT_LENGTH = 2048
PART_TOKENS = 1 << 20  # of a token file, read at a time


class Text(NamedTuple):
    """The text to give a model, and how it is cut.

    Attributes:
      texts: text files, joined.
      field: field of JSON lines and Parquet.
      tokens_path: a file of token ids instead.
      length: tokens per sequence.
      bos: ``auto``, ``always`` or ``never`` (`tokenizer.bos_id`).
      by_model: no text: the model writes its own (`steps.selftext`).
      dataset: a data set of the Hub instead.
      chat: the rows are conversations (`chat.conversation_text`).
    """

    texts: Sequence[Path] = ()
    field: str = "text"
    tokens_path: Path | None = None
    length: int = DEFAULT_LENGTH
    bos: str = "auto"
    by_model: bool = False
    dataset: Dataset | None = None
    chat: bool = False

    @property
    def said(self) -> dict[str, Any]:
        """What the history says of a data set, of token ids, and of conversations."""
        said: dict[str, Any] = {"chat": True} if self.chat else {}
        if self.tokens_path:
            said["tokens_file"] = True
        if not self.dataset:
            return said
        column = self.dataset.column
        own = {"text_field": column} if column else {}
        return {"dataset": self.dataset.pinned, "split": self.dataset.split, **own, **said}

    @property
    def files(self) -> list[Path]:
        """All its files."""
        return [*self.texts, *([self.tokens_path] if self.tokens_path else [])]

    @property
    def where(self) -> str:
        """Its name in messages."""
        return self.dataset.where if self.dataset else ", ".join(map(str, self.files))

    def load(
        self, directory: Path, vocab_size: int, samples: int | None, shuffle: int | None = None
    ) -> tuple[np.ndarray, int | None]:
        """Make the sequences with a checkpoint's tokenizer; also returns the BOS they begin with.

        See `read_text`, `tokenize`, `read_tokens`, `bos_id` and `sequences`, which raise
        CorpusError.

        Args:
          directory: the checkpoint's directory.
          vocab_size: the checkpoint's vocabulary size.
          samples, shuffle: as in `sequences`.

        Returns:
          (samples, length) int32; the BOS, or None.
        """
        # A chat template writes its own BOS.
        how = "never" if self.chat and self.bos == "auto" else self.bos
        bos = bos_id(directory, vocab_size, how, self.tokens_path)
        where = self.where
        ids: np.ndarray | Iterator[np.ndarray]
        render = conversation_text(directory) if self.chat else None
        if self.dataset:
            known = self.dataset.known
            column = Column(known.field, "" if self.chat else known.between, render)
            parts = read_text(self.dataset.paths(), column, where, rows=True)
            ids = tokenize(parts, directory)
        elif self.tokens_path:
            ids = read_tokens(self.tokens_path)
        else:
            column = Column(self.field, "" if self.chat else ROWS, render)
            ids = tokenize(read_text(self.texts, column, where), directory)
        return sequences(ids, samples, self.length, vocab_size, where, shuffle, bos), bos


def read_tokens(path: Path) -> np.ndarray:
    """Token ids from a .npy file, or the only tensor of a .safetensors file, as stored.

    Raises:
      CorpusError: if it cannot be read or does not hold whole numbers.
    """
    if path.exists() and not path.is_file():  # a pipe cannot be mapped
        raise CorpusError(
            path, "is not a regular file", "write the ids with numpy.save('ids.npy', ids)"
        )
    try:
        ids = _safetensors_ids(path) if path.suffix.lower() == ".safetensors" else _npy_ids(path)
    except OSError as error:
        why = error.strerror or error
        raise CorpusError(path, f"cannot be read ({why})", "check --tokens") from error
    except Exception as error:  # NumPy's header parser can raise anything
        raise CorpusError(
            path,
            f"cannot be read as token ids ({str(error) or type(error).__name__})",
            "write the ids with numpy.save('ids.npy', ids); give text with --text",
        ) from error
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        raise CorpusError(
            path, f"is {ids.dtype} of shape {ids.shape}", "give whole numbers, (n,) or (n, length)"
        )
    return ids


def _safetensors_ids(path: Path) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"{len(names)} tensors instead of one")
        return np.asarray(file.get_tensor(names[0]))


def _npy_ids(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it is neither .npy nor .safetensors")
    with warnings.catch_warnings(action="ignore"):
        # Mapped, so that the shape is checked against the file's size before memory is taken.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def sequences(
    ids: np.ndarray | Iterable[np.ndarray],
    samples: int | None,
    length: int,
    vocab_size: int,
    where: object,
    shuffle: int | None = None,
    bos: int | None = None,
) -> np.ndarray:
    """Cut token ids into sequences.

    Args:
      ids: (n,), or its parts in order, of which no more are taken than needed; or (n, length),
        which is used as it is.
      samples: how many sequences; None for all.
      length: tokens per sequence.
      vocab_size: every id used must be below it.
      where: the ids' source, for messages.
      shuffle: a seed, to draw windows at random positions instead of consecutive ones.
      bos: the token that begins each sequence, before ``length - 1`` of the ids.

    Returns:
      (samples, length), int32.

    Raises:
      CorpusError: if there are too few (says how many are missing), one is outside the
        vocabulary, or there is a BOS but the sequences are already whole.
    """
    own = length if bos is None else length - 1
    if isinstance(ids, np.ndarray):
        _check(ids, vocab_size, where)
    if isinstance(ids, np.ndarray) and ids.ndim == 2:
        windows = _whole(ids, length, bos, where)
        have = len(windows)
        if shuffle is not None:
            windows = windows[np.random.default_rng(shuffle).permutation(have)]
    else:
        parts = _parts(ids, vocab_size, where)
        if shuffle is None or samples is None:
            windows = _consecutive(parts, samples, own)
            have = len(windows)
        else:
            windows, have = _drawn(parts, samples, own, shuffle)
    wanted = samples if samples is not None else max(have, 1)
    if have < wanted:
        raise CorpusError(
            where,
            f"gives {have} of {wanted} sequences of {length} tokens, "
            f"{(wanted - have) * own:,} tokens short",
            f"give {f'--samples {have}, ' if have else ''}more text or a shorter --sequence-length",
        )
    windows = windows[:wanted]
    if bos is not None:
        windows = np.pad(windows, ((0, 0), (1, 0)), constant_values=bos)
    return np.ascontiguousarray(windows, np.int32)


def pictures(
    ids: np.ndarray,
    samples: int | None,
    codes: int,
    vocab_size: int,
    classes: int,
    where: object,
    shuffle: int | None = None,
) -> np.ndarray:
    """Sequences of a model of pictures: the class, then the codes in raster order.

    Args:
      ids: (n, 1 + codes): ``vocab_size`` + class, then codes below ``vocab_size``.
      samples, where, shuffle: as in `sequences`.
      codes: codes of a picture.
      vocab_size, classes: numbers of codes and of classes there are.

    Returns:
      (samples, 1 + codes), int32.

    Raises:
      CorpusError: if they are something else, or too few.
    """
    todo = "give what prunetool sample writes for this model"
    wanted = samples or 1
    if ids.ndim != 2 or ids.shape[1] != codes + 1:
        raise CorpusError(
            where, f"is of shape {ids.shape}; a picture is its class and {codes} codes", todo
        )
    _check(ids, vocab_size + classes, where)
    if ids[:, 0].min() < vocab_size or ids[:, 1:].max() >= vocab_size:
        raise CorpusError(
            where,
            f"holds no pictures: each is a class (id {vocab_size} and up), then codes below that",
            todo,
        )
    if len(ids) < wanted:
        raise CorpusError(
            where, f"has {len(ids)} of {wanted} pictures", "sample more, or give fewer --samples"
        )
    return sequences(ids, samples, codes + 1, vocab_size + classes, where, shuffle)


def _check(ids: np.ndarray, vocab_size: int, where: object) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        worst = f"the token id {ids.min()}" if ids.min() < 0 else f"token ids up to {ids.max()}"
        raise CorpusError(
            where,
            f"has {worst}, outside the vocabulary of {vocab_size}",
            "use this model's tokenizer",
        )


def _parts(
    ids: np.ndarray | Iterable[np.ndarray], vocab_size: int, where: object
) -> Iterator[np.ndarray]:
    if isinstance(ids, np.ndarray):  # perhaps a mapped file
        for start in range(0, len(ids), PART_TOKENS):
            yield ids[start : start + PART_TOKENS]
    else:
        for part in ids:
            _check(part, vocab_size, where)
            yield part


def _whole(ids: np.ndarray, length: int, bos: int | None, where: object) -> np.ndarray:
    """Sequences used as stored in a file."""
    if bos is not None:
        raise CorpusError(
            where,
            "holds whole sequences, which a BOS would lengthen",
            "put it into the file, or give --bos auto",
        )
    if ids.shape[1] != length:
        raise CorpusError(
            where,
            f"has sequences of {ids.shape[1]} tokens",
            f"give --sequence-length {ids.shape[1]}",
        )
    return ids


def _consecutive(parts: Iterator[np.ndarray], samples: int | None, own: int) -> np.ndarray:
    """The first windows, (samples, own) or as many as there are; None for all."""
    found, have = [], 0
    for ids in parts:
        found.append(ids if samples is None else ids[: samples * own - have])
        have += len(found[-1])
        if samples is not None and have == samples * own:
            break
    joined = np.concatenate([np.zeros(0, np.int32), *found], dtype=np.int32, casting="unsafe")
    return joined[: have // own * own].reshape(-1, own)


def _drawn(
    parts: Iterator[np.ndarray], samples: int, own: int, seed: int
) -> tuple[np.ndarray, int]:
    """Windows whose starts are drawn uniformly and independently among all possible ones.

    One pass that keeps little but the windows, each its own reservoir: each of the i starts seen
    so far is the window's with probability 1 / i. So with probability i / t no start before the
    t-th replaces it, and the next one to do so is number floor(i / u), counted from zero, u uniform
    in (0, 1]. It depends on the seed and the window's number, not on the parts.

    Returns:
      The windows, (samples, own), int32, and how many the ids have without overlap; if these are
      fewer than ``samples``, no windows.
    """
    first, have = [], 0  # enough that memory is taken only for windows that exist
    while have < samples * own and (part := next(parts, None)) is not None:
        first.append(part)
        have += len(part)
    if have < samples * own:
        return np.zeros((0, own), np.int32), have // own
    windows = np.zeros((samples, own), np.int32)
    random = np.random.default_rng(seed).spawn(samples)
    upcoming = [0] * samples  # the next start to replace each window's
    ids, before = np.zeros(0, np.int32), 0  # where windows may still begin; number of starts before
    for part in chain(first, parts):
        ids = np.concatenate([ids, part], dtype=np.int32, casting="unsafe")
        room = max(0, len(ids) - own + 1)
        for window in range(samples):
            start = None
            while upcoming[window] < before + room:
                start = upcoming[window]
                upcoming[window] = int((start + 1) / (1 - random[window].random()))
            if start is not None:
                windows[window] = ids[start - before : start - before + own]
        ids, before = ids[room:], before + room
    return windows, (before + len(ids)) // own


def fingerprint(tokens: np.ndarray) -> str:
    """SHA-256 of the sequences' shape and ids, in hexadecimal."""
    found = hashlib.sha256(repr(tokens.shape).encode())
    found.update(np.ascontiguousarray(tokens).data)
    return found.hexdigest()
