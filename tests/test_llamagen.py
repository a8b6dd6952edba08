"""LlamaGen's class-conditional models: from their .pt through the pipe to their own program.

With PRUNETOOL_LLAMAGEN naming a checkout of github.com/FoundationVision/LlamaGen, its own module
judges; else that of `references_llamagen`.
"""

import argparse
import importlib.util
import json
import os
import runpy
import signal
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from prunetool import streaming
from prunetool.llama import decode, forward
from prunetool.llama.config import GRID_ROPE, Rope
from prunetool.llama.weights import Layer
from prunetool.model import open_model
from tests import references_llamagen as reference
from tests.conftest import command, error_of

GRID, CODES, V, D = 6, 36, 200, 96
LLAMAGEN = os.environ.get("PRUNETOOL_LLAMAGEN")
KILLED = """
import os, signal
from prunetool import workdir
from prunetool.steps import selftext
selftext.WIDEST = 4
def write(work, name, arrays, real=workdir.write):
    real(work, name, arrays)
    os.kill(os.getpid(), signal.SIGKILL)
workdir.write = write
"""


@pytest.fixture
def gpt(monkeypatch):
    if not LLAMAGEN:
        return reference.install(monkeypatch)
    monkeypatch.syspath_prepend(LLAMAGEN)
    from autoregressive.models import gpt

    return gpt


@pytest.fixture
def theirs(gpt):
    """A small model of theirs."""
    return reference.random_model(gpt)


@pytest.fixture
def converted(theirs, run, tmp_path):
    """The directory of its checkpoint."""
    torch.save(theirs.state_dict(), tmp_path / "tiny.pt")
    run("convert", "tiny.pt", "M", "--image-size", 96, "--heads", 4)
    return tmp_path / "M"


@pytest.fixture
def pictures(tmp_path):
    """Ids of 24 pictures, not the model's own."""
    random = np.random.default_rng(0)
    ids = random.integers(0, V, (24, CODES + 1)).astype(np.int32)
    ids[:, 0] = V + np.arange(24) % 10
    np.save(tmp_path / "ids.npy", ids)
    return ids


def close(a, b, limit):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= limit * np.abs(b).max()


def state_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def ours(directory, ids):
    """Logits of prunetool's own forward, (n, N, V)."""
    model = open_model(str(directory))
    rope = streaming.rotation(model, ids.shape[1])
    h = model.embedding()[ids].astype(np.float32).transpose(2, 0, 1)
    config = model.config
    for _, layer in model.padded_layers():
        weights = streaming.to_device(layer, "float32")
        h, _ = forward.decoder_layer(
            h, weights, rope, head_dim=config.head_dim, eps=config.rms_norm_eps
        )
    norm, head = (np.asarray(part, np.float32) for part in (model.final_norm(), model.head()))
    each = [
        forward.logits(np.asarray(h)[:, i : i + 1], norm, head, eps=config.rms_norm_eps).T
        for i in range(len(ids))
    ]
    return np.array(each)


@torch.no_grad()
def their_logits(model, ids):
    positions = torch.arange(ids.shape[1])
    codes, classes = torch.tensor(ids[:, 1:]).long(), torch.tensor(ids[:, 0] - V).long()
    return model(codes, classes, input_pos=positions)[0].numpy()


