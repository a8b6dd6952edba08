"""Calibration text without text: sequences that the model itself writes.

Each token is drawn from the model's own distribution, at temperature 1. A sequence begins with the
BOS if the model's windows do, else with a token drawn uniformly from the vocabulary. It goes on
after an EOS, as windows of a text go on from one document to the next: calibration needs sequences
of one length, and what is padded would not count.

Sequence i has its own stream of random numbers, from the seed and i. Products of another width may
round differently, so the number of sequences decoded together is fixed by the model, the length
and the dtype alone (`width`): sequence i is the same for any --samples and --batch-size. It may
differ on another kind of processor.

The ids are kept in the work directory, rewritten as batches of sequences come, so that a killed
run goes on and another one with the same model, length, BOS, dtype and seed takes them as they are.
The file can be given to --tokens too.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import console, corpus, plan, streaming, workdir
from prunetool.errors import ConfigError, CorpusError, RecordError
from prunetool.llama import decode
from prunetool.model import Model
from prunetool.steps.evaluate import Ends
from prunetool.tokenizer import bos_id

RARELY = 16  # the file is written again once a 16th is new
WIDEST = 64  # sequences decoded together at most: 1.15 times as fast as 16 on two cores
CACHE_BYTES = 2 << 30  # of keys and values at most, or as many as the weights have


@dataclass(frozen=True)
class Sampler:
    """What determines the sequences, except how many.

    Attributes:
      length: tokens per sequence, N.
      bos: the token that begins each; None for a random one.
      dtype: dtype of the products.
    """

    model: Model
    length: int
    bos: int | None
    dtype: str
    seed: int = 0

    ASKED: ClassVar = "--text self"
    SMALLER: ClassVar = "give a text, a shorter --sequence-length, or sample on a larger machine"

    @property
    def rows(self) -> int:
        """Rows of the decoder that one sequence takes."""
        return 1

    @property
    def width(self) -> int:
        """Sequences decoded together: a power of two."""
        each = self.rows * plan.cache_bytes(self.model, self.length)
        most = max(CACHE_BYTES, plan.weights_bytes(self.model, self.dtype)) // each
        return 1 << (max(1, min(most, WIDEST)).bit_length() - 1)

    @property
    def described(self) -> dict[str, Any]:
        """All that determines the sequences."""
        return {
            **self.model.identity(),
            "length": self.length,
            "bos": self.bos,
            "dtype": self.dtype,
            "seed": self.seed,
            "width": self.width,
        }

    @property
    def name(self) -> str:
        """Name of the file of ids."""
        return f"self-{workdir.digest(self.described)}.safetensors"

    def load(self, work: Path, samples: int) -> np.ndarray:
        """The first ``samples`` sequences, from the work directory or sampled and kept there.

        Returns:
          (samples, N), int32.

        Raises:
          WorkError: if another process writes there.
          ConfigError: if the memory is too small.
          NumericalError: if the model's output is not finite.
          CorpusError: if the ids in the directory are not this model's.
        """
        with workdir.lock(work):
            return self.load_locked(work, samples)

    def load_locked(self, work: Path, samples: int) -> np.ndarray:
        """`load` for a caller that holds the directory's lock."""
        ids = self._kept(work)
        if len(ids) < samples:
            self._need_memory()
            starts = range(len(ids), samples, self.width)
            console.doing("reading the whole model")
            decoder = self.decoder()
            new: list[np.ndarray] = []
            for start in console.progress(starts, len(starts), what="sampled batch"):
                new.append(self._sample(decoder, start))
                count = len(new) * self.width
                if count * RARELY >= len(ids) or start == starts[-1]:
                    ids, new = np.concatenate([ids, *new]), []
                    workdir.write(work, self.name, {"tokens": ids})
            del decoder
            streaming.return_free_memory()
        count = self.model.config.ids
        return corpus.sequences(ids, samples, self.length, count, work / self.name)

    def _kept(self, work: Path) -> np.ndarray:
        """The sequences that an earlier run kept, in whole batches."""
        none = np.zeros((0, self.length), np.int32)
        if not workdir.below(work, self.name).exists():
            return none
        try:
            return workdir.load(work, self.name)["tokens"]
        except RecordError as error:
            console.log.warning("%s: %s; sampled again", error.where, error.what)
            return none

    def _need_memory(self) -> None:
        rows = self.rows * self.width
        need = plan.self_text_memory(self.model, self.length, rows, self.dtype)
        free = free_memory_bytes()
        if free < need:
            raise ConfigError(
                self.ASKED,
                f"holds the whole model: it needs {need / 1e9:.1f} GB of memory and "
                f"{free / 1e9:.1f} GB are free",
                self.SMALLER,
            )

    def decoder(self) -> decode.Decoder:
        """The whole model in memory."""
        config = self.model.config
        layers = [streaming.to_device(w, self.dtype) for _, w in self.model.padded_layers()]
        ends = Ends.of(self.model, self.dtype)
        return decode.Decoder(
            layers,
            self.model.embedding(),
            ends.norm,
            ends.head,
            streaming.rotation(self.model, self.length),
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            window=config.window,
        )

    def _sample(self, decoder: decode.Decoder, start: int) -> np.ndarray:
        """Sequences ``start`` and following, (width, N), int32."""
        begun = [self.begin(i) for i in range(start, start + self.width)]
        ids = np.zeros((self.width, self.length), np.int32)
        ids[:, 0] = [first for first, _ in begun]
        u = np.stack([random.random(self.length) for _, random in begun])
        for n, drawn in enumerate(self._drawn(decoder, ids, u), 1):
            ids[:, n] = drawn
            console.within(n, self.length - 1, "token")
        return ids

    def begin(self, i: int) -> tuple[int, np.random.Generator]:
        """The first token of sequence i, and its random numbers."""
        random = np.random.default_rng([self.seed, i])
        first = int(random.integers(self.model.config.vocab_size))
        return first if self.bos is None else self.bos, random

    def scores(self, decoder: decode.Decoder, ids: np.ndarray, n: int) -> jax.Array:
        """Scores of what follows the tokens at position n, (V, width), from which it is drawn."""
        scores: jax.Array = decoder(ids, n)
        return scores

    def draw(self, scores: jax.Array, u: np.ndarray) -> jax.Array:
        """Draw the next tokens, (width,), by uniform numbers."""
        drawn: jax.Array = decode.draw(scores, jnp.asarray(u))
        return drawn

    def _drawn(
        self, decoder: decode.Decoder, ids: np.ndarray, u: np.ndarray
    ) -> Iterator[np.ndarray]:
        for n in range(self.length - 1):
            scores = self.scores(decoder, ids[:, n], n)
            drawn = np.asarray(self.draw(scores, u[:, n]))
            streaming.check_finite(np.asarray(scores[:1]), self.model.layers - 1)
            yield drawn


