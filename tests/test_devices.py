"""Several devices of one process, and several processes on loopback, against one alone."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prunetool.devices import Team, _need_free, _numeric
from prunetool.workdir import load
from tests.conftest import DIE, at_layer, command, error_of, until

SECONDS = 240  # for processes to end; JAX itself would wait for longer


def calibrate(model, text, work, *more):
    return ["calibrate", model, "--text", text, "--samples", 11, "--sequence-length", 33,
            "--held-out", 3, "--stats", "all", "--attention-samples", 2, "--attention-length", 16,
            "--gradients", 3, "--first-tokens", 66, "--stream-dtype", "float32",
            "--batch-size", 5, "--work", work, *more]  # fmt: skip


def stats(work):
    found = sorted((work / "stats").glob("layer-*"))
    return {path.name: load(work, f"stats/{path.name}") for path in found}


def assert_alike(work, expected):
    """Equal within the rounding of float32 products of other batches."""
    found, expected = stats(work), stats(expected)
    assert found.keys() == expected.keys() != set()
    for file, arrays in expected.items():
        for name, array in arrays.items():
            # Each gradient has been through the layers above and back.
            within = (5e-6 if "gradients" in file else 2e-6) * (np.abs(array).max() or 1.0)
            np.testing.assert_allclose(found[file][name], array, atol=within, err_msg=name)


@pytest.mark.parametrize("biased", [False, True])
def test_four_devices_give_the_sums_of_one(checkpoint, text, process, tmp_path, biased):
    model = checkpoint(attention_bias=biased, mlp_bias=biased)
    process(*calibrate(model, text, tmp_path / "one", "-o", "one.jsonl"))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    process(*calibrate(model, text, tmp_path / "four", "-o", "four.jsonl"), **flags)
    assert_alike(tmp_path / "four", tmp_path / "one")


def test_the_stats_hardly_depend_on_the_batch(checkpoint, text, process, tmp_path):
    model = checkpoint()
    process(*calibrate(model, text, tmp_path / "five", "-o", "a.jsonl"))
    process(*calibrate(model, text, tmp_path / "one", "--batch-size", 1, "-o", "b.jsonl"))
    assert_alike(tmp_path / "one", tmp_path / "five")


class Processes:
    """Two processes of one calibration on loopback."""

    def __init__(self, words, cwd, slurm=False, more=((), ()), first=("", "")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port = free.getsockname()[1]
        self.running = []
        for i in range(2):
            if slurm:  # what srun sets; the port comes from the job's number
                found = ["--coordinator", "auto"]
                environment = {
                    "SLURM_JOB_ID": str(port),
                    "SLURM_STEP_NODELIST": "127.0.0.1",
                    "SLURM_NTASKS": "2",
                    "SLURM_PROCID": str(i),
                    "SLURM_LOCALID": str(i),
                    "SLURM_STEP_NUM_NODES": "1",
                }
            else:
                found = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
                found += ["--process-id", str(i)]
                environment = {}
            self.running.append(
                subprocess.Popen(
                    command([*words, *found, *more[i]], first[i]),
                    cwd=cwd,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env={**os.environ, **environment},
                )
            )

    def finish(self):
        """The exit code, output and errors of each."""
        try:
            said = [process.communicate(timeout=SECONDS) for process in self.running]
        finally:
            for process in self.running:
                process.kill()
        return [(p.returncode, *streams) for p, streams in zip(self.running, said, strict=True)]


def test_two_processes_give_the_sums_of_one(checkpoint, text, process, tmp_path):
    model = checkpoint()
    alone = process(*calibrate(model, text, "one")).stdout
    (code, out, err), (other, nothing, more) = Processes(
        calibrate(model, text, "two"), tmp_path
    ).finish()
    assert (code, other) == (0, 0), err + more
    assert out == alone.replace("/one", "/two")
    assert not nothing
    assert_alike(tmp_path / "two", tmp_path / "one")
    assert not list((tmp_path / "two").glob("hidden-*"))
    # Records are read again, by two or by one.
    again = Processes(calibrate(model, text, "two"), tmp_path).finish()
    assert [code for code, _, _ in again] == [0, 0]
    assert again[0][1] == out


def test_processes_find_each_other_as_slurm_says(checkpoint, text, tmp_path):
    found = Processes(calibrate(checkpoint(), text, "two"), tmp_path, slurm=True).finish()
    assert [code for code, _, _ in found] == [0, 0], found
    assert found[0][1].endswith('{"record": "end"}\n')
    assert not found[1][1]


def listening(pid):
    """Addresses (hexadecimal, as the kernel has them) and ports that a process listens on."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed since
            sockets.add(str(entry.readlink()))
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    found = [of[1].split(":") for of in lines if of[3] == "0A" and f"socket:[{of[9]}]" in sockets]
    return {int(port, 16): address for address, port in found}


