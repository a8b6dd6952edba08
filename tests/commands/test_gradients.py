"""``calibrate --gradients``: its sums are those of torch's autograd, however the run went."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from prunetool import plan, streaming
from prunetool.errors import NumericalError, WorkError
from prunetool.llama import decode
from prunetool.llama.parts import MATRICES
from prunetool.model import open_model
from prunetool.pruning import gram
from prunetool.steps import calibrate
from prunetool.steps.backward import _top_gradient
from prunetool.workdir import load
from tests.commands.test_pipe import contents
from tests.llama.test_backward import theirs
from tests.test_families import load as judge_of

EXACT = ["--stats-dtype", "float64", "--dtype", "float32", "--stream-dtype", "float32"]
USED = [0, 1, 2]  # of the 4 sequences that are not held out


@pytest.fixture
def ids(tmp_path):
    found = np.random.default_rng(2).integers(0, 250, (6, 32), np.int32)
    np.save(tmp_path / "ids.npy", found)
    return found


def words(model, *more, gradients=3, work="w"):
    return ["calibrate", model, "--tokens", "ids.npy", "--samples", 6, "--held-out", 2,
            "--sequence-length", 32, "--stats", "all", "--batch-size", 2, "--gradients", gradients,
            "--work", work, "-o", f"{work}.jsonl", *more]  # fmt: skip


def expected(path, ids):
    """By layer, the sums of its file of gradients, from autograd."""
    judge = judge_of(path).requires_grad_()
    tokens, labels = ids[USED].astype(np.int64), []
    with torch.no_grad():
        scores = judge(torch.tensor(tokens)).logits.numpy()
    for number, of in zip(USED, scores, strict=True):
        uniform = np.random.default_rng([0, number]).random(len(of))
        labels.append(decode.draw(jnp.asarray(of.T), jnp.asarray(uniform)))
    outputs, _ = theirs(judge, tokens, np.array(labels, np.int64))
    found = []
    for at in outputs:
        flat = {part: np.float64(g).reshape(len(g), -1) for part, g in at.items()}
        sums = {f"{part}.gram": flat[part] @ flat[part].T for part in ("o", "down")}
        found.append(sums | {f"{part}.square": (flat[part] ** 2).sum(1) for part in MATRICES})
    return found


def sums(work, layers=3):
    """By layer, the sums of its file of gradients."""
    found = []
    for layer in range(layers):
        arrays = load(work, f"stats/layer-{layer:05d}.gradients.safetensors")
        assert arrays.pop("tokens") == [3 * 32]
        found.append({k: gram.unpack(v) if "gram" in k else v for k, v in arrays.items()})
    return found


def furthest(found, due):
    """The largest relative error of any sum."""
    assert [layer.keys() for layer in found] == [layer.keys() for layer in due]
    return max(
        np.linalg.norm(layer[name] - array) / np.linalg.norm(array)
        for layer, right in zip(found, due, strict=True)
        for name, array in right.items()
    )


KINDS = {
    "untied, GQA": {},
    "tied, biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen3, window": {
        "model_type": "qwen3", "head_dim": 24, "attention_bias": "absent", "mlp_bias": "absent",
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_autograd(checkpoint, call, ids, tmp_path, kind):
    path = checkpoint(**KINDS[kind])
    call(*words(path, *EXACT))
    due = expected(path, ids)
    assert furthest(sums(tmp_path / "w"), due) < 2e-5
    call(*words(path, *EXACT, "--batch-size", 1, work="single"))
    assert furthest(sums(tmp_path / "single"), sums(tmp_path / "w")) < 5e-6


def test_rounded_streams_change_the_sums_little(
    checkpoint, call, ids, tmp_path, monkeypatch, request
):
    def same(scores, uniform):  # where logits differ, a drawn token may
        return (uniform * scores.shape[0]).astype(jnp.int32)

    monkeypatch.setattr(decode, "draw", same)
    request.addfinalizer(_top_gradient.cache_clear)  # it has what is drawn compiled in
    _top_gradient.cache_clear()
    path = checkpoint()
    for dtype in ("float32", "bfloat16"):
        call(*words(path, *EXACT[:-1], dtype, work=dtype))
    change = furthest(sums(tmp_path / "bfloat16"), sums(tmp_path / "float32"))
    print(f"largest relative change {change}")
    assert 1e-4 < change < 0.01


def test_sums_of_unequal_layers_are_those_of_autograd(checkpoint, call, ids, tmp_path):
    call(*words(checkpoint()))
    call("score", "--method", "random", "--sparsity", ".3", "w.jsonl", "-o", "kept.jsonl")
    call("export", "out", "kept.jsonl")
    out = tmp_path / "out"
    assert len(set(open_model(str(out)).config.layer_shapes)) > 1
    call(*words(out, *EXACT, work="pruned"))
    assert furthest(sums(tmp_path / "pruned"), expected(out, ids)) < 2e-5


def test_a_file_of_gradients_has_the_sums_asked_for(checkpoint, call, ids, tmp_path):
    path = checkpoint()
    call(*words(path, "--stats", "structural"))
    (file, *_) = sorted(tmp_path.glob("w/stats/*.gradients.*"))
    assert load_file(file).keys() == {"tokens", "o.gram", "down.gram"}
    call(*words(path, gradients=0, work="none"))
    assert not list(tmp_path.glob("none/stats/*.gradients.*"))
    assert "gradients" not in (tmp_path / "none.jsonl").read_text().partition("\n")[2]


def interrupted(call, monkeypatch, line, layer, what):
    """Run up to a layer of the forward, or to gradients of which ``what`` is said."""

    def fail(h, number, *said, real=streaming.check_finite):
        real(h, number, *said)
        if number == layer and bool(said) == bool(what) and what in "".join(said):
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "check_finite", fail)
        with pytest.raises(MemoryError):
            call(*line)


MOMENTS = {
    "forward": (1, ""), "labels": (3, "after it"), "last": (3, "its"), "middle": (1, "its"),
    "first": (0, "its"),
}  # fmt: skip


def leftovers(work):
    return sorted(path.name for kind in streaming.KINDS for path in work.glob(f"*{kind}-*"))


@pytest.fixture
def whole(checkpoint, call, ids, tmp_path):
    """A model of four layers, and the work directory of its run."""
    path = checkpoint(num_hidden_layers=4)
    call(*words(path, work="whole"))
    assert not leftovers(tmp_path / "whole")
    return path


def assert_as_whole(tmp_path):
    assert contents(tmp_path / "w") == contents(tmp_path / "whole")
    found, due = ((tmp_path / f"{name}.jsonl").read_text() for name in ("w", "whole"))
    assert found == due.replace("/whole", "/w")


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_ends_in_the_same_bytes(whole, call, tmp_path, monkeypatch, moment):
    line, work = words(whole), tmp_path / "w"
    interrupted(call, monkeypatch, line, *MOMENTS[moment])
    assert leftovers(work)
    for other in ("hidden-00002.0of2", "residual-00002.1of2", "gradient-00002.1of2"):
        (work / other).touch()  # of a run with another number of processes
    made = {path: path.stat().st_mtime_ns for path in work.glob("stats/*")}
    call(*line)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert_as_whole(tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGED = {
    "residual-00002": "is missing or damaged; starting again",
    "gradient-00002": "is damaged; made again",
    "stats/layer-00003.gradients.safetensors": "does not match; starting again",
    "stats/layer-00003.stats.safetensors": "does not match; starting again",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_made_again(whole, run, call, tmp_path, monkeypatch, name):
    line = words(whole)
    interrupted(call, monkeypatch, line, 1, "its")
    flip(tmp_path / "w" / name)
    said = run(*line).stderr
    assert name in said.splitlines()[0]
    assert DAMAGED[name] in said.splitlines()[0]
    assert_as_whole(tmp_path)


def test_a_finished_run_with_a_damaged_file_starts_again(whole, run, tmp_path):
    flip(tmp_path / "whole/stats/layer-00002.gradients.safetensors")
    again = words(whole, work="whole")
    assert "does not match; starting again" in run(*again).stderr
    run(*words(whole))
    assert_as_whole(tmp_path)


def test_gradients_of_an_earlier_forward_are_not_taken_for_its_own(
    whole, call, tmp_path, monkeypatch
):
    line, work = words(whole), tmp_path / "w"
    interrupted(call, monkeypatch, line, 1, "its")
    (work / "hidden-00004").unlink()
    interrupted(call, monkeypatch, line, 1, "")
    assert "gradient-00002" not in leftovers(work)
    call(*line)
    assert_as_whole(tmp_path)


def test_another_number_of_sequences_is_another_run(whole, call, tmp_path, monkeypatch):
    line, work = words(whole), tmp_path / "w"
    interrupted(call, monkeypatch, line, 1, "its")
    with pytest.raises(WorkError, match="holds another run: --gradients was 3 and is 2; give --ov"):
        call(*words(whole, gradients=2))
    interrupted(call, monkeypatch, words(whole, "--overwrite", gradients=2), 1, "")
    assert leftovers(work) == ["hidden-00001", "residual-00000", "residual-00001"]
    call(*words(whole, gradients=2))
    assert not leftovers(work)


def test_clean_deletes_the_streams(whole, call, tmp_path, monkeypatch):
    interrupted(call, monkeypatch, words(whole), 1, "its")
    call("clean", "w")
    assert not (tmp_path / "w").exists()


def test_a_discarded_file_is_not_made_again(whole, call, tmp_path, monkeypatch):
    """In a pipe, score discards what it has read before calibrate has ended."""
    line, work = words(whole), tmp_path / "w"

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(calibrate.Calibration, "_read_ends", fail)
        with pytest.raises(MemoryError):
            call(*line)
    call("score", "--sparsity", ".2", "--multiple-of", 8, "--discard", "whole.jsonl")
    (work / "discarded").touch()
    for path in work.glob("stats/layer-00001.*"):
        path.unlink()
    call(*line)
    assert not list(work.glob("stats/layer-00001.*"))
    assert not list(tmp_path.glob("whole/stats/layer-*"))


def test_the_disk_planned_is_the_disk_used(whole, call, tmp_path, monkeypatch):
    interrupted(call, monkeypatch, words(whole), 0, "its")
    files = [path for path in tmp_path.glob("w/*") if path.name[:8] in ("residual", "gradient")]
    files += (tmp_path / "whole/stats").glob("*.gradients.*")
    used = sum(path.stat().st_size for path in files)
    planned = plan.gradient_bytes(open_model(str(whole)), 3, 32, "all", "bfloat16", "float32")
    assert used <= planned < 1.2 * used


def test_the_disk_is_checked_for_the_streams(whole, call, tmp_path, monkeypatch):
    model = open_model(str(whole))
    least = plan.stats_bytes(model, "all", (0, 0), "float32") + plan.hidden_bytes(model, 6, 32)
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=least))
    call(*words(whole, gradients=0, work="none"))
    with pytest.raises(WorkError, match=r"w: needs .* GB of disk and .* GB are free; make room or"):
        call(*words(whole))


# After a norm of tiny weights, the products of huge ones are finite. Backward they come first.
MLP = "model.layers.1.mlp."
HUGE = {
    "layer 1: its gradients are NaN or infinite": (
        {"model.layers.1.post_attention_layernorm.weight": 2e-38, f"{MLP}down_proj.weight": 1e-3,
         "lm_head.weight": 30.0},
        [f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"],
    ),
    "layer 2: the gradients after it are NaN or infinite": (
        {"model.norm.weight": 2e-38},
        ["lm_head.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HUGE)
def test_gradients_that_overflow_name_their_layer(checkpoint, call, ids, what):
    path = checkpoint()
    tensors = load_file(path / "model.safetensors")
    factors, matrices = HUGE[what]
    for name, factor in factors.items():
        tensors[name] *= np.float32(factor)
    for name in matrices:
        tensors[name] = np.sign(tensors[name]) * np.float32(3e38)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    call(*words(path, gradients=0, work="none"))
    with pytest.raises(NumericalError, match=f"^{what}; try --dtype float32, or check the model"):
        call(*words(path))


@pytest.mark.parametrize("given", [5, 4])
def test_only_what_is_not_held_out_can_be_used(checkpoint, run, ids, given):
    done = run(*words(checkpoint(), gradients=given), ok=False)
    if given == 4:
        assert done.returncode == 0
    else:
        assert done.returncode == 2
        assert "--gradients 5: only 4 samples are not held out" in done.stderr