def loader(directory, monkeypatch):
    monkeypatch.syspath_prepend(str(directory))
    spec = importlib.util.spec_from_file_location("loaded", directory / "llamagen_pruned.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pipe(run, *score, out="P", compensate=True, form="auto"):
    run("calibrate", "M", "--tokens", "ids.npy", "--samples", 32, "--stats", "all", "-o", "s.jsonl")
    run("score", "s.jsonl", "-o", "k.jsonl", *score)
    if compensate:
        run("compensate", "k.jsonl", "-o", "c.jsonl")
    run("export", out, "c.jsonl" if compensate else "k.jsonl", "--format", form)


# The module


def test_logits_are_those_of_the_reference(theirs, converted, pictures):
    ids = pictures[:3, :-1]
    own = ours(converted, ids)
    close(own, their_logits(theirs, ids), 2e-5)
    state = state_of(theirs)
    for row, each in zip(ids, own, strict=True):
        close(each, reference.logits(state, row[0] - V, row[1:], GRID, D // 4), 2e-5)


def test_the_class_has_no_angle_but_zero(theirs, converted, pictures, monkeypatch):
    """With the identity instead, the logits are far off: the test above would notice."""
    ids = pictures[:1, :-1]
    expected = ours(converted, ids)
    real = streaming.rotation

    def identity(model, length):
        c, s = real(model, length)
        return forward.Rotation(c.at[:, 0].set(1.0), s)

    monkeypatch.setattr(streaming, "rotation", identity)
    assert np.abs(ours(converted, ids) - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("size", "heads"), [(1536, 24), (3200, 32)], ids=["XXL", "3B"])
def test_a_layer_of_real_size(gpt, size, heads):
    torch.manual_seed(0)
    config = gpt.ModelArgs(
        dim=size, n_head=heads, n_layer=1, vocab_size=8, num_classes=2, block_size=576
    )
    model = gpt.Transformer(config).eval()
    layer = model.layers[0]
    for p in layer.parameters():
        p.data = torch.randn_like(p) * 0.02 if p.ndim == 2 else 1 + 0.1 * torch.randn_like(p)
    h = torch.randn(1, 577, size)
    with torch.no_grad():
        expected = layer(h, model.freqs_cis, None, None).numpy()
    d = size // heads
    w = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    q, k, v = np.split(w["attention.wqkv.weight"], 3)
    q, k = (x.reshape(-1, d // 2, 2, size).swapaxes(1, 2).reshape(x.shape) for x in (q, k))
    parts = Layer(
        w["attention_norm.weight"], q, k, v, w["attention.wo.weight"], w["ffn_norm.weight"],
        *(w[f"feed_forward.w{n}.weight"] for n in (1, 3, 2)),
    )  # fmt: skip
    rope = forward.rotation(Rope(GRID_ROPE, parameters={"grid": 24}), d, 577, 577)
    own, _ = forward.decoder_layer(
        h.numpy().transpose(2, 0, 1), streaming.to_device(parts, "float32"), rope,
        head_dim=d, eps=1e-5,
    )  # fmt: skip
    close(np.asarray(own).transpose(1, 2, 0), expected, 2e-6)


# Files


def saved(model, form):
    """A state dict as LlamaGen's training programs save it."""
    state = model.state_dict()
    if form == "fsdp":
        return state
    args = argparse.Namespace(gpt_model="GPT-B", epochs=300)
    return {"model": state, "optimizer": {"state": {}}, "steps": 5, "args": args}


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_bit_for_bit(theirs, run, tmp_path, monkeypatch, form, dtype):
    theirs.to(dtype)
    torch.save(saved(theirs, form), tmp_path / "c2i_tiny_256.pt")
    said = run("convert", "c2i_tiny_256.pt", "M", "--heads", 4).stderr
    assert "256 pixels, by its name" in said
    config = json.loads((tmp_path / "M/config.json").read_text())
    assert (config["model_type"], config["num_classes"]) == ("llamagen", 10)
    assert config["rope_scaling"] == {"rope_type": "llamagen_2d", "grid": 16}
    module = loader(tmp_path / "M", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "M"), "--to-pt", str(tmp_path / "b.pt")])
    module.main()
    whole = torch.load(tmp_path / "b.pt")
    back, state = whole.pop("model"), theirs.state_dict()
    assert back.keys() == state.keys() == whole.keys()  # for both readers
    for name, tensor in state.items():
        assert tensor.dtype == back[name].dtype == whole[name].dtype
        assert torch.equal(tensor, back[name]), name
        assert torch.equal(tensor, whole[name]), name


def test_parameters_views_and_what_is_computed_again(theirs, run, tmp_path):
    """A state dict of parameters, tensors that share a storage, and a table that is dropped."""
    state = OrderedDict(theirs.named_parameters())
    both = torch.stack([state["layers.0.feed_forward.w1.weight"].data] * 2)
    state["layers.0.feed_forward.w1.weight"] = both[1]
    state["freqs_cis"] = theirs.freqs_cis
    torch.save({"state_dict": state}, tmp_path / "t.pt")
    run("convert", "t.pt", "M", "--image-size", 96, "--heads", 4)
    model = open_model(str(tmp_path / "M"))
    assert np.array_equal(model.part(0, "gate"), both[1].numpy())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_file_runs(theirs, run, tmp_path):
    torch.save(
        {"args": Evil(tmp_path / "ran"), "model": theirs.state_dict()}, tmp_path / "t.pt"
    )  # fmt: skip
    run("convert", "t.pt", "M", "--image-size", 96, "--heads", 4)
    assert not (tmp_path / "ran").exists()
    assert open_model(str(tmp_path / "M")).layers == 3


def zip_with(path, data, **members):
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"a/{name}", content)


def broken(kind, theirs, path):
    state = theirs.state_dict()
    match kind:
        case "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        case "not a zip":
            path.write_bytes(b"GGUF" * 100)
        case "script":
            zip_with(path, b"\x80\x02}.", **{"code/__torch__.py": b"class Linear"})
        case "nested keys":
            zip_with(path, b"\x80\x02}K\x01" + b"\x85" * 10**6 + b"K\x02s0.")
        case "doubled keys":  # 2⁴⁰ steps to hash
            again = b"".join(b"q%ch%c\x86" % (n, n) for n in range(1, 41))
            zip_with(path, b"\x80\x02})" + again + b"K\x02s.")
        case "sets":
            zip_with(path, b"\x80\x02" + b"\x8f" * 10**6 + b".")
        case "packed pickle":
            import zipfile

            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a/data.pkl", b"\x80\x02}" + b"]" * 10**6)
        case "foreign storage":
            rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
            zip_with(path, b"\x80\x02}U\x01x" + rebuild + b"(U\x02V4U\x010\x86K\x00))tRs.")
        case "key of another kind":
            torch.save({5: torch.ones(2)}, path)
        case "no end":
            zip_with(path, b"\x80\x02}q\x00(")
        case "calls a tensor":
            zip_with(path, b"\x80\x02ctorch\nFloatStorage\n)R.")
        case "big-endian":
            zip_with(path, b"\x80\x02}.", byteorder=b"big")
        case "compressed":
            import zipfile

            torch.save(state, path)
            with zipfile.ZipFile(path) as old:
                members = {info.filename: old.read(info) for info in old.infolist()}
            with zipfile.ZipFile(path, "w") as new:
                for name, content in members.items():
                    new.writestr(name, content, zipfile.ZIP_DEFLATED * ("/data/" in name))
        case "truncated":
            torch.save(state, path)
            path.write_bytes(path.read_bytes()[:-2000])
        case "damaged":
            torch.save(state, path)
            data = bytearray(path.read_bytes())
            at = data.find(state["norm.weight"].numpy().tobytes())
            data[at] ^= 1
            path.write_bytes(data)
        case "transposed":
            name = "layers.1.attention.wo.weight"
            torch.save({**state, name: state[name].T}, path)
        case "nothing":
            torch.save({"weights": torch.ones(2)}, path)
        case "tokenizer":
            torch.save({"model": {"quantize.embedding.weight": torch.ones(2, 2)}}, path)
        case "text":
            torch.save({**state, "cls_embedding.cap_proj.fc1.weight": torch.ones(2, 2)}, path)
        case "fewer KV heads":
            name = "layers.0.attention.wqkv.weight"
            torch.save({**state, name: state[name][: 2 * D].clone()}, path)
        case "not finite":
            state["layers.1.attention.wo.weight"][0, 0] = float("nan")
            torch.save(state, path)
        case "unknown":
            torch.save({**state, "layers.0.attention.q_norm.weight": torch.ones(2)}, path)
        case "lacking":
            del state["layers.1.ffn_norm.weight"]
            torch.save(state, path)
        case "whole numbers":
            name = "layers.1.attention.wo.weight"
            torch.save({**state, name: state[name].int()}, path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("legacy", "before version 1.6; save it again"),
        ("not a zip", "not a zip archive; save it again"),
        ("script", "is a TorchScript program"),
        ("nested keys", "cannot be read as a PyTorch file"),
        ("doubled keys", "has no tok_embeddings.weight"),
        ("sets", "the instruction EMPTY_SET, which torch does not write"),
        ("packed pickle", "data.pkl: compressed, or of"),
        ("foreign storage", "a tensor without a storage"),
        ("key of another kind", "has no tok_embeddings.weight"),
        ("no end", "cannot be read as a PyTorch file"),
        ("calls a tensor", "has no tok_embeddings.weight; give"),
        ("big-endian", "is big-endian"),
        ("compressed", "compressed or encrypted"),
        ("truncated", "cannot be read as a PyTorch file"),
        ("damaged", "norm.weight cannot be read (Bad CRC-32"),
        ("transposed", "not contiguous (strides (1, 96))"),
        ("nothing", "has no tok_embeddings.weight, only weights"),
        ("tokenizer", "is the tokenizer of pictures; give the model"),
        ("text", "is text-conditional"),
        ("fewer KV heads", "attention.wqkv.weight is (192, 96)"),
        ("not finite", "layers.1.attention.wo.weight holds NaN or infinity"),
        ("unknown", "tensor layers.0.attention.q_norm.weight is unknown"),
        ("lacking", "has no layers.1.ffn_norm.weight"),
        ("whole numbers", "layers.1.attention.wo.weight is int32"),
    ],
)
def test_files_that_are_refused(theirs, run, tmp_path, kind, said):
    broken(kind, theirs, tmp_path / "t.pt")
    done = run("convert", "t.pt", "M", "--image-size", 96, "--heads", 4, ok=False)
    assert said in error_of(done)
    assert not (tmp_path / "M/model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heads", 4], "does not say in its name for which pictures"),
        (["--image-size", 96], "3 layers of 96 features, which no size of LlamaGen has"),
        (["--image-size", 100, "--heads", 4], "100 is not a multiple of 16"),
        (["--image-size", 96, "--heads", 5], "which 5 heads do not divide"),
        (["--image-size", 96, "--heads", 32], "head_dim = 3"),
    ],
)
def test_what_the_shapes_do_not_say(theirs, run, tmp_path, words, said):
    torch.save(theirs.state_dict(), tmp_path / "t.pt")
    assert said in error_of(run("convert", "t.pt", "M", *words, ok=False))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x.gguf", "M", "--heads", 4], "--heads is for LlamaGen's .pt files only"),
        (["M", "x.gguf", "--image-size", 96], "--image-size is for LlamaGen's .pt files only"),
        (["x.pt", "M", "--type", "f32"], "--type is for a GGUF only"),
        (["M", "x.gguf", "--dtype", "float32"], "--dtype is for a checkpoint only"),
    ],
)
def test_options_of_another_direction(run, words, said):
    assert said in run("convert", *words, ok=False).stderr


