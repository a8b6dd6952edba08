"""The tokenizer in a GGUF header -> tokenizer.json and its companions.

A GGUF names its pre-tokenizer only by a word; the words known here are those whose splitting is
known exactly. A tokenizer that splits otherwise would give other ids without an error.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from prunetool.checkpoint.gguf import GGUFModel
from prunetool.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
# Llama 3's published splitting.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"  # SentencePiece writes a space so


def build_tokenizer(model: GGUFModel) -> Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``).

    Raises:
      ConfigError: where its kind or its pre-tokenizer is not known.
    """
    kind = model.required("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ConfigError(model.path, f"tokenizer {kind!r}", f"known: {', '.join(builders)}")
    tokenizer = builders[kind](model)
    texts, types = _vocabulary(model)
    tokenizer.add_tokens(
        [
            AddedToken(text, special=type_ == CONTROL, normalized=False)
            for text, type_ in zip(texts, types, strict=True)
            if type_ in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def tokenizer_config(model: GGUFModel) -> dict[str, Any]:
    """tokenizer_config.json: the class, the special tokens, the chat template."""
    texts, _ = _vocabulary(model)

    def text_of(key: str) -> str | None:
        number = model.value(f"tokenizer.ggml.{key}_token_id")
        return None if number is None else texts[number]

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.required("llama.context_length"),
    }
    for theirs, ours in (
        ("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")
    ):  # fmt: skip
        if text_of(theirs) is not None:
            config[f"{ours}_token"] = text_of(theirs)
    template = model.value("tokenizer.chat_template")
    return {**config, "chat_template": template} if template else config


def _vocabulary(model: GGUFModel) -> tuple[list[str], list[int]]:
    texts = model.required("tokenizer.ggml.tokens")
    types = model.value("tokenizer.ggml.token_type", [NORMAL] * len(texts))
    return texts, types


def _byte_level(model: GGUFModel) -> Tokenizer:
    texts, _ = _vocabulary(model)
    merges = [tuple(merge.split(" ", 1)) for merge in model.required("tokenizer.ggml.merges")]
    word = model.value("tokenizer.ggml.pre", "default")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splitting = {
        "gpt-2": lambda: plain,
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), plain]
        ),
        "llama-bpe": lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    splitting["llama3"] = splitting["llama-v3"] = splitting["llama-bpe"]
    if word not in splitting:
        raise ConfigError(
            model.path, f"pre-tokenizer {word!r}", f"known: {', '.join(sorted(splitting))}"
        )
    vocabulary = _numbered(texts)
    for merge in merges:  # the tokenizers library would panic
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ConfigError(
                model.path, f"merge {' '.join(merge)!r} is not of its vocabulary", "get it again"
            )
    # Llama 3 takes a word that is a token as it is, whatever the merges would give.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=word.startswith("llama")))
    tokenizer.pre_tokenizer = splitting[word]()  # type: ignore[no-untyped-call]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(model: GGUFModel) -> Tokenizer:
    texts, types = _vocabulary(model)
    scores = model.required("tokenizer.ggml.scores")
    vocabulary = _numbered(texts)
    normal = {t for t, type_ in zip(texts, types, strict=True) if type_ in (NORMAL, USER_DEFINED)}
    # SentencePiece merges the pair whose result scores best; every way to make a piece is a merge.
    ranked = []
    for text in normal:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                number = vocabulary[text]
                rank = (-scores[number], number, vocabulary[left], vocabulary[right])
                ranked.append((rank, (left, right)))
    merges = [pair for _, pair in sorted(ranked)]
    unknown = next((t for t, type_ in zip(texts, types, strict=True) if type_ == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(model.value("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
    )
    return tokenizer


def _numbered(texts: list[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(texts)}
