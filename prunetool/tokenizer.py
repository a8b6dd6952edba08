"""The tokenizer of a checkpoint: text -> token ids, and the token that begins a text.

Its file is untrusted: its rules are checked before they run, and any failure of the library becomes
a one-line error.
"""

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, models

from prunetool import pieces
from prunetool.checkpoint.index import read_json, tokenizer_path
from prunetool.checkpoint.sentencepiece_model import build_tokenizer, read_sentencepiece
from prunetool.errors import CorpusError

TOKENIZER_BYTES = 128 << 20  # the largest in use have about 35 MB
MOST_GROWTH = 100  # T5's and ALBERT's rules, counted as `_growth` does, come to 72

# The most characters that Unicode's own rules make from one, as of Unicode 15.
FORMS = {"NFC": 3.0, "NFD": 4.0, "NFKC": 18.0, "NFKD": 18.0, "Lowercase": 2.0}


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load a checkpoint's tokenizer.json or tokenizer.model, configured for inference.

    Leftovers of training in tokenizer.json are switched off: truncation, padding, and BPE's random
    dropout. Rules may multiply a text's length by `MOST_GROWTH` at most.

    Raises:
      CorpusError: if both are missing, it is damaged, or it would take up all memory.
      ConfigError: if a tokenizer.model is damaged or unsupported, see `read_sentencepiece`.
    """
    path = tokenizer_path(directory)
    if not path.exists():
        raise CorpusError(path, "no such file", "give token ids with --tokens instead of --text")
    if not path.is_file():  # reading a named pipe would block
        raise CorpusError(path, "is not a regular file", "download it again")
    if path.stat().st_size > TOKENIZER_BYTES:
        raise CorpusError(
            path,
            f"is {path.stat().st_size >> 20:,} MiB, but at most {TOKENIZER_BYTES >> 20} are read",
            "download it again",
        )
    try:
        document = json.loads(
            path.read_bytes() if path.suffix == ".json" else _sentencepiece(path).to_str()
        )
        growth = max(
            _growth(_rules([document.get("normalizer"), document.get("pre_tokenizer")])),
            _growth(_rules([document.get("decoder")])),
        )
    except OSError as error:
        raise CorpusError(path, f"cannot be read ({error.strerror})", "check it") from error
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise CorpusError(path, f"is not a tokenizer ({error})", "download it again") from error
    if growth > MOST_GROWTH:
        raise CorpusError(
            path,
            f"has rules that turn one character into {growth:,.4g}; at most {MOST_GROWTH} are "
            "allowed",
            "download it again, or give token ids with --tokens",
        )
    document |= {"truncation": None, "padding": None}
    with _library(path, "is not a tokenizer"):
        document["model"].pop("dropout", None)
        return Tokenizer.from_str(json.dumps(document))


def _sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model, which adds BOS by default, as LlamaTokenizer does."""
    model = read_sentencepiece(path)
    config_path = path.with_name("tokenizer_config.json")
    config = read_json(config_path) if config_path.exists() else {}
    bos = None
    if config.get("add_bos_token") is not False:
        texts = model.vocabulary.texts
        own = texts[model.bos] if 0 <= model.bos < len(texts) else None
        named = named_token(config, "bos_token")
        bos = named if named in model.vocabulary.ids else own
    with _no_stderr():
        return build_tokenizer(path, model, bos)


def tokenize(parts: Iterable[str], directory: Path) -> Iterator[np.ndarray]:
    """Token ids of a text from the checkpoint's tokenizer, part by part, int32, without a BOS.

    They equal those of the whole text (see `pieces`); no more of it is read than needed.

    Raises:
      CorpusError: see `load_tokenizer`; or if the tokenizer fails on this text.
    """
    path, tokenizer = tokenizer_path(directory), load_tokenizer(directory)

    def encode(texts: Sequence[str]) -> Sequence[Encoding]:
        with _library(path, "cannot tokenise the text"):
            encodings: list[Encoding] = tokenizer.encode_batch(texts, add_special_tokens=False)
            return encodings

    yield from pieces.token_ids(parts, tokenizer, encode)


def encode_all(texts: Sequence[str], directory: Path) -> list[list[int]]:
    """Token ids of short texts from the checkpoint's tokenizer, without a BOS.

    Raises:
      CorpusError: see `tokenize`.
    """
    tokenizer = load_tokenizer(directory)
    with _library(tokenizer_path(directory), "cannot tokenise the text"):
        return [
            encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)
        ]


@contextmanager
def _library(path: Path, what: str) -> Iterator[None]:
    """Raise CorpusError for any failure of the tokenizers library, including a Rust panic.

    A panic is a BaseException, and prints a backtrace to stderr's file descriptor.
    """
    try:
        with _no_stderr():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CorpusError(path, f"{what} ({error})", "download it again") from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # the program was started without stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _rules(parts: list[Any]) -> list[dict[str, Any]]:
    """The rules in parts of a tokenizer.json, flattened, in order of use."""
    rules: list[dict[str, Any]] = []
    todo: list[Any] = [parts]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += reversed(part)
        elif isinstance(part, dict):
            rules.append(part)
            todo += [value for value in part.values() if isinstance(value, list)]
    return rules


