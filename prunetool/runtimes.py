"""Speed and memory of a model in the program that will run it; one model to a process.

    python -m prunetool.runtimes '{"model": "OUT", "prompt": 128, "generate": 32, …}'

prints one JSON object. The programs are not dependencies of prunetool and are imported only here:
transformers (with torch) for a checkpoint, llama.cpp (with its wheel cyllama) for a GGUF file.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

NEEDED = {"transformers": ("transformers", "torch"), "llama.cpp": ("cyllama",)}  # packages


def runtime_of(model: Path) -> str:
    """The program for a model: by its name, a GGUF file's or a checkpoint's."""
    return "llama.cpp" if model.suffix == ".gguf" else "transformers"


def measure(
    model: str, prompt: int, generate: int, repeats: int, dtype: str, threads: int, trusted: bool
) -> dict[str, Any]:
    """Load a model, run a prompt and go on from it, some times.

    Args:
      model: directory of a checkpoint, or GGUF file.
      prompt, generate: numbers of tokens.
      repeats: how often; once more before, to warm up.
      dtype: of a checkpoint's weights, or ``auto``: as stored.
      threads: of the program.
      trusted: whether the checkpoint's code may run.

    Returns:
      Seconds of loading, tokens a second of every repeat, and peak resident bytes.
    """
    runtime = runtime_of(Path(model))
    if runtime == "transformers":
        load = _transformers(model, dtype, threads, trusted=trusted)
    else:
        load = _llama_cpp(model, threads, prompt + generate)
    began = time.perf_counter()
    run, vocab_size = load()
    loaded = time.perf_counter() - began
    ids = np.random.default_rng(0).integers(0, vocab_size, prompt)
    unit = 1 if sys.platform == "darwin" else 1024
    found = [run(ids, generate) for _ in range(repeats + 1)][1:]
    return {
        "runtime": runtime,
        "load_seconds": loaded,
        "prompt_tokens_per_second": [prompt / first for first, _ in found],
        "generated_tokens_per_second": [generate / rest for _, rest in found],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


# Runs a prompt and goes on greedily; returns the seconds of both.
Run = Callable[[np.ndarray, int], tuple[float, float]]
Load = Callable[[], tuple[Run, int]]


def _transformers(model: str, dtype: str, threads: int, *, trusted: bool) -> Load:
    torch, transformers = import_module("torch"), import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)

    def load() -> tuple[Run, int]:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, trust_remote_code=trusted
        ).eval()

        def run(ids: np.ndarray, generate: int) -> tuple[float, float]:
            began = time.perf_counter()
            with torch.inference_mode():
                out = loaded(torch.tensor(ids[None]), use_cache=True)
                read = time.perf_counter()
                for _ in range(generate):
                    token = out.logits[:, -1:].argmax(-1)
                    out = loaded(token, past_key_values=out.past_key_values, use_cache=True)
            return read - began, time.perf_counter() - read

        return run, loaded.config.vocab_size

    return load


def _llama_cpp(model: str, threads: int, length: int) -> Load:
    llama = import_module("cyllama.llama.llama_cpp")
    llama.disable_logging()

    # The wheel's context asks a model for this.
    own = {"n_vocab": property(lambda self: self.get_vocab().n_vocab)}
    Model = type("Model", (llama.LlamaModel,), own)

    def load() -> tuple[Run, int]:
        loaded = Model(model, llama.LlamaModelParams())
        how = llama.LlamaContextParams()
        how.n_ctx = how.n_batch = how.n_ubatch = max(length, 32)
        how.n_threads = how.n_threads_batch = threads
        context = llama.LlamaContext(loaded, how)

        def decode(ids: list[int], start: int) -> int:
            batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
            for place, number in enumerate(ids, start):
                batch.add(number, place, [0], place == start + len(ids) - 1)
            context.decode(batch)
            return int(np.argmax(context.get_logits_ith(len(ids) - 1)))

        def run(ids: np.ndarray, generate: int) -> tuple[float, float]:
            context.kv_cache_clear()
            began = time.perf_counter()
            token = decode(list(map(int, ids)), 0)
            read = time.perf_counter()
            for place in range(len(ids), len(ids) + generate):
                token = decode([token], place)
            return read - began, time.perf_counter() - read

        return run, loaded.get_vocab().n_vocab

    return load


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
