"""The report in a real browser: headless Chromium at the width of a desktop and of a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
# The page in a frame of a given width; what the script finds stands in the document's title.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title></title>
<iframe width="{width}" height="800" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = frames[0].document, wide = page.documentElement.clientWidth;
  const box = (one) => one.getBoundingClientRect();
  for (const one of page.querySelectorAll("details")) one.open = true;
  const shown = [...page.querySelectorAll("h1, figure, .table, summary")];
  const inside = (one) => [...one.querySelectorAll("*")].filter(
    (part) => box(part).width && box(part).height).length;
  document.title = JSON.stringify({{
    client: wide, scroll: page.documentElement.scrollWidth,
    over: shown.filter((one) => box(one).right > wide + 1).map((one) => one.textContent),
    empty: shown.filter((one) => !box(one).height).length,
    pictures: [...page.querySelectorAll("svg")].map((one) => [box(one).width, inside(one)]),
    tables: page.querySelectorAll("table").length, text: page.body.innerText,
  }});
}});
</script>"""


def measured(path, width):
    """What the script says, and the browser's console."""
    page = path.with_name("frame.html")
    page.write_text(FRAME.format(width=width, page=html.escape(path.read_text())))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
         f"--window-size={width + 60},900", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    return json.loads(html.unescape(title[1])), [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_nothing_runs_off_the_edge_or_is_blank(calibrated, run, text, tmp_path):
    dense, records = calibrated(gradients=2, attention=3, num_attention_heads=8, head_dim=8)
    words = ["--sparsity", ".2,.4", "--multiple-of", 8, "-o", "kept-{sparsity}.jsonl"]
    run("score", records, *words)
    run("compensate", "kept-.4.jsonl", "--damping", ".01", "-o", "made.jsonl")
    run("export", "out", "made.jsonl")
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    words = ["--text", "other.txt", "--samples", 2, "--sequence-length", 32]
    (tmp_path / "e.json").write_text(run("evaluate", "out", "--against", dense, *words).stdout)
    how = {"prompt": 8, "generate": 4, "repeats": 3, "threads": 2, "dtype": "auto"}
    speed = {
        "model": "out", "runtime": "llama.cpp", "file_bytes": 1, "load_seconds": 1.0,
        "peak_bytes": 1, "prompt_tokens_per_second": [1.0, 2.0, 3.0],
        "generated_tokens_per_second": [1.0, 2.0, 3.0], "how": how,
    }  # fmt: skip
    (tmp_path / "speed.json").write_text(json.dumps([speed]))
    run("report", "out", "--evaluation", "e.json", "--bench", "speed.json")
    for width in (1200, 390):
        found, console = measured(tmp_path / "report.html", width)
        assert not console
        assert found["scroll"] <= found["client"] <= width
        assert not found["over"]
        assert not found["empty"]
        assert len(found["pictures"]) == 3
        assert all(0 < wide <= width and inside > 4 for wide, inside in found["pictures"])
        assert found["tables"] >= 10
        assert not re.search(r"None|undefined|nan|[0-9a-f]{12}|/tmp", found["text"])
