"""Conversations: transformers' own rendering of the model's chat template is the judge."""

import json
import shutil

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from prunetool import workdir
from prunetool.chat import conversation_text
from tests.conftest import byte_tokenizer, error_of

TALKS = [
    [{"role": "user", "content": "What is a “keep”?\nSay it <b>briefly</b>."},
     {"role": "assistant", "content": "  A tower.\n"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello {{ 1 }}"},
     {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"},
     {"role": "assistant", "content": ""}],
]  # fmt: skip
SHAREGPT = [
    [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
]
TEMPLATES = {
    "marked": "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'assistant' %}\n"
    "{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}\n"
    "    {% else %}[{{ m['role'] | upper }}] {{ m['content'] }}\n    {% endif %}\n{% endfor %}",
    "tools": "{% if tools is not none or documents is not none %}TOOLS{% endif %}"
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}"
    "{{ m | tojson(ensure_ascii=true, separators=(',', ':')) }}{% endfor %}",
    "json": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }} {{ m | tojson }} "
    "{{ m | tojson(indent=2) }}{% endfor %}",
}


def write_rows(path, talks, field="messages"):
    path.write_text("".join(json.dumps({field: talk}) + "\n" for talk in talks))
    return path.name


def add_template(directory, template):
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def dense(checkpoint):
    directory = checkpoint()
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def tokens(work):
    return workdir.TensorFile(work, workdir.TOKENS_NAME)["tokens"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_what_transformers_renders(dense, name):
    render = conversation_text(add_template(dense, TEMPLATES[name]))
    judge = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<bos>", eos_token="<eos>",
        chat_template=TEMPLATES[name],
    )  # fmt: skip
    for talk in TALKS:
        assert render("row", talk) == judge.apply_chat_template(talk, tokenize=False)


def test_smollm2_s_template_and_ids(smollm2, call, tmp_path):
    judge = PreTrainedTokenizerFast.from_pretrained(smollm2)
    render = conversation_text(smollm2.absolute())
    ids = []
    for talk in TALKS:
        assert render("row", talk) == judge.apply_chat_template(talk, tokenize=False)
        ids += judge.apply_chat_template(talk, return_dict=False)
    name = write_rows(tmp_path / "talks.jsonl", TALKS)
    words = ["--chat", "--samples", 2, "--held-out", 1, "--sequence-length", len(ids) // 2]
    words += ["--gradients", 0, "--work", "w", "-o", "r"]
    shutil.copytree(smollm2, tmp_path / "m", symlinks=False)
    call("calibrate", "m", "--text", name, *words)
    assert tokens(tmp_path / "w").reshape(-1).tolist() == ids[: 2 * (len(ids) // 2)]
    options = json.loads((tmp_path / "r").read_text().split("\n")[0])["history"][0]["options"]
    assert options["chat"] is True


def test_the_same_rows_in_parquet_and_of_sharegpt(dense, call, tmp_path):
    add_template(dense, TEMPLATES["marked"])
    words = ["--samples", 3, "--sequence-length", 16, "--gradients", 0, "--chat", "--work"]
    write_rows(tmp_path / "a.jsonl", [SHAREGPT[1]] * 9)
    call("calibrate", "dense", "--text", "a.jsonl", *words, "a", "-o", "x")
    parquet.write_table(pyarrow.table({"messages": [SHAREGPT[1]] * 9}), tmp_path / "b.parquet")
    call("calibrate", "dense", "--text", "b.parquet", *words, "b", "-o", "x")
    write_rows(tmp_path / "c.jsonl", [SHAREGPT[0]] * 9, "conversations")
    words = ["--text", "c.jsonl", "--text-field", "conversations", *words, "c", "-o", "x"]
    call("calibrate", "dense", *words)
    for other in "bc":
        assert np.array_equal(tokens(tmp_path / "a"), tokens(tmp_path / other))
    assert tokens(tmp_path / "a")[0, 0] == 256, "the template's own BOS"
    assert tokens(tmp_path / "a")[0, 1] != 256, "and no second one"


def test_run_and_recover_take_conversations_too(dense, run, tmp_path):
    add_template(dense, TEMPLATES["marked"])
    name = write_rows(tmp_path / "a.jsonl", TALKS * 20)
    words = ["--sequence-length", 32, "--sparsity", ".2", "--allocation", "uniform"]
    run("run", "dense", "out", "--chat", "--text", name, "--samples", 4, "--gradients", 0, *words)
    card = (tmp_path / "out/README.md").read_text()
    assert "calibrate dense --text TEXT" in card
    assert "--chat" in card
    line = error_of(run("evaluate", "out", "--chat", "--text", name, *words[:2], ok=False))
    assert "a.jsonl: was used to prune" in line
    made = str(next((tmp_path / "dense.prunetool").glob("compensate-*/records.jsonl")))
    done = run("recover", made, "--chat", ok=False)
    assert "--chat is for conversations in --text or --dataset" in done.stderr


def test_what_parquet_fills_with_null_is_not_there(dense, call, tmp_path):
    add_template(dense, TEMPLATES["tools"])
    rows = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None,
             "tool_calls": ["a", "b"]}]] * 9  # fmt: skip
    words = ["--samples", 2, "--sequence-length", 16, "--gradients", 0, "--chat", "--work"]
    write_rows(tmp_path / "a.jsonl", rows)
    call("calibrate", "dense", "--text", "a.jsonl", *words, "a", "-o", "x")
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "b.parquet")
    call("calibrate", "dense", "--text", "b.parquet", *words, "b", "-o", "x")
    assert np.array_equal(tokens(tmp_path / "a"), tokens(tmp_path / "b"))


