"""``score --target hidden --basis layer``: a basis for each norm, with a matrix between any two."""

import json
import re
from types import MethodType

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from tests.commands.test_hidden import IDS, KINDS, D, Norm, logits
from tests.conftest import error_of
from tests.loaders.test_mlx import assert_a_cache_changes_nothing, loss_in_mlx
from tests.test_families import load as judge_of

LAYER = ["--target", "hidden", "--basis", "layer"]
WORDS = ["--samples", 2, "--sequence-length", 32, "--allow-calibrated", "--dtype", "float32"]
MORE_KINDS = {
    **KINDS,
    "a large ε": {"rms_norm_eps": 0.05},
    "qwen2": {"model_type": "qwen2", "attention_bias": "absent", "mlp_bias": "absent"},
    "window": {
        "model_type": "mistral", "sliding_window": 8, "attention_bias": "absent",
        "mlp_bias": "absent",
    },
}  # fmt: skip


@pytest.fixture
def cut(calibrated, call, tmp_path):
    """Export a model cut to a sparsity; gives it, the dense one and each layer's bases."""

    def make(sparsity, *more, **changes):
        dense, records = calibrated(stats="residual", gradients=0, **changes)
        call("score", records, *LAYER, "--sparsity", sparsity, *more, "-o", "kept.jsonl")
        call("export", "out", "kept.jsonl", "--overwrite")
        return tmp_path / "out", dense, bases(tmp_path / "kept.jsonl")

    return make


def bases(records):
    layers = map(json.loads, records.read_text().splitlines()[1:-1])
    work = json.loads(records.read_text().splitlines()[0])["work"]
    return [load_file(f"{work}/{layer['files']['basis']}") for layer in layers]


def in_layers(directory):
    """Parameters of the layers' matrices, and of those between bases."""
    return sum(
        array.size
        for path in directory.glob("*.safetensors")
        for name, array in load_file(path).items()
        if re.search(r"(_proj|shortcut)\.weight", name)
    )


def sliced(dense, found):
    """transformers' dense model with each signal in its own basis, written on its own; float64."""
    model = judge_of(dense).double()
    eps, inner = model.config.rms_norm_eps, model.model
    Q = [torch.tensor(layer[s]).double() for layer in found for s in ("attention", "mlp")]
    Q.append(torch.eye(D).double())
    inner.embed_tokens.weight = torch.nn.Parameter(inner.embed_tokens.weight @ Q[0])

    def forward(self, h, **more):
        A, B, C = self.around
        attended = self.self_attn(self.input_layernorm(h), **more)[0]
        h = h @ A.T @ B + attended @ B
        return h @ B.T @ C + self.mlp(self.post_attention_layernorm(h)) @ C

    for n, layer in enumerate(inner.layers):
        attention, mlp = layer.self_attn, layer.mlp
        layer.around = Q[2 * n : 2 * n + 3]
        for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
            folded = matrix.weight * layer.input_layernorm.weight @ Q[2 * n]
            matrix.weight = torch.nn.Parameter(folded)
        for matrix in (mlp.gate_proj, mlp.up_proj):
            folded = matrix.weight * layer.post_attention_layernorm.weight @ Q[2 * n + 1]
            matrix.weight = torch.nn.Parameter(folded)
        layer.input_layernorm = layer.post_attention_layernorm = Norm(eps)
        if hasattr(attention, "q_norm"):  # which has the ε of the others
            for norm in (attention.q_norm, attention.k_norm):
                norm.variance_epsilon = eps * D / Q[0].shape[1]
        layer.forward = MethodType(forward, layer)
    return model


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_whole_bases_change_nothing(cut, kind):
    out, dense, found = cut(0, "--multiple-of", D, **MORE_KINDS[kind])
    assert found[0]["attention"].shape == (D, D)
    assert (logits(judge_of(out)) - logits(judge_of(dense))).abs().max() < 3e-5


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_what_is_exported_loads_strictly_and_is_the_cut_model(cut, call, text, kind, tmp_path):
    out, dense, found = cut(0.25, **MORE_KINDS[kind])
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    assert not any(said.values())
    k = found[0]["attention"].shape[1]
    assert model.config.hidden_size == k < D
    assert model.lm_head.weight.shape[1] == model.model.norm.weight.shape[0] == D
    assert (logits(model) - logits(sliced(dense, found))).abs().max() < 3e-5
    np.save(tmp_path / "ids.npy", IDS.numpy().astype(np.int32))
    mine = json.loads(
        call("evaluate", out, "--tokens", "ids.npy", "--sequence-length", 40, "--dtype", "float32")
    )
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss.item()
    assert mine["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_mlx_computes_the_same(cut, kind):
    out, *_ = cut(0.25, **MORE_KINDS[kind])
    with torch.no_grad():
        due = judge_of(out)(IDS, labels=IDS).loss.item()
    assert loss_in_mlx(out, IDS.numpy()) == pytest.approx(due, abs=1e-5)
    assert_a_cache_changes_nothing(out, np.tile(IDS.numpy(), 2)[:, :48])


def test_transformers_generates_and_saves_it_again(cut, tmp_path):
    out, *_ = cut(0.25)
    model = judge_of(out)
    plain = model.generate(IDS[:, :8], max_new_tokens=8, do_sample=False, use_cache=False)
    cached = model.generate(IDS[:, :8], max_new_tokens=8, do_sample=False)
    assert (plain == cached).all()
    model.save_pretrained(tmp_path / "saved")
    assert (logits(judge_of(tmp_path / "saved")) == logits(model)).all()


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.3])
def test_the_sparsity_is_of_parameters_with_the_matrices_between(cut, sparsity):
    out, dense, _ = cut(sparsity, "--multiple-of", 1)
    sizes = [in_layers(path) for path in (dense, out)]
    assert 1 - sizes[1] / sizes[0] == pytest.approx(sparsity, abs=0.01)
    said = f"| parameters in decoder layers | {sizes[0]:,} | {sizes[1]:,} ("
    assert said in (out / "README.md").read_text()