def free_memory_bytes() -> int:
    """Bytes of memory that can be had: on Linux what is free or cached, elsewhere all there is."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_pictures(model: Model) -> None:
    """Refuse ``--text self`` of a model of pictures."""
    if model.config.classes:
        raise CorpusError(
            "--text self", "is for models of text",
            "make pictures: prunetool sample MODEL -o FILE.npy, then --tokens FILE.npy",
        )  # fmt: skip


def own_text(
    model: Model,
    text: corpus.Text,
    samples: int,
    dtype: str,
    seed: int,
    work: Path,
    said: list[str],
    *,
    overwrite: bool,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The sequences of `Sampler` for ``--text self``, and how they were made, for the history.

    Raises:
      WorkError: at once if calibrate could not use the work directory afterwards.
    """
    refuse_pictures(model)
    started = time.monotonic()
    bos = bos_id(model.directory, model.config.vocab_size, text.bos)
    chosen = {"text": "self", "shuffle": seed, "bos": bos}
    sizes = {"samples": samples, "sequence_length": text.length, "dtype": dtype}
    known = {"command": "calibrate", **model.identity(), **sizes, **chosen}
    workdir.check(work, known, overwrite=overwrite)
    tokens = Sampler(model, text.length, bos, dtype, seed).load(work, samples)
    console.doing("checking")
    said.append(f"own text in {time.monotonic() - started:.1f} s")
    return tokens, chosen
