"""Common parts of steps: a model with text; a stream of records read, and another written."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from prunetool import console, records, workdir
from prunetool.checkpoint import checksum
from prunetool.checkpoint.writer import need_room
from prunetool.corpus import DEFAULT_LENGTH, Text, pictures, read_tokens
from prunetool.errors import CheckpointError, ConfigError, CorpusError, RecordError, naming
from prunetool.model import Model, open_model, read_weights
from prunetool.profiling import Profile

Arrays = dict[str, np.ndarray]
Opens = Callable[[], AbstractContextManager[IO[str]]]


def reopen(header: records.Header) -> Model:
    """Open the checkpoint of a stream, after checking its work directory.

    Raises:
      WorkError: if the work directory is not the stream's (`workdir.run_of`).
      CheckpointError: if the checkpoint has changed since it was calibrated. Changes beyond a
        tensor's first rows are noticed when it is read (`Model.read`).
    """
    run = workdir.run_of(header)
    if not Path(header.model).is_dir():  # a stream must not cause requests to the Hub
        raise CheckpointError(header.model, "no such directory", "calibrate again")
    model = open_model(header.model)
    now = model.identity()
    if changed := workdir.differing({key: run.get(key) for key in now}, now):
        raise CheckpointError(
            header.model,
            f"its {changed[0].key} has changed since it was calibrated",
            "restore it, or calibrate again",
        )
    if header.fingerprint != checksum.of_json(now) or header.layers != model.layers:
        raise RecordError("header", "is for a different checkpoint than its run", records.AGAIN)
    return replace(model, recorded=Path(header.work) / workdir.WEIGHTS_NAME)


def recall_weights(model: Model, work: Path, *, overwrite: bool) -> bool:
    """Accept the checksums of the tensors that a killed run has read.

    Returns:
      Whether the run can resume; if not, it starts again.

    Raises:
      CheckpointError: if a tensor has changed since; with ``overwrite``, everything made from it
        is removed instead.
    """
    path = work / workdir.WEIGHTS_NAME
    try:
        known = read_weights(path)
    except CheckpointError as error:
        console.log.warning("%s: %s; starting again", path, error.what)
    else:
        try:
            model.recall(known)
            return True
        except CheckpointError:
            if not overwrite:
                raise
    workdir.drop(work)  # including what later steps made from other weights
    model.checksums.clear()
    return False


def read_text(
    model: Model, text: Text, samples: int | None, shuffle: int | None = None
) -> tuple[np.ndarray, int | None]:
    """Cut text for a checkpoint.

    Args:
      model: the checkpoint.
      text: the text.
      samples, shuffle: as in `corpus.sequences`.

    Returns:
      The sequences, (samples, N), int32; the BOS that begins each, or None.

    Raises:
      CorpusError: if the model is one of pictures, and the text is none of its own.
    """
    config = model.config
    console.doing("reading text")
    if config.classes:
        if text.tokens_path is None:
            raise CorpusError(
                model.directory,
                "is a model of pictures, which reads no text",
                "give --tokens FILE, from prunetool sample",
            )
        if text.length not in (DEFAULT_LENGTH, config.codes + 1):
            raise CorpusError(
                f"--sequence-length {text.length}",
                f"a picture has {config.codes + 1} ids",
                "leave it out",
            )
        bos, tokens = None, pictures(
            read_tokens(text.tokens_path), samples, config.codes, config.vocab_size,
            config.classes, text.where, shuffle,
        )  # fmt: skip
    else:
        tokens, bos = text.load(model.directory, config.vocab_size, samples, shuffle)
    console.doing("checking")
    return tokens, bos


def as_fed(model: Model, tokens: np.ndarray, guidance: str) -> np.ndarray:
    """The sequences as a model reads them when it generates.

    Args:
      model: the checkpoint; for one of text they stay as they are.
      tokens: (samples, N), int32.
      guidance: of pictures: ``both``: after each, the same codes with the null class, as
        classifier-free guidance has them; ``class``: only with their own.

    Returns:
      Of pictures without the last code, which is never fed: (samples or 2 · samples, N − 1).
    """
    if not model.config.classes:
        return tokens
    fed = tokens[:, :-1]
    if guidance == "both":
        fed = np.repeat(fed, 2, axis=0)
        fed[1::2, 0] = model.config.ids - 1
    return np.ascontiguousarray(fed)


def chosen_layers(how: Mapping[str, Any], count: int) -> np.ndarray:
    """Which of a model's layers the option ``layers``, ``A:B``, names, (count,) bool; None: all.

    Raises:
      ConfigError: if it names none.
    """
    layers = how["layers"] or ":"
    start, stop = (int(end) if end else None for end in layers.split(":"))
    chosen = np.zeros(count, bool)
    chosen[start:stop] = True
    if not chosen.any():
        where = "--published" if how["published"] else f"--layers {layers!r}"
        raise ConfigError(where, f"leaves none of {count} layers to prune", "give other --layers")
    return chosen


@dataclass
class Run:
    """One run of a step over the layers of a stream.

    Attributes:
      header: header of the output stream, with the step in its history.
      model: the dense checkpoint.
      work: the work directory.
      directory: name of this step's directory below ``work``.
      profile: collects the seconds.
      discard: delete a layer's stats once its file is written.
    """

    header: records.Header
    model: Model
    work: Path
    directory: str
    profile: Profile
    discard: bool

    @classmethod
    def of(cls, header: records.Header, profile: Path | None, discard: bool) -> "Run":
        """Open the checkpoint and work directory that a stream names.

        Raises:
          WorkError: if the work directory is not the stream's.
          CheckpointError: if the checkpoint has changed.
        """
        directory = workdir.step_directory(header)
        return cls(header, reopen(header), Path(header.work), directory, Profile(profile), discard)

    def write(
        self, open_sink: Opens, layers: Iterable[records.LayerRecord], needed_bytes: int
    ) -> None:
        """Write the records of all layers, and a copy of them, under a lock.

        Args:
          open_sink: opens where to write.
          layers: yields them.
          needed_bytes: disk space for everything the step makes.
        """
        with workdir.lock(self.work / self.directory), self.profile.trace():
            there = workdir.size_bytes(self.work, f"{self.directory}/*")
            need_room(self.work, needed_bytes - there)
            copied = workdir.records_copy(self.work, self.directory)
            with open_sink() as sink, copied as copy:
                records.write(sink, self.header, layers, copy)

    def layers(
        self,
        source: Iterable[records.LayerRecord],
        make: Callable[[records.LayerRecord], Arrays],
        what: str = "layer",
    ) -> Iterator[tuple[records.LayerRecord, str, Arrays]]:
        """Yield each layer's record, and the name and arrays of the file made for it.

        Args:
          source: the records.
          make: makes the arrays; not called if the file exists and is intact.
          what: word for a layer on the bar.
        """
        for record in console.progress(source, self.header.layers, what=what):
            name = workdir.layer_file(self.directory, record.index)
            with naming(f"layer {record.index}"):
                arrays = workdir.make_once(self.work, name, lambda: make(record))  # noqa: B023
            if self.discard:
                workdir.discard_stats(self.work, record)
            yield record, name, arrays
