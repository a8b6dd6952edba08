"""``recover``: its steps are those of torch's Adam on transformers' model, and it resumes."""

import errno
import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from prunetool import corpus, workdir
from prunetool.checkpoint.writer import atomic
from prunetool.steps import recover as step
from prunetool.steps.trained import Trained
from tests.conftest import error_of
from tests.test_families import FAMILIES, load

SHARD = "model-00001-of-00001.safetensors"
WORDS = ["--samples", 5, "--sequence-length", 32, "--held-out", 1, "--gradients", 0]
KINDS = {
    "llama, tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    **{name: {"attention_bias": "absent", "mlp_bias": "absent", **FAMILIES[name]}
       for name in ("mistral", "qwen3")},
}  # fmt: skip


@pytest.fixture
def kept(checkpoint, tmp_path, call):
    """A pruned tiny model, alike in all layers, not refitted: a stock architecture.

    All its sequences are equal but for one token, so that what helps one helps the others.
    """

    def make(*score, **changes):
        checkpoint(**changes)
        ids = np.tile(np.random.default_rng(2).integers(0, 250, 32), (5, 1))
        ids[:, 9] = range(5)
        np.save(tmp_path / "ids.npy", ids.ravel())
        call(
            "calibrate", "dense", "--tokens", "ids.npy", *WORDS, "--work", "w", "-o", "stats.jsonl"
        )
        words = score or [
            "--target",
            "channels",
            "--allocation",
            "uniform",
            "--sparsity",
            ".3",
            "--multiple-of",
            8,
        ]
        call("score", "stats.jsonl", *words, "-o", "kept.jsonl")

    return make


def descend(judge, dense, tokens, order, peak, trained):
    """The same training by torch, in float32."""
    names = dict(judge.model.named_parameters())
    chosen = [value for name, value in names.items() if trained(name)]
    for value in chosen:
        value.requires_grad_()
    adam = torch.optim.Adam(chosen, lr=peak, betas=(0.9, 0.95))
    for n, sequence in enumerate(order):
        row = torch.tensor(tokens[[sequence]].astype(np.int64))
        with torch.no_grad():
            target = dense(row).logits.log_softmax(-1)
        found = judge(row).logits.log_softmax(-1)
        loss = (target.exp() * (target - found)).sum(-1).mean()
        for group in adam.param_groups:
            group["lr"] = step.learning_rate(n, len(order), peak)
        adam.zero_grad()
        loss.backward()
        adam.step()


@pytest.mark.parametrize(
    ("kind", "what", "epochs"),
    [(kind, what, 1) for kind in KINDS for what in ("all", "norms")]
    + [(next(iter(KINDS)), "all", 2)],
)
def test_its_steps_are_those_of_adam_on_transformers_model(
    tmp_path, call, kept, kind, what, epochs
):
    kept(**KINDS[kind])
    call("export", "before", "kept.jsonl")
    peak = "3e-4"
    words = ["--what", what, "--learning-rate", peak, "--seed", 3, "-o", "recovered.jsonl"]
    call("recover", "kept.jsonl", *words, "--epochs", epochs)
    made = [json.loads(line) for line in (tmp_path / "recovered.jsonl").read_text().splitlines()]
    said = made[1]["values"]["recover"]
    assert said["steps"] == 4 * epochs
    assert said["kl_after"] < said["kl_before"]
    call("export", "after", "recovered.jsonl")
    tokens = workdir.TensorFile(tmp_path / "w", workdir.TOKENS_NAME)["tokens"]
    judge = load(tmp_path / "before").requires_grad_(False)
    random = np.random.default_rng(3)
    order = [n for _ in range(epochs) for n in random.permutation(4)]

    def trained(name):
        return "embed" not in name and (what == "all" or "norm" in name)

    descend(judge, load(tmp_path / "dense"), tokens, order, float(peak), trained)
    expected = {f"model.{name}": value for name, value in judge.model.named_parameters()}
    before = load_file(tmp_path / "before" / SHARD)
    for name, array in load_file(tmp_path / "after" / SHARD).items():
        if name == "lm_head.weight":
            continue
        moved = np.abs(array - before[name]).max()
        assert (moved > 1e-5) == trained(name)
        # Adam's first steps are signs: where a gradient is near 0, rounding decides.
        far = np.abs(array - expected[name].detach().numpy()) > 1e-5
        assert far.mean() < 0.01, name