@pytest.fixture
def waiting(checkpoint, text, tmp_path):
    """Process 0 of two as it waits for the other, which does not come."""
    pair = Processes(calibrate(checkpoint(), text, "two"), tmp_path, more=((), ["--help"]))
    until(lambda: pair.port in listening(pair.running[0].pid), pair.running[0])
    yield pair
    for process in pair.running:
        with process:
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_0_listens_on_the_address_given_and_no_other(waiting):
    found = listening(waiting.running[0].pid)
    loopback = "0100007F"  # 127.0.0.1; in IPv6, ::ffff:127.0.0.1
    assert found[waiting.port] in (loopback, f"{'0' * 16}FFFF0000{loopback}")


@pytest.mark.parametrize("address", ["h", "h:", ":1", "h:x", "h:0", "h:65536"])
def test_an_address_is_host_and_port(checkpoint, text, process, address):
    for index in (0, 1):
        done = process(*calibrate(checkpoint(), text, "w"), "--coordinator", address,
                   "--processes", 2, "--process-id", index, ok=False)  # fmt: skip
        assert f"'{address}' is not HOST:PORT); start all of them with the same" in error_of(done)


def test_an_address_may_be_a_name_or_of_ipv6():
    assert _numeric("127.0.0.1:80") == "127.0.0.1:80"
    assert _numeric("[::1]:80") == "[::1]:80"
    assert _numeric("localhost:80") in ("127.0.0.1:80", "[::1]:80")


def test_an_address_that_cannot_be_listened_on_is_one_line(checkpoint, text, process):
    alone = [*calibrate(checkpoint(), text, "w"), "--processes", 2, "--process-id", 0]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        line = error_of(process(*alone, "--coordinator", address, ok=False))
        assert line == f"Error: --coordinator: {address} is in use; give another port"
        with socket.create_connection(other.getsockname()):
            other.accept()[0].close()
    _need_free(address, address)  # of a connection that has ended, nothing is left
    line = error_of(process(*alone, "--coordinator", "192.0.2.1:4000", ok=False))
    assert "--coordinator: process 0 cannot listen on 192.0.2.1:4000 (Cannot assign" in line


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_that_waits_for_the_others(waiting, tmp_path, number, code):
    waiting.running[0].send_signal(number)
    (found, _, said), _ = waiting.finish()
    assert (found, said) == (code, "Interrupted; run the same command again to resume\n")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_stops_the_others_and_the_run_goes_on(checkpoint, text, tmp_path, lost):
    model = checkpoint(num_hidden_layers=5)
    words = calibrate(model, text, "two")
    dies = [at_layer(3, DIE) if i == lost else "" for i in (0, 1)]
    ended = Processes(words, tmp_path, first=dies).finish()
    assert ended[lost][0] == -signal.SIGKILL
    code, _, said = ended[1 - lost]
    assert code == 1
    assert "run all of them again; they resume after the last finished layer" in said
    assert list((tmp_path / "two").glob("hidden-*"))
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("stats/layer-0000[01].*")}
    assert made
    again = Processes(words, tmp_path).finish()
    assert [code for code, _, _ in again] == [0, 0], again
    assert {path: path.stat().st_mtime_ns for path in made} == made

    whole = Processes(calibrate(model, text, "whole"), tmp_path).finish()
    assert again[0][1] == whole[0][1].replace("/whole", "/two")
    for file, arrays in stats(tmp_path / "whole").items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(stats(tmp_path / "two")[file][name], array)


