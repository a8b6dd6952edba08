"""``score --target hidden``: a stock model of a smaller hidden size, in one basis of the stream."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from prunetool.errors import NumericalError
from prunetool.pruning import basis, gram
from tests.conftest import error_of
from tests.test_families import load as judge_of

D, KEPT = 64, 48
IDS = torch.tensor(np.random.default_rng(3).integers(0, 250, (2, 40)))
KINDS = {
    "untied, GQA": {},
    "tied, biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "MHA": {"num_key_value_heads": 4},
    "qwen3": {
        "model_type": "qwen3", "head_dim": 24, "attention_bias": "absent", "mlp_bias": "absent",
    },
}  # fmt: skip


@pytest.fixture
def cut(calibrated, call, tmp_path):
    """Export a model cut to a sparsity: ``cut(0.25, **changes)``; gives it, the dense one and Q."""

    def make(sparsity, *more, **changes):
        dense, records = calibrated(stats="all", gradients=0, **changes)
        stream = call("score", records, "--target", "hidden", "--sparsity", sparsity, *more)
        (tmp_path / "kept.jsonl").write_text(stream)
        call("export", "out", "kept.jsonl", "--overwrite")
        file = json.loads(stream.splitlines()[1])["files"]["basis"]
        return tmp_path / "out", dense, load_file(tmp_path / "dense.work" / file)["basis"]

    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.double()


class Norm(torch.nn.Module):
    """SliceGPT's: without weights, and dividing by the dense model's D."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, h):
        return h / torch.sqrt((h**2).sum(-1, keepdim=True) / D + self.eps)


def sliced(dense, Q):
    """The dense model of transformers with its stream cut to Q, written on its own; float64."""
    model = judge_of(dense).double()
    Q, inner = torch.tensor(Q, dtype=torch.float64), model.model
    head = model.lm_head.weight * inner.norm.weight
    inner.embed_tokens.weight = torch.nn.Parameter(inner.embed_tokens.weight @ Q)
    model.lm_head.weight = torch.nn.Parameter(head @ Q)
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        reads = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, matrices in reads.items():
            for matrix in matrices:
                matrix.weight = torch.nn.Parameter(matrix.weight * norm.weight @ Q)
        for matrix in (attention.o_proj, mlp.down_proj):
            matrix.weight = torch.nn.Parameter(Q.T @ matrix.weight)
            if matrix.bias is not None:
                matrix.bias = torch.nn.Parameter(Q.T @ matrix.bias)
        layer.input_layernorm = layer.post_attention_layernorm = Norm(model.config.rms_norm_eps)
    inner.norm = Norm(model.config.rms_norm_eps)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_basis_changes_nothing(cut, kind):
    out, dense, Q = cut(0, **KINDS[kind])
    assert Q.shape == (D, D)
    assert (logits(judge_of(out)) - logits(judge_of(dense))).abs().max() < 3e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_loads_strictly_and_is_the_cut_model(cut, kind):
    out, dense, Q = cut(0.25, **KINDS[kind])
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values())
    assert model.config.hidden_size == KEPT
    assert not list(out.glob("*.py"))
    assert (logits(model) - logits(sliced(dense, Q))).abs().max() < 3e-5


def test_more_parameters_are_said_to_be_more(cut, run, tmp_path):
    out, _, _ = cut(0.1, "--multiple-of", 1, tie_word_embeddings=True)
    said = run("export", "again", "kept.jsonl").stderr
    now, before = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+)(?= of| parameters)", said)[:2]
    )
    assert now > before
    assert f"({now / before - 1:.2%} more)" in " ".join(said.split())
    assert f"(+{now / before - 1:.2%}) |" in (out / "README.md").read_text()


def test_a_size_that_no_heads_divide_is_a_mistral(cut):
    out, dense, Q = cut(0.1, "--multiple-of", 1)
    assert Q.shape == (D, 58)
    assert json.loads((out / "config.json").read_text())["model_type"] == "mistral"
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (logits(model) - logits(sliced(dense, Q))).abs().max() < 3e-5


