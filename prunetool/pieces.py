"""Token ids of a text given part by part: those of the whole text, in constant memory.

The text is tokenised in overlapping pieces. Where two pieces meet, the ids switch from one to the
other at a **joint**: from there on, until after some white space between two words, both pieces
have the same tokens, of the same characters, in words that begin alike. If there is no joint, both
pieces, and as many more as double the text, are merged into one; in the end that is the whole text.

Why the ids are those of the whole text, by the parts of a tokenizer:

** A pre-tokenizer works from left to right: two that begin a word at the same place continue alike.
  Look-ahead follows a run of characters of one kind (spaces before a token with lstrip, digits in
  threes from the right, combining marks), and the white space breaks such a run. So the end of the
  first piece cannot affect its tokens before the joint, nor the beginning of the second one its
  tokens after it.
** Merges (BPE) act inside a word. Tokens are the merges' result for a word if each two neighbours
  are their result for these two alone. All neighbours are so in one of the pieces, because both
  have the token after the joint; so a joint may be inside a word, even in one as long as the text,
  as in SentencePiece's tokenizers.
** An added token cut by a piece's end is whole in the other piece: both reach farther beyond the
  overlap than the longest one. So they differ there.
** Unigram takes the path with the largest sum over a word. In a text that is one word, the paths
  meet at white space, as pieces begin with it; only between two paths that are equal up to
  rounding may the whole text take the other one.

If a piece has grown to `LONG` characters without white space, agreement over half the overlap has
to suffice.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

PIECE = 1 << 15  # characters from one piece's start to the next one's
OVERLAP = 1 << 11  # characters
AT_ONCE = 8  # pieces that are tokenised in parallel
LONG = 1 << 20  # characters of a piece up to which white space is required
BREAK = re.compile(r"\w[ \t\r\n]+\w")

Encode = Callable[[Sequence[str]], Sequence[Encoding]]
# Id, span of its characters in the whole text, and whether it begins a word.
Token = tuple[int, int, int, bool]


class Piece(NamedTuple):
    """A piece of the text and its tokens.

    Attributes:
      start: position of its first character in the text.
      spans: start and end of each token's characters in the piece.
      words: number of each token's word, as split by the pre-tokenizer.
    """

    start: int
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int | None]

    def tokens(self, low: int, high: int) -> tuple[int, list[Token]]:
        """The tokens within a part of the whole text, and the index of the first."""
        first = 0
        while first < len(self.ids) and self.spans[first][0] + self.start < low:
            first += 1
        found: list[Token] = []
        word = self.words[first - 1] if first else None
        for token, (start, end), of in islice(
            zip(self.ids, self.spans, self.words, strict=True), first, None
        ):
            if end + self.start > high:
                break
            found.append((token, start + self.start, end + self.start, of != word))
            word = of
        return first, found


def token_ids(parts: Iterable[str], tokenizer: Tokenizer, encode: Encode) -> Iterator[np.ndarray]:
    """Ids of a text, part by part, (n,), int32, without a BOS.

    Args:
      parts: parts of the text, of any length.
      tokenizer: the tokenizer, for its added tokens.
      encode: maps texts to the results of `Tokenizer.encode`.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    longest = max((len(token.content) for token in added), default=0)
    overlap = max(OVERLAP, 4 * longest)  # a normaliser may have shortened it
    pieces = _tokenised(_overlapping(parts, max(PIECE, overlap), overlap), encode)
    before, first = next(pieces), 0  # the ids of `before` from `first` on are due
    for behind in pieces:
        margin = None if len(before.text) < LONG else overlap // 2
        joint = _joint(before, behind, margin)
        if joint is None:  # at least double: growing takes linear time
            text, wanted = before.text + behind.text[overlap:], 2 * len(before.text)
            while len(text) < wanted and (more := next(pieces, None)) is not None:
                text += more.text[overlap:]
            before = _encoded(before.start, text, encode([text])[0])
        else:
            yield np.asarray(before.ids[first : joint[0]], np.int32)
            before, first = behind, joint[1]
    yield np.asarray(before.ids[first:], np.int32)


def _overlapping(parts: Iterable[str], step: int, overlap: int) -> Iterator[tuple[int, str]]:
    """The text in pieces of ``step + overlap`` characters, each with its start."""
    start, text = 0, ""
    have: list[str] = []
    size = 0
    for part in parts:
        for at in range(0, len(part), step):
            have.append(part[at : at + step])
            size += len(have[-1])
            if size > step + overlap:
                text = "".join(have)
                yield start, text[: step + overlap]
                start += step
                have = [text[step:]]
                size -= step
    yield start, "".join(have)


def _tokenised(pieces: Iterator[tuple[int, str]], encode: Encode) -> Iterator[Piece]:
    """Tokenise pieces in parallel; few at first, in case few are needed."""
    count = 1
    while batch := list(islice(pieces, count)):
        encodings = encode([text for _, text in batch])
        for (start, text), encoding in zip(batch, encodings, strict=True):
            yield _encoded(start, text, encoding)
        count = min(2 * count, AT_ONCE)


def _encoded(start: int, text: str, encoding: Encoding) -> Piece:
    return Piece(start, text, encoding.ids, encoding.offsets, encoding.word_ids)


def _joint(before: Piece, behind: Piece, margin: int | None) -> tuple[int, int] | None:
    """The indices, in two pieces, of the tokens where the second can take over from the first.

    Args:
      before: the first piece.
      behind: the second piece.
      margin: how many characters must agree after the joint; None: up to white space between
        two words.
    """
    low, high = behind.start, before.start + len(before.text)
    i, ours = before.tokens(low, high)
    j, theirs = behind.tokens(low, high)
    for m, n, count in _runs(ours, theirs):
        place, end = ours[m][1] - low, ours[m + count - 1][2] - low
        if BREAK.search(behind.text, place, end) if margin is None else end - place >= margin:
            return i + m, j + n
    return None


def _runs(ours: list[Token], theirs: list[Token]) -> Iterator[tuple[int, int, int]]:
    """Runs where two lists of tokens agree: the start in each, and the number of tokens."""
    m = n = 0
    while m < len(ours) and n < len(theirs):
        same = zip(ours[m:], theirs[n:], strict=False)
        count = sum(1 for _ in takewhile(lambda two: two[0] == two[1], same))
        if count:
            yield m, n, count
            m, n = m + count, n + count
        else:
            start, other = ours[m][1], theirs[n][1]
            m, n = m + (start <= other), n + (other <= start)
