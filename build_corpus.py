"""Step 2 of 6: build the corpus that is trained on.

In:   data/raw/*.jsonl, the records that collect.py wrote (or your own, in the same form), and --pool, more of
      general text and code
Out:  data/corpus/
        tokenizer.tiktoken, tokenizer.json,   one byte-level BPE tokenizer, for tiktoken and Hugging Face
        tokenizer_config.json
        <domain>.<split>.bin, .idx            token ids and document starts; split is train or heldout
        instruction.<split>.mask              the loss mask of tuning: 1 on target tokens
        retrieved.<split>.score               of the pool's documents: how likely they are of the seed's kind
        heldout_apis.json, heldout.jsonl      APIs no training document mentions; their conversations
        manifest.json, rejected.jsonl         counts and hashes of all this; a sample of what was dropped
        work/                                 what the steps wrote, by hash; may be deleted at any time

Laptop:         python build_corpus.py            and then, to look at it: python build_corpus.py --show 5
One node:       python build_corpus.py --vocab-size 32768 --pool data/web --benchmarks tests/bfcl
Many nodes:     torchrun --nnodes=4 --nproc_per_node=1 ... build_corpus.py ...      over a shared file system
A base's own:   python build_corpus.py --tokenizer path/to/Qwen3-8B-Base
Own data:       python build_corpus.py --raw my/records --out my/corpus

The steps: clean, drop duplicates and near duplicates, drop what is in test data, retrieve from the pool what
is like the seed, hold APIs out by a hash of their name, tokenize. Shards are worked on in pieces, and what a
step writes of a piece is named by a hash of all that it depends on: after a kill, a new shard or a changed
option only what is missing is done. The result is the same for any number of processes and any order of the
input.
"""
import argparse
import base64
import hashlib
import heapq
import json
import multiprocessing
import operator
import os
import platform
import re
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict, namedtuple
from functools import cache, lru_cache, partial
from itertools import chain, groupby, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from collect import (DOMAINS, HelpFormatter, Record, attempt, calls_in, fail, functions_called, list_or_none,
                     python_calls, read_values, run_main, unit_hash, visible, writing)

SPLITS = ("train", "heldout")
BINS = (*DOMAINS, "retrieved")   # retrieved: what was taken from the pool
STAGES = {"wide": BINS, "seed": DOMAINS}  # what pretrain.py's two stages read
FILES_HELDOUT = 0.1  # share of code and text documents kept from training
MAX_REJECTED = 100   # examples kept of each reason
PIECE = 4 * 2**20    # bytes of a shard that are worked on together


def main():
    """Clean, deduplicate, hold out, retrieve and tokenize the records; write the corpus, or show it."""
    args = parse_args()
    if args.show is not None:
        return show(args)
    started, out = time.time(), Path(args.out)
    shards = find_shards(args.raw, args.workers)
    pool = find_shards(args.pool, args.workers) if args.pool else {}
    tokenizer = Tokenizer.find(args.tokenizer) if args.tokenizer else None
    options = {
        "tokenizer": tokenizer and tokenizer.fingerprint(),
        "benchmarks": [sha256(file) for file in args.benchmarks],
        "inputs": {shard.name: key for shard, key in shards.items()},
        "pool": {shard.name: key for shard, key in pool.items()},
        "encoder": encoder_hashes(args.encoder)}
    for name in ("vocab_size", "near_duplicates", "heldout", "fold", "retrieve", "retrieve_above"):
        options[name] = getattr(args, name)
    corpus = attempt(Corpus, out)  # or why there is none
    if isinstance(corpus, Corpus) and corpus.manifest["options"] == options:
        print(f"{out} is up to date")
        return report(corpus.manifest, time.time() - started)
    (out / "work").mkdir(parents=True, exist_ok=True)
    if is_main():
        (out / "manifest.json").unlink(missing_ok=True)  # until it is written again the corpus is not valid

    pieces = find_pieces(shards, False) + find_pieces(pool, True)
    documents = clean_all(sorted(pieces), out / "work", args.workers)  # sorted by content
    if not documents:
        fail(f"{args.raw}: no document is left after cleaning")
    drop_duplicates(documents, args)
    drop_contaminated(documents, args)
    retrieval = retrieve(documents, args) if pool else None
    heldout_apis = sorted({api for report in documents.reports for api in report["apis"]
                           if in_fold(api, args.heldout, args.fold)})
    split = Split(heldout_apis, args.fold, documents.copies_apis)
    tokenizer = tokenizer or train_tokenizer(documents, split, args)
    tokenize(documents, split, tokenizer, args)
    if is_main():
        manifest = assemble(out, documents, heldout_apis, tokenizer)
        manifest |= {"options": options, "retrieval": retrieval}
        write(out / "manifest.json", json.dumps(manifest, indent=1))
        report(manifest, time.time() - started)


def clean_all(pieces, work, workers):
    """Clean the records of all pieces. Returns the Documents that are left."""
    run_jobs(clean_piece, [(work / f"{piece.key}.npy", piece) for piece in pieces], workers, "clean")
    return Documents(pieces, work)


def clean(record, masked):
    """The record with its texts scrubbed; what is masked is counted."""
    parts = [record.text, record.messages, record.tools]
    record.text, record.messages, record.tools = scrub_strings(parts, masked)
    for hint, line in BOILERPLATE.items():
        if record.domain == "text" and hint in record.text.lower():
            line = rf"^[ \t>*#|-]*(?:{line})[ \t]*(?:\n|\Z)"
            record.text, found = re.subn(line, "", record.text, flags=re.I | re.M)
            masked["lines of boilerplate"] += found
    return record


def minhash(hashes, starts):
    """Signatures (N, BANDS * ROWS) uint64 of N texts, from their shingle_hashes(): two agree at a place
    with a probability that is the Jaccard similarity of their sets of shingles. The functions are of the form
    (a·x + b mod 2^64) / 2^32 with x below 2^32, which is universal (Dietzfelbinger 1996) and needs no wider
    numbers.
    """
    x = hashes >> 32
    functions = np.random.default_rng(0).integers(2**64, size=(2, BANDS * ROWS), dtype=np.uint64).T
    return np.array([np.minimum.reduceat((x * (a | 1) + b) >> 32, starts[:-1]) for a, b in functions]).T


def drop_duplicates(documents, args):
    """Keep the best of equal and of nearly equal documents: a collected one before one of the pool, then
    the longest, then the lowest id. Sets documents.copy_of and .copies_apis. Candidates are found by their
    bands and compared in full, a part by each process; neither needs the texts in memory.
    """
    kept, copy_of, threshold = documents.kept, documents.copy_of, args.near_duplicates
    about_apis = documents.is_in("api_doc", "trajectory", "instruction")
    best = np.lexsort((documents.id, -documents.length.astype(np.int64), documents.is_in("retrieved")))
    _, first, value = np.unique(documents.digest[best], return_index=True, return_inverse=True)
    copy_of[best] = best[first[value]]
    for j in np.flatnonzero(copy_of != np.arange(len(documents))):
        documents.drop(j, "duplicate", of=documents.name(copy_of[j]))
        if about_apis[j]:
            documents.copies_apis[copy_of[j]].update(documents[j].apis)
    path, best = documents.file("pairs.npy", threshold), best[kept[best]]
    run_jobs(find_pairs, [(path, best, documents, threshold)], 1, "look for near duplicates")
    pairs = np.load(path)
    parts = enumerate(np.split(pairs, range(PAIRS, len(pairs), PAIRS)))
    jobs = [(documents.file(f"{k}.similar.npy", threshold), part) for k, part in parts]
    run_jobs(compare_pairs, jobs, args.workers, "compare near duplicates", (documents, threshold))
    similar = np.concatenate([np.load(path) for path, _ in jobs])
    for j, i in similar.tolist():  # the best j first: whether the better i was kept is known
        if kept[i] and kept[j]:
            documents.drop(j, "near duplicate", of=documents.name(i))
            copy_of[j] = i
    # A document that is dropped may resemble several that are kept.
    for gone, other in np.concatenate([similar, similar[:, ::-1]]).tolist():
        if kept[other] and not kept[gone]:
            named = documents[gone].apis if about_apis[gone] else []
            documents.copies_apis[other].update(named, documents.copies_apis.get(gone, ()))


def drop_contaminated(documents, args):
    """Drop the documents that share something with the test data."""
    if not args.benchmarks:
        return
    jobs = documents.jobs("matches.json", [sha256(file) for file in args.benchmarks])
    benchmarks = Benchmarks(args.benchmarks) if not all(path.exists() for path, _ in jobs) else None
    run_jobs(find_matches, jobs, args.workers, "decontaminate", (documents, benchmarks))
    for path, n in jobs:
        for row, words, file in read_json(path):
            i = documents.rows(n)[row]
            if documents.kept[i]:
                documents.drop(i, "shares words or a call with a benchmark", match=words, file=file)


def retrieve(documents, args):
    """Drop the pool's documents that are not like the seed, the documentation and trajectories. Sets
    documents.score (N,), the probability of each document of the pool, calibrated on as many of the seed as
    of the pool. Returns the figures for the manifest.

    The classifier is fastText's (arXiv 1607.01759): the mean of vectors of hashed words and pairs of words,
    and a logistic loss. With two classes a vector and the output layer make one number for each n-gram, so
    that number is what is learned.
    """
    seed, pool = documents.ordered("api_doc", "trajectory"), documents.ordered("retrieved")
    count = min(SAMPLE, len(seed), len(pool))
    if count < 50:
        fail(f"--pool: {len(pool):,} documents of the pool and {len(seed):,} of the seed are left; a "
             "classifier needs 50 of each")
    depends = hash_of(documents.names, documents.kept, encoder_hashes(args.encoder))
    path = documents.file("scorer.npy", depends)
    job = path, (seed[:count], pool[:count]), documents, args.encoder
    run_jobs(train_scorer, [job], 1, "train the classifier")
    scorer, report = np.load(path), read_json(path.with_suffix(".json"))
    jobs = [(path, n) for path, n in documents.jobs("scores.npy", depends) if documents.pieces[n].pool]
    workers = 1 if args.encoder else args.workers
    run_jobs(score_piece, jobs, workers, "score the pool", (documents, scorer, args.encoder))
    for path, n in jobs:
        documents.score[documents.rows(n)] = probability(np.load(path), report["line"])
    pool = pool[np.lexsort((documents.id[pool], -documents.score[pool]))]  # the likeliest first
    count = round(args.retrieve * len(pool))
    if args.retrieve_above is not None:
        count = int((documents.score[pool] >= args.retrieve_above).sum())
    for i in pool[count:]:
        documents.drop(i, "not of the seed's kind", probability=round(float(documents.score[i]), 4))
    least = float(documents.score[pool[:count]].min(initial=1.0))
    return report["figures"] | {"pool": len(pool), "taken": count, "least": least}


