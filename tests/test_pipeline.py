"""The whole, as a user runs it: six scripts one after the other, and the same again with every stage killed once."""
import json
import sys
import time

import pytest

from conftest import ROOT, Script, made_once, run

TRAIN = ["--batch-tokens", 1536, "--compile", "no", "--dtype", "float32", "--device", "cpu", "--save-every", 2, "--val-windows", 4]
STAGES = {  # script: (flags, directory that stands in the run's directory)
    "pretrain.py": ["--base-tokens", 6144, "--stage1-tokens", 6144, "--stage2-tokens", 6144, *TRAIN],
    "finetune.py": ["--tokens", 9216, *TRAIN],
    "evaluate.py": ["--limit", 10, "--device", "cpu", "--batch-size", 8, "--plot"]}


def flags(script, corpus, out):
    return [*map(str, STAGES[script]), "--corpus", str(corpus), "--out", str(out)]


@pytest.fixture(scope="module")
def unbroken(small_corpus, tmp_path_factory):
    def make(out):
        printed = {script: run(script, *flags(script, small_corpus, out)).stdout for script in STAGES}
        (out / "printed.json").write_text(json.dumps(printed))
    out = made_once(tmp_path_factory, "unbroken", make)
    return out, json.loads((out / "printed.json").read_text())


def test_table_and_results(unbroken):
    out, printed = unbroken
    results = json.loads((out / "eval" / "results.json").read_text())
    table = printed["evaluate.py"]
    report = (out / "eval" / "report.md").read_text()
    for suite in ("loss", "choice", "next", "calls", "calls-constrained"):
        assert f"### {suite}" in table.splitlines() and f"### {suite}" in report.splitlines()
    for r in results:
        assert {"model", "suite", "metric", "n", "score", "low", "high"} <= r.keys() and r["n"] > 0 and r["low"] <= r["score"] <= r["high"]
        assert r.get("baseline") == (None if r["model"] == "control" else "control")
        assert ("verdicts" in r) == r["suite"].startswith("calls")
    assert {r["model"] for r in results} == {"control", "ours"} and "## What failed in calls" in report
    assert (out / "eval" / "report.png").read_bytes().startswith(b"\x89PNG")
    for name in ("control", "ours"):
        lines = (out / "eval" / "items" / name / "calls.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines[1:]]
        assert len(items) == 10 and all({"prompt", "output", "calls", "gold", "verdict", "scores"} <= i.keys() for i in items)
    assert table.count("a conversation about an API held out from the corpus") == 3
    constrained = [json.loads(line) for line in (out / "eval" / "items" / "ours" / "calls-constrained.jsonl").open(encoding="utf-8")][1:]
    assert all(name in json.dumps(item["prompt"]) for item in constrained for name, _ in item["calls"] or [])


def test_only_the_models_named(unbroken, small_corpus, tmp_path):
    out, _ = unbroken
    table = run("evaluate.py", *flags("evaluate.py", small_corpus, tmp_path), "--model", out / "ours", "--seq-len", 256).stdout
    assert "control" not in table and "| ours " in table
    assert "nowhere" in run("evaluate.py", "--corpus", small_corpus, "--model", "nowhere", ok=False).stderr


def test_killed_in_every_stage_the_table_is_the_same(unbroken, small_corpus, tmp_path):
    """kill -9 after 3 and 5 seconds of work in each stage, then the same command to its end."""
    out, _ = unbroken
    for script in STAGES:
        for seconds in (3, 5):
            process = Script(ROOT / script, *flags(script, small_corpus, tmp_path))
            time.sleep(seconds)
            process.kill()
            process.wait()
        run(script, *flags(script, small_corpus, tmp_path))
    assert json.loads((out / "eval" / "results.json").read_text()) == json.loads((tmp_path / "eval" / "results.json").read_text())
    for path in (out / "eval" / "items").rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "eval" / "items" / path.relative_to(out / "eval" / "items")).read_bytes()


@pytest.mark.parametrize("script", ["collect.py", "build_corpus.py", "pretrain.py", "finetune.py", "evaluate.py"])
def test_help_is_a_good_page(script):
    page = run(script, "--help").stdout
    for word in ("In:", "Out:", "Laptop:", f"python {script}", "(default:"):
        assert word in page, word
    options = page.split("options:")[1]
    for paragraph in options.split("\n  --")[1:]:
        assert len(paragraph.split()) > 3, paragraph  # each flag says what it does


def test_run_time_imports_are_the_required_packages():
    import ast
    allowed = {*sys.stdlib_module_names, "torch", "tiktoken", "numpy", "requests", "tqdm"}
    allowed |= {"regex", "urllib3"}  # which tiktoken and requests bring
    order = ["collect", "build_corpus", "model", "pretrain", "finetune", "evaluate"]
    for i, name in enumerate(order):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        project = {m for m in imported if m in order}
        assert {m.split(".")[0] for m in imported} <= allowed | project
        assert project <= {*order[:i], "model"} and (name != "model" or not project)  # from stages above, and the model, which needs none
