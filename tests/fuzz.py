"""Damaged files of every kind, each given to a command that reads it: none may be a traceback.

    python tests/fuzz.py --cases 20000 --seed 0
    python tests/fuzz.py --seed 0 --only 1234

A case is decided by its seed and number. It may end well, in a usage error, in a PrunetoolError
that is one line of at most LONGEST characters which a terminal can show, or in an OSError, of which
the command line makes such a line. Anything else is a failure; ``--only`` shows its traceback.
"""

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import click
import jax
import numpy as np
import zstandard
from click.testing import CliRunner
from safetensors.numpy import load, save

if __name__ == "__main__":  # run by hand
    sys.path.insert(0, str(Path(__file__).parent.parent))

from prunetool import cli, console, corpus, methods, streaming, workdir
from prunetool.checkpoint import checksum
from prunetool.errors import LONGEST, PrunetoolError
from prunetool.model import open_model
from tests.checkpoint.test_gguf import write_gguf
from tests.conftest import tiny_config, write_checkpoint

SECONDS = 5.0  # of computing for one case, and six times that of waiting; most take a hundredth
TIMERS = (
    (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
    (signal.SIGALRM, signal.ITIMER_REAL, 6 * SECONDS),
)

CONFIG = tiny_config(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    head_dim=4,
    max_position_embeddings=64,
)
CORPUS = ["--samples", "4", "--sequence-length", "16"]
CALIBRATE = ["calibrate", "model", "--text", "texts/a.txt", *CORPUS, "--held-out", "1", "--stats",
             "all", "--attention-samples", "1", "--work", "w"]  # fmt: skip
UNITS = ["--multiple-of", "1", "--min-channels", "1"]
WEIGHTS = ["--target", "weights", "--method", "magnitude"]
STREAMS = STATS, KEPT, MASKED, REFITTED = [
    f"streams/{name}.jsonl" for name in ("stats", "kept", "masked", "refitted")
]


# Valid inputs


def make_inputs() -> None:
    """Write one valid file of every kind into the directory that this runs in."""
    here = Path()
    write_checkpoint(here / "model", CONFIG)
    write_checkpoint(here / "sharded", CONFIG, shards=3)
    for name in ("texts", "tokens", "streams"):
        (here / name).mkdir()
    text = "".join(Random(0).choices("abcdefgh ,.\n", k=400))
    lines = "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines())
    (here / "texts/a.txt").write_text(text)
    (here / "texts/a.jsonl").write_text(lines)
    for suffix, pack in {"gz": gzip, "bz2": bz2, "xz": lzma, "zst": zstandard}.items():
        (here / f"texts/a.jsonl.{suffix}").write_bytes(pack.compress(lines.encode()))
    ids = np.random.default_rng(0).integers(0, 256, (4, 16), np.int32)
    np.save(here / "tokens/ids.npy", ids)
    (here / "tokens/ids.safetensors").write_bytes(save({"ids": ids}))
    write_gguf(here / "a.gguf", CONFIG)
    call(*CALIBRATE, "-o", STATS)
    call("score", STATS, "--sparsity", ".3", *UNITS, "-o", KEPT)
    call("score", KEPT, "--sparsity", ".5", *WEIGHTS, "-o", MASKED)
    call("compensate", MASKED, "-o", REFITTED)
    call("export", "out", REFITTED)
    compared = call(
        "evaluate",
        "--allow-calibrated",
        "out",
        "--against",
        "model",
        "--tokens",
        "tokens/ids.npy",
        *CORPUS,
    )
    (here / "compared.json").write_text(compared)


def call(*words: str) -> str:
    """Run a command in this process; gives its stdout."""
    done = CliRunner().invoke(
        cli.group, [str(word) for word in words], standalone_mode=False, catch_exceptions=False
    )
    return done.stdout


# Damage

TEXTS = ["", "\0", "\ud800", "\x1b[31m", "\u2028", "x" * 5000, "..", "../x", ".", "nan", "1", "ä\n"]
NUMBERS = [-1, 0, 1, 3, 0.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e-320, 1e308, float("nan"),
           float("inf"), -float("inf")]  # fmt: skip
# Raw JSON that json.dumps does not write.
RAW = {"@deep": "[" * 9000 + "]" * 9000, "@digits": "9" * 9000, "@objects": '{"a":' * 9000}


def damage_json(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change some values of a JSON document, or its bytes."""
    if random.random() < 0.1:
        return damage_bytes(random, data)
    document, said = json.loads(data), []
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        document, what = _changed(random, document)
        said.append(what)
    if isinstance(document, dict) and checksum.KEY in document and random.random() < 0.5:
        del document[checksum.KEY]  # damage that came before the checksum, or on purpose
        document = checksum.sealed(document)
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode(), ", ".join(said)


def _changed(random: Random, document: object) -> tuple[object, str]:
    """A document with one value, wherever it stands, removed or made something else."""
    places = list(_places(document))
    if not places or random.random() < 0.02:
        new = random.choice([None, [], {}, 1, "text"])
        return new, f"all is {new!r}"
    holder, key = random.choice(places)
    old = holder[key]
    if random.random() < 0.15:
        del holder[key]
        return document, f"no {key!r}"
    other_holder, other = random.choice(places)
    new = random.choice([
        None, True, [], {}, *random.sample(TEXTS, 2), *random.sample(NUMBERS, 3), *RAW, [old],
        {"a": old}, [old] * 3, str(old), other_holder[other],
        -old if isinstance(old, int | float) else old,
        old * 2 if isinstance(old, int | float | str | list) else old,
        old + 1 if isinstance(old, int | float) else old,
    ])  # fmt: skip
    holder[key] = json.loads(json.dumps(new))  # a copy: the document stays a tree
    return document, f"{key!r} is {str(new)[:40]!a}"


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def damage_bytes(random: Random, data: bytes, head: int = 0) -> tuple[bytes, str]:
    """Flip, cut, repeat, insert or overwrite bytes, mostly among the first ``head``."""
    out = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 8])):
        at = random.randrange(head if head and random.random() < 0.8 else len(out) or 1)
        how = random.choice(["flip", "flip", "flip", "cut", "drop", "repeat", "insert", "over"])
        if how == "flip" and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif how == "cut":
            del out[at:]
        elif how == "drop":
            del out[at : at + random.randrange(1, 40)]
        elif how == "repeat":
            out[at:at] = out[at : at + 40]
        elif how == "insert":
            out[at:at] = random.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n"])
        elif how == "over":
            out[at : at + 8] = struct.pack("<Q", random.choice([0, 1, 2**31, 2**40, 2**64 - 1]))
        if not out:
            break
    return bytes(out), f"bytes: {how} at {at}"


def damage_text(random: Random, data: bytes) -> tuple[bytes, str]:
    """Bytes of a text file, plain or compressed; of the text within if it is JSON lines."""
    if data[:1] == b"{" and random.random() < 0.5:
        return damage_lines(random, data)
    return damage_bytes(random, data)


def damage_lines(random: Random, data: bytes) -> tuple[bytes, str]:
    """One line of JSON lines, or their order."""
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    how = random.choice(["change"] * 8 + ["drop", "repeat", "swap"])
    if how == "change":
        changed, said = damage_json(random, lines[at])
        lines[at] = changed.rstrip(b"\n") + b"\n"
        return b"".join(lines), f"line {at + 1}: {said}"
    other = random.randrange(len(lines))
    if how == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at : at + 1] = [] if how == "drop" else [lines[at]] * 2
    return b"".join(lines), f"{how} line {at + 1}"


DTYPES = ["float64", "float16", "int32", "uint8", "bool", "int64", "uint64"]


def damage_safetensors(random: Random, data: bytes) -> tuple[bytes, str]:
    """Arrays of other values, types or shapes; the header's JSON; or bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    how = random.choice(["array", "array", "header", "bytes"])
    if how == "bytes":
        return damage_bytes(random, data, 8 + size)
    if how == "header":
        header, said = damage_json(random, data[8 : 8 + size])
        size = len(header) if random.random() < 0.9 else random.choice([0, 1, 2**40])
        return struct.pack("<Q", size) + header + data[8 + struct.unpack("<Q", data[:8])[0] :], said
    arrays, metadata = load(data), json.loads(data[8 : 8 + size]).get("__metadata__", {})
    name = random.choice(sorted(arrays))
    arrays[name], said = damage_array(random, arrays[name])
    if random.random() < 0.2:
        del arrays[name]
        said = "gone"
    elif random.random() < 0.1:
        arrays[random.choice([*TEXTS[:1], *TEXTS[3:]])] = arrays.pop(name)
        said = "renamed"
    if workdir.SUMS in metadata and random.random() < 0.7:  # damage that came before, or on purpose
        sums = {key: checksum.of_array(array) for key, array in arrays.items()}
        metadata, said = {workdir.SUMS: json.dumps(sums)}, f"{said}, and its checksum"
    return save(arrays, metadata), f"{name} {said}"


def damage_array(random: Random, array: np.ndarray) -> tuple[np.ndarray, str]:
    """An array of other values, type or shape."""
    how = random.choice(["type", "value", "all", "shape", "flat", "empty", "scalar", "transposed"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "type":
            return array.astype(dtype := random.choice(DTYPES)), f"is {dtype}"
        if how in ("value", "all"):
            array, value = array.copy(), random.choice(NUMBERS[:9] + NUMBERS[10:])
            place = ... if how == "all" or not array.size else random.randrange(array.size)
            flat = array.reshape(-1)
            flat[place] = np.asarray(value, np.float64).astype(array.dtype)
            return array, f"{how} {value}"
    if how == "shape":
        return array[: len(array) // 2] if array.ndim else array, "is half"
    if how == "flat":
        return array.reshape(-1), how
    if how == "empty":
        return array.reshape(-1)[:0], how
    if how == "scalar":
        return np.asarray(array.reshape(-1)[:1].sum()), how
    return np.ascontiguousarray(array.T), how


def damage_tokens(random: Random, data: bytes) -> tuple[bytes, str]:
    """A token file, .npy or .safetensors."""
    if data[:6] != b"\x93NUMPY":
        return damage_safetensors(random, data)
    if random.random() < 0.5:
        return damage_bytes(random, data, 128)
    array, said = damage_array(random, np.load(io.BytesIO(data)))
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue(), said


GGUF_KEYS = ["block_count", "context_length", "embedding_length", "feed_forward_length",
             "attention.head_count", "attention.head_count_kv", "attention.key_length",
             "rope.dimension_count", "attention.layer_norm_rms_epsilon",
             "rope.freq_base"]  # fmt: skip


def damage_gguf(random: Random, data: bytes) -> tuple[bytes, str]:
    """A number of the header, or bytes of it."""
    if random.random() < 0.4:
        return damage_bytes(random, data, data.index(b"blk.1.ffn_down") + 40)
    out, said = bytearray(data), []
    for _ in range(random.choice([1, 1, 2])):
        key = f"llama.{random.choice(GGUF_KEYS)}".encode()
        at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4  # behind the type
        value = random.choice(
            [0, 1, 2, 3, 5, 6, 7, 255, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000, 0x7FC00000]
        )
        out[at : at + 4] = struct.pack("<I", value)
        said.append(f"{key.decode()} {value}")
    return bytes(out), ", ".join(said)


def damage_any(random: Random, data: bytes) -> tuple[bytes, str]:
    """A file of a directory that a command made."""
    if data.startswith(b'{"record"'):
        return damage_lines(random, data)
    if data[:1] in (b"{", b"["):
        return damage_json(random, data)
    return (damage_safetensors if data[8:9] == b"{" else damage_bytes)(random, data)


# Commands


def read_model(random: Random, path: str) -> None:
    """Look at a checkpoint, and read all of it."""
    model = Path(path).parts[0]
    call("inspect", model)
    opened = open_model(model)
    streaming.rotation(opened, 16)
    for _ in opened.padded_layers():
        pass
    opened.embedding(), opened.final_norm(), opened.head()


def read_corpus(random: Random, path: str) -> None:
    """Text or tokens; of a damaged tokenizer, a valid text."""
    opened, field = (
        open_model("model"),
        random.choice(["text", "text", "text", "a.b", "", "\ud800"]),
    )
    tokens = Path(path) if path.startswith("tokens/") else None
    text = Path("texts/a.txt" if path.endswith("tokenizer.json") else path)
    corpus.Text([] if tokens else [text], field, tokens, 16).load(
        opened.directory, opened.config.vocab_size, 4
    )


def read_stream(random: Random, path: str) -> None:
    """Any step on a stream, by options that it was run with before or by others."""
    stream = path if path in STREAMS else random.choice(STREAMS)
    unit_method = random.choice(list(methods.UNITS))
    weight_method = random.choice(list(methods.WEIGHTS))
    target = random.choice(["weights", "qk", "v,o", "down"])
    made = ["-o", "made"]
    steps = [
        ["score", stream, "--sparsity", random.choice([".3", ".4"]), *UNITS, "--method",
         unit_method, *made],
        ["score", stream, "--sparsity", ".5", "--target", target, "--method", weight_method, *made],
        ["compensate", stream, "--damping", random.choice(["auto", "0.1"]), *made],
        ["export", "exported", stream, "--format", random.choice(["auto", "dense"])],
        ["report", stream, *made],
    ]  # fmt: skip
    likely = {STATS: steps[:2], REFITTED: steps[3:]}.get(stream, steps[2:])
    call(*random.choice([*steps, *likely]))


def calibrate(random: Random, path: str) -> None:
    call(*CALIBRATE, *(["--overwrite"] if random.random() < 0.02 else []), "-o", "made")


def read_work(random: Random, path: str) -> None:
    """Mostly the cheaper steps: calibrate makes a damaged layer again."""
    if path.endswith(workdir.RECORDS_NAME):
        call("report", "w", "-o", "made")
    (calibrate if random.random() < 0.1 else read_stream)(random, path)


def read_evaluation(random: Random, path: str) -> None:
    call("report", REFITTED, "--evaluation", path, "-o", "made")


def convert(random: Random, path: str) -> None:
    call("convert", path, "converted", "--dtype", "float32")


def export(random: Random, path: str) -> None:
    call("export", "out", REFITTED, *random.choice([[], ["--overwrite"]]))


class Kind(NamedTuple):
    """One kind of input.

    Attributes:
      files: which of the valid inputs, as a pattern below their directory.
      damage: makes damaged bytes of a file's bytes, and says how.
      run: gives the damaged file to a command.
    """

    files: str
    damage: Callable[[Random, bytes], tuple[bytes, str]]
    run: Callable[[Random, str], None]


KINDS = {
    "config": Kind("model/config.json", damage_json, read_model),
    "index": Kind("sharded/model.safetensors.index.json", damage_json, read_model),
    "shard": Kind("*/model*.safetensors", damage_safetensors, read_model),
    "tokenizer": Kind("model/tokenizer.json", damage_json, read_corpus),
    "text": Kind("texts/*", damage_text, read_corpus),
    "tokens": Kind("tokens/*", damage_tokens, read_corpus),
    "records": Kind("streams/*", damage_lines, read_stream),
    "work directory": Kind("w/**/*", damage_any, read_work),
    "run.json": Kind("w/run.json", damage_json, calibrate),
    "evaluation": Kind("compared.json", damage_json, read_evaluation),
    "gguf": Kind("a.gguf", damage_gguf, convert),
    "exported": Kind("out/*", damage_any, export),
}


# Cases


class Hang(BaseException):
    """A case took too long; no ``except Exception`` may take it for its own."""


def _hang(*_: object) -> None:
    raise Hang


@contextmanager
def _as_by_hand() -> Iterator[None]:
    """Without what the tests ask of warnings and of JAX, and without what is said on stderr."""
    with (
        warnings.catch_warnings(),
        redirect_stderr(io.StringIO()),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        warnings.simplefilter("ignore")
        console.setup_logging(0)
        yield


class Fuzzer:
    """Cases in a directory of their own.

    Args:
      root: an empty directory (one in memory is much faster). Streams name their files by absolute
        paths, so that the inputs are made, and every case is run, in the same place below it.
    """

    def __init__(self, root: Path) -> None:
        self.pristine, self.case = root / "pristine", root / "case"
        self.case.mkdir()
        with chdir(self.case), _as_by_hand():
            make_inputs()
        self.case.rename(self.pristine)
        self.files = {
            name: sorted(
                path.relative_to(self.pristine)
                for path in self.pristine.glob(kind.files)
                if path.is_file()
            )
            for name, kind in KINDS.items()
        }

    def run(self, seed: int, number: int, kind: str = "") -> tuple[str, BaseException | None]:
        """Run one case; what was done, and what it failed with that it may not."""
        random = Random(f"{seed} {number}")
        kind = kind or list(KINDS)[number % len(KINDS)]
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.pristine, self.case, copy_function=os.link)
        file = random.choice(self.files[kind])
        damaged, said = KINDS[kind].damage(random, (self.case / file).read_bytes())
        (self.case / file).unlink()  # of the valid one only this name
        (self.case / file).write_bytes(damaged)
        for name, timer, seconds in TIMERS:
            signal.signal(name, _hang)
            signal.setitimer(timer, seconds)
        failure: BaseException | None = None
        try:
            with chdir(self.case), _as_by_hand():
                KINDS[kind].run(random, str(file))
        except (click.ClickException, OSError):
            pass
        except PrunetoolError as error:
            if len(str(error)) > LONGEST or not str(error).isprintable():
                failure = error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is none of Exception
            failure = error
        finally:
            for _, timer, _ in TIMERS:
                signal.setitimer(timer, 0)
        return f"case {number}, {kind}, {file}: {said}", failure


def cause(failure: BaseException) -> str:
    """Where in prunetool, and what: the same for failures that one change would mend."""
    frames = traceback.extract_tb(failure.__traceback__)
    ours = [frame for frame in frames if "/prunetool/" in frame.filename] or frames
    place = f"{ours[-1].filename.split('/prunetool/')[-1]}:{ours[-1].lineno}"
    return f"{place}: {type(failure).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", choices=["", *KINDS])
    parser.add_argument("--only", type=int, help="run this case alone")
    asked = parser.parse_args()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        # Each calibration compiles anew what was compiled before.
        jax.config.update("jax_compilation_cache_dir", f"{root}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        fuzzer, seen = Fuzzer(Path(root).resolve()), Counter[str]()
        for number in range(asked.cases) if asked.only is None else [asked.only]:
            said, failure = fuzzer.run(asked.seed, number, asked.kind)
            if failure is None:
                continue
            seen[cause(failure)] += 1
            if asked.only is not None:
                traceback.print_exception(failure)
            if seen[cause(failure)] <= 3:
                last = "".join(traceback.format_exception_only(failure)).strip()
                print(f"{cause(failure)}\n  {said}\n  {last.splitlines()[-1][:300]}", flush=True)
    for place, count in seen.most_common():
        print(f"{count:6} {place}")
    print(f"{asked.cases} cases, {seen.total()} failures of {len(seen)} causes")
    sys.exit(bool(seen))


if __name__ == "__main__":
    main()