def test_heads_and_channels_go_first_in_the_same_pipe(calibrated, call, tmp_path):
    _, records = calibrated(stats="all")
    call("score", records, "--sparsity", ".2", "--allocation", "uniform", "-o", "units.jsonl")
    call("score", "units.jsonl", "--target", "hidden", "--sparsity", ".25", "-o", "both.jsonl")
    call("compensate", "both.jsonl", "-o", "refitted.jsonl")
    call("export", "out", "refitted.jsonl")
    call("compensate", "units.jsonl", "-o", "alone.jsonl")
    call("export", "alone", "alone.jsonl")
    file = json.loads((tmp_path / "both.jsonl").read_text().splitlines()[1])["files"]["basis"]
    Q = load_file(tmp_path / "dense.work" / file)["basis"]
    found, due = judge_of(tmp_path / "out"), sliced(tmp_path / "alone", Q)
    assert found.config.hidden_size == KEPT
    assert (logits(found) - logits(due)).abs().max() < 3e-5
    said = (tmp_path / "out" / "README.md").read_text()
    assert "| hidden size | 64 | 48 |" in said


def test_it_can_be_compared_and_reported(cut, call, text, tmp_path):
    out, dense, _ = cut(0.25)
    words = ["--text", text, "--samples", 2, "--sequence-length", 32, "--allow-calibrated"]
    said = call("evaluate", out, "--against", dense, *words, "--dtype", "float32")
    (tmp_path / "said.json").write_text(said)
    alone = json.loads(call("evaluate", out, *words, "--dtype", "float32"))
    found = json.loads(said)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert found["against"]["kl"] > 0
    page = call("report", out, "--evaluation", "said.json", "--format", "markdown", "-o", "-")
    assert "| before | 64 |" in page
    assert "Energy of the residual stream that is kept" in page


def test_stats_are_discarded_if_asked(calibrated, call, tmp_path):
    _, records = calibrated(stats="all", gradients=0)
    call("score", records, "--target", "hidden", "--sparsity", ".2", "--discard")
    assert not list(tmp_path.glob("dense.work/stats/*.stats.*"))