# Pictures


def test_greedy_codes_are_the_references(theirs, converted, run, tmp_path):
    run("sample", "M", "--classes", "3,7", "--temperature", 0, "-o", "g.npy")
    found = np.load(tmp_path / "g.npy")
    assert (found.shape, found.dtype) == ((2, 37), np.int32)
    state = state_of(theirs)
    for row, chosen in zip(found, (3, 7), strict=True):
        assert row[0] == V + chosen
        assert list(row[1:13]) == reference.greedy(state, chosen, 12, GRID, D // 4, 1.75)


@pytest.mark.parametrize(
    "likeliest", [["--temperature", "1e-6"], ["--top-k", 1], ["--top-p", "1e-6"]]
)
def test_each_option_of_the_draw_alone_can_leave_the_likeliest(converted, run, tmp_path, likeliest):
    words = ["sample", "M", "--classes", "3,7"]
    run(*words, "--temperature", 0, "-o", "greedy.npy")
    run(*words, *likeliest, "-o", "found.npy")
    run(*words, "-o", "drawn.npy")
    greedy, found, drawn = (np.load(tmp_path / f"{n}.npy") for n in ("greedy", "found", "drawn"))
    assert np.array_equal(found, greedy)
    assert not np.array_equal(drawn, greedy)


def test_a_picture_is_the_same_whatever_else_is_asked_for(converted, run, tmp_path):
    run("sample", "M", "--per-class", 2, "-o", "all.npy")
    run("sample", "M", "--classes", "7", "--per-class", 2, "-o", "one.npy")
    every, one = np.load(tmp_path / "all.npy"), np.load(tmp_path / "one.npy")
    assert len(every) == 20
    assert len({bytes(row) for row in every}) == 20
    assert np.array_equal(every[every[:, 0] == V + 7], one)
    run("sample", "M", "--classes", "7", "--seed", 1, "-o", "other.npy")
    assert not np.array_equal(np.load(tmp_path / "other.npy"), one[:1])
    assert not list(tmp_path.glob("*.prunetool*"))


def test_the_distribution_before_the_draw(theirs, converted, monkeypatch):
    """Guided, then by top k and top p."""
    random = np.random.default_rng(0)
    both = random.normal(size=(50, 6)).astype(np.float32) * 3
    guided = np.asarray(decode.guided(both, np.float32(1.75)))
    own, null = both[:, :3], both[:, 3:]
    np.testing.assert_allclose(guided, null + 1.75 * (own - null), rtol=1e-5)
    for top_k, top_p in ((7, 1.0), (0, 0.6), (10, 0.8), (0, 1.0)):
        found = np.asarray(decode.filtered(guided, top_k=top_k, top_p=top_p))
        for column in range(3):
            scores = guided[:, column].astype(np.float64)
            order = np.argsort(-scores)
            kept = list(order[: top_k or 50])
            p = np.exp(scores[kept] - scores.max())
            before = np.cumsum(p / p.sum()) - p / p.sum()
            kept = [unit for unit, sum_ in zip(kept, before, strict=True) if sum_ <= top_p]
            assert set(np.flatnonzero(found[:, column] > -1e29)) == set(kept)
            assert np.array_equal(found[kept, column], guided[kept, column])


def test_codes_are_drawn_from_it(converted, run, tmp_path):
    """The first code of many pictures of one class is as likely as the model says."""
    run("sample", "M", "--classes", 4, "--per-class", 512, "--cfg-scale", 1, "-o", "f.npy")
    first = np.load(tmp_path / "f.npy")[:, 1]
    scores = ours(converted, np.array([[V + 4]]))[0, 0]
    p = np.exp(scores - scores.max())
    expected = 512 * p / p.sum()
    counts = np.bincount(first, minlength=V)
    likely = expected > 5
    assert likely.sum() >= 3
    rest = [counts[~likely].sum()], [expected[~likely].sum()]
    seen, wanted = (np.append(a[likely], b) for a, b in zip((counts, expected), rest, strict=True))
    assert ((seen - wanted) ** 2 / wanted).sum() < 3 * len(seen)  # chi squared, far in its tail


def test_a_killed_run_goes_on(converted, popen, run, tmp_path, monkeypatch):
    from prunetool.steps import selftext

    monkeypatch.setattr(selftext, "WIDEST", 4)
    words = ["sample", "M", "--per-class", 2, "-o", "p.npy"]
    child = popen(command(words, KILLED), cwd=tmp_path)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "p.npy").exists()
    (kept,) = (tmp_path / "p.npy.prunetool").glob("self-*")
    said = run(*words, "--seed", 1, ok=False).stderr
    assert "holds another run: --seed was 0 and is 1; give --overwrite" in said
    assert "--work" not in said
    assert kept.stat().st_size
    sampled, sample = [], selftext.Sampler._sample
    monkeypatch.setattr(
        selftext.Sampler, "_sample",
        lambda self, decoder, start: sampled.append(start) or sample(self, decoder, start),
    )  # fmt: skip
    done = run(*words)
    assert min(sampled) > 0, "what is kept is not sampled again"
    assert "20 pictures of 36 codes" in done.stderr
    run("sample", "M", "--per-class", 2, "-o", "q.npy")
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "q.npy").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--classes", "10", "-o", "p.npy"], 1, "'10' is not a class (10 is the null class)"),
        (["--classes", "3, x", "-o", "p.npy"], 1, "'x' is not a class; give 0 to 9, or all"),
        (["--classes", "3,1,3", "-o", "p.npy"], 1, "names a class twice; give --per-class"),
        (["-o", "M"], 2, "name a file that ends in .npy"),
        (["-o", "p.txt"], 2, "name a file that ends in .npy"),
        (["-o", "ids.npy"], 1, "ids.npy: exists; name another file"),
    ],
)
def test_sample_refuses(converted, pictures, run, words, code, said):
    done = run("sample", "M", *words, ok=False)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_a_model_of_text_makes_no_pictures(checkpoint, text, run):
    model = checkpoint()
    done = run("sample", model, "-o", "p.npy", ok=False)
    assert "is a model of text" in error_of(done)
    done = run("calibrate", model, "--text", text, "--guidance", "class", ok=False)
    assert "--guidance is for models of pictures" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids: ids[:, :-1], "is of shape (24, 36); a picture is its class and 36 codes"),
        (lambda ids: ids.ravel(), "is of shape (888,)"),
        (lambda ids: np.where(ids >= V, 5, ids), "holds no pictures: each is a class (id 200 "),
        (lambda ids: np.where(ids == ids[0, 5], V + 1, ids), "holds no pictures"),
        (lambda ids: ids[:0], "is int32 of shape (0, 37)"),
        (lambda ids: ids + 11, "outside the vocabulary of 211"),
    ],
)
def test_ids_that_are_not_its_pictures(converted, pictures, run, tmp_path, change, said):
    np.save(tmp_path / "bad.npy", change(pictures))
    for words in (["calibrate", "M", "--samples", 8], ["evaluate", "M"]):
        assert said in error_of(run(*words, "--tokens", "bad.npy", ok=False))


