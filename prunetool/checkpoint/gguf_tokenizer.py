"""The tokenizer in a GGUF header -> tokenizer.json and its companions.

A GGUF identifies its pre-tokenizer only by a name; only names whose splitting is known exactly are
accepted, since a different split would silently give different ids. Defaults are llama.cpp's
(src/llama-vocab.cpp).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from prunetool.checkpoint.gguf import GGUFModel
from prunetool.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
LLAMA3 = ("llama-bpe", "llama-v3", "llama3")
BYTE_LEVEL = ("gpt-2", "smollm", "qwen2", *LLAMA3)
# The published splitting of Llama 3, and of Qwen2, which splits off single digits.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
SPACE = "\u2581"  # SentencePiece's mark for a space
ENDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # a GGUF's name, ours
TEMPLATE = "tokenizer.chat_template"  # of the default one; .NAME of others


class Vocabulary(NamedTuple):
    """Texts by id, the type of each, and the ids by text."""

    texts: list[str]
    types: list[int]
    ids: dict[str, int]


def build_tokenizer(model: GGUFModel) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``).

    Raises:
      ConfigError: if its kind or pre-tokenizer is unknown, or its parts are inconsistent.
    """
    kind = model.required("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ConfigError(model.path, f"tokenizer {kind!r}", f"supported: {', '.join(builders)}")
    vocabulary = _vocabulary(model)
    tokenizer = builders[kind](model, vocabulary)
    added = [
        AddedToken(text, special=type_ == CONTROL, normalized=False)
        for text, type_ in zip(vocabulary.texts, vocabulary.types, strict=True)
        if type_ in (CONTROL, USER_DEFINED)
    ]
    bos, eos = _ends_added(model)
    first = [] if bos is None else [vocabulary.texts[bos]]
    last = [] if eos is None else [vocabulary.texts[eos]]
    with refusals(model.path):
        tokenizer.add_tokens(added)
        if first or last:
            pair = [*first, "$A:0", *last, *(f"{text}:1" for text in first), "$B:1"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*first, "$A:0", *last],
                pair=[*pair, *(f"{text}:1" for text in last)],
                special_tokens=[(text, vocabulary.ids[text]) for text in {*first, *last}],
            )
    return tokenizer


def tokenizer_config(model: GGUFModel) -> dict[str, Any]:
    """tokenizer_config.json: the class, the special tokens, the chat template.

    Raises:
      ConfigError: if one of these cannot be read.
    """
    texts = _vocabulary(model).texts
    bos, eos = _ends_added(model)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.required(model.key("context_length"), int),
        "add_bos_token": bos is not None,
        "add_eos_token": eos is not None,
    }
    for theirs, ours in ENDS.items():
        number = model.special_id(theirs)
        if number is not None:
            config[f"{ours}_token"] = texts[number]
    named = {}
    if template := model.value(TEMPLATE, str):
        named["default"] = template
    if model.has(f"{TEMPLATE}s"):
        for name in model.values(f"{TEMPLATE}s", str):
            named[name] = model.required(f"{TEMPLATE}.{name}", str)
    if not named:
        return config
    listed = [{"name": name, "template": text} for name, text in named.items()]
    return {**config, "chat_template": template if [*named] == ["default"] else listed}


def _ends_added(model: GGUFModel) -> tuple[int | None, int | None]:
    """Ids of the BOS and EOS tokens added to every text; None if not added.

    Without a flag, SentencePiece vocabularies and Llama 3's add BOS.
    """
    sentencepiece = model.value("tokenizer.ggml.model", str) == "llama"
    by_default = sentencepiece or model.value("tokenizer.ggml.pre", str) in LLAMA3
    ids: list[int | None] = []
    for name, default in (("bos", by_default), ("eos", False)):
        stated = model.value(f"tokenizer.ggml.add_{name}_token", bool)
        number = model.special_id(name)
        if stated and number is None:
            raise ConfigError(
                model.path,
                f"adds {name.upper()}, but has no tokenizer.ggml.{name}_token_id",
                "download it again",
            )
        ids.append(number if (default if stated is None else stated) else None)
    return ids[0], ids[1]