def in_fold(name, share, fold):
    """Whether a hash of the name falls into the given one of the 1 / share folds. Folds are counted
    round, from 0.
    """
    return int(unit_hash(name) / share) == fold % int(1 / share)


class Split:
    """Tells of a document whether it is for "train" or "heldout", or None where it mentions a held-out
    API.

    A record (api_doc, trajectory, instruction) that documents or calls a held-out API is held out. So is one
    whose dropped near duplicate did. One that only mentions a held-out API by its qualified name, in the text
    or inside one of its `apis`, is dropped, also of what is retrieved. Code and text, on which all compared
    models are trained, are split by a hash of their id; they have fewer documents, so a larger share is held
    out.
    """

    def __init__(self, heldout_apis, fold, copies_apis):
        self.heldout, self.fold, self.copies_apis = set(heldout_apis), fold, copies_apis
        self.mentions = mention_finder(self.heldout)

    def __call__(self, i, record, bin):
        if bin in ("code", "text"):
            return "heldout" if in_fold(record.id, FILES_HELDOUT, self.fold) else "train"
        if self.heldout & {*record.apis, *self.copies_apis.get(i, ())}:
            return "heldout"
        return None if self.mentions(" ".join([content_of(record), *record.apis])) else "train"


def tokenize(documents, split, tokenizer, args):
    """Tokenize the kept documents of each piece. Sets documents.tokenized, the paths of what
    tokenize_piece() wrote of each, and returns them.
    """
    jobs, depends = [], hash_of(tokenizer.fingerprint(), sorted(split.heldout), args.fold)
    for n, name in enumerate(documents.names):
        rows = documents.rows(n)
        copies = [sorted(split.copies_apis.get(i, ())) for i in rows]
        key = hash_of(name, documents.kept[rows], copies, depends)
        jobs.append((documents.work / f"{key}.tokens.npy", n))
    run_jobs(tokenize_piece, jobs, args.workers, "tokenize", (documents, split, tokenizer))
    documents.tokenized = [path for path, _ in jobs]
    return documents.tokenized


def tokenize_piece(n, documents, split, tokenizer):
    """The ids of a piece's kept documents, each with an end of text (.bin), their loss mask if conversations
    are among them (.mask), and for each document of the piece what became of it (.npy).
    """
    rows, end = documents.rows(n), np.array([tokenizer.end_of_text], np.uint32)
    entries, ids, targets, start = [(0, 0, "", 0)] * len(rows), [end[:0]], [], 0
    for row, i in enumerate(rows):
        if not documents.kept[i]:
            continue
        record = documents[i]
        name = split(i, record, BINS[documents.bin[i]])
        if name is None:
            continue
        tokenizer.lost = 0
        if record.text is None:
            encoded, target = tokenizer.render(record.messages, record.tools)
        else:
            encoded, target = tokenizer.encode_to_numpy(record.text), []
        if record.messages is not None:  # it may have a text beside them
            targets.append((start, target))
        ids += [encoded, end]
        entries[row] = start, len(encoded) + 1, name, tokenizer.lost
        start += len(encoded) + 1
    files, mask = {".bin": [np.concatenate(ids).astype(tokenizer.dtype)]}, np.zeros(start, np.uint8)
    for at, target in targets:
        mask[at:at + len(target)] = target
    if targets:
        files[".mask"] = [mask]
    return files | {".npy": np.array(entries, TOKENS)}


# ==========================================================================================================
# Below: options; pieces of work; cleaning; near duplicates; decontamination; retrieval; the tokenizer; bins;
# the report.

# ----------------------------------------------------------------------------------------------------------
# Options


# A flag; its default or, if it has none, its type; and what it means.
FLAGS = (
    ("--raw DIR", "data/raw", "directory of records"),
    ("--out DIR", "data/corpus", "directory for the corpus"),
    ("--show N", int, "print N documents of the corpus with their tokens in two shades, target tokens in "
     "colour, and their measures"),
    ("--tokenizer NAME", str, "take the tokenizer of a base instead of training one: a model's directory or "
     "its tokenizer.json (byte-level BPE: Llama 3, Qwen, GPT-2, ...), Llama 3's tokenizer.model, or a name "
     "that tiktoken knows"),
    ("--vocab-size N", 2048, "tokens of the tokenizer trained here, special ones included"),
    ("--near-duplicates J", 0.8, "drop documents whose sets of 5-word runs have at least this Jaccard "
     "similarity to those of a longer one; 0 keeps them. Below 0.75 not all are found"),
    ("--benchmarks PATH", str, "drop documents that share 13 words in a row, or a call with its arguments, "
     "with this file or directory of test data (JSON, JSON lines, CSV, text)"),
    ("--pool DIR", str, "directory of records of general text and code, of which what is like the "
     "documentation and trajectories is taken for stage 1, by a classifier that tells the two apart"),
    ("--retrieve SHARE", 0.1, "share of the pool's documents to take"),
    ("--retrieve-above P", float, "take instead all of at least this probability"),
    ("--encoder DIR", str, "in place of the classifier: similarity of this model's mean hidden states to "
     "those of the seed"),
    ("--heldout SHARE", 0.08, "share of APIs kept from training"),
    ("--fold N", 1, "which share of the APIs is held out, 0 being the first: choose settings on one fold and "
     "report another (our defaults were chosen on fold 0)"),
    ("--workers N", os.cpu_count(), "processes; the result is the same for any number"))
RANGES = {"near_duplicates": (0, 1), "retrieve": (0, 1), "retrieve_above": (0, 1), "heldout": (1e-6, 0.999),
          "workers": (1, 10_000), "vocab_size": (267, 1_000_000)}  # bytes and special tokens at least


def parse_args():
    """The flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    for flag, default, meaning in FLAGS:
        name, value = flag.split()
        kind, default = (default, None) if isinstance(default, type) else (type(default), default)
        parser.add_argument(name, type=kind, default=default, metavar=value, help=meaning)
    args = parser.parse_args()
    for flag, (least, most) in RANGES.items():
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:
            fail(f"--{flag.replace('_', '-')} {value}: must be from {least} to {most}")
    args.benchmarks = benchmark_files(args.benchmarks) if args.benchmarks else []
    return args


# ----------------------------------------------------------------------------------------------------------
# Pieces of work, over processes and ranks


# The lines of a shard that begin in the PIECE bytes from `start` on. The key tells their content.
Piece = namedtuple("Piece", "key shard start pool")


def find_shards(directory, workers):
    """{path: SHA-256} of the files of records in a directory."""
    shards = sorted(Path(directory).glob("*.jsonl"))
    with ThreadPool(workers) as threads:
        hashes = dict(zip(shards, threads.map(sha256, shards)))
    return hashes or fail(f"{directory}: no *.jsonl files of records, such as `python collect.py` writes")


def find_pieces(shards, pool):
    """The Pieces of some shards."""
    return [Piece(hash_of(key, start, pool), shard, start, pool)
            for shard, key in shards.items() for start in range(0, shard.stat().st_size, PIECE)]


def hash_of(*parts):
    """A name for what depends on these parts (JSON and arrays), and on this program."""
    content = json.dumps([sha256(__file__), *parts], default=lambda array: hashlib.sha256(array).hexdigest())
    return hashlib.sha256(content.encode()).hexdigest()[:20]


def is_main():
    """Whether this is the only rank, or the first of several."""
    return int(os.environ.get("RANK", 0)) == 0


USED = set()  # the keys of all files that this build needs


def run_jobs(function, jobs, workers, name, shared=()):
    """Do the jobs (path, *arguments) whose file is not there yet, and return when all files are.

    function(*arguments, *shared) returns what is written: {suffix: content} of files beside the path, that of
    the path itself last, so that an end at any time loses no more than the jobs under way. Ranks share out
    the jobs, `workers` processes those of a rank.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    jobs = {path: arguments for path, *arguments in jobs}  # equal shards make equal jobs
    USED.update(map(key_of, jobs))
    todo, parent = [path for path in [*jobs][rank::world] if not path.exists()], os.getpid()

    def run():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
        while os.getppid() == parent:  # else it was killed, and may have been started anew
            with begun.get_lock():
                n, begun.value = begun.value, begun.value + 1
            if n >= len(todo):
                break
            for suffix, content in function(*jobs[todo[n]], *shared).items():
                write(todo[n].with_suffix(suffix), content)

    fork = multiprocessing.get_context("fork")
    begun = fork.Value("q")  # how many jobs: each process takes the next
    processes = [fork.Process(target=run, daemon=True) for _ in range(min(workers, len(todo)))]
    for process in processes:
        process.start()
    for path in tqdm(jobs, desc=name, disable=None if not rank and len(todo) > 1 else True):
        while not path.exists():  # also those of other ranks
            if any(process.exitcode for process in processes):
                fail(f"{name}: a process failed; if nothing above says why, for lack of memory, of which "
                     "fewer --workers need less")
            time.sleep(0.01)


def key_of(path):
    """The hash in the name of a file in work/."""
    return path.name.partition(".")[0]


# ----------------------------------------------------------------------------------------------------------
# Clean