def test_text_is_not_for_it(converted, text, run):
    for given in (text, "self"):
        done = run("calibrate", "M", "--text", given, "--samples", 8, ok=False)
        assert "prunetool sample" in error_of(done)


# The pipe


def test_each_picture_counts_with_its_class_and_with_none(converted, pictures, run, tmp_path):
    common = ["calibrate", "M", "--tokens", "ids.npy", "--gradients", 0]
    run(*common, "--samples", 8, "--held-out", 2, "--work", "both", "-o", "b.jsonl")
    fed = np.repeat(pictures[:4, :-1], 2, axis=0)
    fed[1::2, 0] = V + 10
    model = open_model(str(converted))
    from prunetool.steps.run import as_fed

    assert np.array_equal(as_fed(model, pictures[:4], "both"), fed)
    assert np.array_equal(as_fed(model, pictures[:4], "class"), pictures[:4, :-1])
    history = json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])["history"]
    assert history[0]["options"]["guidance"] == "both"
    assert history[0]["options"]["sequence_length"] == CODES
    for words, said in (
        (["--samples", 9], "--samples 9: --guidance both uses each picture twice"),
        (["--samples", 8, "--held-out", 1], "--held-out 1: --guidance both"),
        (["--samples", 8, "--attention-samples", 3], "--attention-samples 3: --guidance both"),
        (["--samples", 2], "--held-out 2 of --samples 2 leaves none to fit"),
        (["--samples", 8, "--gradients", 7], "only 6 samples are not held out"),
        (["--samples", 8, "--first-tokens", 5], "--first-tokens is for models of text"),
        (["--samples", 8, "--attention-samples", 2, "--attention-length", 40], "exceeds"),
        (["--samples", 8, "--sequence-length", 8], "a picture has 37 ids; leave it out"),
        (["--samples", 64], "has 24 of 32 pictures; sample more"),
    ):
        done = run(*common[:-2], *words, "--work", "odd", ok=False)
        assert said in done.stderr