def test_the_default_rate_follows_the_loss_before(tmp_path, run, kept):
    kept()
    said = run("recover", "kept.jsonl", "-o", "default.jsonl").stderr
    value = json.loads((tmp_path / "default.jsonl").read_text().splitlines()[1])["values"]
    rate = value["recover"]["learning_rate"]
    assert rate == min(2.5e-4 * value["recover"]["kl_before"], 5e-4)
    assert f"learning rate up to {rate:.2g}" in said
    run("recover", "kept.jsonl", "--learning-rate", rate, "-o", "given.jsonl")
    for name in ("default", "given"):
        run("export", name, f"{name}.jsonl")
    made, same = (load_file(tmp_path / name / SHARD) for name in ("default", "given"))
    assert all(np.array_equal(made[part], same[part]) for part in made)


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("weights.json", "cost.json")  # times
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", [3, 8, 20, 31, 50, 77, 115])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, call, kept, monkeypatch, writes):
    words = ["--method", "random", "--allocation", "global", "--sparsity", ".3"]
    kept(*words, num_hidden_layers=2)
    words = ["recover", "kept.jsonl", "--learning-rate", "1e-3", "-o"]
    call(*words, "whole.jsonl")
    expected = contents(tmp_path / "w")
    (done,) = (tmp_path / "w").glob("recover-*")
    shutil.rmtree(done)
    left, write = [writes], atomic

    @contextmanager
    def killing(path, **how):
        with write(path, **how) as partial:
            yield partial
            left[0] -= 1
            if not left[0]:
                raise Killed

    for module in ("steps.trained", "streaming"):
        monkeypatch.setattr(f"prunetool.{module}.atomic", killing)
    with pytest.raises(Killed):
        call(*words, "again.jsonl")
    assert not list(done.glob("layer-*")) or writes > 20
    call(*words, "again.jsonl")
    assert contents(tmp_path / "w") == expected
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.parametrize("writes", [3, 40, 90])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, run, kept, monkeypatch, writes):
    kept(num_hidden_layers=2)
    words = ["recover", "kept.jsonl", "--learning-rate", "1e-3"]
    expected = run(*words).stdout
    (done,) = (tmp_path / "w").glob("recover-*")
    shutil.rmtree(done)
    left = [writes]

    @contextmanager
    def full(path, **how):
        with atomic(path, **how) as partial:
            yield partial
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for module in ("steps.trained", "streaming"):
            patch.setattr(f"prunetool.{module}.atomic", full)
        line = error_of(run(*words, ok=False))
    assert "cannot be written (No space left on device); make room and run again" in line
    assert not list(done.glob(".*"))
    assert run(*words).stdout == expected


