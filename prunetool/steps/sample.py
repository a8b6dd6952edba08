"""Pictures that a model makes: the codes of each, given its class.

As `steps.selftext` writes text: the whole model is in memory, and the number of pictures made
together depends on the model and the precision alone, so that a picture is the same whatever else
is asked for. Its random numbers come from the seed, its class, and its number within the class.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import __version__, console, workdir
from prunetool.checkpoint.writer import atomic
from prunetool.errors import ConfigError, shown
from prunetool.llama import decode
from prunetool.model import Model
from prunetool.steps.export import refuse_taken_file
from prunetool.steps.selftext import Sampler


@dataclass(frozen=True)
class Pictures(Sampler):
    """What determines the pictures.

    Attributes:
      classes: those to draw, each once, in this order, and then again from the first.
      cfg_scale: s of classifier-free guidance (`decode.guided`); at most 1: none.
      temperature: divides the scores; 0: the likeliest code, always.
      top_k, top_p: as in `decode.filtered`.
    """

    classes: tuple[int, ...] = (0,)
    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    ASKED: ClassVar = "sample"
    SMALLER: ClassVar = "give --dtype bfloat16, or sample on a larger machine"

    @property
    def rows(self) -> int:
        """Two with guidance: with the class, and with the null class."""
        return 2 if self.cfg_scale > 1 else 1

    @property
    def described(self) -> dict[str, Any]:
        """All that determines the pictures."""
        own = ("classes", "cfg_scale", "temperature", "top_k", "top_p")
        return super().described | {name: getattr(self, name) for name in own}

    def begin(self, i: int) -> tuple[int, np.random.Generator]:
        """The class's id, and the picture's random numbers."""
        copy, place = divmod(i, len(self.classes))
        chosen = self.classes[place]
        random = np.random.default_rng([self.seed, chosen, copy])
        return self.model.config.vocab_size + chosen, random

    def scores(self, decoder: decode.Decoder, ids: np.ndarray, n: int) -> jax.Array:
        """Scores of the next codes, guided, (V, width)."""
        if self.rows == 1:
            return super().scores(decoder, ids, n)
        null = np.full_like(ids, self.model.config.ids - 1) if n == 0 else ids
        both = super().scores(decoder, np.concatenate([ids, null]), n)
        guided: jax.Array = decode.guided(both, jnp.float32(self.cfg_scale))
        return guided

    def draw(self, scores: jax.Array, u: np.ndarray) -> jax.Array:
        """Draw the next codes."""
        if not self.temperature:
            return jnp.argmax(scores, axis=0)
        scores = scores / jnp.float32(self.temperature)
        return super().draw(decode.filtered(scores, top_k=self.top_k, top_p=self.top_p), u)


def parse_classes(said: str, model: Model) -> tuple[int, ...]:
    """Classes as typed: ``all``, or numbers separated by commas.

    Raises:
      ConfigError: if the model is one of text, or has no such class.
    """
    known = model.config.classes - 1
    if known < 0:
        raise ConfigError(
            model.directory, "is a model of text", "let it write: prunetool calibrate --text self"
        )
    if said == "all":
        return tuple(range(known))
    numbers = [number.strip() for number in said.split(",")]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(
            "--classes", f"{shown(said)} names a class twice", "give --per-class for several"
        )
    for number in numbers:
        if not re.fullmatch(r"0|[1-9]\d{0,8}", number, re.ASCII) or int(number) >= known:
            null = f" ({known} is the null class)" if number == str(known) else ""
            raise ConfigError(
                "--classes", f"{shown(number)!r} is not a class{null}",
                f"give 0 to {known - 1}, or all",
            )  # fmt: skip
    return tuple(map(int, numbers))


def write(pictures: Pictures, per_class: int, out: Path, *, overwrite: bool) -> list[str]:
    """Make the pictures, and write their ids to a .npy file; resumes a killed run.

    Args:
      pictures: what to make.
      per_class: how many of each class.
      out: the file: (n, 1 + codes) int32, ``vocab_size`` + class and then the codes.
      overwrite: replace it, and what a killed run of other pictures left.

    Returns:
      What to report about it.

    Raises:
      WorkError: if something is there, or another run writes it.
    """
    work = out.with_name(f"{out.name}.prunetool").absolute()
    if not (work / workdir.RUN_NAME).exists():  # or it was killed behind its last write
        refuse_taken_file(out, overwrite=overwrite)
    count = per_class * len(pictures.classes)
    described = pictures.described
    shape = {"per_class": per_class, **described, "classes": list(pictures.classes)}
    run = workdir.identity(
        "sample", pictures.model.identity(), workdir.digest(described), __version__, shape
    )
    with workdir.lock(work):
        workdir.claim(work, run, overwrite=overwrite, other="another -o")
        ids = pictures.load_locked(work, count)
        with atomic(out) as partial, partial.open("wb") as file:
            np.save(file, ids)
        workdir.clear(work)
    console.log.info(
        "Calibrate on them: prunetool calibrate MODEL --tokens %s", shlex.quote(str(out))
    )
    return [f"{count:,} pictures of {pictures.model.config.codes} codes in {out}"]