def test_run_takes_pictures(converted, pictures, run, tmp_path):
    run("run", "M", "R", "--tokens", "ids.npy", "--samples", 12, "--guidance", "class",
        "--sparsity", 0.2)  # fmt: skip
    assert "--guidance class" in (tmp_path / "R/README.md").read_text()


@pytest.mark.parametrize(
    ("score", "form"),
    [
        (["--sparsity", 0.25], "dense"),
        (["--sparsity", 0.3, "--target", "channels", "--allocation", "uniform"], "auto"),
        (["--sparsity", 0.25], "auto"),
        (["--sparsity", 0.25, "--method", "wanda-sp"], "auto"),
    ],
    ids=["dense", "uniform", "unequal", "wanda-sp"],
)
def test_three_forms_load_and_agree(gpt, converted, pictures, run, tmp_path, monkeypatch, score,
                                    form):  # fmt: skip
    pipe(run, *score, form=form)
    module = loader(tmp_path / "P", monkeypatch)
    ids = pictures[:3, :-1]
    own = ours(tmp_path / "P", ids)
    close(own, their_logits(module.load(tmp_path / "P"), ids), 5e-5)
    config, shapes = module.read_config(tmp_path / "P")
    alike = "uniform" in score or form == "dense"
    assert (len(set(shapes)) == 1) == alike
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "P"), "--to-pt", str(tmp_path / "p.pt")])
    if not alike:
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 1
        return
    runpy.run_path(str(tmp_path / "P/llamagen_pruned.py"), run_name="__main__")
    sizes = {"dim": D, "n_layer": 3, "n_head": 4, "vocab_size": V, "num_classes": 10,
             "block_size": CODES, **module.ffn_arguments(config, shapes[0][1])}  # fmt: skip
    plain = gpt.Transformer(gpt.ModelArgs(**sizes)).eval()  # two constructor arguments
    plain.load_state_dict(torch.load(tmp_path / "p.pt")["model"], strict=True)
    close(own, their_logits(plain, ids), 5e-5)


