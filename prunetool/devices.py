"""Devices that share the sequences of a batch, and processes that share the samples.

Every process runs its share of the sequences on its own devices, without communication until the
layer is done; then JAX's collectives add the sums of all devices of all processes.
"""

import atexit
import ctypes
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prunetool import signals
from prunetool.errors import ConfigError, WorkError

JOIN_SECONDS = 300
STOPPED = "run all of them again; they resume after the last finished layer"


def spec(*axes: str | None) -> PartitionSpec:
    """Mesh axis along which each axis of an array is split."""
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def local_mesh() -> Mesh:
    """This process's devices, along the axis ``device``."""
    return Mesh(np.array(jax.local_devices()), ("device",))


BY_SEQUENCE, BY_DEVICE, EVERYWHERE = spec(None, "device"), spec("device"), spec()


class Spread:
    """A function of sequences over this process's devices, compiled once.

    Its arrays are spread `BY_SEQUENCE`, whose second axis is the sequences', `BY_DEVICE`, where the
    first axis has one term per device, such as sums, or are the same `EVERYWHERE`, like weights.

    Args:
      function: what each device computes from its part.
      given, made: how its arguments, and its results, are spread.
      donated: number of the argument whose memory the results may take.
    """

    def __init__(self, function: Callable[..., Any], given: Any, made: Any, donated: int) -> None:
        self._mesh = local_mesh()
        mapped = jax.shard_map(
            function, mesh=self._mesh, in_specs=given, out_specs=made, check_vma=False
        )
        self.call = jax.jit(mapped, donate_argnums=donated)

    def everywhere(self, tree: Any) -> Any:
        """Put arrays on every device."""
        return jax.device_put(tree, NamedSharding(self._mesh, EVERYWHERE))

    def zeros(self, shapes: Any) -> Any:
        """Zeros of these shapes, once per device."""
        place, count = NamedSharding(self._mesh, BY_DEVICE), self._mesh.size
        return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype, device=place), shapes)

    def sequences(self, h: np.ndarray) -> jax.Array:
        """Spread sequences, (D, B, N), padded with zeros to as many on each device."""
        h = np.pad(h, ((0, 0), (0, -h.shape[1] % self._mesh.size), (0, 0)))
        placed: jax.Array = jax.device_put(h, NamedSharding(self._mesh, BY_SEQUENCE))
        return placed

    def real(self, sequences: int) -> jax.Array | None:
        """1 for each of the sequences and 0 for those that pad them; None if none can."""
        if self._mesh.size == 1:
            return None
        room = -sequences % self._mesh.size
        return jnp.asarray(np.arange(sequences + room) < sequences, jnp.float32)


def own_terms(array: np.ndarray) -> jax.Array:
    """A host array as the term of this process's first device; the others are zero."""
    mesh = local_mesh()
    terms = np.zeros((mesh.size, *array.shape), array.dtype)
    terms[0] = array
    placed: jax.Array = jax.device_put(terms, NamedSharding(mesh, spec("device")))
    return placed


