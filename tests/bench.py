"""Speed and memory side by side with the peer, in the same run, as ratios: medians of interleaved runs.

    python tests/bench.py generation     tokens/s of model.generate and transformers' generate
    python tests/bench.py loss           memory of the loss with a large vocabulary, in chunks and plain
    python tests/bench.py load           seconds and memory of loading a checkpoint, and of reading its file
    python tests/bench.py attention      compiled attention on a CPU, and the fused kernel
    python tests/bench.py train --nanogpt DIR    tokens/s of the training loop, and of nanoGPT's, whose directory is DIR
    python tests/bench.py packing        packed attention with a mask, and document by document
    python tests/bench.py minhash        signatures a second, and datasketch's (and datatrove's, where that is installed)
    python tests/bench.py dedup          seconds and memory of dropping near duplicates from 10,000 to 1,000,000 documents
    python tests/bench.py tokenize       MB/s from records to ids on all cores, and bare tiktoken's
    python tests/bench.py bpe            seconds of training a tokenizer, and those of tokenizers on the same words
    python tests/bench.py build          MB/s and memory of build_corpus.py for records of 25 and of 100 MB

Needs tests/requirements.txt; memory is measured on Linux. No tests: a number that depends on the machine must not fail one.
"""
import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import pickle
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_corpus
import model as transformer
import pretrain
from collect import Record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs, of which the median counts")
    parser.add_argument("--nanogpt", metavar="DIR", help="nanoGPT's directory, to train beside it")
    args = parser.parse_args()
    torch.manual_seed(0)
    BENCHES["train"] = functools.partial(train, nanogpt=args.nanogpt)
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