@torch.no_grad()
def test_the_unequal_model_generates_the_same(gpt, converted, pictures, run, tmp_path, monkeypatch):
    """Its own cache, sized by layer, and greedy guided codes."""
    pipe(run, "--sparsity", 0.25)
    model = loader(tmp_path / "P", monkeypatch).load(tmp_path / "P")
    model.setup_caches(max_batch_size=2, max_seq_length=CODES + 1, dtype=torch.float32)
    scores, _ = model(None, torch.tensor([4, 10]), input_pos=torch.arange(1))
    codes = []
    for position in range(1, CODES + 1):
        own, null = scores[:, -1]
        codes.append(int((null + 1.75 * (own - null)).argmax()))
        scores, _ = model(torch.tensor([[codes[-1]]] * 2), None, input_pos=torch.tensor([position]))
    run("sample", "P", "--classes", 4, "--temperature", 0, "-o", "p.npy")
    assert np.load(tmp_path / "p.npy")[0, 1:].tolist() == codes


def test_the_refit_lowers_the_error(converted, run, tmp_path):
    run("sample", "M", "--per-class", 4, "-o", "ids.npy")
    run("sample", "M", "--per-class", 1, "--seed", 9, "-o", "held.npy")
    pipe(run, "--sparsity", 0.25)
    run("export", "Q", "k.jsonl")
    found = {}
    for name in ("P", "Q"):
        done = run("evaluate", name, "--against", "M", "--tokens", "held.npy", "--cfg-scale", 1.75)
        found[name] = json.loads(done.stdout)["against"]
        assert "guided " in done.stderr
    for kl in ("kl", "kl_null", "kl_guided"):
        assert 0 < found["P"][kl] < found["Q"][kl]
    assert found["P"]["kl_guided"] > found["P"]["kl"]  # guidance multiplies differences