@dataclass(frozen=True)
class Team:
    """The processes that share the sequences.

    Attributes:
      index: index of this process; 0 writes.
      count: number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        """Suffix of this process's files; empty for a single process."""
        return f".{self.index}of{self.count}" if self.count > 1 else ""

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """Start and stop of this process's part of a range."""
        cuts = [start + (stop - start) * i // self.count for i in range(self.count + 1)]
        return cuts[self.index], cuts[self.index + 1]

    def wait(self, what: str) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            with _together():
                multihost_utils.sync_global_devices(what)

    def same(self, value: int) -> bool:
        """Whether all processes have the same value."""
        return self.least(value) == -self.least(-value)

    def leave(self) -> None:
        """Wait for the others at the end; otherwise a process that ends takes them with it."""
        self.wait("end")
        atexit.unregister(os._exit)

    def least(self, value: int) -> int:
        """The smallest of the processes' values."""
        if self.count == 1:
            return value
        with _together():
            return int(multihost_utils.process_allgather(np.array(value)).min())

    def total(self, tree: Any) -> Any:
        """The sum over all devices of all processes, in float64 where the terms are.

        Args:
          tree: arrays with a first axis along this process's devices (`local_mesh`).

        Returns:
          The same tree of host arrays without that axis.
        """
        if jax.device_count() == 1:
            return jax.tree.map(lambda terms: np.asarray(terms)[0], tree)
        mesh = Mesh(np.array(jax.devices()), ("device",))
        everywhere = NamedSharding(mesh, spec())

        def total(terms: jax.Array) -> np.ndarray:
            shape = (jax.device_count(), *terms.shape[1:])
            pieces = [shard.data for shard in terms.addressable_shards]
            joined = jax.make_array_from_single_device_arrays(
                shape, NamedSharding(mesh, spec("device")), pieces
            )
            return np.asarray(_adder(everywhere)(joined).addressable_data(0))

        with _together():
            return jax.tree.map(total, tree)


def start(
    device: str,
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
) -> Team:
    """Choose where JAX computes and join the other processes, before JAX makes any array.

    From here on JAX has float64, which sums over tokens need; everything else names its dtype.

    Args:
      device: ``cpu``, ``gpu``, or ``auto``: what JAX finds.
      coordinator: ``HOST:PORT`` of process 0; ``auto`` finds all three as JAX does, from SLURM,
        Open MPI or Kubernetes; None for a single process.
      processes: number of processes.
      index: index of this one.

    Raises:
      ConfigError: if JAX has no GPU, the address is in use, or the processes do not connect.
    """
    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]
    if coordinator is not None:
        _join(coordinator, processes, index)
    if device == "gpu" and jax.default_backend() == "cpu":
        raise ConfigError(
            "--device gpu", "JAX finds no GPU", "install jax[cuda13] for it, or give --device cpu"
        )
    team = Team(jax.process_index(), jax.process_count()) if coordinator is not None else Team()
    if team.count > 1:
        # At exit JAX would wait for the others, who wait for this one if it failed. The last
        # registered function runs first.
        atexit.register(os._exit, 1)
    if team.index:
        _say_when_aborted()
    return team


@cache
def _adder(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """The sum over the first axis, across devices; compiled once per shape."""
    return jax.jit(lambda terms: terms.sum(axis=0), out_shardings=sharding)


def _join(coordinator: str, processes: int | None, index: int | None) -> None:
    # Gloo writes to stdout, which is for records only.
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # JAX's SIGTERM handler only records the signal; the process would go on.
    jax.config.update("jax_enable_preemption_service", False)  # type: ignore[no-untyped-call]
    try:
        if coordinator == "auto":
            with signals.at_once(signals.GO_ON):
                jax.distributed.initialize()
        else:
            address = _numeric(coordinator)
            if index == 0:
                _need_free(coordinator, address)
            with signals.at_once(signals.GO_ON):
                jax.distributed.initialize(
                    coordinator,
                    processes,
                    index,
                    initialization_timeout=JOIN_SECONDS,
                    coordinator_bind_address=address,
                )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            "--coordinator",
            f"the processes did not connect ({error})",
            "start all of them with the same HOST:PORT, and each with its own --process-id",
        ) from error


def _numeric(address: str) -> str:
    """``HOST:PORT`` with the host's numeric address: process 0 listens on that alone.

    Raises:
      ValueError: if it is something else.
      OSError: if the host's name is unknown.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{address!r} is not HOST:PORT")
    (*_, (number, *_)), *_ = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    return f"[{number}]:{port}" if ":" in str(number) else f"{number}:{port}"


def _need_free(coordinator: str, address: str) -> None:
    """Refuse an address that process 0 cannot listen on: JAX would crash without a message.

    Args:
      coordinator: the address as given.
      address: the same from `_numeric`.

    Raises:
      ConfigError: if it is in use, or not an address of this machine.
    """
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what, todo = f"{coordinator} is in use", "give another port"
            else:
                what = f"process 0 cannot listen on {coordinator} ({error.strerror})"
                todo = "give an address of its machine, and a port above 1023"
            raise ConfigError("--coordinator", what, todo) from error


@contextmanager
def _together() -> Iterator[None]:
    """Report a lost process when a collective fails."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # from a reduction, from a barrier
        reason = str(error).splitlines()[0]
        raise WorkError("another process", f"stopped ({reason})", STOPPED) from error


def _say_when_aborted() -> None:
    """When process 0 is lost, JAX aborts this process from a thread of its own: say why.

    Python's own signal handlers would wait for the main thread, which waits for process 0.
    """
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)


def _stop(_: int) -> None:
    os.write(2, f"Error: process 0: stopped; {STOPPED}\n".encode())
    os._exit(1)


_on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(_stop)