# A document is dropped if a measure of it lies outside these limits: of prose, and of code and documentation,
# which repeat themselves and consist of symbols by nature. After Gopher (arXiv 2112.11446, table A1), set so
# that of the default records what goes deserves it. Conversations have a length alone.
LIMITS = {
    #                   prose             code, api_doc     what lies outside
    "characters":     ((50, 2_000_000), (20, 2_000_000)),  # nothing to learn from; no document but data
    "repeated lines": ((0, 0.3),        (0, 0.8)),  # share of characters in repeated lines: menus, logs
    "repeated runs":  ((0, 0.3),        (0, 0.8)),  # share of repeated runs of five words: spam, tables
    "symbols":        ((0, 0.4),        (0, 0.6)),  # share that is no letter, digit or white space: dumps
    "line length":    ((0, 5_000),      (0, 5_000)),  # mean characters of a line: minified code, encoded data
}
# What is replaced by its name wherever it stands. A text is searched only if it holds the hint.
SECRETS = {
    # Of an address: user:password.
    "PASSWORD": ("://", r"(?<=://)[^\s/:@<>{}\"'`]+:[^\s/:@<>{}\"'`]{3,}(?=@[\w.-]+)"),
    # The ending is one of domains, lest `x@self.weight` and `img@2x.png` count; git@host:path is no address.
    "EMAIL": ("@", r"\b(?!git@)[\w.+-]{1,64}@(?!(?:[\w-]+\.)*(?:example|test|localhost|invalid)\b)"
              r"(?:[a-zA-Z0-9-]+\.)+(?:com|org|net|edu|gov|mil|int|info|biz|name|io|dev|app|ai|xyz|site|"
              r"online|tech|cloud|email|me|pro|museum|academy|agency|company|digital|systems|software|"
              r"(?!py|rs|sh|js|ts|cc|md|so)[a-z]{2})\b(?![.\w]|:[\w/~])"),
    "PRIVATE_KEY": ("PRIVATE KEY-----", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]{100,10000}?"
                    r"-----END [A-Z ]*PRIVATE KEY-----"),
    "AWS_KEY": ("AKIA", r"\bAKIA(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}\b"),
    "GITHUB_TOKEN": ("gh", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,})\b"),
    "GOOGLE_KEY": ("AIza", r"\bAIza[\w-]{35}\b"),
    "SLACK_TOKEN": ("xox", r"\bxox[abprs]-[0-9]{8,}-[\w-]{10,}"),
    "API_KEY": ("sk", r"\b(?:sk-(?:proj-|ant-)?(?=\w*\d)[\w-]{32,}|sk_live_\w{24,})"),
    "HF_TOKEN": ("hf_", r"\bhf_(?=\w*\d)[A-Za-z0-9]{30,}\b"),
    "JWT": ("eyJ", r"\beyJ[\w-]{15,2000}\.eyJ[\w-]{15,10000}\.[\w-]{20,}"),
}
# Lines of web pages that say nothing, dropped from prose, by what is looked for first.
BOILERPLATE = {
    "skip to": "skip to (?:main )?content",
    "cookies": "(?:accept|manage|reject) (?:all )?cookies.*|we use cookies.*",
    "javascript": r".{0,80}(?:enable javascript|javascript is (?:disabled|required)).*",
    "share": r"share (?:this )?on (?:twitter|facebook|linkedin|x)\b.*",
    "all rights reserved": r"(?:(?:copyright )?(?:©|\(c\)).{0,80})?all rights reserved\.?",
    "newsletter": "subscribe to (?:our|the) newsletter.*",
    "github": "edit (?:this page )?on github",
    "back to top": "back to top",
    "lorem ipsum": "lorem ipsum.*"}
SYMBOL = re.compile(r"[^\w\s]+")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f"
                     "\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
# UTF-8 that was read as Windows-1252: Ã, Â, â or ð, and then what the bytes from 80 to BF look like.
WINDOWS = {bytes([b]).decode("cp1252", "ignore") or chr(b): b for b in range(128, 256)}
CONTINUED = "".join(re.escape(c) for c, b in WINDOWS.items() if b < 192)
MOJIBAKE = re.compile(f"(?:[ÃÂ][{CONTINUED}]|â[{CONTINUED}]{{2}}|ð[{CONTINUED}]{{3}})+")

INDEX = np.dtype([("id", "S64"), ("order", "<u8"), ("digest", "S16"), ("start", "<u8"), ("size", "<u4"),
                  ("length", "<u4"), ("bin", "u1")])


def clean_piece(piece):
    """Clean the records of a piece. Returns them (.jsonl), the hashes of their bands (.bands.npy), a report
    (.json) and their index (.npy).
    """
    rejected, masked, lines, index, bands, apis = [], Counter(), [], [], [], set()
    records = (clean(record, masked) for record in read_records(piece, rejected))
    texts = ((record, content_of(record)) for record in records)
    for batch in batches(texts, lambda pair: len(pair[1]), 500_000):
        hashes, starts = shingle_hashes([text for _, text in batch])
        keys = band_keys(minhash(hashes, starts))
        for (record, text), shingles, key in zip(batch, np.split(hashes, starts[1:-1]), keys):
            measured = measure(text, shingles)
            if fault := outside_limits(record, measured):
                rejected.append({"reason": fault, "id": record.id, "value": round(float(measured[fault]), 3)})
                continue
            bin = "retrieved" if piece.pool else record.domain
            if bin == "api_doc":
                apis.update(record.apis)
            lines.append(record.to_json().encode("utf-8", "replace") + b"\n")
            bands.append(key)
            size = len(lines[-1]), len(text)
            index.append((*index_key(record.id), digest_of(text), 0, *size, BINS.index(bin)))
    index = np.array(index, INDEX)
    index["start"] = np.cumsum(index["size"]) - index["size"]
    bands = np.array(bands, np.uint64).reshape(-1, BANDS).T.copy()
    report = {"rejected": rejected, "masked": masked, "apis": sorted(apis)}
    return {".jsonl": lines, ".bands.npy": bands, ".json": json.dumps(report), ".npy": index}


def read_records(piece, rejected):
    """Yields the records in the lines of a piece. A line that holds none is named, and joins the rejected."""
    number = 1  # of the line that `before` has come to
    with open(piece.shard, "rb") as file, open(piece.shard, "rb") as before:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line that begins in the piece before
        while (at := file.tell()) < piece.start + PIECE and (line := file.readline()):
            try:
                record = Record.from_json(line.decode("utf-8", "replace"))
                if piece.pool and record.text is None:
                    raise ValueError("a conversation has no place in a pool")
                if attempt(well_formed, record) is not True:
                    raise ValueError("not in the form of a record")
                yield record
            except ValueError as error:
                while ahead := at - before.tell():
                    number += before.read(min(ahead, PIECE)).count(b"\n")
                print(f"{piece.shard}:{number}: left out: {error}", file=sys.stderr)
                rejected.append({"reason": "not a record", "id": f"{piece.shard.name}:{number}"})


def well_formed(record):
    """Whether the parts that later steps read are of their types, which collect.py sees to."""
    messages = record.messages or []
    texts = [*record.apis, *(message["role"] for message in messages)]
    texts += [message.get("content") or "" for message in messages]
    texts += [tool["function"]["name"] for tool in record.tools or []]
    given = [json.loads(function["arguments"]) for function in functions_called(messages)]
    return {*map(type, texts)} <= {str} and {*map(type, given)} <= {dict}


def index_key(name):
    """A record's id in at most 64 bytes, and the number by which documents are ordered."""
    name = name.encode("utf-8", "replace")
    code = hashlib.sha256(name).hexdigest()[:16]
    return name if len(name) <= 64 else name[:48] + code.encode(), int(code, 16)


def batches(items, size, most):
    """Lists of consecutive items whose sizes add up to about `most`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def content_of(record):
    """What a record says, as one text."""
    if record.text is not None:
        return record.text
    return json.dumps([record.messages, record.tools], ensure_ascii=False)


def digest_of(text):
    """16 bytes that are equal for texts equal up to case and white space."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "replace")).digest()[:16]


