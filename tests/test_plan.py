import json

import pytest

from prunetool import plan
from prunetool.model import open_model


@pytest.mark.parametrize("stats", ["structural", "token", "all"])
def test_the_disk_planned_is_the_disk_used(calibrated, tmp_path, stats):
    path, _ = calibrated(stats=stats, attention=2)
    model = open_model(str(path))
    files = (tmp_path / "dense.work" / "stats").iterdir()
    used = sum(file.stat().st_size for file in files if "gradients" not in file.name)
    planned = plan.stats_bytes(model, stats, (2, 32), "float32")
    assert used <= planned <= 1.5 * used


def test_a_refit_fits_in_its_plan(calibrated, run, tmp_path):
    path, stats = calibrated()
    score = run("score", "--sparsity", ".2", "--multiple-of", 8, stats).stdout
    run("compensate", stdin=score)
    model = open_model(str(path))
    for pattern, planned in (
        ("compensate-*/*", plan.refit_bytes(model, model.layers)),
        ("score*/*", plan.units_bytes(model)),
    ):
        used = sum(file.stat().st_size for file in tmp_path.glob(f"dense.work/{pattern}"))
        assert 0 < used <= planned + 4096 * model.layers


def test_inspect_plans_a_run(checkpoint, run):
    words = ["inspect", checkpoint(), "--plan", "--samples", 8, "--sequence-length", 32]
    done = run(*words)
    steps = json.loads(done.stdout)["plan"]["steps"]
    assert list(steps) == ["calibrate", "score", "compensate", "recover", "export"]
    assert all(step["memory"] > 0 and step["seconds"] > 0 for step in steps.values())
    assert "this machine" in done.stderr
    twice = json.loads(run(*words[:-3], 16, *words[-2:]).stdout)["plan"]["steps"]
    assert twice["calibrate"]["products"] == 2 * steps["calibrate"]["products"]
    once, again = (
        json.loads(run(*words[:-3], count, *words[-2:]).stdout)["plan"]["steps"]["calibrate"]
        for count in (128, 192)
    )  # of which 32 run backward, and as many tokens as in 64 alone
    model = open_model(str(words[1]))
    forward = plan.calibrate(model, 64, 32, 64, "structural", "float32")
    assert again["products"] - once["products"] == forward.products
    none, first = (
        json.loads(run(*words[:-3], count, *words[-2:]).stdout)["plan"]["steps"]["calibrate"]
        for count in (64, 65)
    )  # 2048 tokens, and so many first tokens besides as there are more
    assert first["products"] - none["products"] == pytest.approx(forward.products * 65 / 64)
    assert twice["score"]["solves"] == steps["score"]["solves"]
