"""Speed and memory side by side with the peer, in the same run, as ratios: medians of interleaved runs.

    python tests/bench.py generation     tokens/s of model.generate and transformers' generate
    python tests/bench.py loss           memory of the loss with a large vocabulary, in chunks and plain
    python tests/bench.py load           seconds and memory of loading a checkpoint, and of reading its file
    python tests/bench.py packing        packed attention with a mask, and document by document
    python tests/bench.py minhash        signatures a second, and datasketch's (and datatrove's, where that is installed)
    python tests/bench.py dedup          seconds and memory of dropping near duplicates from 10,000 to 300,000 documents

Needs tests/requirements.txt; memory is measured on Linux. No tests: a number that depends on the machine must not fail one.
"""
import argparse
import multiprocessing
import random
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_corpus
import model as transformer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs, of which the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    for what in args.what:
        BENCHES[what](args.rounds)


def interleaved(rounds, **runs):
    """{name: median seconds} of functions called in turn, after one call of each that does not count."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}


def in_process(rounds, function, *arguments):
    """Medians of what the function returns, each time in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return [statistics.median(column) for column in zip(*(pool.submit(function, *arguments).result() for _ in range(rounds)))]


def measured(run):
    """Seconds that a function takes, and MB of memory that the process holds at its peak beyond what it held before."""
    def memory(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, started = memory("VmRSS"), time.perf_counter()
    result = run()
    seconds, peak = time.perf_counter() - started, memory("VmHWM") - before
    del result  # held until here
    return seconds, peak


def generation(rounds):
    """Four layers of 256, float32, greedy, prompts of 16 to 128 tokens, 64 new tokens each."""
    from transformers import AutoModelForCausalLM
    model = transformer.Transformer(transformer.Config(vocab_size=4096, dim=256, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=688)).eval()
    with tempfile.TemporaryDirectory() as directory:
        transformer.save(model, directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for lengths in ([64], torch.linspace(16, 128, 32).long().tolist()):
        prompts = [torch.randint(4096, (n,)).tolist() for n in lengths]
        pads = [max(lengths) - n for n in lengths]
        ids, mask = torch.tensor([[0] * n + p for n, p in zip(pads, prompts)]), torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, prompts)])
        seconds = interleaved(rounds, ours=lambda: transformer.generate(model, prompts, 64), theirs=lambda: theirs.generate(
            ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0))
        rate = {name: 64 * len(prompts) / s for name, s in seconds.items()}
        print(f"generation, batch {len(prompts)}: ours {rate['ours']:,.0f} tokens/s, transformers {rate['theirs']:,.0f}; {rate['ours'] / rate['theirs']:.2f} times")


def loss_once(chunked):
    x, weight = (torch.randn(n, 256, requires_grad=True) for n in (2048, 128_256))
    x.grad, weight.grad = torch.zeros_like(x), torch.zeros_like(weight)
    targets = torch.randint(128_256, (2048,))
    plain = lambda: F.cross_entropy(F.linear(x, weight), targets, reduction="sum")
    return measured(lambda: (transformer.head_loss(x, weight, targets) if chunked else plain()).backward())


def loss(rounds):
    """2,048 tokens, 256 wide, vocabulary of 128,256: what forward and backward hold beyond weights, input and their gradients."""
    ours, plain = in_process(rounds, loss_once, True), in_process(rounds, loss_once, False)
    print(f"loss: in chunks {ours[1]:,.0f} MB in {ours[0]:.1f} s, plain {plain[1]:,.0f} MB in {plain[0]:.1f} s; {ours[1] / plain[1]:.2f} of the memory")


def load_once(directory, ours):
    def read():
        if not ours:
            return (Path(directory) / "model.safetensors").read_bytes()
        model = transformer.load(directory, dtype=None)
        for p in model.parameters():
            p.view(torch.int16)[..., ::1024].sum()  # a page of the file holds 2,048 weights: every page is read
        return model

    return measured(read)


