"""Accuracy at choosing the right continuation of a context, from the losses of all choices.

A file of items is JSON lines:

    {"context": "The castle was built", "choices": [" of stone", " of hope"], "answer": 0}

The tokens of a choice are those of context and choice together after those of the context alone
(which should not end with a space: most tokenizers join it to what follows). Two rules decide: the
least loss of a choice's tokens, and the least loss for each of its bytes, which does not favour
short ones.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from prunetool import console
from prunetool.checkpoint.index import tokenizer_path
from prunetool.errors import CorpusError, shown
from prunetool.llama import forward
from prunetool.model import Model
from prunetool.steps.evaluate import Ends, count_pieces, final_stream, pieces
from prunetool.tokenizer import bos_id, encode_all

AS_ITEMS = 'give lines like {"context": "…", "choices": ["…", "…"], "answer": 0}'


class Item(NamedTuple):
    """A context, its possible continuations, and the number of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """How many items were answered rightly, by both rules.

    Attributes:
      items: how many there are.
      by_loss, by_bytes: fractions of them.
    """

    items: int
    by_loss: float
    by_bytes: float

    def as_json(self) -> dict[str, Any]:
        """The result as JSON, with the standard error of the first rule."""
        p = self.by_loss
        return {
            "items": self.items,
            "accuracy": p,
            "accuracy_by_bytes": self.by_bytes,
            "standard_error": math.sqrt(p * (1 - p) / self.items),
        }


def read_items(path: Path) -> list[Item]:
    """Read a file of items.

    Raises:
      CorpusError: if it cannot be read, or a line is not an item; names it.
    """
    items: list[Item] = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CorpusError(path, f"cannot be read ({reason})", "check --choices") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            match value:
                case {"context": str(context), "choices": [*choices], "answer": int(answer)} if (
                    not isinstance(answer, bool)
                ):
                    pass
                case _:
                    raise ValueError("not an item")
            wrong = [c for c in choices if not isinstance(c, str) or not c]
            json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
            if wrong or len(choices) < 2 or not 0 <= answer < len(choices):
                raise ValueError("it needs two or more choices, all texts, one of them the answer")
        except (ValueError, RecursionError) as error:
            where = f"{path}: line {number}"
            raise CorpusError(where, f"is not an item ({shown(error, 80)})", AS_ITEMS) from error
        items.append(Item(context, tuple(choices), answer))
    if not items:
        raise CorpusError(path, "holds no items", AS_ITEMS)
    return items


@dataclass(frozen=True)
class Choices:
    """All choices of a file behind their contexts.

    Attributes:
      items: the items.
      tokens: ids, (choices, N), int32, zero behind the last one.
      chosen: which of them are a choice's, (choices, N), bool.
    """

    items: Sequence[Item]
    tokens: np.ndarray
    chosen: np.ndarray

    @classmethod
    def read(cls, path: Path, model: Model, how: str) -> "Choices":
        """Read and tokenise a file of items.

        Args:
          path: the file.
          model: the checkpoint, for its tokenizer.
          how: whether a context begins with the BOS (`tokenizer.bos_id`).

        Raises:
          CorpusError: see `read_items` and `bos_id`; or if a choice has no token of its own, or
            nothing before it, or a token is outside the vocabulary.
        """
        if not tokenizer_path(model.directory).exists():
            raise CorpusError(
                model.directory, "has no tokenizer", "--choices needs the model's own"
            )
        items, vocab_size = read_items(path), model.config.vocab_size
        bos = bos_id(model.directory, vocab_size, how)
        pairs = [(item.context, item.context + choice) for item in items for choice in item.choices]
        first = [] if bos is None else [bos]
        found = encode_all([text for pair in pairs for text in pair], model.directory)
        ids = [first + own for own in found]
        if max(max(own, default=0) for own in ids) >= vocab_size:
            raise CorpusError(
                path, "has tokens outside the vocabulary", "use this model's tokenizer"
            )
        contexts, wholes = ids[::2], ids[1::2]
        tokens = np.zeros((len(wholes), max(map(len, wholes))), np.int32)
        chosen = np.zeros(tokens.shape, bool)
        for row, (context, whole) in enumerate(zip(contexts, wholes, strict=True)):
            if not 0 < len(context) < len(whole):
                what = "has no token before it" if not context else "has no tokens of its own"
                text = shown(pairs[row][1], 60)
                raise CorpusError(path, f"a choice {what}: {text!r}", AS_ITEMS)
            tokens[row, : len(whole)] = whole
            chosen[row, len(context) : len(whole)] = True
        return cls(items, tokens, chosen)

    def accuracy(self, model: Model, dtype: str) -> Accuracy:
        """Measure a model.

        Args:
          model: the checkpoint.
          dtype: dtype of the products.
        """
        ends = Ends.of(model, dtype)

        @jax.jit
        def losses(h: jax.Array, targets: jax.Array, norm: jax.Array, head: jax.Array) -> jax.Array:
            return forward.token_losses(forward.logits(h, norm, head, eps=ends.eps), targets)

        tokens = self.tokens
        with tempfile.TemporaryDirectory(prefix="prunetool-") as directory:
            stream = final_stream(model, tokens, dtype, Path(directory))
            parts = console.progress(pieces([stream], tokens), count_pieces(tokens), what="choices")
            found = [np.asarray(losses(h, y, ends.norm, ends.head)) for y, (h,) in parts]
        of_tokens = np.concatenate(found).reshape(len(tokens), -1)
        sums = np.where(self.chosen[:, 1:], of_tokens, 0).sum(axis=1, dtype=np.float64)
        right, right_by_bytes, row = 0, 0, 0
        for item in self.items:
            mine = sums[row : row + len(item.choices)]
            sizes = np.array([len(choice.encode()) for choice in item.choices])
            right += int(mine.argmin()) == item.answer
            right_by_bytes += int((mine / sizes).argmin()) == item.answer
            row += len(item.choices)
        return Accuracy(len(self.items), right / len(self.items), right_by_bytes / len(self.items))
