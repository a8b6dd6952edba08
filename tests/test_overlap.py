"""Whether a text was calibrated on."""

import base64
import json

import numpy as np
import pytest

from prunetool.checkpoint import checksum
from prunetool.checkpoint.writer import MANIFEST
from prunetool.overlap import KEPT, SHINGLE, share, sketch
from tests.conftest import error_of


def drawn(seed, samples, length=256):
    return np.random.default_rng(seed).integers(0, 49152, (samples, length), np.int32)


@pytest.mark.parametrize("samples", [2, 6, 40, 400])
def test_the_share_is_that_of_the_text(samples):
    mine = drawn(0, 40)
    other = drawn(1, samples)
    count = samples // 2
    other[:count] = np.resize(mine, (count, 256))
    expected = min(count, 40) / (samples - max(count - 40, 0))  # repeated shingles count once
    assert share(other, [sketch(mine)]) == pytest.approx(expected, abs=0.05)
    assert share(drawn(2, samples), [sketch(mine)]) == 0
    assert share(mine, [sketch(drawn(3, 9)), sketch(mine)]) == 1, "the largest counts"


def test_a_short_text_of_a_long_calibration_is_found_or_nothing_is_said():
    mine = drawn(0, 128, 2048)
    said = sketch(mine)
    for row in mine[:40]:
        assert share(row[None, :256], [said]) == 1
        assert share(row[None, :40], [said]) in (1, None)
    other = [share(row[None, :256], [said]) for row in drawn(1, 40, 2048)]
    assert set(other) == {0, None}
    assert share(mine[:1, : SHINGLE - 1], [said]) is None
    assert share(mine[:4], [""]) is None, "of a text in shorter windows nothing is known"


def test_windows_may_begin_elsewhere_and_ids_may_be_large():
    ids = drawn(0, 1, 40 * 256)[0] * 40_000
    mine = ids.reshape(40, 256)
    shifted = ids[100 : 100 + 39 * 256].reshape(39, 256)
    assert share(shifted, [sketch(mine)]) > 0.85, "but for what a cut of either divides"
    assert share(mine[:, ::-1], [sketch(mine)]) == 0, "order counts"
    assert share(mine[:, : SHINGLE - 1], [sketch(mine)]) is None, "no shingle"
    assert sketch(mine[:, : SHINGLE - 1]) == ""
    assert len(base64.b64decode(sketch(np.concatenate([mine, drawn(5, 9)])))) == 4 * KEPT


def test_measuring_on_calibrated_text_is_refused(calibrated, text, run, tmp_path):
    _, records = calibrated()
    words = ["--samples", 4, "--sequence-length", 32]
    run("score", records, "--sparsity", 0.3, "--allocation", "uniform", "-o", "s.jsonl")
    run("export", "out", "s.jsonl")
    done = run("evaluate", "out", "--text", text, *words, ok=False)
    line = error_of(done)
    assert "text.txt: was used to prune " in line
    assert "/out (about 100% of it); measure on other text, or give --allow-calibrated" in line
    found = json.loads(run("evaluate", "out", "--text", text, *words, "--allow-calibrated").stdout)
    assert found["calibrated"] == 1
    (tmp_path / "e.json").write_text(json.dumps(found))
    run("report", "out", "--evaluation", "e.json")
    assert "about 100%" in (tmp_path / "report.html").read_text()
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    found = json.loads(run("evaluate", "out", "--text", "other.txt", *words).stdout)
    assert found["calibrated"] == 0
    found = json.loads(run("evaluate", "dense", "--text", text, *words).stdout)
    assert "calibrated" not in found, "nothing is known of a model that was not pruned"
    said = json.loads((tmp_path / "out" / MANIFEST).read_text()) | {"sketches": ["*"]}
    del said["checksum"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(checksum.sealed(said)))
    done = run("evaluate", "out", "--text", text, *words, ok=False)
    assert f"{MANIFEST}: has a damaged sketch" in error_of(done)


def test_texts_of_recover_and_of_an_earlier_pruning_count_too(calibrated, text, run, tmp_path):
    _, records = calibrated()
    words = ["--samples", 4, "--sequence-length", 32]
    turned = tmp_path / "turned.txt"
    turned.write_text(text.read_text()[::-1])
    upper = tmp_path / "upper.txt"
    upper.write_text(text.read_text().swapcase())
    kept = ["--sparsity", 0.2, "--allocation", "global", "--method", "newton"]
    run("score", records, *kept, "-o", "s.jsonl")
    how = ["--held-out", 1, "--sequence-length", 32, "--learning-rate", 1e-3, "-o", "r.jsonl"]
    run("recover", "s.jsonl", "--text", turned, "--samples", 3, *how)
    run("export", "out", "r.jsonl")
    layers = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()[1:-1]]
    assert "recover" in layers[0]["files"], "it trained"
    run("calibrate", "out", "--text", upper, *words, "--gradients", 0, "--work", "w", "-o", "t")
    run("score", "t", *kept, "-o", "s.jsonl")
    run("export", "again", "s.jsonl")
    for model, texts in (("out", [text, turned]), ("again", [text, turned, upper])):
        for used in texts:
            line = error_of(run("evaluate", model, "--text", used, *words, ok=False))
            assert "was used to prune" in line
