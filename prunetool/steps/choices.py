"""Accuracy at choosing the right continuation of a context, from the losses of all choices.

A file of items is JSON lines:

    {"context": "The castle was built", "choices": [" of stone", " of hope"], "answer": 0}

As in lm-evaluation-harness, the tokens of a choice are those of context and choice together after
those of the context alone, and two rules decide: the least loss of a choice's tokens, and the least
loss for each of its bytes, which does not favour short ones.
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
from prunetool.errors import CorpusError, shown
from prunetool.llama import forward
from prunetool.model import Model
from prunetool.steps.evaluate import Ends, count_pieces, final_stream, pieces
from prunetool.tokenizer import load_tokenizer

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
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CorpusError(path, f"cannot be read ({reason})", "check --choices") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            match value:
                case {"context": str(context), "choices": [*choices], "answer": int(answer)}:
                    pass
                case _:
                    raise ValueError("not an item")
            wrong = [c for c in choices if not isinstance(c, str) or not c]
            if wrong or len(choices) < 2 or not 0 <= answer < len(choices):
                raise ValueError("it needs two or more choices, all texts, one of them the answer")
        except (ValueError, RecursionError) as error:
            where = f"{path}: line {number}"
            raise CorpusError(where, f"is not an item ({shown(error, 80)})", AS_ITEMS) from error
        items.append(Item(context, tuple(choices), answer))
    if not items:
        raise CorpusError(path, "holds no items", AS_ITEMS)
    return items


def tokenised(
    directory: Path, items: Sequence[Item], bos: int | None, where: object
) -> tuple[np.ndarray, np.ndarray]:
    """All choices behind their contexts.

    Args:
      directory: of the checkpoint, for its tokenizer.
      items: the items.
      bos: the token that begins each, or None.
      where: the items' file, for errors.

    Returns:
      The ids, (choices, N), int32, zero behind the last one, and which of them are a choice's.

    Raises:
      CorpusError: if a choice has no token of its own, or nothing before it.
    """
    tokenizer = load_tokenizer(directory)

    def encoded(texts: list[str]) -> list[list[int]]:
        first = [] if bos is None else [bos]
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [first + encoding.ids for encoding in found]

    contexts = encoded([item.context for item in items for _ in item.choices])
    wholes = encoded([item.context + choice for item in items for choice in item.choices])
    tokens = np.zeros((len(wholes), max(map(len, wholes))), np.int32)
    chosen = np.zeros(tokens.shape, bool)
    for row, (context, whole) in enumerate(zip(contexts, wholes, strict=True)):
        if not 0 < len(context) < len(whole):
            raise CorpusError(where, f"choice {row + 1} has no tokens of its own", AS_ITEMS)
        tokens[row, : len(whole)] = whole
        chosen[row, len(context) : len(whole)] = True
    return tokens, chosen


def accuracy(
    model: Model, items: Sequence[Item], tokens: np.ndarray, chosen: np.ndarray, dtype: str
) -> Accuracy:
    """Measure a model on items.

    Args:
      model: the checkpoint.
      items: the items.
      tokens, chosen: as from `tokenised`.
      dtype: dtype of the products.
    """
    ends = Ends.of(model, dtype)

    @jax.jit
    def losses(h: jax.Array, targets: jax.Array, norm: jax.Array, head: jax.Array) -> jax.Array:
        return forward.token_losses(forward.logits(h, norm, head, eps=ends.eps), targets)

    with tempfile.TemporaryDirectory(prefix="prunetool-") as directory:
        stream = final_stream(model, tokens, dtype, Path(directory))
        parts = console.progress(pieces([stream], tokens), count_pieces(tokens), what="choices")
        found = [np.asarray(losses(h, y, ends.norm, ends.head)) for y, (h,) in parts]
    of_tokens = np.concatenate(found).reshape(len(tokens), -1)
    sums = np.where(chosen[:, 1:], of_tokens, 0).sum(axis=1, dtype=np.float64)
    right, right_by_bytes, row = 0, 0, 0
    for item in items:
        mine = sums[row : row + len(item.choices)]
        sizes = np.array([len(choice.encode()) for choice in item.choices])
        right += int(mine.argmin()) == item.answer
        right_by_bytes += int((mine / sizes).argmin()) == item.answer
        row += len(item.choices)
    return Accuracy(len(items), right / len(items), right_by_bytes / len(items))