def _vocabulary(model: GGUFModel) -> Vocabulary:
    key = "tokenizer.ggml.tokens"
    # llama.cpp gives an empty token a name, too.
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(model.values(key, str))]
    if len(texts) != model.vocab_size:
        raise ConfigError(
            model.path,
            f"has {len(texts)} tokens but {model.vocab_size} rows of token_embd.weight",
            "download it again",
        )
    ids: dict[str, int] = {}
    for number, text in enumerate(texts):
        if ids.setdefault(text, number) != number:
            raise ConfigError(
                model.path,
                f"token {text!r} has the ids {ids[text]} and {number}",
                "download it again",
            )
    key = "tokenizer.ggml.token_type"
    stated = model.has(key)
    types = _of_each_token(model, key, len(texts), int) if stated else [NORMAL] * len(texts)
    return Vocabulary(texts, types, ids)


def _of_each_token(model: GGUFModel, key: str, count: int, *kinds: type) -> list[Any]:
    found = model.values(key, *kinds)
    if len(found) != count:
        raise ConfigError(
            model.path, f"{key} has {len(found)} values for {count} tokens", "download it again"
        )
    return found


def _byte_level(model: GGUFModel, vocabulary: Vocabulary) -> Tokenizer:
    word = model.value("tokenizer.ggml.pre", str, "default")
    if word not in BYTE_LEVEL:
        known = ", ".join(sorted(BYTE_LEVEL))
        raise ConfigError(model.path, f"pre-tokenizer {word!r}", f"supported: {known}")
    merges = []
    for text in dict.fromkeys(model.values("tokenizer.ggml.merges", str)):  # the first one counts
        cut = text.find(" ", 1)
        merge = text[:cut], text[cut + 1 :]
        if cut < 0 or not {*merge, "".join(merge)} <= vocabulary.ids.keys():
            raise ConfigError(
                model.path, f"merge {text!r} is not in its vocabulary", "download it again"
            )
        merges.append(merge)
    splits = {"qwen2": QWEN2_SPLIT, **dict.fromkeys(LLAMA3, LLAMA3_SPLIT)}
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=word not in splits)
    with refusals(model.path):
        # Llama 3 keeps a word that is a token whole, whatever the merges would give.
        tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=word in LLAMA3))
        if word in splits:
            split = pre_tokenizers.Split(Regex(splits[word]), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        elif word == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
        else:
            tokenizer.pre_tokenizer = plain
        if word == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(model: GGUFModel, vocabulary: Vocabulary) -> Tokenizer:
    texts, types, ids = vocabulary
    scores = _of_each_token(model, "tokenizer.ggml.scores", len(texts), float, int)
    for text, score in zip(texts, scores, strict=True):
        if not math.isfinite(score):
            raise ConfigError(
                model.path, f"token {text!r} has the score {score}", "download it again"
            )
    merges = merges_by_score(vocabulary, scores)
    unknown = next((t for t, type_ in zip(texts, types, strict=True) if type_ == UNKNOWN), None)
    prefix = model.value("tokenizer.ggml.add_space_prefix", bool, True)
    replace = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    with refusals(model.path):
        tokenizer = Tokenizer(
            models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = (
            normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
        )
        tokenizer.decoder = decoders.Sequence(
            [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
        )
    return tokenizer


def merges_by_score(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE, in the order to try them.

    SentencePiece merges the pair whose result scores best; every way to make a piece is a merge. It
    breaks ties by the leftmost in the text; a list of merges can only take the lower id, which is
    the same if all scores differ, as those from its trainer do.
    """
    texts, types, ids = vocabulary
    normal = {t for t, type_ in zip(texts, types, strict=True) if type_ in (NORMAL, USER_DEFINED)}
    ranked = []
    for text in normal:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                rank = (-scores[ids[text]], ids[text], ids[left], ids[right])
                ranked.append((rank, (left, right)))
    return [pair for _, pair in sorted(ranked)]


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what the tokenizers library refuses into a one-line error.

    It raises bare exceptions, and its panics are not even derived from `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(
            path, f"its tokenizer cannot be built ({error})", "download it again"
        ) from error