def scrub_strings(value, masked, key=None):
    """A JSON value with its strings scrubbed, and those in the JSON that a call has for arguments."""
    if isinstance(value, list):
        return [scrub_strings(member, masked) for member in value]
    if isinstance(value, dict):
        return {k: scrub_strings(v, masked, k) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    if key != "arguments":
        return scrub(value, masked)
    given = attempt(json.loads, value)
    after = scrub_strings(given, masked)
    return value if after == given else json.dumps(after, ensure_ascii=False)


def scrub(text, masked):
    """A text in Unicode's NFC, mojibake mended, without control and zero-width characters (save those
    that join letters, as in Persian, and emoji), secrets and e-mail addresses replaced by their kind.

    >>> scrub("cafe\\u0301 cafÃ© zero\\u200bwidth me@host.org", Counter())
    'café café zerowidth <EMAIL>'
    """
    if not text.isascii():
        text = re.sub("[\ud800-\udfff]", "\ufffd", MOJIBAKE.sub(mend_mojibake, text))
        text = unicodedata.normalize("NFC", text)
    text = CONTROL.sub("", text.replace("\r\n", "\n"))
    for kind, (hint, pattern) in SECRETS.items():
        if hint in text:
            text, found = re.subn(pattern, f"<{kind}>", text)
            if found:
                masked[kind] += found
    return text


def mend_mojibake(match):
    """What the characters are when their Windows-1252 bytes are read as UTF-8; as they stand if that is
    none.
    """
    mended = bytes(WINDOWS[c] for c in match[0]).decode("utf-8", "replace")
    return match[0] if CONTROL.search(mended) or "\ufffd" in mended else mended


def measure(text, shingles):
    """The measures that LIMITS names, of a text and its shingle_hashes()."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    characters = sum(map(len, lines))
    return {
        "characters": characters,
        "repeated lines": 1 - sum(map(len, set(lines))) / max(1, characters),
        "repeated runs": (len(shingles) - len(np.unique(shingles))) / len(shingles),
        "symbols": 1 - len(SYMBOL.sub("", text)) / max(1, len(text)),
        "line length": characters / max(1, len(lines))}


def outside_limits(record, measured):
    """The name of the first measure of a record that is outside its limits, or None."""
    for name in LIMITS if record.text is not None else ["characters"]:
        lowest, highest = LIMITS[name][record.domain != "text"]
        if not lowest <= measured[name] <= highest:
            return name


# ----------------------------------------------------------------------------------------------------------
# Duplicates and near duplicates: MinHash (Broder 1997) and banded locality-sensitive hashing (Mining of
# Massive Datasets, chapter 3)

SHINGLE = 5          # words that are hashed together
# A pair of Jaccard similarity s is found with probability 1 - (1 - s^7)^18: 0.99 at 0.8, 0.13 at 0.5.
BANDS, ROWS = 18, 7
NEAR = 16            # documents with the same hash of a band, each of which is compared with a next one
PAIRS = 20_000       # are compared by one job
# What divides words outside ASCII, and what are words by themselves, in scripts that write no spaces.
DIVIDER = regex.compile(r"[^\p{L}\p{M}\p{N}\x00-\x7f]")
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*")
WORD_BYTES = np.array([bytes([b]).isalnum() or b >= 128 or b == 0 for b in range(256)])  # 0: an empty word


class Documents:
    """The cleaned documents of all pieces, numbered through: their index in memory, about 100 bytes each,
    their texts on disk. The steps drop() some.
    """

    def __init__(self, pieces, work):
        self.pieces, self.work = pieces, work
        self.names = [piece.key for piece in pieces]
        self.reports, self.reasons, self.examples = [], Counter(), []  # examples: for rejected.jsonl
        for name in self.names:
            report = read_json(work / f"{name}.json")
            for example in report.pop("rejected"):
                self.reject(example)
            self.reports.append(report)
        parts = [np.load(work / f"{name}.npy") for name in self.names]
        self.first = np.cumsum([0, *map(len, parts)])  # of each piece, and the end
        self.piece = np.repeat(np.arange(len(parts)), np.diff(self.first))  # (N,)
        index = np.concatenate([np.zeros(0, INDEX), *parts])
        vars(self).update({name: index[name] for name in INDEX.names})  # (N,) each: .id, .digest, ...
        self.order = np.lexsort((self.id, self.order))  # (N,) all of them, by the hash of their ids
        self.kept = np.ones(len(self), bool)          # (N,)
        self.copy_of = np.arange(len(self))           # (N,) the document that is kept instead, or itself
        self.copies_apis = defaultdict(set)           # {kept document: the APIs of the copies dropped for it}
        self.score = np.zeros(len(self), np.float32)  # (N,) set by retrieve()
        self.open = lru_cache(500)(lambda name: open(work / name, "rb"))

    def __len__(self):
        return len(self.id)

    def __getitem__(self, i):
        """The Record of a document."""
        name = f"{self.names[self.piece[i]]}.jsonl"
        return Record.from_json(self.read(name, self.start[i], self.size[i]))

    def read(self, name, start, size):
        """Bytes of a file in work/. Seeking would move the file's position for all processes."""
        return os.pread(self.open(name).fileno(), size, start)

    def rows(self, n):
        """The numbers of the documents of a piece."""
        return range(self.first[n], self.first[n + 1])

    def is_in(self, *bins):
        """(N,) Whether each is kept and belongs to one of these bins."""
        return self.kept & np.isin(self.bin, [BINS.index(b) for b in bins])

    def ordered(self, *bins, split=None):
        """The numbers of the documents that are kept of these bins, in the order of a hash of their ids; of
        one split, once they are tokenized.
        """
        chosen = self.is_in(*bins)
        if split:
            chosen &= self.tokens["split"] == split
        return self.order[chosen[self.order]]

    def tokens_of(self, chosen, suffix, size):
        """Yields the tokens of documents, or their mask, as bytes; one takes `size`."""
        for i in chosen.tolist():
            path = self.tokenized[self.piece[i]].with_suffix(suffix)
            yield self.read(path.name, self.tokens["start"][i] * size, self.tokens["length"][i] * size)

    def name(self, i):
        """The id of a document as it is shown."""
        return self.id[i].decode("utf-8", "replace")

    def drop(self, i, reason, **details):
        """Drop a document; rejected.jsonl may tell the details."""
        self.kept[i] = False
        self.reject({"reason": reason, "id": self.name(i), **details})

    def reject(self, example):
        """Count {"reason", "id", ...}, and keep it while few are kept: a large pool has millions."""
        self.reasons[example["reason"]] += 1
        self.examples.append(example)
        if len(self.examples) > 100_000:
            self.examples = sample_of(self.examples)

    def file(self, suffix, *depends):
        """The path in work/ of what depends on all documents."""
        return self.work / f"{hash_of(self.names, depends)}.{suffix}"

    def jobs(self, suffix, *depends):
        """[(path, n)] of what depends on piece n."""
        return [(self.work / f"{hash_of(name, depends)}.{suffix}", n) for n, name in enumerate(self.names)]


def divided(text):
    """A text in lower case whose words are divided by ASCII in every script."""
    text = text.lower()
    return text if text.isascii() else UNSPACED.sub(r" \g<0> ", DIVIDER.sub(" ", text))


def mix(x):
    """Scramble uint64s, so that every bit depends on every other (the finaliser of splitmix64). 0 stays
    0. Arithmetic is modulo 2^64.
    """
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def shingle_hashes(texts, size=SHINGLE):
    """Hashes (M,) uint64 of the runs of `size` words that begin at each word of the texts, and where each
    text's begin.

    All texts at once: a word from a to b has the sum of byte[j]·p^(j-a) for a hash, and a run the same of
    its words; dividing by the odd p^a is multiplying by its inverse modulo 2^64. Behind each text stand as
    many empty words, of hash 0: its last runs are shorter, and none reaches into the next text.
    """
    padding = b" \0" * size + b" "
    encoded = [divided(text).replace("\0", " ").encode("utf-8", "replace") + padding for text in texts]
    content = np.frombuffer(b"".join(encoded), np.uint8)
    in_word = WORD_BYTES[content]
    begin = np.flatnonzero(in_word & np.diff(in_word, prepend=False))
    p = 0x9E3779B97F4A7C15
    factors = np.array([[p], [pow(p, -1, 2**64)]], np.uint64)
    powers, inverse = np.multiply.accumulate(np.repeat(factors, len(content), 1), 1)
    words = mix(np.add.reduceat(content * in_word * powers, begin) * inverse[begin])
    runs = mix(np.convolve(words, np.append(np.uint64(1), powers[:size - 1]), "valid"))
    first = np.searchsorted(begin, np.cumsum([0, *map(len, encoded)]))  # of each text, and the end
    counts = np.maximum(np.diff(first) - size, 1)  # a text without a word has one empty run
    return np.concatenate([runs[a:a + n] for a, n in zip(first, counts)]), np.cumsum([0, *counts])


def band_keys(signatures):
    """(N, BANDS) uint64: a hash of each band of the signatures, equal where all its ROWS agree."""
    weights = mix(np.arange(1, ROWS + 1, dtype=np.uint64))
    return mix((signatures.reshape(-1, BANDS, ROWS) * weights).sum(2, dtype=np.uint64))


def find_pairs(best, documents, threshold):
    """The pairs (later, earlier) of documents, given from the best on, that are to be compared: a
    document with the best that has the hash of one of its bands, and with the NEAR before it.
    """
    pairs, n = np.zeros(0, np.int64), len(best)  # a pair is later * n + earlier, of places in `best`
    for band in tqdm(range(BANDS if threshold else 0), desc="bands", disable=None):
        paths = (documents.work / f"{name}.bands.npy" for name in documents.names)
        keys = np.concatenate([np.load(path, mmap_mode="r")[band] for path in paths])[best]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        heads = np.searchsorted(keys, keys)  # where each run of equal keys begins
        later, found = np.arange(n), [pairs]
        for step in range(1, NEAR + 1):
            later = later[later - step >= heads[later]]
            found.append(order[later] * n + order[later - step])
        pairs = np.unique(np.concatenate([*found, order[later] * n + order[heads[later]]]))
    return {".npy": best[np.stack(np.divmod(pairs, n), 1)]}


def compare_pairs(pairs, documents, threshold):
    """Those of some pairs whose shingles have a Jaccard similarity that reaches the threshold."""
    shingles = lru_cache(2_000)(lambda i: set(shingle_hashes([content_of(documents[i])])[0].tolist()))
    both = ((shingles(j), shingles(i)) for j, i in pairs.tolist())
    return {".npy": pairs[[len(a & b) >= threshold * len(a | b) for a, b in both]]}


# ----------------------------------------------------------------------------------------------------------
# Decontamination: no document that holds a part of a benchmark

canonical = partial(json.dumps, sort_keys=True)  # equal for equal values
OVERLAP = 13  # words in a row, as for GPT-3 (arXiv 2005.14165, appendix C)


class Benchmarks:
    """What test data holds: all telling runs of OVERLAP words with the file each is from, and the calls by
    name.
    """

    def __init__(self, files):
        self.runs, self.calls = {}, defaultdict(list)
        for file in tqdm(files, desc="benchmarks", disable=None):
            for _, value in read_values(file):
                for part in parts_of(value):
                    for name, accepted in gold_calls(part):
                        self.calls[name].append({k: [*map(canonical, v)] for k, v in accepted.items()})
                    for run in filter(is_telling, runs_of(part) if isinstance(part, str) else []):
                        self.runs.setdefault(run, file.name)

    def match(self, text, messages):
        """What a document has in common with a file, as (words or call, file's name), or None."""
        for run in runs_of(text):
            if run in self.runs:
                return run, self.runs[run]
        for function in functions_called(messages or []):
            given = {k: canonical(v) for k, v in json.loads(function["arguments"]).items()}
            for accepted in self.calls.get(function["name"], []):
                if given and all(given.get(k, '""') in accepted.get(k, ()) for k in given | accepted):
                    return f"{function['name']}({function['arguments']})", "a call"


def parts_of(value):
    """Every string and every dict in a JSON value, however deep."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (str, dict)):
            yield part
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def gold_calls(part):
    """[(name, {argument: acceptable values})] of the calls in test data: {"name", "arguments"}, Python's
    f(a=1), or BFCL's {name: {argument: [acceptable values, "" if it may be left out]}}.
    """
    calls = []
    if isinstance(part, str):
        calls = list_or_none(python_calls, part) if re.match(r"\[?[\w.]+\(", part) else []
    elif {"name", "arguments"} <= part.keys():
        calls = list_or_none(calls_in, part)
    elif len(part) == 1:
        [(name, given)] = part.items()
        if isinstance(given, dict) and {*map(type, given.values())} <= {list}:
            return [(name, given)]
    functions = [call["function"] for call in calls]
    return [(f["name"], {k: [v] for k, v in json.loads(f["arguments"]).items()}) for f in functions]


def runs_of(text):
    """Every run of OVERLAP words of a text, which shingle_hashes() tells apart alike."""
    words = re.findall(r"[a-z0-9\u0080-\U0010ffff]+", divided(text))
    return [" ".join(words[i:i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)]


def is_telling(run):
    """Whether it has eight different words of two letters or more: counting and JSON have not."""
    words = {w for w in run.split() if (len(w) > 1 or not w.isascii()) and not w.isdigit()}
    return len(words) >= 8


def find_matches(n, documents, benchmarks):
    """[row, words or call, file] of the documents of a piece that share something with the
    benchmarks.
    """
    found = []
    for row, i in enumerate(documents.rows(n)):
        record = documents[i]
        if match := benchmarks.match(content_of(record), record.messages):
            found.append((row, *match))
    return {".json": json.dumps(found)}


def benchmark_files(path):
    """The files of --benchmarks: one, or those in a directory."""
    place = Path(path)
    files = [place] if place.is_file() else sorted(
        file for file in place.rglob("*") if re.search(r"\.(json|jsonl|csv|txt|md)(\.gz)?$", file.name))
    return files or fail(f"--benchmarks {path}: no such file, or no JSON, CSV or text files in it")


# ----------------------------------------------------------------------------------------------------------
# Retrieval: what of a pool is like the seed

BUCKETS = 2**20  # places for the hashed n-grams
SAMPLE = 100_000  # documents of each kind, at most, that the classifier learns from
LONGEST_SCORED = 10_000  # characters of a document, at most, that it sees


def plain_text(record):
    """The words of a record without the form that collect.py gives them, which would tell it at once."""
    if record.text is not None:
        return re.sub(r"^(?:\{.*\}|Package: .*)$", "", record.text[:LONGEST_SCORED], flags=re.M)
    parts = []
    for message in record.messages:
        parts += [message.get("reasoning_content") or "", message.get("content") or ""]
        parts += [f"{function['name']} {function['arguments']}" for function in functions_called([message])]
    return "\n".join(parts)


def train_scorer(kinds, documents, encoder):
    """What score() needs (.npy), the line from scores to the logarithm of odds, and figures of how well that
    predicts unseen documents (.json). The kinds are as many documents of the seed as of the pool.
    """
    texts = np.array([[plain_text(documents[i]) for i in kind] for kind in kinds], object)
    (seed, pool), tune, test = np.split(texts, [int(share * len(kinds[0])) for share in (0.8, 0.9)], axis=1)
    if encoder:
        scorer = encode_texts(encoder, seed[:4096])
    else:
        scorer = fit_ngrams(seed, pool)
        # Hard negatives: of the pool those that it takes for the seed more than others, save the top, which
        # may well be of its kind.
        order = np.argsort(score(pool, scorer, None))
        hard = pool[order[len(order) // 2:len(order) * 9 // 10]]
        scorer = fit_ngrams(seed, np.append(pool, hard))
    line = calibrate(score(tune.ravel(), scorer, encoder))
    p = probability(score(test.ravel(), scorer, encoder), line)
    found, is_seed = p >= 0.5, first_half(p)
    hits = (found & is_seed).sum()
    gaps = np.bincount(np.minimum(p * 10, 9).astype(int), p - is_seed)  # of each tenth of the probabilities
    figures = {"precision": hits / max(1, found.sum()), "recall": hits / is_seed.sum(),
               "f1": 2 * hits / (found.sum() + is_seed.sum()), "calibration_error": abs(gaps).sum() / len(p),
               "tested": float(len(p))}
    return {".json": json.dumps({"line": line, "figures": figures}), ".npy": scorer}


def first_half(values):
    """(N,) Whether each is in the first half, that of the seed."""
    return np.arange(len(values)) < len(values) // 2


def score(texts, scorer, encoder):
    """(N,) The mean weight of each text's n-grams or, with an encoder, its similarity to the nearest of the
    seed.
    """
    if encoder:
        return np.sort(encode_texts(encoder, texts) @ scorer.T, axis=1)[:, -8:].mean(1)
    places = ngrams(texts)
    counts = [*map(len, places)]
    return np.add.reduceat(scorer[np.concatenate(places)], np.cumsum([0, *counts[:-1]])) / counts


def probability(scores, line):
    """That a text is of the seed's kind, from its score and the line to the logarithm of odds."""
    return 1 / (1 + np.exp(-np.polyval(line, scores)))


def score_piece(n, documents, scorer, encoder):
    """The score of each document of a piece of the pool."""
    scores, records = [[]], map(documents.__getitem__, documents.rows(n))
    for batch in batches(records, lambda record: len(record.text), 500_000):
        scores.append(score([plain_text(record) for record in batch], scorer, encoder))
    return {".npy": np.concatenate(scores)}


def ngrams(texts):
    """[Places (M,) int32] of each text's words and pairs of words, hashed."""
    found = []
    for batch in batches(texts, len, 500_000):
        words, starts = shingle_hashes(batch, 1)
        pairs, _ = shingle_hashes(batch, 2)  # as many as words: the last is one word
        found += [np.append(words[a:b], pairs[a:b]) for a, b in zip(starts, starts[1:])]
    return [(hashes % BUCKETS).astype(np.int32) for hashes in found]


def fit_ngrams(seed, pool, epochs=3, batch_size=64):
    """The number (BUCKETS,) of each n-gram by whose mean over a text those of the seed are told best."""
    import torch  # here, since only --pool needs it
    torch.set_num_threads(1)  # the same sums under torchrun, which sets their number
    grams = [*map(torch.from_numpy, ngrams(np.append(seed, pool)))]
    weights = torch.zeros(BUCKETS, 1, requires_grad=True)
    optimizer = torch.optim.SparseAdam([weights], lr=0.1)
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(grams)), epochs))
    parts = np.split(order, range(batch_size, len(order), batch_size))
    for batch in tqdm(parts, desc="classifier", disable=None):
        rows = [grams[i] for i in batch]
        offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)
        bags = torch.nn.functional.embedding_bag(torch.cat(rows).long(), weights, offsets, mode="mean",
                                                 sparse=True)
        target = torch.from_numpy(batch < len(seed)).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(bags[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights.detach()[:, 0].numpy()


def encoder_hashes(directory):
    """What tells one encoder from another; None for none."""
    return directory and [sha256(file) for file in sorted(Path(directory).glob("*.safetensors"))]


@cache
def load_encoder(directory):
    """The (Transformer, Tokenizer) in a checkpoint directory."""
    import model as transformer  # the next stage, which imports none of the project, for --encoder alone
    try:
        return transformer.load(directory), Tokenizer.load(directory)
    except ValueError as error:
        fail(error)


def encode_texts(directory, texts, longest=512):
    """(N, C) mean hidden states of the model in a directory over each text's first tokens, of length 1."""
    import torch
    encoder, tokenizer = load_encoder(directory)
    vectors = np.zeros((len(texts), encoder.config.dim), np.float32)
    ids = [tokenizer.encode(text[:10 * longest])[:longest] or [tokenizer.end_of_text] for text in texts]
    lengths = [*map(len, ids)]
    order = tqdm(np.argsort(lengths, kind="stable"), desc="encode", disable=None)
    for rows in batches(order, lengths.__getitem__, 4096):
        sequences = [torch.tensor(ids[i]) for i in rows]
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (B, T)
        with torch.inference_mode():
            for i, states in zip(rows, encoder.hidden(padded)):
                vectors[i] = states[:lengths[i]].mean(0)  # attention is causal: it saw no padding
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def calibrate(scores):
    """Slope and offset by which scores, the first half of the seed, become the logarithm of odds (Platt
    1999), by Newton's method; a weak prior keeps them finite.
    """
    scale, w = scores.std(), np.zeros(2)
    x = np.vander(scores / scale, 2)  # (N, 2) with ones
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 0.01 * np.eye(2)
        w -= np.linalg.solve(hessian, x.T @ (p - first_half(p)) + 0.01 * w)
    return w[0] / scale, w[1]


# ----------------------------------------------------------------------------------------------------------
# Split: what a model is tested on is never in what it learned from


def mention_finder(names):
    """A function that tells whether a text holds any of the names, be it inside a longer name.

    >>> mentions = mention_finder(["numpy.add"])
    >>> mentions("see numpy.add.reduce"), mentions("see numpy.ad")
    (True, False)
    """
    lengths = {len(name) for name in names}
    # A name can only start where its first component does, and ends before the next character that is no word
    # or dot.
    components = {re.escape(name.split(".")[0]) for name in names}
    starts = re.compile(rf"(?=(?:{'|'.join(components)})\.)")

    @lru_cache(1_000_000)
    def in_run(run):
        return any(run[m.start():m.start() + n] in names for m in starts.finditer(run) for n in lengths)

    return lambda text: any(map(in_run, re.findall(r"(?<![\w.-])[\w.-]*\w\.[\w.-]+", text)))


# ----------------------------------------------------------------------------------------------------------
# Tokenizer

TAGS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
        "<think>", "</think>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *TAGS)
SPECIAL = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})")
# What stands before a name, in a tool's definition as in a call; words with the space, dot or underscore
# before them; numbers of up to three digits; punctuation; white space. A qualified name so follows one token
# that nothing else follows, and is cut alike wherever it stands: to copy it a model need only look for what
# came after the same token.
PATTERN = r'[ {](?="name": ")|"name": "|[ ._]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'
# How others cut, where their tokenizer.json only names it: GPT-2, the same between single digits (SmolLM),
# and Llama 3.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# The special tokens that the code which reads Llama 3's tokenizer.model adds to its ranks.
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>",
                 "<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]]
