"""Where the time of a step goes: seconds by phase, and the JAX profiler's trace."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax


class Profile:
    """Seconds by phase, layer by layer.

    Args:
      path: where to write the trace (gzipped JSON for Perfetto and Chrome); None records only the
        seconds.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards a phase, and mark it in the trace."""
        started = time.perf_counter()
        with jax.profiler.TraceAnnotation(name) if self.path else nullcontext():
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self, step: str, before: Mapping[str, Any]) -> dict[str, Any]:
        """Values for the record of the layer just done; none unless profiling was requested.

        Args:
          step: the command.
          before: the record's values, including earlier steps' seconds.
        """
        spent, self._seconds = self._seconds, {}
        if not self.path:
            return {}
        rounded = {name: round(value, 4) for name, value in spent.items()}
        return {"seconds": {**before.get("seconds", {}), step: rounded}}

    @contextmanager
    def trace(self) -> Iterator[None]:
        """Write the trace of what runs inside, if requested."""
        if not self.path:
            yield
            return
        with tempfile.TemporaryDirectory(prefix="prunetool-") as directory:
            jax.profiler.start_trace(directory, create_perfetto_trace=True)
            try:
                yield
            finally:
                jax.profiler.stop_trace()  # type: ignore[no-untyped-call]
            (found,) = Path(directory).rglob("perfetto_trace.json.gz")
            shutil.copyfile(found, self.path)
