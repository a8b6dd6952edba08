"""Small random checkpoints, and the commands run as a user runs them."""

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import click
import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prunetool import cli, signals
from prunetool.checkpoint.shards import TensorSpec
from prunetool.llama.config import FAMILIES, parse_config
from prunetool.llama.weights import tensor_shapes


def temporary() -> str:
    """A directory that goes when this process ends."""
    directory = tempfile.mkdtemp(prefix="prunetool-tests-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


# A runner in the background has them ignored, which the processes of tests would inherit.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)
# Idle threads of torch's and NumPy's products would spin, on the cores of the other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
# transformers copies a checkpoint's own code there; read when it is first imported.
os.environ["HF_MODULES_CACHE"] = temporary()
# What one test compiled, the others and their processes load: it halves their time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", temporary())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("ci")

WIKITEXT = Path(os.environ.get("PRUNETOOL_WIKITEXT", "../shared/wikitext-2"))
SMOLLM2 = Path(os.environ.get("PRUNETOOL_SMOLLM2", "demo/SmolLM2-135M"))
LIMIT_SECONDS = 900  # of a test, which hangs if it takes longer
UNTIL_SECONDS = 240  # of waiting for what takes a few at most
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    def stop(*_):
        pytest.fail(f"not at its end after {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def until(condition, process):
    """Wait for what a process brings about; fail with its words if that cannot come any more."""
    last = time.monotonic() + UNTIL_SECONDS
    while True:
        ended = process.poll() is not None
        if condition():
            return
        if ended or time.monotonic() > last:
            process.kill()
            raise AssertionError(f"it ended ({ended}) or hangs: {process.communicate()}")
        time.sleep(0.01)


def tiny_config(**changes):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return {k: v for k, v in {**config, **changes}.items() if v != "absent"}


def byte_tokenizer():
    """Every byte a token, and a few special ones: any text has ids below 260."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


# The rest of a config does not change the shapes, and may be what prunetool refuses.
SHAPING = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "per_layer_config", "family",
)  # fmt: skip


def write_checkpoint(directory, config, *, dtype="float32", shards=1, seed=0):
    """A checkpoint of random weights whose activations are of ordinary size."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    shaping = {key: config[key] for key in SHAPING if key in config}
    if config.get("model_type") in FAMILIES:
        shaping["family"] = config["model_type"]
    parsed = parse_config({"model_type": "pruned_llama", **shaping}, directory)
    tensors = {}
    for name, shape in tensor_shapes(parsed).items():
        if name.endswith("norm.weight"):
            array = 1 + 0.1 * random.standard_normal(shape)
        elif name.endswith("bias"):
            array = 0.1 * random.standard_normal(shape)
        else:
            array = random.standard_normal(shape) / np.sqrt(shape[-1])
        tensors[name] = array.astype(DTYPES[dtype])
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        names, weight_map = sorted(tensors), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, directory / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint: ``checkpoint(num_key_value_heads=1, dtype="bfloat16")``."""

    def make(name="dense", *, dtype="float32", shards=1, seed=0, **changes):
        config = tiny_config(**changes)
        return write_checkpoint(tmp_path / name, config, dtype=dtype, shards=shards, seed=seed)

    return make


def specs_of(chunks):
    """What `CheckpointWriter` is told of chunks of arrays."""
    return [
        {name: TensorSpec(array.dtype.name, array.shape) for name, array in chunk.items()}
        for chunk in chunks
    ]


def write_chunks(writer, chunks, whole=None):
    """Write arrays, a shard a chunk; leave it in the shard behind the first ``whole`` ones."""
    written = writer.write(specs_of(chunks), chunks.__getitem__, max_shard_bytes=1)
    for number, _ in enumerate(written):
        if number == whole:
            break
    written.close()


@pytest.fixture
def text(tmp_path):
    """A file of 4,000 letters, and so 4,000 tokens."""
    random = np.random.default_rng(1)
    letters = "".join(random.choice(list("abcdefgh ,.\n"), 4000))
    path = tmp_path / "text.txt"
    path.write_bytes(letters.encode())
    return path


@pytest.fixture
def process(tmp_path):
    """Run ``prunetool`` in a process of its own; gives the finished process."""

    def call(*words, stdin="", ok=True, cwd=tmp_path, **environment):
        done = subprocess.run(
            command(words),
            capture_output=True,
            text=True,
            cwd=cwd,
            input=stdin,
            env={**os.environ, **environment},
        )
        assert not ok or done.returncode == 0, done.stderr
        return done

    return call


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``prunetool`` in this process, which is quick; gives what `process` does."""

    def call(*words, stdin="", ok=True, cwd=tmp_path):
        words = [*map(str, words)]
        with monkeypatch.context() as patch, ExitStack() as stack:
            streams = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
            streams[0].write(stdin)
            streams[0].seek(0)
            for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
                patch.setattr(sys, name, stream)
            patch.setattr(sys, "argv", ["prunetool", *words])
            patch.setattr(signals, "raised", lambda during: nullcontext())  # pytest's own stay
            patch.chdir(cwd)
            code, said = cli._run()
            if code:
                gc.collect(1)
                click.echo(said, nl=bool(said), err=True)
            for stream in streams:
                stream.seek(0)
            done = subprocess.CompletedProcess(words, code, *(each.read() for each in streams[1:]))
        assert not ok or done.returncode == 0, done.stderr
        return done

    return call


def command(words, first=""):
    """The words that run ``prunetool`` in a process of its own, ``first`` some Python there."""
    how = (
        ["-c", f"{first}\nfrom prunetool.cli import main; main()"] if first else ["-m", "prunetool"]
    )
    return [sys.executable, *how, *map(str, words)]


def at_layer(number, act, backwards=False):
    """Python for `command`: at a layer of its forward, or backward, it does something."""
    return f"""
import os, signal, time
from pathlib import Path
from prunetool import streaming
def check(h, layer, *what, real=streaming.check_finite):
    real(h, layer, *what)
    if layer == {number} and bool(what) == {backwards}:
        {act}
streaming.check_finite = check
"""


STAND = "time.sleep(3600)"  # until a signal comes, or the end of the test
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def popen():
    """Start a process, of text; what still runs at the end of the test is killed."""
    started = []

    def begin(words, **how):
        usual = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(words, text=True, **{**usual, **how}))
        return started[-1]

    yield begin
    for process in started:
        with process:
            process.kill()


@pytest.fixture
def start(popen, tmp_path):
    """Start ``prunetool`` in a process of its own, ``first`` some Python there."""

    def begin(words, cwd=tmp_path, *, first="", stdin=subprocess.DEVNULL, **environment):
        environment = {**os.environ, **environment}
        return popen(command(words, first), cwd=cwd, stdin=stdin, env=environment)

    return begin


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run ``prunetool`` in this process; gives what it wrote to stdout, and raises its errors."""

    def run(*words, cwd=tmp_path):
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        cli.group.main([str(word) for word in words], standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def calibrated(checkpoint, text, run, tmp_path):
    """A tiny checkpoint and the records of its calibration: ``calibrated(kv_heads=1)``."""

    def make(
        name="dense", stats="structural", held_out=2, attention=0, gradients=None, labels="model",
        **changes,
    ):  # fmt: skip
        words = ["--labels", labels] + ([] if gradients is None else ["--gradients", gradients])
        model = checkpoint(name, **changes)
        path = tmp_path / f"{name}.jsonl"
        run(
            "calibrate", model, "--text", text, "--samples", 8, "--sequence-length", 32,
            "--held-out", held_out, "--stats", stats, "--attention-samples", attention,
            "--work", tmp_path / f"{name}.work", "-o", path, *words,
        )  # fmt: skip
        return model, path

    return make


@pytest.fixture(scope="session")
def wikitext():
    if not (WIKITEXT / "wiki.valid.raw").exists():
        pytest.skip(f"no WikiText-2 in {WIKITEXT}; name its directory by PRUNETOOL_WIKITEXT")
    return WIKITEXT


@pytest.fixture(scope="session")
def smollm2():
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip(f"no converted SmolLM2 in {SMOLLM2}; `make {SMOLLM2}` makes it")
    return SMOLLM2.resolve()


def error_of(done):
    """The one line that a failed command says."""
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]