LONGEST_RUN = 20_000  # characters without white space, or of nothing else, that are encoded together
# Tiles a text. The group matches what to cut off a longer run: where possible after a letter and before a
# sign, where every tokenizer here cuts as well.
RUNS = re.compile(r"((?=\S{%d})(?:\S{%d,%d}(?<=[^\W\d_])(?=[^\w\s])|\S{%d})|\s{%d}(?=\s))|\s+|\S+" % (
    LONGEST_RUN + 1, LONGEST_RUN - 999, LONGEST_RUN - 1, LONGEST_RUN, LONGEST_RUN))
# How turns begin, but for an assistant's. What no special token divides is encoded at once, as who reads the
# text as a whole does.
TURNS = {"system": "<|im_start|>system\n{content}", "user": "<|im_start|>user\n{content}",
         "tool": "<|im_start|>tool\n<tool_response>\n{content}\n</tool_response>"}


class Tokenizer:
    """Byte-level BPE over tiktoken, with the chat format. Special ids come only from `render`, never from
    text.

    >>> tokenizer = Tokenizer.train(["low lower lowest"] * 9, 270)
    >>> tokenizer.decode(tokenizer.encode("lower <|im_end|>"))
    'lower <|im_end|>'
    """

    def __init__(self, ranks, added=(), pattern=PATTERN, content=None):
        """From the ranks and added tokens of a tokenizer.json with this content or, without one, which cuts
        by this pattern. Raises ValueError for one that is not byte-level.
        """
        self.ranks = dict(sorted(ranks.items(), key=operator.itemgetter(1)))  # {bytes: id}
        self.content = content or tokenizer_json(self.ranks, pattern)
        *cuts, pattern = read_patterns(self.content["pre_tokenizer"])
        self.normal_form = read_normal_form(self.content["normalizer"])
        self.cuts = [regex.compile(tiling(cut)) for cut in cuts]  # by which text is cut before, in this order
        self.words = regex.compile(tiling(pattern))
        model = self.content["model"]
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ranks)  # what it has no token for
        self.unknown = model["vocab"].get(model.get("unk_token"))
        self.fuse_unknown = bool(model.get("fuse_unk"))  # missing bytes in a row are one unknown token
        self.lost = 0  # bytes that it was given and has no token for
        self.added_tokens = with_chat_tokens(added, ranks)  # as in a tokenizer.json
        self.special = {token["content"]: token["id"] for token in self.added_tokens}
        # Added tokens that are not special count in text.
        self.added = {t["content"]: t for t in self.added_tokens
                      if not t.get("special") and t["content"] not in SPECIAL_TOKENS}
        takes_space = any(t.get("lstrip") or t.get("rstrip") for t in self.added.values())
        if takes_space and any(token[:1].isspace() for token in self.added):
            raise ValueError("added tokens of white space, and others that take white space along")
        patterns = map(added_pattern, sorted(self.added.values(), key=lambda token: -len(token["content"])))
        self.find_added = regex.compile(f"({'|'.join(patterns)})")
        self.vocab_size = max(*ranks.values(), *self.special.values()) + 1
        self.end_of_text = self.special.get("<|endoftext|>", self.special.get("<|end_of_text|>"))
        self.im_end = self.special["<|im_end|>"]
        self.dtype = np.dtype("u2" if self.vocab_size <= 2**16 else "u4")  # of ids in files
        self.encoding = tiktoken.Encoding("corpus", pat_str=self.words.pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special)

    @classmethod
    def find(cls, name):
        """By the name of a directory, a tokenizer.json, Llama 3's tokenizer.model, or an encoding that
        tiktoken knows. This one downloads the ranks, once; without a network that may hang, so it gets ten
        seconds.
        """
        if name not in tiktoken.list_encoding_names() or Path(name).exists():
            return cls.load(name)
        try:
            encoding = ThreadPool(1).apply_async(tiktoken.get_encoding, [name]).get(10)
        except Exception as error:
            url = getattr(getattr(error, "request", None), "url", "")
            place = f"as {hashlib.sha1(url.encode()).hexdigest()} " if url else "named by its URL's SHA-1 "
            fail(f"--tokenizer {name}: tiktoken could not download its file {url}. Put it, {place}into a "
                 "directory and name that in TIKTOKEN_CACHE_DIR")
        added = [added_token(*token) for token in encoding._special_tokens.items()]
        return cls(encoding._mergeable_ranks, added, encoding._pat_str)

    @classmethod
    def load(cls, place):
        """From a file or the directory with it: a tokenizer.json, ours or that of a model with byte-level
        BPE such as GPT-2, Llama 3 and Qwen, or Meta's tokenizer.model of Llama 3.
        """
        place = Path(place)
        if not place.exists():
            fail(f"{place}: no such file or directory, of a tokenizer")
        path, *_ = *place.glob("tokenizer.json"), *place.glob("tokenizer.model"), place
        tokenizer = attempt(read_tokenizer, path)  # or why it cannot be read
        if not isinstance(tokenizer, cls):
            fail(f"{path}: not a byte-level BPE tokenizer that can be read here: {tokenizer}. Start from a "
                 "base that has one: Llama 3, Qwen or SmolLM2. A SentencePiece model, as Llama 2's, is none")
        return tokenizer

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) until there are vocab_size tokens."""
        words = Counter(chain.from_iterable(map(regex.compile(PATTERN).findall, texts)))
        words = {word.encode("utf-8", "replace"): count for word, count in words.items()}
        return cls(train_bpe(words, vocab_size - len(SPECIAL_TOKENS)))

    def same_as(self, other):
        """Whether both give every text and every special token the same ids."""
        return self.fingerprint() == other.fingerprint()

    def encode(self, text):
        """Ids of a text. What looks like a special token in it is ordinary text."""
        return self.encode_to_numpy(text).tolist()

    def special_pieces(self):
        """{id of a special token: ids of its name as ordinary text}."""
        return {i: self.encode(token) for token, i in self.special.items()}

    def encode_to_numpy(self, text):
        """The same as an array (N,) uint32."""
        arrays = []
        for i, run in enumerate(self.find_added.split(text) if self.added else [text]):
            if i % 2:  # flags take white space along
                token = self.added.get(run) or self.added[run.strip()]
                arrays.append([token["id"]])
            else:
                arrays += map(self.encode_part, self.parts(run))
        return np.concatenate(arrays).astype(np.uint32) if len(arrays) > 1 else arrays[0]

    def encode_part(self, text):
        """The ids of a text without added tokens. A byte that has no token is the unknown one or, if
        there is none, left out of its word.
        """
        data = text.encode("utf-8", "replace")
        lost = len(data) - len(data.translate(None, self.missing))
        if not lost:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        self.lost += lost
        ids, missing = [], b"[" + re.escape(self.missing) + b"]" + b"+" * self.fuse_unknown
        for match in self.words.finditer(text):
            word = match[0].encode("utf-8", "replace")
            if self.unknown is None:
                word = word.translate(None, self.missing)
            for i, run in enumerate(re.split(missing, word)):
                ids += [self.unknown] * (i > 0)  # for what stood between two runs
                ids += self.encoding._encode_single_piece(run) if run else []
        return np.array(ids, np.uint32)

    def normalised(self, text):
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def parts(self, text):
        """The text as it is encoded: at once, but for RUNS that tiktoken's expressions would run out of
        stack on, which are cut, and where the tokenizer cuts text several times.
        """
        text = self.normalised(text)
        cuts = [run.end() for run in RUNS.finditer(text) if run[1]] if len(text) > LONGEST_RUN else []
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        for cut in self.cuts:
            parts = [match[0] for part in parts for match in cut.finditer(part)]
        return parts or [""]

    def token_bytes(self, id):
        """The bytes of a token; none of an id that stands for nothing, as in a padded vocabulary."""
        try:
            return self.encoding.decode_single_token_bytes(id)
        except KeyError:
            return b""

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def render(self, messages, tools=None, answer=False):
        """A conversation as (ids, mask): mask is 1 on what the assistant writes, its end of turn
        included.

        ChatML with Hermes tool calls, put together piece by piece, so that no text in the data can pass for a
        special token. With answer=True it ends where the assistant's next answer begins.
        """
        ids, mask = [], []

        def add(template, target=0, **texts):
            """Append a template, in which special tokens are special, with texts from the data."""
            for part in SPECIAL.split(template):
                part = [self.special[part]] if part in self.special else self.encode(part.format(**texts))
                ids.extend(part)
                mask.extend([target] * len(part))

        if tools:
            add("<|im_start|>system\n")
            if messages and messages[0]["role"] == "system":
                add("{content}\n", content=messages[0]["content"])
                messages = messages[1:]
            add("<tools>\n")
            for f in (tool["function"] for tool in tools):
                definition = {"description": f.get("description") or "", "name": f["name"],
                              "parameters": f.get("parameters") or {}}
                add("{text}\n", text=json.dumps(definition, ensure_ascii=False))
            add("</tools><|im_end|>\n")
        for message in messages:
            content, target = message.get("content") or "", 0
            if message["role"] in TURNS:
                add(TURNS[message["role"]], content=content)
            else:
                add("<|im_start|>assistant\n")
                thought, target = message.get("reasoning_content"), 1
                form = "<think>\n{thought}\n</think>\n\n{content}" if thought else "{content}"
                add(form, target, thought=thought, content=content)
            for i, function in enumerate(functions_called([message])):
                if i or content:
                    add("\n", target)
                name = json.dumps(function["name"], ensure_ascii=False)
                text = f'{{"name": {name}, "arguments": {function["arguments"]}}}'
                # A tag within a string would end the call for who reads it; JSON has another way to write it.
                text = re.sub("<(/?tool_call>)", r"\\u003c\1", text)
                add("<tool_call>\n{text}\n</tool_call>", target, text=text)
            add("<|im_end|>", target)
            add("\n")
        if answer:
            add("<|im_start|>assistant\n")
        return ids, mask

    def fingerprint(self):
        """A hash of all that decides which ids a text gets."""
        patterns = [cut.pattern for cut in [*self.cuts, self.words]]
        parts = [self.tiktoken_file(), self.special, patterns, self.normal_form, self.added, self.unknown,
                 self.fuse_unknown]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def tiktoken_file(self):
        """The ranks in tiktoken's format."""
        return "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in self.ranks.items())

    def save(self, directory):
        """Write tokenizer.tiktoken and, for Hugging Face from the same ranks, tokenizer.json, its config
        and the stop tokens.
        """
        # A reserved token may stand in the vocabulary too, whose names decide the ids of added tokens.
        names, model = {i: token for token, i in self.special.items()}, self.content["model"]
        vocabulary = {names.get(i, token): i for token, i in model["vocab"].items()}
        content = self.content | {"added_tokens": self.added_tokens, "model": model | {"vocab": vocabulary}}
        files = {
            "tokenizer.tiktoken": self.tiktoken_file(),
            "tokenizer.json": json.dumps(content, ensure_ascii=False),
            "tokenizer_config.json":
                TOKENIZER_CONFIG % (self.decode([self.end_of_text]), json.dumps(CHAT_TEMPLATE)),
            "generation_config.json": GENERATION_CONFIG % (self.im_end, self.end_of_text, self.end_of_text)}
        for name, text in files.items():
            write(Path(directory, name), text)