def test_a_process_without_gradients_joins_a_backward_pass_that_goes_on(
    checkpoint, text, process, tmp_path
):
    model, one = checkpoint(), ["--gradients", 1]
    process(*calibrate(model, text, "one", *one))
    words = calibrate(model, text, "two", *one)
    dies = at_layer(1, DIE, backwards=True)  # process 0, which has the sequence
    (code, _, _), (other, _, said) = Processes(words, tmp_path, first=(dies, "")).finish()
    assert (code, other) == (-signal.SIGKILL, 1)
    assert "run all of them again" in said
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "two").glob("stats/layer-*")}
    assert tmp_path / "two/stats/layer-00002.gradients.safetensors" in made
    again = Processes(words, tmp_path).finish()
    assert [code for code, _, _ in again] == [0, 0], again
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert_alike(tmp_path / "two", tmp_path / "one")
    assert not [path for path in (tmp_path / "two").iterdir() if "-00" in path.name]


def test_shares_are_whole_and_even():
    for count in range(1, 6):
        cuts = [Team(i, count).share(3, 14) for i in range(count)]
        assert cuts[0][0] == 3
        assert cuts[-1][1] == 14
        assert all(a[1] == b[0] for a, b in pairwise(cuts))
        assert max(b - a for a, b in cuts) - min(b - a for a, b in cuts) <= 1


def test_a_gpu_that_is_not_there_is_one_line(checkpoint, text, process):
    done = process("calibrate", checkpoint(), "--text", text, "--device", "gpu", ok=False)
    assert "--device gpu: JAX finds no GPU; install jax[cuda13] for it" in error_of(done)


def test_a_process_that_fails_ends_the_others_at_once(checkpoint, text, process, tmp_path):
    model = checkpoint()
    process(
        "calibrate", model, "--text", text, "--samples", 2, "--work", "two", "--sequence-length", 32
    )
    (code, _, said), (other, _, more) = Processes(calibrate(model, text, "two"), tmp_path).finish()
    assert (code, other) == (1, 1)
    assert "holds another run" in said
    assert "run all of them again" in more


def test_processes_that_run_different_things_say_so(checkpoint, text, tmp_path):
    words = calibrate(checkpoint(), text, "two")
    pair = Processes(words, tmp_path, more=(["--shuffle", "1"], ["--shuffle", "2"]))
    for code, _, said in pair.finish():
        assert code == 1
        assert "the processes differ in checkpoint, text or options; give all of them" in said


def test_processes_with_other_weights_say_so(checkpoint, text, tmp_path):
    models = [checkpoint(name) for name in ("one", "other")]
    tensors = load_file(models[1] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1] += 1  # beyond the rows of the fingerprint
    save_file(tensors, models[1] / "model.safetensors", metadata={"format": "pt"})
    command, _, *rest = calibrate(models[0], text, "two")
    for code, _, said in Processes([command, *rest], tmp_path, more=[[m] for m in models]).finish():
        assert code == 1
        assert "Error: layer 1: the processes have different weights; give all of them" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--processes", 2],
        ["--coordinator", "h:1", "--processes", 2],
        ["--coordinator", "auto", "--process-id", 0],
    ],
)
def test_processes_need_their_address(checkpoint, text, process, words):
    done = process("calibrate", checkpoint(), "--text", text, *words, ok=False)
    assert done.returncode == 2
    assert "--coordinator HOST:PORT, --processes and --process-id go together" in done.stderr