def load(rounds):
    """The 124m preset with a vocabulary of 128,256, in bfloat16: loaded and every weight read, against reading the file's bytes."""
    with tempfile.TemporaryDirectory() as directory:
        model = transformer.Transformer(transformer.Config(vocab_size=128_256, **transformer.PRESETS["124m"])).bfloat16()
        transformer.save(model, directory)
        size = (Path(directory) / "model.safetensors").stat().st_size / 2**20
        ours, bytes_read = in_process(rounds, load_once, directory, True), in_process(rounds, load_once, directory, False)
    print(f"load: {size:,.0f} MB in {ours[0]:.2f} s with {ours[1]:,.0f} MB of memory; its bytes alone {bytes_read[0]:.2f} s, {bytes_read[1]:,.0f} MB")


def packing(rounds):
    """Forward and backward of packed attention: heads of 64, documents of about 280 tokens."""
    for batch, heads, T in ((4, 3, 384), (2, 12, 1024), (1, 12, 4096)):
        q, k, v = (torch.randn(batch, heads, T, 64, requires_grad=True) for _ in range(3))
        segments = (torch.arange(T) // 284)[None].expand(batch, -1)

        def masked():
            mask = torch.ones(T, T, dtype=torch.bool).tril() & (segments[:, :, None] == segments[:, None, :])
            transformer.attend(q, k, v, mask[:, None]).sum().backward()

        seconds = interleaved(rounds, masked=masked, documents=lambda: transformer.packed_attention(q, k, v, segments).sum().backward())
        print(f"packing, {batch} windows of {T}: mask {1e3 * seconds['masked']:.1f} ms, by document {1e3 * seconds['documents']:.1f} ms")


def synthetic(count):
    """Documents of about 580 bytes, of which one in ten is another with a word replaced."""
    rng = random.Random(0)
    texts = [" ".join(f"word{rng.randrange(50_000)}" for _ in range(58)) for _ in range(count - count // 10)]
    return texts + [re.sub(r"word\d+", "other", text, count=1) for text in rng.sample(texts, count // 10)]


def minhash(rounds):
    """2,000 documents of 580 bytes in one process, runs of five words, 126 hashes."""
    from datasketch import MinHash
    texts, hashes = synthetic(2000), build_corpus.BANDS * build_corpus.ROWS

    def datasketch():
        for text in texts:
            words = re.findall(r"\w+", text.lower())
            MinHash(num_perm=hashes).update_batch([" ".join(words[i:i + 5]).encode() for i in range(len(words) - 4)])

    runs = {"ours": lambda: [build_corpus.minhash(texts[i:i + 500]) for i in range(0, len(texts), 500)], "datasketch": datasketch}
    try:
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
        from datatrove.utils.hashing import HashConfig
        step = MinhashDedupSignature("unused", MinhashConfig(5, build_corpus.BANDS, build_corpus.ROWS, hash_config=HashConfig(hash_fc="sha1")))
        runs["datatrove"] = lambda: [step.get_signature(step.get_shingles(text)) for text in texts]
    except ImportError as error:
        print(f"minhash: without datatrove ({error})")
    seconds = interleaved(rounds, **runs)
    for name, s in seconds.items():
        print(f"minhash: {name} {len(texts) / s:,.0f} documents/s" + f"; ours {s / seconds['ours']:.1f} times" * (name != "ours"))


def dedup_once(count):
    texts = synthetic(count)
    return measured(lambda: build_corpus.near_duplicates(texts, texts, 0.8, workers=2))


def dedup(rounds):
    """From texts in memory to what is dropped, in two processes; memory is that of this one beyond the texts."""
    for count in (10_000, 30_000, 100_000, 300_000):
        seconds, peak = in_process(1, dedup_once, count)
        print(f"dedup, {count:,} documents: {seconds:.1f} s, {count / seconds:,.0f} documents/s, {peak:,.0f} MB")


BENCHES = {"generation": generation, "loss": loss, "load": load, "packing": packing, "minhash": minhash, "dedup": dedup}

if __name__ == "__main__":
    main()