def attention(rounds):
    """Forward and backward in bfloat16: heads of 64, under a mask."""
    torch.use_deterministic_algorithms(True)
    for batch, heads, T in ((16, 4, 256), (4, 3, 384), (2, 3, 768)):
        q, k, v = (torch.randn(batch, heads, T, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
        ours = torch.compile(transformer.compiled_attention)
        seconds = interleaved(4 * rounds, compiled=lambda: ours(q, k, v, mask).sum().backward(),
                              kernel=lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward())
        print(f"attention, {batch} windows of {T}: compiled {1e3 * seconds['compiled']:.1f} ms, kernel {1e3 * seconds['kernel']:.1f} ms; "
              f"{seconds['kernel'] / seconds['compiled']:.2f} times")


class RandomTokens:
    """Stands for a corpus of a million random tokens."""
    directory, tokenizer = "random", build_corpus.Tokenizer({bytes([i]): i for i in range(256)})

    def read(self, domain, split):
        return np.random.default_rng(0).integers(4096, size=10**6, dtype=np.uint16)


def train_once(steps, windows, T, document_mask=True):
    """Lines of metrics of a run of pretrain.py's loop: 4 layers, 256 wide, vocabulary of 4,096, with its defaults for this machine."""
    parser = argparse.ArgumentParser()
    pretrain.add_training_flags(parser)
    parser.set_defaults(lr=1e-3)
    args = parser.parse_args(["--seq-len", str(T), "--val-windows", "16", "--save-every", "100000", "--val-every", "100000", "--device", "cpu"])
    args.batch_tokens = windows * T
    pretrain.setup(args)
    config = transformer.Config(vocab_size=4096, dim=256, n_layers=4, n_heads=4, n_kv_heads=4, hidden_dim=688)
    get_batch, _ = pretrain.window_batches(RandomTokens(), {"code": 1}, steps * windows, T, windows, [0], document_mask=document_mask)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        run = Path(directory) / "run"
        pretrain.settle_options(run, {"steps": steps})
        pretrain.train(run, lambda: transformer.Transformer(config), get_batch,
                       pretrain.held_out_windows(RandomTokens(), args, document_mask), {"steps": steps}, RandomTokens(), args)
        return [line for line in map(json.loads, (run / "metrics.jsonl").open()) if "tokens" in line]


def nanogpt_once(directory, flags):
    """Milliseconds of a step of its train.py."""
    done = subprocess.run([sys.executable, *flags], cwd=directory, capture_output=True, text=True)
    times = [float(t) for t in re.findall(r"time ([0-9.]+)ms", done.stdout)]
    if len(times) < 20:
        sys.exit(f"nanoGPT did not train: {done.stderr}")
    return statistics.median(times[5:])


def train(rounds, nanogpt):
    """16 windows of 256 tokens a step, the data in files, on all cores; nanoGPT of the same size as its README says for a CPU, and
    with bfloat16 and compile."""
    rate, waits = {}, []
    with tempfile.TemporaryDirectory() as copy, ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        def ours(document_mask):
            lines = pool.submit(train_once, 40, 16, 256, document_mask).result()[5:]
            waits.extend(line["data_wait"] for line in lines)
            return statistics.median(line["ms"] for line in lines)

        runs = {"ours": lambda: ours(False), "ours with documents masked": lambda: ours(True)}  # nanoGPT masks none
        if nanogpt:
            shutil.copytree(nanogpt, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", "data", "assets"))
            data = Path(copy, "data", "random")
            data.mkdir(parents=True)
            for name in ("train.bin", "val.bin"):
                RandomTokens().read(None, None).tofile(data / name)
            (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4096}))
            source = Path(copy, "train.py").read_text()
            Path(copy, "train_bfloat16.py").write_text(source.replace("ctx = nullcontext() if device_type == 'cpu' else ", "ctx = "))
            flags = ["--dataset=random", "--eval_iters=1", "--log_interval=1", "--batch_size=16", "--block_size=256", "--n_layer=4", "--n_head=4",
                     "--n_embd=256", "--gradient_accumulation_steps=1", "--max_iters=40", "--device=cpu"]
            runs["nanoGPT"] = lambda: nanogpt_once(copy, ["train.py", *flags, "--compile=False", "--dtype=float32"])
            runs["nanoGPT, bfloat16 and compile"] = lambda: nanogpt_once(copy, ["train_bfloat16.py", *flags, "--compile=True", "--dtype=bfloat16"])
        for i in range(rounds):
            for name, run in runs.items():
                rate.setdefault(name, []).append(16 * 256 / run() * 1000)
        rate = {name: statistics.median(r) for name, r in rate.items()}
        for name, r in rate.items():
            print(f"train: {name} {r:,.0f} tokens/s" + f"; ours {rate['ours'] / r:.2f} times" * (name != "ours"))
        lines = pool.submit(train_once, 2000, 2, 128).result()
    print(f"train: data wait {statistics.mean(waits):.2%} of a step; memory after 200 steps {lines[199]['memory_gb']:.3f} GB, after 2,000 {lines[-1]['memory_gb']:.3f} GB")


def packing(rounds):
    """Forward and backward of packed attention: heads of 64, documents of about 280 tokens."""
    for batch, heads, T in ((4, 3, 384), (2, 12, 1024), (1, 12, 4096)):
        q, k, v = (torch.randn(batch, heads, T, 64, requires_grad=True) for _ in range(3))
        segments = (torch.arange(T) // 284)[None].expand(batch, -1)

        def masked():
            mask = torch.ones(T, T, dtype=torch.bool).tril() & (segments[:, :, None] == segments[:, None, :])
            transformer.fused_attention(q, k, v, mask[:, None]).sum().backward()

        seconds = interleaved(rounds, masked=masked, documents=lambda: transformer.packed_attention(q, k, v, transformer.document_starts(segments)).sum().backward())
        print(f"packing, {batch} windows of {T}: mask {1e3 * seconds['masked']:.1f} ms, by document {1e3 * seconds['documents']:.1f} ms")


def synthetic(count):
    """Documents of about 580 bytes, of which one in ten is another with a word replaced."""
    rng, names = random.Random(0), [f"word{i}" for i in range(50_000)]
    texts = [" ".join(rng.choices(names, k=58)) for _ in range(count - count // 10)]
    return texts + [re.sub(r"word\d+", "other", text, count=1) for text in rng.sample(texts, count // 10)]


def sources(megabytes):
    """Documents of about 580 bytes from the source of the standard library and the installed packages."""
    left = megabytes * 10**6
    for path in sorted(Path(path) for place in ("stdlib", "purelib") for path in Path(sysconfig.get_path(place)).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for at in range(0, len(text), 580):
            yield text[at:at + 580]
            left -= 580
            if left < 0:
                return


def write_records(directory, texts):
    """The texts as records in four shards. Returns their size in MB."""
    directory.mkdir()
    files = [open(directory / f"{i}.jsonl", "w", encoding="utf-8", errors="replace") for i in range(4)]
    for i, text in enumerate(texts):
        files[i % 4].write(Record(f"r{i}", "code", "bench", "", [], text).to_json() + "\n")
    for file in files:
        file.close()
    return sum(f.stat().st_size for f in directory.iterdir()) / 1e6


def cleaned(directory, near_duplicates=0.8):
    """Documents and args of the records in directory/raw, cleaned in two processes, as build_corpus.py's later steps take them."""
    args = argparse.Namespace(workers=2, near_duplicates=near_duplicates, heldout=0.08, fold=1, vocab_size=8192)
    shards = sorted((directory / "raw").glob("*.jsonl"))
    pieces = build_corpus.find_pieces({shard: build_corpus.sha256(shard) for shard in shards}, False)
    (directory / "work").mkdir(exist_ok=True)
    return build_corpus.clean_all(pieces, directory / "work", 2), args


def minhash(rounds):
    """2,000 documents of 580 bytes in one process, runs of five words, 126 hashes."""
    from datasketch import MinHash
    texts, hashes = synthetic(2000), build_corpus.BANDS * build_corpus.ROWS

    def datasketch():
        for text in texts:
            words = re.findall(r"\w+", text.lower())
            MinHash(num_perm=hashes).update_batch([" ".join(words[i:i + 5]).encode() for i in range(len(words) - 4)])

    runs = {"ours": lambda: [build_corpus.minhash(*build_corpus.shingle_hashes(texts[i:i + 500])) for i in range(0, len(texts), 500)], "datasketch": datasketch}
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


def dedup_once(directory):
    documents, args = cleaned(directory)
    return [*measured(lambda: build_corpus.drop_duplicates(documents, args)), len(documents)]


def dedup(rounds):
    """From records in files to what is dropped, in two processes; the memory is this one's beyond the index of the documents."""
    for count in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as directory:
            write_records(Path(directory, "raw"), synthetic(count))
            started = time.perf_counter()
            seconds, peak, kept = in_process(1, dedup_once, Path(directory))
            total = time.perf_counter() - started
        print(f"dedup, {count:,} documents: cleaned and signed in {total - seconds:.0f} s, near duplicates found and dropped in {seconds:.1f} s with {peak:,.0f} MB; "
              f"{count / total:,.0f} documents/s in all")


def tokenize(rounds):
    """20 MB of documents of 580 bytes on two cores, vocabulary of 8,192: from cleaned records to ids in files, and in memory by tiktoken's threads."""
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        write_records(directory / "raw", sources(20))
        documents, args = cleaned(directory, 0)
        build_corpus.drop_duplicates(documents, args)
        texts = [documents[i].text for i in np.flatnonzero(documents.kept)]
        tokenizer = build_corpus.Tokenizer.train(texts[::10], 8192)
        split, size = build_corpus.Split([], 1, {}), sum(len(t.encode()) for t in texts) / 1e6

        def ours():
            for path in build_corpus.tokenize(documents, split, tokenizer, args):
                path.unlink()

        seconds = interleaved(rounds, ours=ours, tiktoken=lambda: tokenizer.encoding.encode_ordinary_batch(texts, num_threads=2))
    rate = {name: size / s for name, s in seconds.items()}
    print(f"tokenize: ours {rate['ours']:.1f} MB/s, tiktoken {rate['tiktoken']:.1f} MB/s; {rate['ours'] / rate['tiktoken']:.2f} times")


def bpe(rounds):
    """Merges up to a vocabulary of 8,192 of the words of 10 MB of source."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    texts = list(sources(10))

    def theirs():
        reference = Tokenizer(models.BPE())
        reference.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(build_corpus.PATTERN), "isolated"),
                                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        reference.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=8192, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))

    seconds = interleaved(min(rounds, 3), ours=lambda: build_corpus.Tokenizer.train(texts, 8192), theirs=theirs)
    print(f"bpe: ours {seconds['ours']:.1f} s, tokenizers {seconds['theirs']:.1f} s; {seconds['ours'] / seconds['theirs']:.1f} times as long")


def build_once(directory):
    started = time.perf_counter()
    subprocess.run([sys.executable, build_corpus.__file__, "--raw", directory / "raw", "--out", directory / "out"], check=True, capture_output=True)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def build(rounds):
    """The whole of build_corpus.py with its defaults; memory is that of its largest process."""
    for megabytes in (25, 100):
        with tempfile.TemporaryDirectory() as directory:
            size = write_records(Path(directory, "raw"), sources(megabytes))
            seconds, peak = in_process(1, build_once, Path(directory))
        print(f"build: {size:,.0f} MB of records in {seconds:.0f} s, {size / seconds:.1f} MB/s, {peak:,.0f} MB of memory")


BENCHES = {"generation": generation, "loss": loss, "load": load, "attention": attention, "train": train, "packing": packing, "minhash": minhash, "dedup": dedup,
           "tokenize": tokenize, "bpe": bpe, "build": build}

if __name__ == "__main__":
    main()