def tokenizer_json(ranks, pattern):
    """What a tokenizer.json holds of a tokenizer with these ranks, but for its special tokens."""
    symbol = byte_symbols()
    written = {token: "".join(symbol[b] for b in token) for token in ranks}
    vocabulary = dict(zip(written.values(), ranks.values()))
    merges = [[written[half] for half in halves(token, ranks)] for token in ranks if len(token) > 1]
    return json.loads(TOKENIZER_JSON % tuple(map(json.dumps, (pattern, vocabulary, merges))))


TOKENIZER_JSON = """{
"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": %s}, "behavior": "Isolated", "invert": false},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
"post_processor": null,
"decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
    "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
    "vocab": %s, "merges": %s}}"""
TOKENIZER_CONFIG = """{
 "tokenizer_class": "PreTrainedTokenizerFast",
 "eos_token": "<|im_end|>",
 "pad_token": "%s",
 "clean_up_tokenization_spaces": false,
 "chat_template": %s
}"""
GENERATION_CONFIG = '{"eos_token_id": [%d, %d], "pad_token_id": %d}'


def added_pattern(token):
    """An expression for where an added token of a tokenizer.json stands in text, by its flags."""
    text = re.escape(token["content"])
    text = rf"(?<!\w){text}(?!\w)" if token.get("single_word") else text
    before = r"(?:(?<!\s)\s+)?" * bool(token.get("lstrip"))  # linear, unlike \s*
    return before + text + r"\s*" * bool(token.get("rstrip"))