def _growth(rules: list[dict[str, Any]]) -> float:
    """The most characters that these rules can make from one.

    From the last rule to the first, a character's weight is the length it ends up with. Replacing p
    by c needs Σ weight(pᵢ) ≥ weight(c), which holds if each pᵢ gets at least weight(c) / |p|. A
    pattern may match the empty string, and then c is added to every character. Consecutive Unicode
    normal forms count once, as they leave normalised text unchanged.

    Raises:
      ValueError: if a table of replacements contradicts itself.
    """
    weights: dict[str, float] = {}  # above `beside`; absent characters have `rest`
    beside, rest, peak, form = 0.0, 1.0, 1.0, 1.0

    def weight(text: str) -> float:
        return sum(weights.get(letter, rest) for letter in text) + beside * len(text)

    for rule in reversed(rules):
        kind, times, more = rule.get("type"), 1.0, 0.0
        if kind in FORMS:
            times, form = max(1.0, FORMS[kind] / form), max(form, FORMS[kind])
        elif "precompiled_charsmap" in rule:
            times = form = _longest_replacement(rule["precompiled_charsmap"])
        elif kind == "ByteLevel":
            times, form = 4.0, 1.0  # bytes of a character in UTF-8
        elif "prepend" in rule or "replacement" in rule:  # Prepend, Metaspace
            more, form = weight(rule.get("prepend", "") + rule.get("replacement", "")), 1.0
        elif kind == "BertNormalizer":
            more, form = 2 * weight(" "), 1.0
        elif "pattern" in rule and "content" in rule:
            form, content = 1.0, weight(rule["content"])
            if pattern := rule["pattern"].get("String"):
                for letter in set(pattern):
                    heavier = max(weight(letter), content / len(pattern))
                    weights[letter], peak = heavier - beside, max(peak, heavier)
            else:
                more = content
        if times > 1:
            weights, beside, rest, peak = {}, 0.0, peak * times, peak * times
        beside, peak = beside + more, peak + more
        if peak > 1e12:  # enough to refuse; beyond, rounding would hide differences
            break
    return peak


def _longest_replacement(table: str) -> float:
    """Length of the longest replacement in SentencePiece's table (base64).

    The table: size of its trie in bytes (uint32, little-endian), trie, NUL-terminated replacements.
    """
    data = base64.b64decode(table)
    trie_bytes = int.from_bytes(data[:4], "little")
    if not 4 <= trie_bytes <= len(data) - 4:
        raise ValueError("its precompiled_charsmap is cut or damaged")
    return max(1.0, *(len(part.decode()) for part in data[4 + trie_bytes :].split(b"\0")))


def bos_id(
    directory: Path, vocab_size: int, how: str, tokens_path: Path | None = None
) -> int | None:
    """The token that begins every window, or None.

    Args:
      directory: the checkpoint's directory.
      vocab_size: the checkpoint's vocabulary size.
      how: ``never``; ``auto``: by the template in tokenizer.json, the only thing that counts in
        transformers (it ignores add_bos_token if there is a tokenizer.json), or for a
        tokenizer.model unless add_bos_token forbids it; ``always``: even if that adds none, from
        bos_token of tokenizer_config.json or bos_token_id of config.json.
      tokens_path: a token file instead of text, to which ``auto`` adds nothing.

    Raises:
      CorpusError: if no BOS can be found, or it is outside the vocabulary.
    """
    if how == "never" or (how == "auto" and tokens_path):
        return None
    path = tokenizer_path(directory)
    tokenizer = load_tokenizer(directory) if how == "auto" or path.exists() else None
    with _library(path, "has a template that does not work"):
        start = template_ends(tokenizer)[0] if tokenizer else []
    if how == "auto" and len(start) > 1:
        raise CorpusError(
            path, f"puts {len(start)} tokens before a text", "give --bos always or --bos never"
        )
    found = start[0] if len(start) == 1 else None
    if how == "always" and found is None:
        found = _named_bos(directory, tokenizer)
        if found is None:
            raise CorpusError(
                directory, "names no BOS token in its tokenizer or config.json", "give --bos never"
            )
    if found is not None and not 0 <= found < vocab_size:
        raise CorpusError(
            directory,
            f"has BOS token {found}, outside the vocabulary of {vocab_size}",
            "give --bos never, or the model's own tokenizer",
        )
    return found


def template_ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer's template puts before a text, and behind it."""
    text = Tokenizer(models.WordLevel({"text": 0}, unk_token="text")).encode("text")
    whole = tokenizer.post_process(text)
    place = whole.special_tokens_mask.index(0)
    return list(whole.ids[:place]), list(whole.ids[place + 1 :])


def named_token(config: Mapping[str, Any], key: str) -> str | None:
    """The text of a special token in a tokenizer_config.json, by its key such as ``bos_token``."""
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_bos(directory: Path, tokenizer: Tokenizer | None) -> int | None:
    path = directory / "tokenizer_config.json"
    token = named_token(read_json(path), "bos_token") if path.exists() else None
    found = tokenizer.token_to_id(token) if tokenizer and token is not None else None
    if found is None:
        found = read_json(directory / "config.json").get("bos_token_id")
    return found if isinstance(found, int) and not isinstance(found, bool) else None