def test_a_damaged_basis_is_made_again_to_the_same_bytes(cut, call, tmp_path):
    out, *_ = cut(0.25)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    before = (tmp_path / "kept.jsonl").read_text()
    (path,) = tmp_path.glob("dense.work/score-*/basis.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    again = call("score", "dense.jsonl", "--target", "hidden", "--sparsity", ".25")
    assert again == before
    call("export", "out", "kept.jsonl", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_the_basis_is_orthogonal_and_of_the_largest_eigenvalues():
    random = np.random.default_rng(0)
    X = random.standard_normal((200, D)) * np.geomspace(1, 1e-3, D)
    Q = basis.principal(X.T @ X, KEPT)
    np.testing.assert_allclose(Q.T @ Q, np.eye(KEPT), atol=1e-12)
    due = np.linalg.eigvalsh(X.T @ X)[::-1][:KEPT]
    np.testing.assert_allclose(np.diagonal(Q.T @ X.T @ X @ Q), due, rtol=1e-6)


@pytest.mark.parametrize("gradients", [0, 2])
def test_the_stream_after_the_last_layer_is_summed_too(calibrated, tmp_path, gradients):
    dense, _ = calibrated(stats="all", gradients=gradients)
    tokens = load_file(tmp_path / "dense.work" / "tokens.safetensors")["tokens"]
    judge, streams = judge_of(dense), []
    judge.model.norm.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
    with torch.no_grad():
        judge(torch.tensor(tokens.astype(np.int64)))
    h = streams[0].double().numpy().reshape(-1, D)
    u = h / np.linalg.norm(h, axis=1, keepdims=True)
    found = load_file(tmp_path / "dense.work" / "stream.safetensors")
    assert found["tokens"] == [len(u)]
    np.testing.assert_allclose(gram.unpack(found["gram"]), u.T @ u, atol=1e-4)


def test_a_lost_sum_over_the_stream_is_made_again(calibrated, run, tmp_path):
    calibrated(stats="all", gradients=0)
    path = tmp_path / "dense.work" / "stream.safetensors"
    whole = path.read_bytes()
    path.unlink()
    calibrated(stats="all", gradients=0)
    assert path.read_bytes() == whole


def test_every_norm_has_its_say_in_the_basis(cut, tmp_path):
    _, dense, Q = cut(0.25)
    tokens = load_file(tmp_path / "dense.work" / "tokens.safetensors")["tokens"]
    judge, H = judge_of(dense), np.zeros((D, D))

    def add(_, given):
        h = given[0].detach().double().numpy().reshape(-1, D)
        u = h / np.linalg.norm(h, axis=1, keepdims=True)
        H[:] += u.T @ u / len(u)

    norms = [judge.model.norm]
    for layer in judge.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.register_forward_pre_hook(add)
    with torch.no_grad():
        judge(torch.tensor(tokens.astype(np.int64)))
    assert np.trace(H) == pytest.approx(7)
    due = np.linalg.eigvalsh(H)[::-1][:KEPT].sum()
    assert np.trace(Q.T @ H @ Q) == pytest.approx(due, rel=1e-6)


def test_tokens_of_norm_1_from_the_sums_of_a_norms_outputs():
    random = np.random.default_rng(1)
    h, w = random.standard_normal((300, D)) * 7, 1 + 0.2 * random.standard_normal(D)
    x = w * h / np.sqrt((h**2).mean(axis=1, keepdims=True))
    u = h / np.linalg.norm(h, axis=1, keepdims=True)
    found = basis.of_unit_norm(gram.pack(x.T @ x), w, len(x))
    np.testing.assert_allclose(found, u.T @ u / len(u), atol=1e-15)
    w[3] = 0
    with pytest.raises(NumericalError, match="is 0: the stream before it is unknown"):
        basis.of_unit_norm(gram.pack(x.T @ x), w, len(x))


def test_bad_input_has_one_clear_line(cut, call, run, calibrated, tmp_path):
    cut(0.25)
    hidden = ["--target", "hidden", "--sparsity"]
    masked = ["score", "dense.jsonl", "--target", "up", "--sparsity", ".5", "-o", "masked.jsonl"]
    call(*masked, "--method", "wanda")
    calibrated("few", gradients=0)
    last = "has its hidden dimensions cut; give --target hidden in the last score"
    filled = (
        "layer 0: has masks, whose zeros another basis would fill; give --target hidden without"
    )
    needs = (
        "--target hidden: needs the sums of the inputs of q, k, v, gate and up, and calibrate kept "
        "none; run calibrate with --stats all"
    )
    none = "--sparsity: 0.99 leaves none of 64 hidden dimensions; lower it, or --multiple-of"
    leave = "has its hidden dimensions cut; leave recover out; fine-tune OUT instead"
    dense = (
        "--format dense: keeps the sizes of the model, and --target hidden cuts one; give another "
        "--format"
    )
    for words, said in {
        ("score", "kept.jsonl", "--sparsity", ".1"): last,
        ("score", "masked.jsonl", *hidden, ".2"): filled,
        ("score", "few.jsonl", *hidden, ".2"): needs,
        ("score", "dense.jsonl", *hidden, ".99"): none,
        ("recover", "kept.jsonl"): leave,
        ("export", "other", "kept.jsonl", "--format", "dense"): dense,
    }.items():
        assert said in error_of(run(*words, ok=False))
    done = run("score", "dense.jsonl", *hidden, ".2", "--allocation", "global", ok=False)
    assert "--allocation is not for --target hidden" in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_norm_with_a_zero_names_its_layer(calibrated, checkpoint, run, tmp_path):
    path = checkpoint()
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][5] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 250, (4, 32)))
    run(
        "calibrate",
        path,
        "--tokens",
        "ids.npy",
        "--samples",
        4,
        "--sequence-length",
        32,
        "--stats",
        "all",
        "--gradients",
        0,
        "-o",
        "a.jsonl",
    )
    done = run("score", "a.jsonl", "--target", "hidden", "--sparsity", ".2", ok=False)
    assert "layer 1, before q/k/v: a norm's weight: is 0" in error_of(done)
