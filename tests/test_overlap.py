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


@pytest.mark.parametrize("samples", [1, 3, 40, 400])
def test_the_share_is_that_of_the_text(samples):
    mine = drawn(0, 40)
    other = drawn(1, samples)
    count = samples // 2
    other[:count] = np.resize(mine, (count, 256))
    expected = min(count, 40) / (samples - max(count - 40, 0))  # repeated shingles count once
    assert share(other, [sketch(mine)]) == pytest.approx(expected, abs=0.12)
    assert share(drawn(2, samples), [sketch(mine)]) == 0
    assert share(mine, [sketch(drawn(3, 9)), sketch(mine)]) == 1, "the largest counts"


def test_windows_may_begin_elsewhere_and_ids_may_be_large():
    ids = drawn(0, 1, 40 * 256)[0] * 40_000
    mine = ids.reshape(40, 256)
    shifted = ids[100 : 100 + 39 * 256].reshape(39, 256)
    assert share(shifted, [sketch(mine)]) > 0.85, "but for what a cut of either divides"
    assert share(mine[:, ::-1], [sketch(mine)]) == 0, "order counts"
    assert share(mine[:, : SHINGLE - 1], [sketch(mine)]) == 0, "no shingle"
    assert sketch(mine[:, : SHINGLE - 1]) == ""
    assert len(base64.b64decode(sketch(mine))) == 4 * KEPT


def test_measuring_on_calibrated_text_is_refused(calibrated, text, run, tmp_path):
    _, records = calibrated()
    words = ["--samples", 4, "--sequence-length", 32]
    run("score", records, "--sparsity", 0.3, "--allocation", "uniform", "-o", "s.jsonl")
    run("export", "out", "s.jsonl")
    done = run("evaluate", "out", "--text", text, *words, ok=False)
    assert f"Error: {text}: is text that out was pruned with (about 100% of it); measure on" in (
        error_of(done)
    )
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