def test_each_basis_is_of_its_own_signal(cut, tmp_path):
    _, dense, found = cut(0.25)
    tokens = load_file(tmp_path / "dense.work" / "tokens.safetensors")["tokens"]
    judge, signals = judge_of(dense), []
    for layer in judge.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda _, given: signals.append(given[0]))
    with torch.no_grad():
        judge(torch.tensor(tokens.astype(np.int64)))
    of = [(layer, site) for layer in range(len(found)) for site in ("attention", "mlp")]
    for (layer, site), h in zip(of, signals, strict=True):
        X = h.double().numpy().reshape(-1, D)
        Q = found[layer][site].astype(np.float64)
        np.testing.assert_allclose(Q.T @ Q, np.eye(Q.shape[1]), atol=1e-6)
        H = X.T @ X
        due = np.linalg.eigvalsh(H)[::-1][: Q.shape[1]].sum()
        assert np.trace(Q.T @ H @ Q) == pytest.approx(due, rel=1e-5)
        kept = found[layer]["kept"][int(site == "mlp")]
        assert kept == pytest.approx(due / np.trace(H), rel=1e-5)


def test_heads_and_channels_go_first_in_the_same_pipe(calibrated, call, run, tmp_path):
    _, records = calibrated(stats="residual")
    call("score", records, "--sparsity", ".3", "--multiple-of", 8, "-o", "units.jsonl")
    call("score", "units.jsonl", *LAYER, "--sparsity", ".25", "-o", "both.jsonl")
    call("compensate", "both.jsonl", "-o", "refitted.jsonl")
    call("export", "out", "refitted.jsonl")
    call("compensate", "units.jsonl", "-o", "alone.jsonl")
    call("export", "alone", "alone.jsonl")
    found = judge_of(tmp_path / "out")
    due = sliced(tmp_path / "alone", bases(tmp_path / "refitted.jsonl"))
    assert len({layer.mlp.gate_proj.out_features for layer in found.model.layers}) > 1
    assert (logits(found) - logits(due)).abs().max() < 3e-5


def test_it_can_be_compared_inspected_and_reported(cut, call, text, tmp_path):
    out, dense, _ = cut(0.25)
    said = call("evaluate", out, "--against", dense, "--text", text, *WORDS)
    (tmp_path / "said.json").write_text(said)
    alone = json.loads(call("evaluate", out, "--text", text, *WORDS))
    found = json.loads(said)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert found["against"]["kl"] > 0
    shown = json.loads(call("inspect", out))
    assert shown["hidden_size"] < D == shown["sliced_from"]
    page = call("report", out, "--evaluation", "said.json", "--format", "markdown", "-o", "-")
    assert "Energy of the residual stream that is kept" in page
    now, before = in_layers(out), in_layers(dense)
    assert f"| before | {before:,} | 100.00% |\n| stored | {now:,} | {now / before:.2%} |" in page