def added_token(content, i):
    """A token of id i as tokenizer.json lists added ones."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": content not in TAGS}


def with_chat_tokens(added, ranks):
    """Added tokens, in the order of their ids, with those of the chat format: missing ones take the
    places of reserved ones, or new ones at the end.
    """
    tokens = {token["id"]: token for token in added}
    names = {token["content"] for token in added}
    if "<|end_of_text|>" in names:
        names.add("<|endoftext|>")
    reserved = [i for i in sorted(tokens) if re.search("reserved|unused|extra", tokens[i]["content"])]
    free = chain(reserved, range(max([*ranks.values(), *tokens]) + 1, 2**32))
    for name, i in zip([name for name in SPECIAL_TOKENS if name not in names], free):
        tokens[i] = added_token(name, i)
    return [tokens[i] for i in sorted(tokens)]


# What Tokenizer.render writes, as a template for servers.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}<tools>
{% for f in tools | map(attribute='function') %}\
{{ dict(description=f.description or '', name=f.name, parameters=f.parameters or {}) | tojson }}
{% endfor %}</tools><|im_end|>
{% endif %}{%- for message in messages %}\
{% if not (message.role == 'system' and tools and loop.first) %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{% if message.role == 'tool' %}<tool_response>
{{ message.content or '' }}
</tool_response>{% else %}{{ message.content or '' }}{% endif %}{% for call in message.tool_calls or [] %}
{% set given = call.function.arguments %}
{% set arguments = given if given is string else given | tojson %}
{% set json = '{"name": ' + call.function.name | tojson + ', "arguments": ' + arguments + '}' %}
{% if not loop.first or message.content %}{{ '\\n' }}{% endif %}<tool_call>
{{ json | replace('<tool_call>', '\\\\u003ctool_call>') | replace('</tool_call>', '\\\\u003c/tool_call>') }}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def train_bpe(words, vocab_size):
    """Ranks {token: id} after merging the most frequent pair of neighbouring tokens again and again.

    words: {bytes: count}. Ties go to the pair of lower ids. A token is written as the character of its id, so
    that a word is a text, and a merge replaces two characters by one. Only the words that hold the merged
    pair are touched, and a heap holds the pairs; its entries may be stale, so the count is checked when one
    comes up.
    """
    tokens = [bytes([b]) for b in range(256)]
    texts, counts = [word.decode("latin-1") for word in words], [*words.values()]
    totals, holders, heap = Counter(), defaultdict(set), []  # holders: the words that may hold a pair
    changes, new = defaultdict(int), ""  # of the totals by the last merge, and the token that it made

    def count_pairs(i, count):
        for pair in map(operator.add, texts[i], texts[i][1:]):
            changes[pair] += count
            if new in pair:
                holders[pair].add(i)

    for i, count in enumerate(counts):
        count_pairs(i, count)
    while len(tokens) < vocab_size:
        for pair, change in changes.items():
            if change:
                totals[pair] += change
                heapq.heappush(heap, (-totals[pair], pair))
        while heap and -heap[0][0] != totals[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or not heap[0][0]:
            break
        pair, new = heap[0][1], chr(len(tokens))
        changes.clear()
        for i in holders.pop(pair):
            count_pairs(i, -counts[i])
            texts[i] = texts[i].replace(pair, new)
            count_pairs(i, counts[i])
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
    return {token: i for i, token in enumerate(tokens)}


def halves(token, ranks):
    """The two tokens whose merge made this one: merge its bytes by rank until two parts are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def read_tokenizer(path):
    """The Tokenizer in a tokenizer.json, or in Meta's tokenizer.model of Llama 3."""
    if path.suffix == ".model":
        ranks = read_ranks(path)
        added = [added_token(name, i) for i, name in enumerate(LLAMA_SPECIAL, len(ranks))]
        return Tokenizer(ranks, added, LLAMA_PATTERN)
    content = read_json(path)
    added = content["added_tokens"]
    ranks = read_vocabulary(content["model"], {token["content"] for token in added})
    return Tokenizer(ranks, added, content=content)


def read_vocabulary(model, special):
    """Ranks {bytes: id} of the model in a tokenizer.json. Raises ValueError for another than a byte-level
    BPE.
    """
    if "merges" not in model:  # old files of BPE have no type
        raise ValueError(f"model.type {model.get('type')}")
    byte = {symbol: i for i, symbol in enumerate(byte_symbols())}
    vocab, unknown = model["vocab"], model.get("unk_token")
    try:
        ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items() if token not in special}
    except KeyError as error:
        raise ValueError(f"model.vocab has {error}, which stands for no byte") from None
    merged = [vocab["".join(merge).replace(" ", "")] for merge in model["merges"]]  # "a b" or ["a", "b"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"model.{name}")
    if merged != sorted(merged):
        raise ValueError("model.merges not in the order of their ids")
    if unknown and unknown not in vocab:
        raise ValueError("a model.unk_token that is not in model.vocab")
    if model.get("byte_fallback") and any(re.fullmatch("<0x[0-9A-F]{2}>", token) for token in vocab):
        raise ValueError("model.byte_fallback")
    if not ranks.keys() >= {bytes([b]) for b in [9, 10, *range(32, 127)]}:  # rarer bytes may be missing
        raise ValueError("a model.vocab without all of ASCII")
    return ranks


