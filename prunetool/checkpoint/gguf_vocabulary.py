"""tokenizer.json and its companions -> the tokenizer in a GGUF header; `gguf_tokenizer` reads it.

llama.cpp knows how a byte-level tokenizer splits text only by a name, so only a splitting whose
name is known exactly is written.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from prunetool.checkpoint.gguf_tokenizer import (
    BYTE,
    CONTROL,
    ENDS,
    LLAMA3_SPLIT,
    NORMAL,
    QWEN2_SPLIT,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    merges_by_score,
)
from prunetool.errors import ConfigError

# What splits text, in the order of use, and whether a word that is a token stays whole.
PRE_TOKENIZERS = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", LLAMA3_SPLIT), ("ByteLevel", False)): ("llama-bpe", True),
    (("Split", QWEN2_SPLIT), ("ByteLevel", False)): ("qwen2", False),
}
WITHOUT = "try llama.cpp's own convert_hf_to_gguf.py, if all layers are alike"


class Ends(NamedTuple):
    """Special tokens, by id; None if there is none.

    Attributes:
      bos, eos, unknown, padding: the tokens.
      adds_bos, adds_eos: whether the tokenizer puts them around a text.
    """

    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    adds_bos: bool
    adds_eos: bool


def vocabulary_fields(
    where: object,
    document: Mapping[str, Any],
    vocab_size: int,
    ends: Ends,
    templates: Mapping[str, str],
) -> dict[str, Any]:
    """The header's fields of a tokenizer.

    Args:
      where: its file, for errors.
      document: its tokenizer.json.
      vocab_size: rows of the model's embedding; tokens that are missing get names of their own.
      ends: its special tokens.
      templates: chat templates by name.

    Raises:
      ConfigError: if llama.cpp would not give its ids.
    """
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise ConfigError(where, f"is a tokenizer of type {model['type']}", WITHOUT)
    _refuse_odd(where, document)
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    if not merges:
        raise ConfigError(where, "has no merges of its BPE", WITHOUT)
    vocabulary = _vocabulary(where, document, vocab_size)
    if model.get("byte_fallback"):
        fields = _sentencepiece(where, document, vocabulary, merges)
    else:
        fields = _byte_level(where, document, merges)
    fields |= {
        "tokens": vocabulary.texts,
        "token_type": vocabulary.types,
        "add_bos_token": ends.adds_bos,
        "add_eos_token": ends.adds_eos,
    }
    for name in ENDS:
        if (number := getattr(ends, name)) is not None:
            fields[f"{name}_token_id"] = number
    named = dict(templates)
    fields = {f"ggml.{key}": value for key, value in fields.items()}
    if "default" in named:
        fields["chat_template"] = named.pop("default")
    if named:
        fields["chat_templates"] = list(named)
        fields |= {f"chat_template.{name}": text for name, text in named.items()}
    return {f"tokenizer.{key}": value for key, value in fields.items()}


def _refuse_odd(where: object, document: Mapping[str, Any]) -> None:
    """Refuse rules that llama.cpp does not have."""
    model = document["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ConfigError(where, f"has {key} {model[key]!r}", WITHOUT)
    for token in document.get("added_tokens") or ():
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                raise ConfigError(where, f"has a token with {key}: {token['content']!r}", WITHOUT)


def _vocabulary(where: object, document: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    """Texts and types by id; SentencePiece's bytes and unknown token by their form."""
    model = document["model"]
    ids: dict[str, int] = dict(model["vocab"])
    special = {}
    for token in document.get("added_tokens") or ():
        ids[token["content"]] = token["id"]
        special[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    texts = {number: text for text, number in ids.items()}
    if texts and max(texts) >= vocab_size:
        raise ConfigError(
            where, f"has token {max(texts)}, outside the vocabulary of {vocab_size}", WITHOUT
        )
    if len(texts) != len(ids):
        raise ConfigError(where, "has two tokens with one id", "repair the tokenizer")

    def type_of(number: int) -> int:
        text = texts.get(number)
        if text is None:
            return UNUSED
        if model.get("byte_fallback"):
            if text == model.get("unk_token"):
                return UNKNOWN
            if len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">"):
                return BYTE
        return special.get(number, NORMAL)

    every = range(vocab_size)
    names = [texts.get(number, f"[PAD{number}]") for number in every]
    return Vocabulary(names, list(map(type_of, every)), {text: i for i, text in enumerate(names)})


def _rules(document: Mapping[str, Any], key: str, inside: str) -> list[Mapping[str, Any]]:
    """The rules of a part of a tokenizer.json, a sequence or a single one."""
    rule = document.get(key)
    if rule is None:
        return []
    return list(rule[inside]) if rule["type"] == "Sequence" else [rule]


def _byte_level(
    where: object, document: Mapping[str, Any], merges: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    rules = _rules(document, "pre_tokenizer", "pretokenizers")
    normal = [rule["type"] for rule in _rules(document, "normalizer", "normalizers")]
    name, whole = PRE_TOKENIZERS.get(tuple(map(_summary, rules)), ("", False))
    if whole != bool(document["model"].get("ignore_merges")) or normal != (
        ["NFC"] if name == "qwen2" and normal else []
    ):
        name = ""
    if not name:
        known = ", ".join(name for name, _ in PRE_TOKENIZERS.values())
        raise ConfigError(
            where, f"splits text in a way that has no name here (known: {known})", WITHOUT
        )
    return {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in merges]}


def _summary(rule: Mapping[str, Any]) -> tuple[str, Any]:
    """A rule that splits text, as `PRE_TOKENIZERS` has it; anything else is like none of these."""
    match rule:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "ByteLevel", rule.get("use_regex", True)
        case {"type": "Digits", "individual_digits": each}:
            return "Digits", each
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}:
            return "Split", "" if rule.get("invert") else pattern
    return str(rule["type"]), None


def _sentencepiece(
    where: object,
    document: Mapping[str, Any],
    vocabulary: Vocabulary,
    merges: Sequence[tuple[str, ...]],
) -> dict[str, Any]:
    """Scores of minus the place of a token's first merge: llama.cpp then merges in that order."""
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        places.setdefault("".join(merge), place)
    scores = [-float(places.get(text, len(merges))) for text in vocabulary.texts]
    # llama.cpp tries all ways to make a token at one time: they must follow each other.
    results = [result for result, _ in groupby(map("".join, merges))]
    if len(results) > len(places) or set(merges_by_score(vocabulary, scores)) != set(merges):
        raise ConfigError(where, "has merges that are not those of SentencePiece", WITHOUT)
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "add_space_prefix": _adds_space(where, document),
    }


def _adds_space(where: object, document: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text, which it replaces by its own mark."""
    rules = [
        *_rules(document, "normalizer", "normalizers"),
        *_rules(document, "pre_tokenizer", "pretokenizers"),
    ]
    adds = replaces = False
    for rule in rules:
        match rule:
            case {"type": "Prepend", "prepend": prepended} if prepended in (SPACE, " "):
                adds = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": content} if (
                content == SPACE
            ):
                replaces = True
            case {"type": "Metaspace", "replacement": mark, "split": False} if mark == SPACE:
                adds, replaces = rule.get("prepend_scheme", "always") != "never", True
            case _:
                replaces = False
                break
    if not replaces:
        raise ConfigError(where, "treats spaces in another way than SentencePiece", WITHOUT)
    return adds