def test_damaged_bases_are_made_again_to_the_same_bytes(cut, call, tmp_path):
    out, *_ = cut(0.25)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    before = (tmp_path / "kept.jsonl").read_text()
    damaged = sorted(tmp_path.glob("dense.work/score-*/layer-*.basis.safetensors"))[1:]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    again = call("score", "dense.jsonl", *LAYER, "--sparsity", ".25")
    assert again == before
    call("export", "out", "kept.jsonl", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_an_evaluation_goes_on_behind_the_last_layer(cut, monkeypatch, tmp_path):
    from prunetool.model import open_model
    from prunetool.steps.evaluate import final_stream, mean_loss

    out, *_ = cut(0.25)
    model, tokens = open_model(str(out)), IDS.numpy().astype(np.int32)
    work = tmp_path / "evaluation"
    work.mkdir()
    stream = final_stream(model, tokens, "float32", work)
    assert stream.hidden_size == D
    due = mean_loss(model, tokens, "float32")
    monkeypatch.setattr("prunetool.steps.evaluate.layer_step", lambda *_: None)
    assert final_stream(model, tokens, "float32", work).path == stream.path
    assert mean_loss(open_model(str(out)), tokens, "float32", work) == due


def test_records_whose_layers_disagree_are_refused(cut, run, tmp_path):
    cut(0.25)
    lines = (tmp_path / "kept.jsonl").read_text().splitlines()
    layer = json.loads(lines[2])
    for changed in (
        layer | {"files": {k: v for k, v in layer["files"].items() if k != "basis"}},
        layer | {"values": layer["values"] | {"hidden": layer["values"]["hidden"] | {"kept": 32}}},
        layer | {"values": layer["values"] | {"hidden": layer["values"]["hidden"] | {"of": 65}}},
    ):
        text = "\n".join([*lines[:2], json.dumps(changed), *lines[3:], ""])
        (tmp_path / "mixed.jsonl").write_text(text)
        said = error_of(run("export", "mixed", "mixed.jsonl", ok=False))
        assert "layer 1: has another basis of the stream than layer 0; run the last score" in said


def test_a_config_that_contradicts_itself_is_refused(cut, run, tmp_path):
    out, *_ = cut(0.25)
    config = json.loads((out / "config.json").read_text())
    for change in ({"sliced_from": 8}, {"tie_word_embeddings": True}, {"family": "llamagen"}):
        (out / "config.json").write_text(json.dumps(config | change))
        said = error_of(run("inspect", out, ok=False))
        assert "config.json" in said
        assert "family" in change or "sliced_from = " in said


def test_bad_input_has_one_clear_line(cut, call, run, calibrated, text, tmp_path):
    out, *_ = cut(0.25)
    calibrated("few", stats="all", gradients=0)
    needs = (
        "--basis layer: needs the sums of the residual stream, and calibrate kept none; run "
        "calibrate with --stats residual"
    )
    far = "--sparsity: 0.99 is out of reach: --multiple-of 8 removes at most "
    again = "has a basis of the stream before each norm, and is not pruned again; prune the model"
    gguf = (
        "llama.cpp: computes no model with a basis before each norm; run score with --basis shared"
    )
    for words, said in {
        ("score", "few.jsonl", *LAYER, "--sparsity", ".2"): needs,
        ("score", "dense.jsonl", *LAYER, "--sparsity", ".99"): far,
        ("calibrate", out, "--text", text, "--samples", 4): again,
        ("export", "other.gguf", "kept.jsonl", "--format", "gguf"): gguf,
        ("convert", out, "other.gguf"): gguf,
        ("inspect", out, "--plan"): "is not pruned again (--basis layer); leave --plan out",
        (
            "score",
            "dense.jsonl",
            *LAYER,
            "--sparsity",
            "0",
            "--multiple-of",
            65,
        ): "above the hidden",
    }.items():
        assert said in error_of(run(*words, ok=False))
    assert "llama.cpp" not in run("export", "again", "kept.jsonl").stderr
    done = run("score", "dense.jsonl", "--basis", "layer", "--sparsity", ".2", ok=False)
    assert "--basis goes with --target hidden" in done.stderr