def test_damaged_state_is_not_used(tmp_path, call, run, kept, monkeypatch):
    kept(num_hidden_layers=2)
    words = ["recover", "kept.jsonl", "--learning-rate", "1e-3", "-o"]
    call(*words, "whole.jsonl")
    (done,) = (tmp_path / "w").glob("recover-*")
    shutil.rmtree(done)
    update, left = Trained.update, [40]

    def killing(*given):
        left[0] -= 1
        if not left[0]:
            raise Killed
        update(*given)

    monkeypatch.setattr(Trained, "update", killing)
    with pytest.raises(Killed):
        call(*words, "again.jsonl")
    state = sorted(done.glob("state-00001.gate.*"))[-1]
    data = bytearray(state.read_bytes())
    data[100] ^= 1
    state.write_bytes(data)
    assert "starting again" in run(*words, "again.jsonl").stderr
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_damaged_result_is_made_again(tmp_path, run, kept):
    kept(num_hidden_layers=2)
    words = ["recover", "kept.jsonl", "--learning-rate", "1e-3"]
    expected = run(*words).stdout
    before = contents(tmp_path / "w")
    (path,) = (tmp_path / "w").glob("recover-*/layer-00001.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    done = run(*words)
    assert "training again" in done.stderr
    assert done.stdout == expected
    assert contents(tmp_path / "w") == before


def test_what_is_measured_is_what_export_rounds(tmp_path, call, run, kept):
    kept(dtype="bfloat16")
    words = [
        "--learning-rate",
        "3e-3",
        "--dtype",
        "float32",
        "--epochs",
        4,
        "-o",
        "recovered.jsonl",
    ]
    call("recover", "kept.jsonl", *words)
    value = json.loads((tmp_path / "recovered.jsonl").read_text().splitlines()[1])["values"]
    call("export", "out", "recovered.jsonl")
    np.save(tmp_path / "held.npy", load_file(tmp_path / "w" / workdir.TOKENS_NAME)["tokens"][-1])
    words = ["--tokens", "held.npy", "--sequence-length", 32, "--dtype", "float32"]
    said = run("evaluate", "out", "--against", "dense", *words, "--allow-calibrated").stdout
    kl = json.loads(said)["against"]["kl"]
    assert kl == pytest.approx(value["recover"]["kl_after"], rel=0.05)  # without the last token


def test_a_kill_before_it_cleans_up_leaves_nothing_for_long(tmp_path, call, kept, monkeypatch):
    kept()
    words = ["recover", "kept.jsonl", "--learning-rate", "1e-3", "-o"]
    call(*words, "whole.jsonl")
    before = contents(tmp_path / "w")
    for done in tmp_path.glob("w/recover-*"):
        shutil.rmtree(done)
    write = step.Recovery._write_progress

    def killed(self, *, finished):
        write(self, finished=finished)
        if finished:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(step.Recovery, "_write_progress", killed)
        with pytest.raises(Killed):
            call(*words, "again.jsonl")
    assert [*tmp_path.glob("w/recover-*/state-*")]
    call(*words, "again.jsonl")
    assert contents(tmp_path / "w") == before


def test_the_disk_asked_for_is_what_is_written(call, kept, monkeypatch):
    asked = []
    monkeypatch.setattr("prunetool.steps.run.need_room", lambda _, need: asked.append(need))
    kept(num_hidden_layers=8)
    asked.clear()
    for words in (["--what", "norms"], [], []):
        call("recover", "kept.jsonl", *words, "-o", "recovered.jsonl")
    norms, every, again = asked
    assert 0 < norms < every / 2
    assert again <= 0


def test_more_than_the_calibration_has_is_said(run, kept):
    kept()
    said = run("recover", "kept.jsonl", "--samples", 9).stderr
    assert "the calibration has only 4 for --samples; give --text for more" in said
    assert "calibration has only" not in run("recover", "kept.jsonl", "--samples", 2).stderr


def test_what_diverges_keeps_what_was_before_and_says_so(tmp_path, run, kept):
    kept()
    done = run("recover", "kept.jsonl", "--learning-rate", "1e3")
    assert "what was best before is kept; try a lower --learning-rate" in done.stderr
    before = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert done.stdout.splitlines()[1:] == before[1:]  # but for the header
    run("export", "out", stdin=done.stdout)
    assert "without training" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("rate", ["1e3", "1e30"])  # too large a loss, and none
def test_what_diverged_is_not_gone_on_with(tmp_path, call, run, kept, monkeypatch, rate):
    kept()
    words = ["recover", "kept.jsonl", "--learning-rate", rate, "-o"]
    said = run(*words, "whole.jsonl").stderr
    write = step.Recovery._write_progress
    for done in tmp_path.glob("w/recover-*"):
        shutil.rmtree(done)

    def killed(self, *, finished):
        if finished:
            raise Killed
        write(self, finished=finished)

    monkeypatch.setattr(step.Recovery, "_write_progress", killed)
    with pytest.raises(Killed):
        call(*words, "again.jsonl")
    monkeypatch.setattr(step.Recovery, "_write_progress", write)
    (after,) = re.findall(r".*; what was best before is kept", said)
    assert after in run(*words, "again.jsonl").stderr
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_gradients_that_overflow_name_their_layer(tmp_path, run, kept, monkeypatch):
    kept()

    def overflowing(h, g, *given, real=step._gradients, **sizes):
        found, inputs = real(h, g, *given, **sizes)
        return found._replace(before=found.before * np.float32(np.nan)), inputs

    monkeypatch.setattr(step, "_gradients", overflowing)
    said = run("recover", "kept.jsonl").stderr
    assert "layer 2: its gradients are NaN or infinite; what was best before is kept" in said


def test_masked_weights_stay_zero(tmp_path, call, kept):
    kept("--target", "weights", "--method", "magnitude", "--sparsity", ".5")
    call("recover", "kept.jsonl", "--learning-rate", "1e-3", "-o", "recovered.jsonl")
    for name in ("kept", "recovered"):
        call("export", name, f"{name}.jsonl")
    before, after = (load_file(tmp_path / n / SHARD) for n in ("kept", "recovered"))
    masked = [name for name in before if "_proj" in name]
    assert len(masked) == 3 * 7
    for name in masked:
        assert ((before[name] == 0) == (after[name] == 0)).all()
        assert (before[name] != after[name]).any()


def test_what_it_refuses(tmp_path, call, run, kept):
    def refused(*words):
        line = run(*words, ok=False)
        assert line.returncode == 1
        return line.stderr.splitlines()[-1]

    kept()
    assert "nothing was pruned" in refused("recover", "stats.jsonl")
    call(
        "score",
        "stats.jsonl",
        "--sparsity",
        "0",
        "--method",
        "magnitude",
        "--allocation",
        "global",
        "-o",
        "all.jsonl",
    )
    assert "nothing was pruned" in refused("recover", "all.jsonl")
    call("recover", "kept.jsonl", "--learning-rate", "1e-3", "-o", "recovered.jsonl")
    assert "was already recovered" in refused("recover", "recovered.jsonl")
    assert "compensate" in refused("compensate", "recovered.jsonl")
    path = tmp_path / "w" / workdir.TOKENS_NAME
    tokens = workdir.TensorFile(tmp_path / "w", workdir.TOKENS_NAME)["tokens"]
    workdir.write(tmp_path / "w", workdir.TOKENS_NAME, {"tokens": tokens[:, ::-1].copy()})
    assert "has the tokens of another run" in refused("recover", "kept.jsonl", "--seed", "1")
    path.unlink()
    assert path.name in refused("recover", "kept.jsonl", "--seed", "1")


def test_what_says_how_a_text_is_cut_needs_a_text(tmp_path, run, kept):
    kept()
    for words in (["--sequence-length", 24], ["--bos", "never"], ["--text-field", "x"]):
        line = run("recover", "kept.jsonl", *words, ok=False).stderr.splitlines()[-1]
        assert f"{words[0]} is for --text, --tokens or --dataset: give one" in line


def test_the_card_names_a_file_of_token_ids(tmp_path, call, kept):
    kept()
    np.save(tmp_path / "more.npy", np.arange(24 * 5) % 250)
    words = ["--tokens", "more.npy", "--samples", 3, "--held-out", 2, "--sequence-length", 24]
    call("recover", "kept.jsonl", *words, "--learning-rate", "1e-4", "-o", "recovered.jsonl")
    call("export", "out", "recovered.jsonl")
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("--tokens FILE") == 2, "calibrate's and recover's"
    assert "--text" not in card.partition("```json")[0].partition("How it was made")[2]


def test_other_text_and_what_the_card_says(tmp_path, call, text, kept):
    kept()
    words = ["--text", text, "--samples", 3, "--held-out", 2, "--sequence-length", 24]
    call("recover", "kept.jsonl", *words, "--learning-rate", "1e-4", "-o", "recovered.jsonl")
    header = json.loads((tmp_path / "recovered.jsonl").read_text().splitlines()[0])
    said = header["history"][-1]["options"]
    assert [said[key] for key in ("samples", "held_out", "sequence_length")] == [3, 2, 24]
    call("export", "recovered", "recovered.jsonl")
    call("export", "kept", "kept.jsonl")
    card = (tmp_path / "recovered/README.md").read_text()
    assert "and trained on its predictions" in card
    assert "| prunetool recover --what all" in card
    command = card.partition("prunetool recover")[2].partition("\n")[0]
    assert "--text TEXT" in command
    assert "--bos never" in command
    assert "--sequence-length 24" in command
    call("recover", "kept.jsonl", "-o", "same.jsonl")
    call("export", "same", "same.jsonl")
    command = (tmp_path / "same/README.md").read_text().partition("| prunetool recover")[2]
    assert "--sequence-length" not in command.partition("\n")[0], "which needs a text"
    call("report", "recovered.jsonl", "-o", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Recovered</caption>" in page
    assert "held-out KL, nats a token" in page
    assert "without training" in (tmp_path / "kept/README.md").read_text()


def test_more_text_that_the_model_writes(tmp_path, call, run, kept):
    kept()
    words = ["recover", "kept.jsonl", "--text", "self", "--sequence-length", 24, "--seed", 3,
             "--held-out", 2]  # fmt: skip
    call(*words, "--samples", 3, "-o", "recovered.jsonl")
    (file,) = (tmp_path / "w").glob("self-*.safetensors")
    header = json.loads((tmp_path / "recovered.jsonl").read_text().splitlines()[0])
    said = header["history"][-1]["options"]
    first = load_file(file)["tokens"][:5].copy()
    assert said["tokens"] == corpus.fingerprint(first)
    call("calibrate", "dense", "--text", "self", "--shuffle", 3, "--samples", 5,
         "--sequence-length", 24, "--work", "w2", "-o", "own.jsonl")  # fmt: skip
    own = load_file(tmp_path / "w2" / workdir.TOKENS_NAME)["tokens"]
    assert (own == first).all(), "calibrate and recover take the same sequences"
    call("export", "out", "recovered.jsonl")
    assert "--text self" in (tmp_path / "out/README.md").read_text()