def test_kl_of_the_guided_mixture(theirs, converted, pictures, run, tmp_path):
    pipe(run, "--sparsity", 0.25, compensate=False)
    np.save(tmp_path / "few.npy", pictures[-2:])
    done = run("evaluate", "P", "--against", "M", "--tokens", "few.npy", "--cfg-scale", 1.75,
               "--allow-calibrated", "--dtype", "float32")  # fmt: skip
    found = json.loads(done.stdout)
    done = run("evaluate", "P", "--against", "M", "--tokens", "few.npy", "--allow-calibrated")
    alone = json.loads(done.stdout)["against"]
    assert alone.keys() == found["against"].keys() - {"kl_null", "kl_guided"}
    for name, value in alone["attention_error"].items():
        assert value == found["against"]["attention_error"][name]
    own, null = pictures[-2:, :-1], pictures[-2:, :-1].copy()
    null[:, 0] = V + 10
    logs = {}
    for name in ("M", "P"):
        with_class, without = (ours(tmp_path / name, ids).astype(np.float64) for ids in (own, null))
        for kind, scores in (
            ("kl", with_class), ("kl_null", without),
            ("kl_guided", without + 1.75 * (with_class - without)),
        ):  # fmt: skip
            logs[name, kind] = scores - np.logaddexp.reduce(scores, axis=2, keepdims=True)
    for kind in ("kl", "kl_null", "kl_guided"):
        p, q = logs["M", kind], logs["P", kind]
        assert found["against"][kind] == pytest.approx((np.exp(p) * (p - q)).sum(2).mean(), 1e-4)
    chosen = np.take_along_axis(logs["P", "kl"], pictures[-2:, 1:, None].astype(int), 2)
    assert found["loss"] == pytest.approx(-chosen.mean(), 1e-5)
    assert found["tokens"] == 2 * CODES


