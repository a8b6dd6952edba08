"""tokenizer.model, SentencePiece's file -> a tokenizer with SentencePiece's ids.

The file is a protocol buffer (sentencepiece_model.proto), of which a few fields are needed. It is
read here because the sentencepiece package's reader works with few versions of protobuf and does
not install one.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from prunetool.checkpoint.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    merges_by_score,
    refusals,
)
from prunetool.errors import ConfigError

UNIGRAM, BPE = 1, 2
MOST_PIECES = 1 << 20  # Gemma's, the largest in use, has 262,144
KINDS = {3: "word", 4: "char"}  # not read


class SentencePieceModel(NamedTuple):
    """The contents of a tokenizer.model; defaults are the format's."""

    vocabulary: Vocabulary
    scores: list[float]
    kind: int = UNIGRAM
    byte_fallback: bool = False
    bos: int = 1  # -1: none
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra_spaces: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
      ConfigError: if it is damaged, or of an unsupported kind.
    """
    try:
        return _parsed(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(path, f"cannot be read ({error.strerror})", "check it") from error
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        why = error if isinstance(error, ValueError) else "a field has an invalid value"
        raise ConfigError(
            path, f"is not a SentencePiece model ({why})", "download it again"
        ) from error


def _parsed(data: bytes, path: Path) -> SentencePieceModel:
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    texts: list[str] = []
    types: list[int] = []
    scores: list[float] = []
    for part, value in _fields(data):
        if part == 1:
            piece = dict(_fields(value))
            texts.append(piece.get(1, b"").decode())
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, NORMAL))
            if not math.isfinite(scores[-1]):
                raise ValueError(f"piece {len(texts) - 1} has the score {scores[-1]}")
            if len(texts) > MOST_PIECES:
                raise ValueError(f"more than {MOST_PIECES:,} pieces")
        elif part in (2, 3):
            (trainer if part == 2 else normalizer).update(_fields(value))
    ids = {text: number for number, text in enumerate(texts)}
    if not texts or len(ids) < len(texts):
        raise ValueError("a piece appears twice" if texts else "it has no pieces")
    kind, charsmap = trainer.get(3, UNIGRAM), normalizer.get(2, b"")
    if not isinstance(kind, int) or not isinstance(charsmap, bytes):
        raise ValueError("its settings are invalid")
    if kind not in (UNIGRAM, BPE):
        raise ConfigError(
            path, f"is of model type {KINDS.get(kind, kind)}", "supported: BPE and unigram"
        )
    if trainer.get(24) or not normalizer.get(5, 1):
        raise ConfigError(
            path,
            "does not write a space as the beginning of a piece",
            "give token ids with --tokens",
        )
    return SentencePieceModel(
        Vocabulary(texts, types, ids), scores, kind, bool(trainer.get(35, 0)),
        _signed(trainer.get(41, 1)), charsmap, bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )  # fmt: skip


def build_tokenizer(path: Path, model: SentencePieceModel, bos: str | None) -> Tokenizer:
    """Build the tokenizer of a tokenizer.model.

    Its ids are SentencePiece's, except that a control piece written in the text (``<s>``) is that
    piece, as in transformers, and that the text after it or a user-defined piece starts afresh.

    Args:
      path: path of the file, for messages.
      model: its contents.
      bos: the piece that begins every text, if any.

    Raises:
      ConfigError: if its parts are inconsistent.
    """
    texts, types, ids = model.vocabulary
    unknown = next((i for i, type_ in enumerate(types) if type_ == UNKNOWN), None)
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if model.dummy_prefix:
        steps.insert(0, normalizers.Prepend(" "))
    if model.remove_extra_spaces:  # only spaces: other white space is up to the charsmap
        steps[:0] = [
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    with refusals(path):
        if model.kind == BPE:
            tokenizer = Tokenizer(
                models.BPE(
                    ids,
                    merges_by_score(model.vocabulary, model.scores),
                    fuse_unk=True,
                    unk_token=None if unknown is None else texts[unknown],
                    byte_fallback=model.byte_fallback,
                )
            )
        else:
            scored = list(zip(texts, model.scores, strict=True))
            tokenizer = Tokenizer(models.Unigram(scored, unknown, model.byte_fallback))
        if model.charsmap:
            steps.insert(0, normalizers.Precompiled(model.charsmap))
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer.add_tokens(
            [
                AddedToken(text, special=type_ == CONTROL, normalized=False)
                for text, type_ in zip(texts, types, strict=True)
                if type_ in (CONTROL, USER_DEFINED)
            ]
        )
        if bos is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A:0"], special_tokens=[(bos, ids[bos])]
            )
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: number, and its value as an int or bytes.

    Raises:
      ValueError: if they are cut off or invalid.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"no field at byte {at:,}")
        if size > len(data) - at:
            raise ValueError("it is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a number of up to ten bytes, seven bits each; also returns the next position."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it is cut off")
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise ValueError(f"no number at byte {at - 10:,}")


def _signed(number: int) -> int:
    """An int32; negative numbers are written as 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