def test_today_is_always_the_same_day(dense):
    add_template(dense, "{{ strftime_now('%d %b %Y') }}")
    assert conversation_text(dense)("row", TALKS[0]) == "26 Jul 2024"


def test_what_is_wrong_is_one_line(dense, run, tmp_path):
    def refused(*words):
        return error_of(run("evaluate", "dense", "--chat", "--text", *words, ok=False))

    talks = write_rows(tmp_path / "a.jsonl", TALKS)
    assert "has no chat template" in refused(talks)
    nested = "".join(f"{{% for a{i} in messages %}}" for i in range(25)) + "{% endfor %}" * 25
    for template in ("{% for %}", nested):
        add_template(dense, template)
        assert "a chat template that cannot be used" in refused(talks)
    add_template(dense, "{{ raise_exception('roles must alternate') }}")
    assert "a.jsonl: line 1: is refused by the model's chat template (roles must" in refused(talks)
    add_template(dense, "{{ messages.__class__.__base__.__subclasses__() }}")
    assert "is refused by the model's chat template" in refused(talks)
    add_template(dense, TEMPLATES["json"])
    odd = ([{"role": 3, "content": ""}], [{"from": [], "value": 1, "role": 3}])
    for wrong in ("text", [], ["text"], [{"role": "user"}], *odd):
        write_rows(tmp_path / "b.jsonl", [TALKS[0], wrong])
        assert "b.jsonl: line 2: has no conversation: a list of objects" in refused("b.jsonl")
    (tmp_path / "plain.txt").write_text("words")
    assert "plain.txt: is plain text, without conversations; omit --chat" in refused("plain.txt")
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    assert refused("bare.jsonl").endswith('give {"messages": [...]} in each line')
    write_rows(tmp_path / "c.jsonl", TALKS, "talk")
    assert "has no text field 'messages' (its fields: talk)" in refused("c.jsonl")
    write_rows(tmp_path / "d.jsonl", [[{"role": "user", "content": "\ud800"}]])
    assert "d.jsonl: line 1: has half of a surrogate pair" in refused("d.jsonl")
    assert "--chat is for conversations in --text" in run(
        "evaluate", "dense", "--chat", "--tokens", "x.npy", ok=False
    ).stderr  # fmt: skip