@pytest.mark.parametrize(
    "score",
    [
        ["--target", "qk", "--sparsity", 0.5],
        ["--target", "weights", "--sparsity", 0.5],
        ["--method", "taylor", "--taylor", "first", "--sparsity", 0.25],
    ],
    ids=["qk", "weights", "taylor"],
)
def test_other_methods_take_it(converted, pictures, run, tmp_path, score):
    labels = ["--labels", "text"] if "taylor" in score else []
    run("calibrate", "M", "--tokens", "ids.npy", "--samples", 16, "--stats", "all", *labels,
        "--attention-samples", 4, "-o", "s.jsonl")  # fmt: skip
    run("score", "s.jsonl", "-o", "k.jsonl", *score)
    run("export", "P", "k.jsonl")
    assert open_model(str(tmp_path / "P")).config.classes == 11


def test_recover_takes_it(converted, pictures, run, tmp_path):
    pipe(run, "--sparsity", 0.25)
    done = run("recover", "c.jsonl", "-o", "r.jsonl")
    assert "held-out KL" in done.stderr
    run("export", "R", "r.jsonl")
    assert open_model(str(tmp_path / "R")).config.classes == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "s.jsonl", "--target", "hidden", "--sparsity", 0.1], "is for models of text"),
        (["convert", "M", "x.gguf"], "llama.cpp: computes no models of pictures"),
        (["bench", "M"], "is a model of pictures; measure it in LlamaGen"),
        (["evaluate", "M", "--text", "ids.npy"], "is a model of pictures, which reads no text"),
    ],
)
def test_what_is_not_for_pictures(converted, pictures, run, words, said):
    run("calibrate", "M", "--tokens", "ids.npy", "--samples", 8, "--stats", "all", "-o", "s.jsonl")
    assert said in error_of(run(*words, ok=False))


def test_its_card_says_how_to_load_it(converted, pictures, run, tmp_path):
    pipe(run, "--sparsity", 0.25)
    card = (tmp_path / "P/README.md").read_text()
    assert "from llamagen_pruned import load" in card
    assert "- llamagen\n" in card
    assert "transformers" not in card
    assert "--guidance both" in card
    (made,) = (line for line in card.splitlines() if line.startswith("prunetool calibrate M "))
    assert "--tokens FILE" in made
    assert "--sequence-length" not in card, "a picture has its own"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_scaling": None}, "rope type default with model_type 'llamagen'"),
        ({"num_classes": None}, "model without num_classes"),
        ({"conditioning": "text"}, "conditioning = 'text' is not supported"),
        ({"model_type": "llama"}, "rope type llamagen_2d with model_type 'llama'"),
    ],
)
def test_configs_that_contradict_it(converted, run, change, said):
    path = converted / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert said in error_of(run("inspect", "M", ok=False))