def read_patterns(pre_tokenizer):
    """The patterns by which a tokenizer.json cuts text, one after the other, from its description there.
    Raises ValueError for others than byte-level ones.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    patterns = []
    for step in steps:
        match step:
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                patterns += [GPT2_PATTERN] * step.get("use_regex", True)
            case _:
                raise ValueError(f"pre_tokenizer {step}")
    if not patterns or steps[-1]["type"] != "ByteLevel":
        raise ValueError(f"pre_tokenizer {pre_tokenizer}")
    return [DIGITS_PATTERN] if patterns == [r"\p{N}", GPT2_PATTERN] else patterns


def tiling(pattern):
    """A pattern that matches all of a text: what `pattern` leaves out is a match of its own."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def read_normal_form(normalizer):
    """The Unicode form to which a tokenizer.json brings text, None for none. Raises ValueError for another
    normalizer.
    """
    match normalizer.get("normalizers", [normalizer]) if normalizer else []:
        case []:
            return None
        case [{"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}]:
            return form
    raise ValueError(f"normalizer {normalizer}")


def byte_symbols():
    """GPT-2's printable character for every byte, in which Hugging Face writes byte-level vocabularies."""
    others = map(chr, range(256, 512))
    return [c if c.isprintable() and c != " " else next(others) for c in map(chr, range(256))]


def train_tokenizer(documents, split, args):
    """The Tokenizer trained on a fair share of each domain's training text, or the one that was written
    when it was.
    """
    def train():
        tokenizer = Tokenizer.train(training_texts(documents, split), args.vocab_size)
        return {".tiktoken": tokenizer.tiktoken_file()}

    path = documents.file("tiktoken", documents.kept, sorted(split.heldout), args.fold, args.vocab_size)
    run_jobs(train, [(path,)], 1, "train the tokenizer")
    return Tokenizer(read_ranks(path))


def training_texts(documents, split, limit=12_000_000):
    """A fair share of each domain's training text, in the order of a hash; conversations as their
    messages and tools.
    """
    for domain in DOMAINS:
        budget = limit // len(DOMAINS)
        for i in documents.ordered(domain):
            record = documents[i]
            if split(i, record, domain) == "train":
                budget -= len(text := content_of(record))
                if budget < 0:
                    break
                yield text


def read_ranks(path):
    """{bytes: id} of a file in tiktoken's format: a token in base64 and its id in each line."""
    lines = filter(None, path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


# ----------------------------------------------------------------------------------------------------------
# Bins

ONLY_OF = {"mask": "instruction", "score": "retrieved"}  # files that only one bin has
# What became of a document: where its tokens begin in those of its piece, their number, its split or "",
# bytes that have no token.
TOKENS = np.dtype([("start", "<u4"), ("length", "<u4"), ("split", "U7"), ("lost", "<u4")])


def assemble(out, documents, heldout_apis, tokenizer):
    """Write the corpus from what the steps wrote, and remove of that what this corpus does not need.
    Returns the manifest.
    """
    documents.tokens = np.concatenate([np.load(path) for path in documents.tokenized])
    tokenizer.save(out)
    for i in np.flatnonzero(documents.kept & (documents.tokens["split"] == "")):
        documents.drop(i, f"{BINS[documents.bin[i]]} mentions a held-out API")
    files = {}
    for bin in BINS:
        for split in SPLITS:
            files |= write_bin(out, bin, split, documents, tokenizer.dtype)
    masked = sum((Counter(report["masked"]) for report in documents.reports), Counter())
    write(out / "heldout_apis.json", json.dumps(heldout_apis, indent=0))
    chats = documents.ordered("instruction", split="heldout")
    write(out / "heldout.jsonl", "".join(documents[i].to_json() + "\n" for i in chats))
    sample = sample_of(documents.examples)
    write(out / "rejected.jsonl", "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in sample))
    for name in ("tokenizer_config.json", "heldout_apis.json", "heldout.jsonl", "rejected.jsonl"):
        files[name] = {"sha256": sha256(out / name)}
    for path in [*documents.work.iterdir(), *out.glob("*.tmp")]:  # of other options, and of what was killed
        if key_of(path) not in USED or path.suffix == ".tmp":
            path.unlink()
    counts = {bin: files[f"{bin}.train.bin"]["tokens"] for bin in BINS}
    total = max(1, sum(counts.values()))
    return {
        "vocab_size": tokenizer.vocab_size, "lost_bytes": int(documents.tokens["lost"].sum()),
        "tokenizer_sha256": sha256(out / "tokenizer.json"),
        "files": files, "heldout_apis": len(heldout_apis),
        "dropped": dict(sorted(documents.reasons.items())), "masked": dict(sorted(masked.items())),
        "shares": {bin: count / total for bin, count in counts.items()},
        "stages": {stage: [f"{bin}.train.bin" for bin in bins if counts[bin]]
                   for stage, bins in STAGES.items()}}


def sample_of(rejected):
    """Of the examples {"reason", "id", ...} of each reason those whose ids have the lowest hashes, so that it
    does not matter in which pieces they were found.
    """
    examples = sorted(rejected, key=lambda e: (e["reason"], unit_hash(e["id"]), e["id"]))
    groups = groupby(examples, operator.itemgetter("reason"))
    return [example for _, group in groups for example in islice(group, MAX_REJECTED)]


def write_bin(out, bin, split, documents, dtype):
    """Write <bin>.<split>.bin and .idx, .mask for instructions, .score for what was retrieved: the chosen
    documents, in their order. Returns the manifest entries.
    """
    chosen, entries = documents.ordered(bin, split=split), {}
    starts = np.cumsum([0, *documents.tokens["length"][chosen]])
    contents = {"bin": (dtype, documents.tokens_of(chosen, ".bin", dtype.itemsize)),
                "mask": ("u1", documents.tokens_of(chosen, ".mask", 1)),
                "idx": ("<u8", [starts.astype("<u8")]), "score": ("<f4", [documents.score[chosen]])}
    for suffix, (stored, parts) in contents.items():
        if bin == ONLY_OF.get(suffix, bin):
            path, stored = out / f"{bin}.{split}.{suffix}", np.dtype(stored)
            write(path, parts)
            count = path.stat().st_size // stored.itemsize
            entries[path.name] = {"dtype": stored.name, "count": count, "sha256": sha256(path)}
    entries[f"{bin}.{split}.bin"] |= {"tokens": int(starts[-1]), "documents": len(chosen)}
    return entries


class Corpus:
    """Opens a corpus directory read-only, memory-mapped, and refuses one that does not match its manifest.

    Raises ValueError naming the file that differs.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        if not path.exists():
            raise ValueError(f"{path}: no such file. Run `python build_corpus.py` to its end first")
        self.manifest, self.sha256 = read_json(path), sha256(path)
        files = self.manifest["files"] | {"tokenizer.json": {"sha256": self.manifest["tokenizer_sha256"]}}
        # What this machine has hashed as it is now is not hashed again: the paper's size is 400 GB.
        notes, found = self.directory / f".checked-{platform.node()}", ""
        known = attempt(notes.read_text)  # or why there is none
        for name, entry in files.items():
            path = self.directory / name
            state = f"{name} {entry['sha256']} {attempt(state_of, path)}\n"
            if state not in known and attempt(sha256, path) != entry["sha256"]:
                raise ValueError(f"{path}: missing or changed. Run `python build_corpus.py` again")
            found += state
        if found != known and os.access(self.directory, os.W_OK):
            write(notes, found)
        self.tokenizer = Tokenizer.load(self.directory)

    def read(self, domain, split, suffix="bin"):
        """Token ids ("bin"), document starts and the end ("idx") or loss mask ("mask"), as a memory map."""
        name = f"{domain}.{split}.{suffix}"
        entry = self.manifest["files"][name]
        if not entry["count"]:
            return np.zeros(0, entry["dtype"])
        return np.memmap(self.directory / name, entry["dtype"], "r")

    def documents(self, domain, split):
        """Each document's token ids."""
        ids, starts = self.read(domain, split), self.read(domain, split, "idx")
        return [ids[a:b] for a, b in zip(starts, starts[1:])]


def write(path, content):
    """Write a text, a list of bytes, or an array in numpy's format; the file appears whole or not at all."""
    with writing(path) as file:
        if isinstance(content, np.ndarray):
            np.save(file.buffer, content)
        elif isinstance(content, str):
            file.write(content)
        else:
            file.buffer.writelines(content)


def read_json(path):
    """The JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path):
    """A file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(path):
    """What changes when a file does."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def report(manifest, seconds):
    """Print what a corpus holds, and what was dropped and masked on the way to it."""
    print(f"{'domain':<12} {'documents':>20} {'tokens':>22} {'share':>7}")
    print(f"{'':<12} {'train':>10} {'held out':>9} {'train':>12} {'held out':>9}")
    for domain in BINS:
        train, heldout = (manifest["files"][f"{domain}.{split}.bin"] for split in SPLITS)
        if train["documents"] or domain != "retrieved":
            print(f"{domain:<12} {train['documents']:>10,} {heldout['documents']:>9,} {train['tokens']:>12,} "
                  f"{heldout['tokens']:>9,} {manifest['shares'][domain]:>7.1%}")
    for what in ("dropped", "masked"):
        for kind, count in manifest[what].items():
            print(f"{what} {count:,}: {kind}")
    if lost := manifest.get("lost_bytes"):
        print(f"lost {lost:,} bytes: the tokenizer has no token for them")
    if manifest["retrieval"]:
        print("retrieved {taken:,} of the pool's {pool:,} documents, of probability {least:.3f} and more. Of "
              "{tested:,.0f} documents not learned from: precision {precision:.3f}, recall {recall:.3f}, "
              "F1 {f1:.3f}, calibration error {calibration_error:.3f}".format(**manifest["retrieval"]))
    files = manifest["files"].values()
    kept, tokens = (sum(entry.get(what, 0) for entry in files) for what in ("documents", "tokens"))
    print(f"{kept:,} of {kept + sum(manifest['dropped'].values()):,} records kept, "
          f"{manifest['heldout_apis']:,} APIs held out, vocabulary {manifest['vocab_size']:,}, "
          f"{seconds:.0f} s" + f", {tokens / max(1, seconds):,.0f} tokens/s" * (seconds >= 1))


def show(args):
    """Print documents of one bin after another, token by token in two shades; target tokens of tuning in
    green.
    """
    corpus = attempt(Corpus, args.out)
    if not isinstance(corpus, Corpus):
        fail(corpus)
    files = corpus.manifest["files"]
    present = [(bin, split) for split in SPLITS for bin in BINS if files[f"{bin}.{split}.bin"]["documents"]]
    for k in range(args.show):
        bin, split = present[k % len(present)]
        starts = corpus.read(bin, split, "idx")
        number = k // len(present) * 7919 % (len(starts) - 1)  # a prime, to come around
        document = slice(*starts[number:number + 2].tolist())
        ids = corpus.read(bin, split)[document].tolist()
        text, mask = corpus.tokenizer.decode(ids[:-1]), [0] * len(ids)
        measured = measure(text, shingle_hashes([text])[0]).items()
        notes = [f"{name} {value:,.2f}" for name, value in measured]
        if bin == "instruction":
            mask = corpus.read(bin, split, "mask")[document]
            notes.append(f"learned {mask.mean():.0%}")
        if bin == "retrieved":
            notes.append(f"probability {corpus.read(bin, split, 'score')[number]:.3f}")
        print(f"--- {bin}.{split}, document {number:,}: {len(ids):,} tokens, "
              f"{len(text) / len(ids):.1f} characters each; {', '.join(notes)}")
        print_tokens(corpus.tokenizer, ids, mask)


def print_tokens(tokenizer, ids, targets):
    """Print tokens in two shades by turns, those that are targets in green. Without a terminal, or with
    NO_COLOR, each has a bar behind it, and two if it is a target.
    """
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    for n, (i, target) in enumerate(zip(ids, targets)):
        token = visible(tokenizer.decode([int(i)]))
        if plain:
            print(token, end="‖" if target else "|")
            continue
        style = f"{'32' if target else '39'};48;5;{(236, 239)[n % 2]}"
        # Line by line, since a background that goes over a line's end would fill the screen.
        print(re.sub("(.+)", f"\033[{style}m\\1\033[0m", token), end="")
    print("\n")


if __name__ == "__main__":
    run_main(main)
