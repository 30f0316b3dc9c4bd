"""Step 2 of 6: build the corpus that is trained on.

In:   data/raw/*.jsonl, the records that collect.py wrote (or your own, in the same form), and --pool, more of general text and code
Out:  data/corpus/
        tokenizer.tiktoken, tokenizer.json, tokenizer_config.json   one byte-level BPE tokenizer, for tiktoken and Hugging Face
        <domain>.<split>.bin, .idx                                  token ids and document starts; split is train or heldout
        instruction.<split>.mask                                    1 where a token is learned in tuning
        retrieved.<split>.score                                     of the pool's documents: how likely they are of the seed's kind
        heldout_apis.json, heldout.jsonl                            APIs no training document mentions; their conversations
        manifest.json, rejected.jsonl                               counts and hashes of all this; a sample of what was dropped
        work/                                                       what the steps left, by hash; may be deleted at any time

Laptop:         python build_corpus.py                              and then, to look at it: python build_corpus.py --show 5
One node:       python build_corpus.py --vocab-size 32768 --pool data/web --benchmarks tests/bfcl
Many nodes:     torchrun --nnodes=4 --nproc_per_node=1 ... build_corpus.py ...      over a shared file system
A base's own:   python build_corpus.py --tokenizer path/to/Qwen3-8B-Base
Own data:       python build_corpus.py --raw my/records --out my/corpus

The steps: clean, drop duplicates and near duplicates, drop what is in test data, retrieve from the pool what is like the seed,
hold APIs out by a hash of their name, tokenize. Shards are worked on in pieces, and what a step leaves of a piece is named by a
hash of all that it depends on: after a kill, a new shard or a changed option only what is missing is done. The result is the same
for any number of processes and any order of the input.
"""
import argparse
import base64
import contextlib
import functools
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import re
import sys
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from collect import (DOMAINS, HelpFormatter, Record, attempt, calls_in, fail, python_calls, read_values, run_main,
                     unit_hash)

SPLITS = ("train", "heldout")
BINS = (*DOMAINS, "retrieved")   # retrieved: what was taken from the pool
STAGES = {"wide": BINS, "seed": DOMAINS}  # what pretrain.py's two stages read
FILES_HELDOUT = 0.1  # share of code and text documents kept from training
MAX_REJECTED = 100   # examples kept of each reason
PIECE = 4 * 2**20    # bytes of a shard that are worked on together



def main():
    args = parse_args()
    if args.show is not None:
        return show(args)
    started, out, work = time.time(), Path(args.out), Path(args.out) / "work"
    shards = find_shards(args.raw, "Run `python collect.py` first, or name the directory with --raw")
    pool = find_shards(args.pool, "name another with --pool") if args.pool else []
    tokenizer = Tokenizer.find(args.tokenizer) if args.tokenizer else None
    with multiprocessing.get_context("fork").Pool(args.workers) as processes:
        hashes = dict(zip(shards + pool, processes.map(sha256, shards + pool)))
    options = {"tokenizer": tokenizer and tokenizer.fingerprint(), "benchmarks": [sha256(f) for f in benchmark_files(args.benchmarks)],
               "inputs": {s.name: hashes[s] for s in shards}, "pool": {s.name: hashes[s] for s in pool},
               "encoder": encoder_hashes(args.encoder),
               **{k: getattr(args, k) for k in ("vocab_size", "near_duplicates", "heldout", "fold", "retrieve", "retrieve_above")}}
    manifest = read_manifest(out)
    if manifest and manifest["options"] == options:
        print(f"{out} is up to date")
        return report(manifest, time.time() - started)
    work.mkdir(parents=True, exist_ok=True)
    if is_main():
        (out / "manifest.json").unlink(missing_ok=True)  # until it is written again the corpus is not valid

    pieces = sorted(find_pieces(shards, hashes, False) + find_pieces(pool, hashes, True))  # by content
    each(clean_piece, [(work / f"{p.key}.npy", p) for p in pieces], args.workers, "clean")
    documents = Documents(pieces, work)
    if not len(documents):
        fail(f"{args.raw}: no document is left after cleaning")
    dropped = drop_duplicates(documents, args)
    drop_contaminated(documents, dropped, args)
    retrieval = retrieve(documents, dropped, args) if pool else None
    heldout_apis = sorted({a for name in documents.names for a in read_json(work / f"{name}.json")["apis"] if in_fold(a, args.heldout, args.fold)})
    divide = Split(heldout_apis, args.fold, dropped.apis)
    tokenizer = tokenizer or train_tokenizer(documents, dropped, divide, args)
    tokenized = tokenize(documents, dropped, divide, tokenizer, args)
    if is_main():
        manifest = assemble(out, documents, dropped, tokenized, heldout_apis, tokenizer) | {"options": options, "retrieval": retrieval}
        write(out / "manifest.json", json.dumps(manifest, indent=1))
        report(manifest, time.time() - started)


def clean(record, masked):
    """The record with its texts scrubbed; what is masked is counted."""
    if record.text is not None:
        record.text = scrub(record.text, masked)
        if record.domain == "text":
            for hint, pattern in BOILERPLATE.items():
                if hint in record.text.lower():
                    record.text, count = pattern.subn("", record.text)
                    masked["lines of boilerplate"] += count
    else:
        record.messages, record.tools = (scrub_strings(part, masked) for part in (record.messages, record.tools))
    return record


def minhash(hashes, starts):
    """Signatures (len(starts) - 1, BANDS * ROWS) uint32 of texts, from their shingle_hashes(): two agree at a place with a
    probability that is the Jaccard similarity of their sets of shingles. The functions are of the form (a·x + b mod 2^64) / 2^32
    with x below 2^32, which is universal (Dietzfelbinger 1996) and needs no wider numbers.
    """
    x = hashes >> np.uint64(32)
    a, b = np.random.default_rng(0).integers(2**64, size=(2, BANDS * ROWS), dtype=np.uint64)
    signatures = np.empty((BANDS * ROWS, len(starts) - 1), np.uint32)
    for i in range(BANDS * ROWS):
        signatures[i] = np.minimum.reduceat((x * (a[i] | np.uint64(1)) + b[i]) >> np.uint64(32), starts[:-1])
    return signatures.T


def drop_duplicates(documents, args):
    """The Dropped that keeps of equal and of nearly equal documents the best: one of the seed before one of the pool, the longest, the
    lowest id. Copies are sought by bands and compared in full, a part by each process; neither needs the texts in memory.
    """
    work, threshold = documents.work, args.near_duplicates
    key = hash_of(documents.names, threshold)
    pairs, path = work / f"{key}.pairs.npz", work / f"{key}.dropped.npz"
    each(find_pairs, [(pairs, documents, threshold)], 0, "look for near duplicates")
    count = len(np.load(pairs)["similar"])
    parts = [(work / f"{key}.{a}.similar.npy", pairs, a, a + 20_000) for a in range(0, count, 20_000)]
    each(compare_pairs, parts, args.workers, "compare near duplicates", (documents, threshold))
    each(choose_copies, [(path, documents, pairs, [p for p, *_ in parts])], 0, "drop copies")
    found = np.load(path)
    apis = {int(i): json.loads(names) for i, names in zip(found["kept"], found["apis"])}
    return Dropped(found["reason"], found["copy_of"], apis)


def drop_contaminated(documents, dropped, args):
    """Drop the documents that share something with the test data, and keep what it is for the report."""
    files = benchmark_files(args.benchmarks)
    if not files:
        return
    key = [sha256(file) for file in files]
    jobs = [(documents.work / f"{hash_of(name, key)}.matches.json", n) for n, name in enumerate(documents.names)]
    benchmarks = Benchmarks(files) if not all(path.exists() for path, _ in jobs) else None
    each(find_matches, jobs, args.workers, "decontaminate", (documents, benchmarks))
    kept = dropped.kept
    for path, n in jobs:
        found = {documents.first[n] + row: match for row, *match in read_json(path)}
        dropped.match |= {i: match for i, match in found.items() if kept[i]}
    dropped.drop(list(dropped.match), "shares words or a call with a benchmark")


def retrieve(documents, dropped, args):
    """Drop of the pool what is not like the seed, the documentation and trajectories. Sets documents.score (N,), the probability
    of each document of the pool, calibrated on as many of the seed as of the pool. Returns the figures for the manifest.

    The classifier is fastText's (arXiv 1607.01759): the mean of vectors of hashed words and pairs of words, and a logistic loss. With two
    classes a vector and the output layer make one number for each n-gram, so that number is what is learned.
    """
    pool = dropped.kept & documents.is_in("retrieved")
    key = hash_of(documents.names, hashlib.sha256(dropped.reason.tobytes()).hexdigest(), encoder_hashes(args.encoder))
    path = documents.work / f"{key}.scorer.npz"
    each(train_scorer, [(path, documents, np.flatnonzero(dropped.kept & documents.is_in("api_doc", "trajectory")), np.flatnonzero(pool), args.encoder)],
         0, "train the classifier")
    scorer = dict(np.load(path))
    jobs = [(documents.work / f"{hash_of(name, key)}.scores.npy", n) for n, name in enumerate(documents.names) if documents.pieces[n].pool]
    each(score_piece, jobs, 0 if args.encoder else args.workers, "score the pool", (documents, make_scorer(scorer, args.encoder)))
    for path, n in jobs:
        documents.score[documents.first[n]:documents.first[n + 1]] = 1 / (1 + np.exp(-np.load(path)))
    if args.retrieve_above is not None:
        taken = pool & (documents.score >= args.retrieve_above)
    else:
        candidates = np.flatnonzero(pool)
        best = np.lexsort((documents.index["id"][candidates], -documents.score[candidates]))
        taken = np.zeros(len(documents), bool)
        taken[candidates[best[:round(args.retrieve * len(candidates))]]] = True
    dropped.drop(pool & ~taken, "not of the seed's kind")
    return {name: float(scorer[name]) for name in ("precision", "recall", "f1", "calibration_error", "tested")} | {
        "pool": int(pool.sum()), "taken": int(taken.sum()), "least": float(documents.score[taken].min(initial=1.0))}


def in_fold(name, share, fold):
    """Whether a hash of the name falls into the given one of the 1 / share folds. Folds are counted round, from 0."""
    return int(unit_hash(name) / share) == fold % int(1 / share)


class Split:
    """Tells of a document whether it is for "train" or "heldout", or None where it mentions a held-out API.

    Of api_doc, trajectory and instruction, a record that documents or calls a held-out API is held out, and so is one for which
    such a record was dropped as a near duplicate: what is found to resemble it is not in train. One that only mentions a held-out API by
    its qualified name, in the text or inside one of its `apis`, is dropped, also of what is retrieved. Code and text, which every compared model learns alike, are
    split by a hash of their id; they have fewer documents, so a larger share is held out.
    """

    def __init__(self, heldout_apis, fold, copies):
        self.heldout, self.mentions, self.fold, self.copies = set(heldout_apis), mention_finder(heldout_apis), fold, copies

    def __call__(self, i, record, bin):
        if bin in ("code", "text"):
            return "heldout" if in_fold(record.id, FILES_HELDOUT, self.fold) else "train"
        if self.heldout.intersection(record.apis) or self.heldout.intersection(self.copies.get(i, ())):
            return "heldout"
        return None if self.mentions(" ".join([content_of(record), *record.apis])) else "train"


def tokenize(documents, dropped, divide, tokenizer, args):
    """Tokenize the kept documents of each piece. Returns for each piece the path of what is left of it."""
    jobs, depends = [], [tokenizer.fingerprint(), sorted(divide.heldout), args.fold]
    depends = hashlib.sha256(json.dumps([*depends, TOKENS.descr]).encode()).hexdigest()
    copies = np.array(sorted(divide.copies), np.int64)
    for n, name in enumerate(documents.names):
        first, end = documents.first[n], documents.first[n + 1]
        kept = hashlib.sha256((dropped.reason[first:end] == 0).tobytes()).hexdigest()
        own = [[int(i - first), divide.copies[i]] for i in copies[np.searchsorted(copies, first):np.searchsorted(copies, end)].tolist()]
        jobs.append((documents.work / f"{hash_of(name, kept, own, depends)}.tokens.npy", n))
    each(tokenize_piece, jobs, args.workers, "tokenize", (documents, dropped, divide, tokenizer))
    return [path for path, _ in jobs]


def tokenize_piece(path, n):
    """Leaves the ids of a piece's kept documents, each with an end of text (.ids.npy), the mask of its instructions (.mask.npy), and what they are."""
    documents, dropped, divide, tokenizer = each.shared
    first, end = documents.first[n:n + 2]
    kept, bins = (dropped.reason[first:end] == 0).tolist(), documents.index["bin"][first:end].tolist()
    entries, ids, masks, end_of_text = [], [], [], np.array([tokenizer.end_of_text], np.uint32)
    for row, (i, record) in enumerate(documents.of_piece(n)):
        if not kept[row]:
            continue
        side = divide(i, record, BINS[bins[row]])
        if side is None:
            entries.append((row, 0, bins[row], MENTIONS, 0))
            continue
        lost_before = tokenizer.lost
        if record.text is not None:
            encoded = tokenizer.encode_to_numpy(record.text)
        else:
            encoded, mask = tokenizer.render(record.messages, record.tools)
            masks += [[*mask, 0]] if record.domain == "instruction" else []
        lost = tokenizer.lost - lost_before
        entries.append((row, len(encoded) + 1, bins[row], SPLITS.index(side), lost))
        ids += [encoded, end_of_text]
    write_array(path.with_suffix(".ids.npy"), np.concatenate([end_of_text[:0], *ids]).astype(tokenizer.dtype))
    write_array(path.with_suffix(".mask.npy"), np.concatenate([np.zeros(0, np.uint8), *(np.array(m, np.uint8) for m in masks)]))
    write_array(path, np.array(entries, TOKENS))


# ============================================================================================================
# Below: options; pieces of work; cleaning; near duplicates; decontamination; retrieval; the tokenizer; bins; the report.

# ------------------------------------------------------------------------------------------------------------
# Options


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--raw", default="data/raw", help="directory of records")
    add("--out", default="data/corpus", help="directory for the corpus")
    add("--show", type=int, metavar="N", help="print N documents of the corpus with their tokens in two shades, what is learned in colour, and their measures")
    add("--tokenizer", metavar="NAME", help="take the tokenizer of a base instead of training one: a model's directory or its tokenizer.json (byte-level BPE: "
        "Llama 3, Qwen, GPT-2, ...), Llama 3's tokenizer.model, or a name that tiktoken knows")
    add("--vocab-size", type=int, default=2048, help="tokens of the tokenizer trained here, special ones included")
    add("--near-duplicates", type=float, default=0.8, metavar="J", help="drop documents whose sets of 5-word runs have at least this Jaccard "
        "similarity to those of a longer one; 0 keeps them. Below 0.75 not all are found")
    add("--benchmarks", metavar="PATH", help="drop documents that share 13 words in a row, or a call with its arguments, with "
        "this file or directory of test data (JSON, JSON lines, CSV, text)")
    add("--pool", metavar="DIR", help="directory of records of general text and code, of which what is like the documentation and trajectories is "
        "taken for stage 1, by a classifier trained on the one against the other")
    add("--retrieve", type=float, default=0.1, metavar="SHARE", help="share of the pool's documents to take")
    add("--retrieve-above", type=float, metavar="P", help="take instead all of at least this probability")
    add("--encoder", metavar="DIR", help="in place of the classifier: similarity of this model's mean hidden states to those of the seed")
    add("--heldout", type=float, default=0.08, help="share of APIs kept from training")
    add("--fold", type=int, default=1, help="which share of the APIs is held out, 0 being the first: choose settings on one "
        "fold and report another (our defaults were chosen on fold 0)")
    add("--workers", type=int, default=os.cpu_count(), help="processes; the result is the same for any number")
    args = parser.parse_args()
    for flag, value in ("--near-duplicates", args.near_duplicates), ("--retrieve", args.retrieve), ("--retrieve-above", args.retrieve_above or 0):
        if not 0 <= value <= 1:
            fail(f"{flag} {value}: must be between 0 and 1")
    if args.workers < 1:
        fail(f"--workers {args.workers}: at least one is needed")
    if not 0 < args.heldout < 1:
        fail(f"--heldout {args.heldout}: must be between 0 and 1")
    if args.benchmarks and not benchmark_files(args.benchmarks):
        fail(f"--benchmarks {args.benchmarks}: no such file, or no JSON, CSV or text files in it")
    if args.vocab_size < 256 + len(SPECIAL_TOKENS):
        fail(f"--vocab-size {args.vocab_size}: must be at least {256 + len(SPECIAL_TOKENS)}, the bytes and the special tokens")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of work, over processes and ranks


class Piece(NamedTuple):
    """Whole lines of a shard, from a byte to another. The key tells their content."""
    key: str
    shard: Path
    start: int
    end: int
    pool: bool


def find_shards(directory, mend):
    """The files of records in a directory."""
    if shards := sorted(Path(directory).glob("*.jsonl")):
        return shards
    fail(f"{directory}: no *.jsonl files; {mend}")


def find_pieces(shards, hashes, pool):
    """The Pieces of some shards."""
    pieces = []
    for shard in shards:
        size = shard.stat().st_size
        with open(shard, "rb") as file:
            bounds = {0, size}
            for at in range(PIECE, size, PIECE):
                file.seek(at)
                file.readline()
                bounds.add(file.tell())
        bounds = sorted(bounds)
        pieces += [Piece(hash_of(hashes[shard], a, pool), shard, a, b, pool) for a, b in zip(bounds, bounds[1:])]
    return pieces


def hash_of(*parts):
    """A name for what depends on these parts, and on this program."""
    return hashlib.sha256(json.dumps([program_hash(), *parts]).encode()).hexdigest()[:20]


@functools.cache
def program_hash():
    """The SHA-256 of this file: another version of it does its work anew."""
    return sha256(__file__)


def is_main():
    """Whether this is the only rank, or the first of several."""
    return int(os.environ.get("RANK", 0)) == 0


def each(function, jobs, workers, name, shared=None):
    """Call function(path, *arguments) for every job (path, *arguments) whose file is not there yet, and return when all files are.

    Ranks share out the jobs, `workers` processes those of a rank (0: none but this one). The function writes its file last,
    whole or not at all, so that an end at any time loses no more than the jobs under way. It finds `shared` in each.shared.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    jobs = [*{job[0]: job for job in jobs}.values()]  # equal shards make equal jobs
    todo = [(function, job) for job in jobs[rank::world] if not job[0].exists()]
    each.shared = shared
    each.used.update(path.name.partition(".")[0] for path, *_ in jobs)
    bar = tqdm(total=len(todo), desc=name, disable=None if is_main() and len(todo) > 1 else True)
    if workers and todo:
        with multiprocessing.get_context("fork").Pool(min(workers, len(todo))) as processes:
            for _ in processes.imap_unordered(call, todo):
                bar.update()
    else:
        for job in todo:
            call(job)
            bar.update()
    bar.close()
    for path, *_ in jobs:
        while not path.exists():
            time.sleep(0.05)  # for another rank


each.used = set()  # the keys of all files that this build needs


def call(job):
    """Do one of the jobs of each(), in a worker process."""
    function, arguments = job
    function(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Clean

# A document is dropped if a measure of it lies outside these limits: of prose, and of code and documentation, which repeat
# themselves and consist of symbols by nature. After Gopher (arXiv 2112.11446, table A1), set so that of the default records what goes
# deserves it. Conversations have a length alone.
LIMITS = {
    #                   prose             code, api_doc     what lies outside
    "characters":     ((50, 2_000_000), (20, 2_000_000)),  # nothing to learn from; no document but data
    "repeated lines": ((0, 0.3),        (0, 0.8)),         # share of the characters, in lines that occurred before: menus, logs
    "repeated runs":  ((0, 0.3),        (0, 0.8)),         # share of the runs of five words that occurred before: spam, tables
    "symbols":        ((0, 0.4),        (0, 0.6)),         # share of characters other than letters, digits, white space: dumps
    "line length":    ((0, 5_000),      (0, 5_000)),       # mean characters of a line: minified code, encoded data
}
# What is replaced by its name wherever it stands. A text is searched only if it holds the hint.
SECRETS = {
    "PASSWORD": ("://", r"(?<=://)[^\s/:@<>{}\"'`]+:[^\s/:@<>{}\"'`]{3,}(?=@[\w.-]+)"),  # of an address: user:password
    # The ending is one of domains, lest `x@self.weight` and `img@2x.png` count; git@host:path is no address.
    "EMAIL": ("@", r"\b(?!git@)[\w.+-]{1,64}@(?!(?:[\w-]+\.)*(?:example|test|localhost|invalid)\b)(?:[a-zA-Z0-9-]+\.)+"
              r"(?:com|org|net|edu|gov|mil|int|info|biz|name|io|dev|app|ai|xyz|site|online|tech|cloud|email|me|pro|museum|"
              r"academy|agency|company|digital|systems|software|(?!py|rs|sh|js|ts|cc|md|so)[a-z]{2})\b(?![.\w]|:[\w/~])"),
    "PRIVATE_KEY": ("PRIVATE KEY-----", r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]{100,10000}?-----END [A-Z ]*PRIVATE KEY-----"),
    "AWS_KEY": ("AKIA", r"\bAKIA(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}\b"),
    "GITHUB_TOKEN": ("gh", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,})\b"),
    "GOOGLE_KEY": ("AIza", r"\bAIza[\w-]{35}\b"),
    "SLACK_TOKEN": ("xox", r"\bxox[abprs]-[0-9]{8,}-[\w-]{10,}"),
    "API_KEY": ("sk", r"\b(?:sk-(?:proj-|ant-)?(?=\w*\d)[\w-]{32,}|sk_live_\w{24,})"),
    "HF_TOKEN": ("hf_", r"\bhf_(?=\w*\d)[A-Za-z0-9]{30,}\b"),
    "JWT": ("eyJ", r"\beyJ[\w-]{15,}\.eyJ[\w-]{15,}\.[\w-]{20,}"),
}
SECRETS = {kind: (hint, re.compile(pattern)) for kind, (hint, pattern) in SECRETS.items()}
# Lines of web pages that say nothing, dropped from prose, by what is looked for first.
BOILERPLATE = {hint: re.compile(rf"^[ \t>*#|-]*(?:{line})[ \t]*(?:\n|\Z)", re.I | re.M) for hint, line in {
    "skip to": "skip to (?:main )?content", "cookies": "(?:accept|manage|reject) (?:all )?cookies.*|we use cookies.*",
    "javascript": r".{0,80}(?:enable javascript|javascript is (?:disabled|required)).*", "share": r"share (?:this )?on (?:twitter|facebook|linkedin|x)\b.*",
    "all rights reserved": r"(?:(?:copyright )?(?:©|\(c\)).{0,80})?all rights reserved\.?", "newsletter": "subscribe to (?:our|the) newsletter.*",
    "github": "edit (?:this page )?on github", "back to top": "back to top", "lorem ipsum": "lorem ipsum.*"}.items()}
SYMBOL = re.compile(r"[^\w\s]+")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
# UTF-8 that was read as Windows-1252: Ã, Â, â or ð, and then what the bytes from 80 to BF look like in it.
WINDOWS = {bytes([b]).decode("cp1252", "ignore") or chr(b): b for b in range(128, 256)}
MOJIBAKE = re.compile("(?:[ÃÂ][%s]|â[%s]{2}|ð[%s]{3})+" % (("".join(re.escape(c) for c, b in WINDOWS.items() if b < 192),) * 3))


INDEX = np.dtype([("id", "S64"), ("order", "<u8"), ("digest", "<u8", 2), ("start", "<u8"), ("size", "<u4"), ("length", "<u4"), ("bin", "u1")])


def clean_piece(path, piece):
    """Clean the records of a piece. Leaves them (.jsonl), the hashes of their bands (.bands.npy), a report (.json) and their index (.npy)."""
    rejected, masked, records = Rejected(), Counter(), []
    with open(piece.shard, "rb") as file:
        file.seek(piece.start)
        lines = file.read(piece.end - piece.start).decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines):
        try:
            record = Record.from_json(line)
            if piece.pool and record.text is None:
                raise ValueError("a conversation has no place in a pool")
        except ValueError as error:
            with open(piece.shard, "rb") as file:
                number += file.read(piece.start).count(b"\n") + 1
            print(f"{piece.shard}:{number}: left out: {error}", file=sys.stderr)
            rejected.add("not a record", f"{piece.shard.name}:{number}")
        else:
            records.append(clean(record, masked))
    kept, bands = [], [np.zeros((BANDS, 0), np.uint64)]
    for batch in batches(records, lambda r: len(content_of(r)), 500_000):
        texts = [content_of(r) for r in batch]
        hashes, starts = shingle_hashes(texts)
        good = []
        for i, (record, measured) in enumerate(zip(batch, measure(texts, hashes, starts))):
            if fault := outside_limits(record, measured):
                rejected.add(fault, record.id, value=round(float(measured[fault]), 3))
            else:
                good.append(i)
                kept.append(record)
        bands.append(band_keys(minhash(hashes, starts))[:, good])
    index, at, apis = np.zeros(len(kept), INDEX), 0, set()
    lines = [r.to_json().encode("utf-8", "replace") + b"\n" for r in kept]
    for row, record, line in zip(index, kept, lines):
        text, code = content_of(record), hashlib.sha256(record.id.encode("utf-8", "replace")).digest()
        name = record.id.encode("utf-8", "replace")
        row["id"] = name if len(name) <= 64 else name[:48] + code.hex()[:16].encode()
        row["order"], row["digest"] = int.from_bytes(code[:8], "big"), np.frombuffer(digest_of(text), "<u8")
        row["start"], row["size"], row["length"], row["bin"] = at, len(line), len(text), BINS.index("retrieved" if piece.pool else record.domain)
        at += len(line)
        if record.domain == "api_doc" and not piece.pool:
            apis.update(record.apis)
    rejected.shrink()
    write(path.with_suffix(".jsonl"), b"".join(lines))
    write_array(path.with_suffix(".bands.npy"), np.concatenate(bands, axis=1))
    write(path.with_suffix(".json"), json.dumps({"records": len(records), "masked": masked, "apis": sorted(apis), **vars(rejected)}))
    write_array(path, index)


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


class Rejected:
    """Counts what is dropped by reason, and keeps some examples of each: those whose ids have the lowest hashes, so that it does
    not matter in which pieces they were found."""

    def __init__(self):
        self.reasons, self.sample = Counter(), []

    def add(self, reason, record_id, **more):
        self.reasons[reason] += 1
        self.sample.append({"reason": reason, "id": record_id, **more})
        if len(self.sample) > 2 * MAX_REJECTED * len(self.reasons):
            self.shrink()

    def merge(self, reasons, sample):
        self.reasons.update(reasons)
        self.sample += sample

    def shrink(self):
        examples = defaultdict(list)
        for example in sorted(self.sample, key=lambda e: (e["reason"], unit_hash(e["id"]), e["id"])):
            examples[example["reason"]].append(example)
        self.sample = [e for group in examples.values() for e in group[:MAX_REJECTED]]


def content_of(record):
    """What a record says, as one text."""
    return record.text if record.text is not None else json.dumps([record.messages, record.tools], ensure_ascii=False)


def digest_of(text):
    """16 bytes that are equal for texts equal up to case and white space."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "replace")).digest()[:16]


def scrub_strings(value, masked):
    """A JSON value with its strings scrubbed, and those in the JSON that a call has for arguments."""
    if isinstance(value, str):
        return scrub(value, masked)
    if isinstance(value, list):
        return [scrub_strings(v, masked) for v in value]
    if isinstance(value, dict):
        scrubbed = {k: scrub_strings(v, masked) for k, v in value.items() if k != "arguments" or not isinstance(v, str)}
        if isinstance(text := value.get("arguments"), str):
            given = attempt(json.loads, text)
            after = scrub_strings(given, masked)
            scrubbed["arguments"] = text if after == given else json.dumps(after, ensure_ascii=False)
        return {k: scrubbed[k] for k in value}
    return value


def scrub(text, masked):
    """A text in Unicode's NFC, mojibake mended, without control and zero-width characters (save those that join letters, as in
    Persian, and emoji), secrets and e-mail addresses replaced by their kind.

    >>> scrub("cafe\\u0301 cafÃ© zero\\u200bwidth me@host.org", Counter())
    'café café zerowidth <EMAIL>'
    """
    if not text.isascii():
        text = re.sub("[\ud800-\udfff]", "\ufffd", MOJIBAKE.sub(mend_mojibake, text))
        text = unicodedata.normalize("NFC", text)
    text = CONTROL.sub("", text.replace("\r\n", "\n"))
    for kind, (hint, pattern) in SECRETS.items():
        if hint in text:
            text, count = pattern.subn(f"<{kind}>", text)
            if count:
                masked[kind] += count
    return text


def mend_mojibake(match):
    """What the characters are when their Windows-1252 bytes are read as UTF-8; as they stand if that is none."""
    mended = bytes(WINDOWS[c] for c in match[0]).decode("utf-8", "replace")
    return match[0] if CONTROL.search(mended) or "\ufffd" in mended else mended


def measure(texts, hashes, starts):
    """The measures that LIMITS names, of each text. hashes and starts are those of shingle_hashes()."""
    owner = np.repeat(np.arange(len(texts)), np.diff(starts))
    order = np.lexsort((hashes, owner))
    again = (hashes[order][1:] == hashes[order][:-1]) & (owner[1:] == owner[:-1])
    repeated = np.bincount(owner[1:][again], minlength=len(texts)) / np.diff(starts)
    for text, runs in zip(texts, repeated):
        seen, lines = set(), [line for line in map(str.strip, text.split("\n")) if line]
        characters = sum(map(len, lines))
        first = sum(len(line) for line in lines if line not in seen and not seen.add(line))
        yield {"characters": characters, "repeated lines": 1 - first / max(1, characters), "repeated runs": runs,
               "symbols": 1 - len(SYMBOL.sub("", text)) / max(1, len(text)), "line length": characters / max(1, len(lines))}


def outside_limits(record, measured):
    """The name of the first measure of a record that is outside its limits, or None."""
    chat = record.text is None
    for name, limits in LIMITS.items():
        lowest, highest = limits[record.domain != "text"]
        if not lowest <= measured[name] <= highest and (name == "characters" or not chat):
            return name


# ----------------------------------------------------------------------------------------------------------------------
# Duplicates and near duplicates: MinHash (Broder 1997) and banded locality-sensitive hashing (Mining of Massive Datasets, chapter 3)

SHINGLE = 5          # words that are hashed together
BANDS, ROWS = 18, 7  # a pair of Jaccard similarity s is found with probability 1 - (1 - s^7)^18: 0.99 at 0.8, 0.13 at 0.5
# What divides words outside ASCII, and what are words by themselves, in scripts that write no spaces.
DIVIDER = regex.compile(r"[^\p{L}\p{M}\p{N}\x00-\x7f]")
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*")
WORD_BYTES = np.array([bytes([b]).isalnum() or b >= 128 for b in range(256)])


class Documents:
    """The cleaned documents of all pieces, numbered through: their index in memory, about 100 bytes each, their texts on disk."""

    def __init__(self, pieces, work):
        self.pieces, self.work = pieces, work
        self.names = [p.key for p in pieces]
        parts = [np.load(work / f"{name}.npy") for name in self.names]
        self.first = np.cumsum([0, *map(len, parts)])  # of each piece, and the end
        self.index = np.concatenate([np.zeros(0, INDEX), *parts])
        self.score = np.zeros(len(self.index), np.float32)  # set by retrieve()
        self.open = lru_cache(500)(lambda n: open(work / f"{self.names[n]}.jsonl", "rb"))

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """The Record of a document."""
        file, entry = self.open(int(np.searchsorted(self.first, i, side="right")) - 1), self.index[i]
        return Record.from_json(os.pread(file.fileno(), int(entry["size"]), int(entry["start"])))  # seeking would move it for all processes

    def of_piece(self, n):
        """Yields the number and the Record of each document of a piece."""
        lines = (self.work / f"{self.names[n]}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return ((i, Record(**json.loads(line))) for i, line in enumerate(lines, int(self.first[n])))

    def is_in(self, *bins):
        """(N,) Whether each belongs to one of these bins."""
        return np.isin(self.index["bin"], [BINS.index(b) for b in bins])

    def bands(self, band):
        """(N,) uint64: the hashes of a band."""
        return np.concatenate([np.zeros(0, np.uint64), *(np.load(self.work / f"{name}.bands.npy", mmap_mode="r")[band] for name in self.names)])


class Dropped:
    """Why each document is dropped, as an index into REASONS; 0: it is kept."""
    REASONS = ("", "duplicate", "near duplicate", "shares words or a call with a benchmark", "not of the seed's kind")

    def __init__(self, reason, copy_of, apis):
        self.reason = reason    # (N,)
        self.copy_of = copy_of  # (N,) the document that is kept instead, -1 for none
        self.apis = apis        # {kept document: the APIs of the copies dropped for it}
        self.match = {}         # {document: (words or call, benchmark file)}

    @property
    def kept(self):
        return self.reason == 0

    def drop(self, documents, reason):
        self.reason[documents] = self.REASONS.index(reason)


def divided(text):
    """A text in lower case whose words are divided by ASCII in every script."""
    text = text.lower()
    return text if text.isascii() else UNSPACED.sub(r" \g<0> ", DIVIDER.sub(" ", text))


def mix(x):
    """Scramble uint64s, so that every bit depends on every other (the finaliser of splitmix64). Arithmetic is modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shingle_hashes(texts, size=SHINGLE):
    """Hashes (N,) uint64 of the runs of `size` words that begin at each word of the texts, and where each text's begin.

    All texts at once, without a loop: with prefix[i] the sum of byte[j]·p^j for j < i, a word from a to b has the hash
    (prefix[b] - prefix[a]) / p^a, and dividing by the odd p is multiplying by its inverse modulo 2^64.
    """
    encoded = [divided(text).encode("utf-8", "replace") + b" " for text in texts]
    content = np.frombuffer(b" " + b"".join(encoded), np.uint8)
    is_word = WORD_BYTES[content]
    begin, end = (np.flatnonzero(edge) + 1 for edge in (is_word[1:] & ~is_word[:-1], is_word[:-1] & ~is_word[1:]))
    p = np.uint64(0x9E3779B97F4A7C15)
    powers, inverse = (np.multiply.accumulate(np.full(len(content) + 1, q, np.uint64)) for q in (p, np.uint64(pow(int(p), -1, 2**64))))
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(content * powers[:-1], dtype=np.uint64)])
    words = mix((prefix[end] - prefix[begin]) * inverse[begin])
    text_of_word = np.searchsorted(np.cumsum([len(e) for e in encoded]), begin, side="left")
    # Behind each text as many empty words: its last runs are shorter, and none reaches into the next text.
    counts = np.bincount(text_of_word, minlength=len(texts))
    padded = np.zeros(len(words) + size * len(texts), np.uint64)
    padded[np.arange(len(words)) + size * text_of_word] = words
    runs = np.zeros(len(padded) - size + 1, np.uint64)
    for i in range(size):
        runs = runs * p + padded[i:len(padded) - size + 1 + i]
    taken = np.maximum(counts, 1)  # a text without a word has one empty run
    starts = np.concatenate([[0], np.cumsum(taken)])
    first = np.concatenate([[0], np.cumsum(counts + size)[:-1]])
    return mix(runs[np.repeat(first - starts[:-1], taken) + np.arange(starts[-1])]), starts


def band_keys(signatures):
    """(BANDS, N) uint64: a hash of each band of the signatures, equal where all its ROWS agree."""
    weights = mix(np.arange(1, ROWS + 1, dtype=np.uint64))
    return mix((signatures.reshape(-1, BANDS, ROWS) * weights).sum(2, dtype=np.uint64)).T


def find_pairs(path, documents, threshold):
    """Leaves pairs (later, earlier) of documents in the order in which they are kept: `equal` ones, and `similar` ones to be compared."""
    index, n = documents.index, len(documents)
    order = np.lexsort((index["id"], -index["length"].astype(np.int64), documents.is_in("retrieved")))
    equal = runs_of_equal(np.lexsort((index["digest"][order, 1], index["digest"][order, 0])), index["digest"][order])
    codes = np.zeros(0, np.uint64)
    if threshold:
        alive = np.delete(np.arange(n), equal[:, 0])
        for band in tqdm(range(BANDS), desc="bands", disable=None):
            pairs = alive[band_pairs(documents.bands(band)[order[alive]])]
            codes = np.union1d(codes, pairs[:, 0].astype(np.uint64) * np.uint64(n) + pairs[:, 1].astype(np.uint64))
    similar = np.stack([codes // np.uint64(max(1, n)), codes % np.uint64(max(1, n))], 1).astype(np.int64)
    write_arrays(path, equal=order[equal], similar=order[similar])


def runs_of_equal(order, values):
    """(M, 2) each item with the first of those that have its values, given an order that brings equal ones together."""
    fresh = np.append(True, (values[order][1:] != values[order][:-1]).any(1))[:len(order)]
    head = order[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]
    pairs = np.stack([order, head], 1)[~fresh]
    return pairs[np.argsort(pairs[:, 0])]


def band_pairs(keys, near=16):
    """(M, 2) pairs j > i of documents of equal keys (N,): each with the first that has its key, and with the `near` before it."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    heads = np.searchsorted(keys, keys)  # where each run of equal keys begins
    found = [np.stack([order, order[heads]], 1)[heads < np.arange(len(keys))]]
    for step in range(1, near + 1):
        equal = np.flatnonzero(keys[step:] == keys[:-step])
        found.append(np.stack([order[equal + step], order[equal]], 1))
    return np.concatenate(found)


def compare_pairs(path, pairs, start, end):
    """Leaves for pairs start to end whether the Jaccard similarity of their shingles reaches the threshold."""
    documents, threshold = each.shared
    sets = lru_cache(20_000)(lambda i: np.unique(shingle_hashes([content_of(documents[i])])[0]))
    similar = []
    for j, i in np.load(pairs)["similar"][start:end].tolist():
        common = len(np.intersect1d(sets(i), sets(j), assume_unique=True))
        similar.append(common >= threshold * (len(sets(i)) + len(sets(j)) - common))
    write_array(path, np.array(similar, bool))


def choose_copies(path, documents, pairs, parts):
    """Leaves which documents are dropped, and for what: a document is, if it equals or resembles one before it that is not."""
    found = np.load(pairs)
    reason, copy_of = np.zeros(len(documents), np.uint8), np.full(len(documents), -1)
    reason[found["equal"][:, 0]], copy_of[found["equal"][:, 0]] = 1, found["equal"][:, 1]
    similar = np.concatenate([np.zeros(0, bool), *map(np.load, parts)])
    for j, i in found["similar"][similar].tolist():  # in the order of j: whether i, which is before it, is kept is known then
        if not reason[i] and not reason[j]:
            reason[j], copy_of[j] = 2, i
    apis = defaultdict(set)
    for j in np.flatnonzero((reason > 0) & documents.is_in("api_doc", "trajectory", "instruction")):
        kept = copy_of[j] if not reason[copy_of[j]] else copy_of[copy_of[j]]
        apis[int(kept)].update(documents[j].apis)
    write_arrays(path, reason=reason, copy_of=copy_of, kept=np.array([*apis], np.int64), apis=np.array([json.dumps(sorted(a)) for a in apis.values()], str))


# ----------------------------------------------------------------------------------------------------------------------
# Decontamination: no document that holds a part of a benchmark

OVERLAP = 13  # words in a row, as for GPT-3 (arXiv 2005.14165, appendix C)


class Benchmarks:
    """What test data holds: hashes of all runs of OVERLAP words with the file each is from, and the calls by name."""

    def __init__(self, files):
        self.files, hashes, owners, self.calls = files, [], [], defaultdict(list)
        for number, file in enumerate(tqdm(files, desc="benchmarks", disable=None)):
            parts = [part for _, value in read_values(file) for part in parts_of(value)]
            for name, accepted in (call for part in parts for call in gold_calls(part)):
                self.calls[name].append(accepted)
            texts = [part for part in parts if isinstance(part, str)]
            hashes += [runs[telling(text)] for runs, text in zip(whole_runs(texts), texts)]
            owners += [number] * (len(hashes) - len(owners))
        sizes = [len(h) for h in hashes]
        self.hashes, first = np.unique(np.concatenate([np.zeros(1, np.uint64), *hashes]), return_index=True)
        self.owners = np.repeat([0, *owners], [1, *sizes])[first]

    def match(self, text, messages):
        """What a document has in common with a file, as (words or call, file's name), or None."""
        [runs] = whole_runs([text])
        place = np.minimum(np.searchsorted(self.hashes, runs), len(self.hashes) - 1)
        for at in np.flatnonzero(self.hashes[place] == runs)[:1]:
            return " ".join(words_of(text)[at:at + OVERLAP]), self.files[self.owners[place[at]]].name
        for function in (c["function"] for m in messages or [] for c in m.get("tool_calls") or []):
            given = {k: json.dumps(v, sort_keys=True) for k, v in json.loads(function["arguments"]).items()}
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
    """(name, {argument: acceptable values as JSON}) of a call in test data: {"name", "arguments"}, Python's f(a=1), or BFCL's
    {name: {argument: [acceptable values, "" if it may be left out]}}."""
    (name, given), *others = part.items() if isinstance(part, dict) and part else [("", None)]
    if isinstance(given, dict) and not others and all(isinstance(values, list) for values in given.values()):
        return [(name, {k: [json.dumps(v, sort_keys=True) for v in values] for k, values in given.items()})]
    is_call = isinstance(part, str) and re.match(r"\[?[\w.]+\(", part) or isinstance(part, dict) and {"name", "arguments"} <= part.keys()
    calls = attempt(python_calls if isinstance(part, str) else calls_in, part) if is_call else []
    functions = [c["function"] for c in calls] if isinstance(calls, list) else []
    return [(f["name"], {k: [json.dumps(v, sort_keys=True)] for k, v in json.loads(f["arguments"]).items()}) for f in functions]


def words_of(text):
    """The words as shingle_hashes() tells them apart."""
    return re.findall(r"[a-z0-9\u0080-\U0010ffff]+", divided(text))


def telling(text):
    """(N,) Whether each run of OVERLAP words has eight different ones of two letters or more: counting and JSON have not."""
    words = [w if (len(w) > 1 or not w.isascii()) and not w.isdigit() else "" for w in words_of(text)]
    return np.array([len({*words[i:i + OVERLAP]} - {""}) >= 8 for i in range(len(words) - OVERLAP + 1)], bool)


def whole_runs(texts):
    """The hashes of each text's runs of exactly OVERLAP words."""
    hashes, starts = shingle_hashes(texts, OVERLAP)
    return [hashes[a:max(a, b - OVERLAP + 1)] for a, b in zip(starts, starts[1:])]


def find_matches(path, n):
    """Leaves [row, words or call, file] of the documents of a piece that share something with the benchmarks."""
    documents, benchmarks = each.shared
    matches = ((row, benchmarks.match(content_of(r), r.messages)) for row, (_, r) in enumerate(documents.of_piece(n)))
    write(path, json.dumps([[row, *match] for row, match in matches if match]))


def benchmark_files(path):
    """The files of --benchmarks: none, one, or those in a directory."""
    if not path or not Path(path).is_dir():
        return [Path(path)] if path and Path(path).is_file() else []
    return sorted(p for p in Path(path).rglob("*") if re.search(r"\.(json|jsonl|csv|txt|md)(\.gz)?$", p.name))


# ----------------------------------------------------------------------------------------------------------------------
# Retrieval: what of a pool is like the seed

BUCKETS = 2**20  # places for the hashed n-grams
SAMPLE = 100_000  # documents of each side, at most, that the classifier learns from
LONGEST_SCORED = 10_000  # characters of a document, at most, that it sees


def plain_text(record):
    """The words of a record without the form that collect.py gives them, which would tell it at once."""
    if record.text is not None:
        return re.sub(r"^(?:\{.*\}|Package: .*)$", "", record.text[:LONGEST_SCORED], flags=re.M)
    return "\n".join(part for m in record.messages for part in
                     [m.get("reasoning_content") or "", m.get("content") or "",
                      *(f"{c['function']['name']} {c['function']['arguments']}" for c in m.get("tool_calls") or [])])


def train_scorer(path, documents, seed, pool, encoder):
    """Leaves what make_scorer() needs, with its figures on documents it did not see: as many of the seed as of the pool."""
    count = min(SAMPLE, len(seed), len(pool))
    if count < 50:
        fail(f"--pool: {len(pool):,} documents of the pool and {len(seed):,} of the seed are left; a classifier needs 50 of each")
    chosen = [side[np.argsort(documents.index["order"][side])[:count]] for side in (seed, pool)]
    train, tune, test = np.split(np.arange(count), [int(0.8 * count), int(0.9 * count)])
    texts = [[plain_text(documents[i]) for i in side] for side in chosen]
    part = lambda rows: ([texts[side][i] for side in (0, 1) for i in rows], np.repeat([1.0, 0.0], len(rows)))
    if encoder:
        learned = {"seeds": encode_texts(encoder, [texts[0][i] for i in train[:4096]])}
    else:
        learned = {"weights": fit_ngrams(*part(train))}
        # Hard negatives: of the pool those that it takes for the seed more than others, save the top, which may well be of its kind.
        score = make_scorer(learned | {"slope": 1.0, "offset": 0.0}, None)([texts[1][i] for i in train])
        hard = train[np.argsort(score)[len(train) // 2:len(train) * 9 // 10]]
        more, labels = part(train)
        learned = {"weights": fit_ngrams(more + [texts[1][i] for i in hard], np.append(labels, np.zeros(len(hard))))}
    raw = make_scorer(learned | {"slope": 1.0, "offset": 0.0}, encoder)
    learned["slope"], learned["offset"] = calibrate(raw(part(tune)[0]), part(tune)[1])
    (texts_tested, labels), score = part(test), make_scorer(learned, encoder)
    p = 1 / (1 + np.exp(-score(texts_tested)))
    hits = ((p >= 0.5) & (labels == 1)).sum()
    bins = np.minimum((p * 10).astype(int), 9)
    error = sum(abs(p[bins == b].sum() - labels[bins == b].sum()) for b in range(10)) / len(p)
    precision, recall = hits / max(1, (p >= 0.5).sum()), hits / labels.sum()
    write_arrays(path, **learned, precision=precision, recall=recall, f1=2 * precision * recall / max(1e-9, precision + recall), calibration_error=error,
                 tested=len(p))


def make_scorer(learned, encoder):
    """A function from texts to the logarithm of their odds, (N,)."""
    def score(texts):
        if encoder:
            nearest = np.sort(encode_texts(encoder, texts) @ learned["seeds"].T, axis=1)[:, -8:]
            raw = nearest.mean(1)
        else:
            buckets, starts = ngrams(texts)
            raw = np.add.reduceat(learned["weights"][buckets], starts[:-1]) / np.diff(starts)
        return learned["slope"] * raw + learned["offset"]
    return score


def score_piece(path, n):
    """Leaves the logarithm of the odds of each document of a piece of the pool."""
    documents, score = each.shared
    records = (record for _, record in documents.of_piece(n))
    scores = [score([plain_text(r) for r in batch]) for batch in batches(records, lambda r: len(r.text), 500_000)]
    write_array(path, np.concatenate([np.zeros(0), *scores]))


def ngrams(texts):
    """Places (M,) int32 of the texts' words and pairs of words, hashed, and where each text's begin."""
    places, counts = [], []
    for batch in batches(texts, len, 500_000):
        (words, first), (pairs, _) = (shingle_hashes(batch, size) for size in (1, 2))  # as many pairs as words: the last is one word
        rows = np.repeat(np.arange(len(batch)), np.diff(first))
        order = np.argsort(np.concatenate([rows, rows]), kind="stable")
        places.append((np.concatenate([words, pairs])[order] % np.uint64(BUCKETS)).astype(np.int32))
        counts.append(2 * np.diff(first))
    return np.concatenate(places), np.concatenate([[0], np.cumsum(np.concatenate(counts))])


def fit_ngrams(texts, labels, epochs=3, batch_size=64):
    """The number (BUCKETS,) of each n-gram by which the mean over a text tells its label best."""
    import torch  # here, since only --pool needs it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums under torchrun, which sets their number
    places, starts = map(torch.from_numpy, ngrams(texts))
    bag = torch.nn.EmbeddingBag(BUCKETS, 1, mode="mean", sparse=True)
    torch.nn.init.zeros_(bag.weight)
    optimizer = torch.optim.SparseAdam(bag.parameters(), lr=0.1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(np.tile(np.arange(len(texts)), epochs)))
    for batch in tqdm(order.split(batch_size), desc="classifier", disable=None):
        lengths = starts[batch + 1] - starts[batch]
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        at = torch.repeat_interleave(starts[batch] - offsets[:-1], lengths) + torch.arange(int(offsets[-1]))
        score = bag(places[at].long(), offsets[:-1])[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score, torch.from_numpy(labels)[batch].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return bag.weight.detach()[:, 0].numpy()


def encoder_hashes(directory):
    """What tells one encoder from another; None for none."""
    return directory and [sha256(file) for file in sorted(Path(directory).glob("*.safetensors"))]


@functools.cache
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
    for rows in batches(tqdm(sorted(range(len(ids)), key=lambda i: len(ids[i])), desc="encode", disable=None), lambda i: len(ids[i]), 4096):
        padded = torch.zeros(len(rows), len(ids[rows[-1]]), dtype=torch.long)  # behind a text: what is causal does not see it
        for row, i in zip(padded, rows):
            row[:len(ids[i])] = torch.tensor(ids[i])
        with torch.inference_mode():
            for i, states in zip(rows, encoder.hidden(padded)):
                vectors[i] = states[:len(ids[i])].mean(0)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def calibrate(scores, labels):
    """Slope and offset by which scores become the logarithm of odds (Platt 1999), by Newton's method; a weak prior keeps them finite."""
    x, w = np.stack([scores / scores.std(), np.ones(len(scores))], 1), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 0.01 * np.eye(2), x.T @ (p - labels) + 0.01 * w)
    return w[0] / scores.std(), w[1]


# ----------------------------------------------------------------------------------------------------------------------
# Split: what a model is tested on is never in what it learned from


def mention_finder(names):
    """A function that tells whether a text holds any of the names, be it inside a longer name.

    >>> mentions = mention_finder(["numpy.add"])
    >>> mentions("see numpy.add.reduce"), mentions("see numpy.ad")
    (True, False)
    """
    names = set(names)
    lengths = sorted({len(n) for n in names})
    # A name can only start where its first component does, and ends before the next character that is no word or dot.
    starts = re.compile(r"(?=(?:%s)\.)" % "|".join(sorted({re.escape(n.split(".")[0]) for n in names}))) if names else None

    @lru_cache(1_000_000)
    def in_run(run):
        return any(run[m.start():m.start() + n] in names for m in starts.finditer(run) for n in lengths)

    return lambda text: bool(names) and any(in_run(run) for run in set(re.findall(r"[\w.]*\w\.[\w.]+", text)))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

TAGS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *TAGS)
# What stands before a name, in a tool's definition as in a call; words with the space, dot or underscore before them; numbers
# of up to three digits; punctuation; white space. A qualified name so follows one token that nothing else follows, and is cut
# alike wherever it stands: to copy it a model need only look for what came after the same token before.
PATTERN = r'[ {](?="name": ")|"name": "|[ ._]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'
# How others cut, where their tokenizer.json only names it: GPT-2, and the same between single digits (SmolLM).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LONGEST_RUN = 20_000  # characters
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Tokenizer:
    """Byte-level BPE over tiktoken, with the chat format. Special ids come only from `render`, never from text.

    >>> tokenizer = Tokenizer.train(["low lower lowest"] * 9, 270)
    >>> tokenizer.decode(tokenizer.encode("lower <|im_end|>"))
    'lower <|im_end|>'
    """

    def __init__(self, ranks, special=None, pattern=PATTERN, normal_form=None, base=None):
        self.ranks = ranks  # {bytes: id}
        self.special = special or {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.pattern, self.normal_form = pattern, normal_form
        self.base = base  # the tokenizer.json that it was read from, if it is another's
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ranks)  # what it has no token for
        model = base["model"] if base else {}
        self.unknown = model["vocab"][model["unk_token"]] if model.get("unk_token") else None
        self.fuse_unknown = bool(model.get("fuse_unk"))  # several missing bytes in a row are one unknown token
        self.lost = 0  # bytes that it was given and has no token for
        found = [t for t in base["added_tokens"] if not t.get("special")] if base else []
        self.added = {t["content"]: t for t in found if t["content"] not in SPECIAL_TOKENS}
        by_length = sorted(self.added.values(), key=lambda token: -len(token["content"]))
        self.find_added = re.compile("|".join(map(added_pattern, by_length)) or "(?!)")
        self.vocab_size = max(*ranks.values(), *self.special.values()) + 1
        self.end_of_text = next(self.special[t] for t in ("<|endoftext|>", "<|end_of_text|>") if t in self.special)
        self.im_end = self.special["<|im_end|>"]
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)  # of ids in files
        self.encoding = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)

    @classmethod
    def find(cls, name):
        """By the name of a directory, a tokenizer.json, Llama 3's tokenizer.model, or an encoding that tiktoken knows."""
        path = Path(name)
        if name in tiktoken.list_encoding_names() and not path.exists():
            return cls.from_tiktoken(name)
        if path.is_dir() and not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
            path = path / "tokenizer.model"
        return cls.load(path) if path.suffix != ".model" else cls.from_llama(path)

    @classmethod
    def from_tiktoken(cls, name):
        """By a name such as cl100k_base. tiktoken downloads the ranks, once; without a network that may hang, so it gets ten seconds."""
        found = {}

        def get():
            try:
                found["encoding"] = tiktoken.get_encoding(name)
            except Exception as error:
                found["error"] = error

        thread = threading.Thread(target=get, daemon=True)
        thread.start()
        thread.join(10)
        if "encoding" not in found:
            url = getattr(getattr(found.get("error"), "request", None), "url", None)
            place = f"the file {hashlib.sha1(url.encode()).hexdigest()}, downloaded from {url}," if url else "its file, named by the SHA-1 of its URL,"
            fail(f"--tokenizer {name}: tiktoken could not download it. Put {place} into a directory and name that in TIKTOKEN_CACHE_DIR")
        encoding = found["encoding"]
        return cls(dict(encoding._mergeable_ranks), with_chat_tokens(dict(encoding._special_tokens), encoding.n_vocab), encoding._pat_str)

    @classmethod
    def from_llama(cls, path):
        """From Meta's tokenizer.model of Llama 3: ranks, to which the code that reads them adds 256 special tokens."""
        try:
            ranks = read_ranks(path)
        except FileNotFoundError:
            fail(f"{path}: no such file")
        except ValueError:
            fail(f"{path}: not ranks in tiktoken's format. (Llama 2's SentencePiece model is no byte-level BPE, and cannot be read here)")
        reserved = iter(range(256))
        named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
        special = {named.get(i) or f"<|reserved_special_token_{next(reserved)}|>": len(ranks) + i for i in range(256)}
        return cls(ranks, with_chat_tokens(special, len(ranks) + 256), LLAMA_PATTERN)

    @classmethod
    def load(cls, directory):
        """From the tokenizer.json in a directory: ours, or that of a model with byte-level BPE such as GPT-2, Llama 3 and Qwen."""
        path = Path(directory) / "tokenizer.json" if Path(directory).suffix != ".json" else Path(directory)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            model, added = content["model"], {t["content"]: t["id"] for t in content["added_tokens"]}
            pattern, normal_form = read_pattern(content["pre_tokenizer"]), read_normal_form(content["normalizer"])
            byte = {symbol: i for i, symbol in enumerate(byte_symbols())}
            ranks = {bytes(byte[c] for c in token): i for token, i in model["vocab"].items() if token not in added}
            merged = [model["vocab"]["".join(m) if isinstance(m, list) else m.replace(" ", "")] for m in model["merges"]]
            if model["type"] != "BPE" or merged != sorted(merged):
                raise ValueError("not a BPE whose ids follow the order of its merges")
            if any(map(model.get, ("continuing_subword_prefix", "end_of_word_suffix"))):
                raise ValueError("a BPE with prefixes or suffixes")
            if model.get("unk_token") and model["unk_token"] not in model["vocab"]:
                raise ValueError("an unknown token that is not in the vocabulary")
            if model.get("byte_fallback") and any(re.fullmatch("<0x[0-9A-F]{2}>", t) for t in model["vocab"]):
                raise ValueError("a BPE with bytes for what is unknown")
            if any(bytes([b]) not in ranks for b in b"\t\n" + bytes(range(32, 127))):  # rare bytes may be missing
                raise ValueError("a vocabulary without all of ASCII")
            kept = [t for t in content["added_tokens"] if not t.get("special")]
            takes_space = any(t.get("lstrip") or t.get("rstrip") for t in kept)
            if takes_space and any(t["content"][:1].isspace() for t in kept):
                raise ValueError("added tokens of white space, and others that take white space along")
            ours = not any(t["content"] not in SPECIAL_TOKENS for t in content["added_tokens"])
        except FileNotFoundError:
            fail(f"{path}: no such file; a directory with a tokenizer has one")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{path}: not a byte-level BPE tokenizer that can be read here ({error!r})")
        special = with_chat_tokens(added, max(*ranks.values(), *added.values(), -1) + 1)
        return cls(ranks, special, pattern, normal_form, base=None if ours else content)

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) until there are vocab_size tokens."""
        splitter = re.compile(python_pattern(PATTERN))
        words = Counter(word for text in texts for word in splitter.findall(text))
        return cls(train_bpe({w.encode("utf-8", "replace"): n for w, n in words.items()}, vocab_size - len(SPECIAL_TOKENS)))

    def same_as(self, other):
        """Whether both give every text and every special token the same ids."""
        parts = ("ranks", "special", "pattern", "normal_form", "added", "unknown", "fuse_unknown")
        return all(getattr(self, part) == getattr(other, part) for part in parts)

    def encode(self, text):
        """Ids of a text. What looks like a special token in it is ordinary text."""
        return self.encode_to_numpy(text).tolist()

    def special_pieces(self):
        """{id of a special token: ids of its name as ordinary text}."""
        return {i: self.encode(token) for token, i in self.special.items()}

    def encode_to_numpy(self, text):
        """The same as an array (N,) uint32."""
        arrays = []
        for part in self.parts(text):
            at = 0
            for match in self.find_added.finditer(part):  # added tokens that are not special count in text
                arrays += [self.encode_part(part[at:match.start()])] * (match.start() > at)
                token = match[0] if match[0] in self.added else match[0].strip()  # flags take white space along
                arrays.append(np.array([self.added[token]["id"]], np.uint32))
                at = match.end()
            arrays += [self.encode_part(part[at:])] * (at < len(part) or not arrays)
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def encode_part(self, text):
        """The ids of a text without added tokens. A byte that has no token is the unknown one or, if there is
        none, left out of its piece.
        """
        if not self.missing or not set(text.encode("utf-8", "replace")).intersection(self.missing):
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        pieces = [piece.encode("utf-8", "replace") for piece in regex.findall(self.pattern, text)]
        ids = []
        for piece in pieces:
            self.lost += len(piece) - len(piece.translate(None, self.missing))
            if self.unknown is None:
                runs = [piece.translate(None, self.missing)]
            else:
                runs = re.split(b"([" + re.escape(self.missing) + b"]+)", piece)
            for i, run in enumerate(runs):
                if i % 2:  # what has no token
                    ids += [self.unknown] * (1 if self.fuse_unknown else len(run))
                elif run:
                    ids += self.encoding._encode_single_piece(run)
        return np.array(ids, np.uint32)

    def normalised(self, text):
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def parts(self, text):
        """The text as it is encoded: at once, but for runs without white space, or of nothing else, that tiktoken's expressions would run
        out of stack on. These are cut, where possible after a letter and before a sign, where every tokenizer here cuts as well.
        """
        text = self.normalised(text)
        if len(text) <= LONGEST_RUN:
            return [text]
        bounds = [0]
        for run in re.finditer(r"\s+|\S+", text):
            at = run.start()
            while (at := at + LONGEST_RUN) < run.end():
                safe = [m.end() for m in re.finditer(r"[^\W\d_](?=[^\w\s])", text[at - 1000:at])]
                at = at - 1000 + safe[-1] if safe else at
                bounds.append(at)
        return [text[a:b] for a, b in zip(bounds, [*bounds[1:], len(text)])]

    def token_bytes(self, id):
        """The bytes of a token; none of an id that stands for nothing, as in a padded vocabulary."""
        try:
            return self.encoding.decode_single_token_bytes(id)
        except KeyError:
            return b""

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def render(self, messages, tools=None, answer=False):
        """A conversation as (ids, mask): mask is 1 on what the assistant writes, its end of turn included.

        ChatML with Hermes tool calls, put together piece by piece, so that no text in the data can pass for a special
        token. With answer=True it ends where the assistant's next answer begins.
        """
        ids, mask = [], []

        def add(text, learned=0):
            pieces = [self.special[text]] if text in self.special else self.encode(text)
            ids.extend(pieces)
            mask.extend([learned] * len(pieces))

        def add_text(text, learned=0):  # text from data, which may be equal to a special token
            ids.extend(pieces := self.encode(text))
            mask.extend([learned] * len(pieces))

        if tools:
            first = messages and messages[0]["role"] == "system"
            system = messages[0]["content"] + "\n" if first else ""
            add("<|im_start|>"), add("system\n"), add_text(system), add("<tools>"), add("\n")
            for f in (tool["function"] for tool in tools):
                definition = {"description": f.get("description") or "", "name": f["name"], "parameters": f.get("parameters") or {}}
                add_text(json.dumps(definition, ensure_ascii=False) + "\n")
            add("</tools>"), add("<|im_end|>"), add("\n")
        for message in messages[bool(tools and first):]:
            role, content, thought = message["role"], message.get("content") or "", message.get("reasoning_content")
            learned = int(role == "assistant")
            add("<|im_start|>")
            # What no special token divides is encoded at once, as who reads the text as a whole does, but for where an answer begins.
            if role in ("system", "user"):
                add_text(f"{role}\n{content}")
            elif role == "tool":
                add("tool\n"), add("<tool_response>"), add_text(f"\n{content}\n"), add("</tool_response>")
            else:
                add("assistant\n")
                if thought:
                    add("<think>", 1), add_text(f"\n{thought}\n", 1), add("</think>", 1)
                add_text("\n\n" * bool(thought) + content, 1)
            for i, call in enumerate(message.get("tool_calls") or []):
                name, arguments = json.dumps(call["function"]["name"], ensure_ascii=False), call["function"]["arguments"]
                if i or content:
                    add("\n", learned)
                text = f'\n{{"name": {name}, "arguments": {arguments}}}\n'
                add("<tool_call>", learned)
                # A tag within a string would end the call for who reads it; JSON has another way to write it.
                add_text(text.replace("<tool_call>", r"\u003ctool_call>").replace("</tool_call>", r"\u003c/tool_call>"), learned)
                add("</tool_call>", learned)
            add("<|im_end|>", learned), add("\n")
        if answer:
            add("<|im_start|>"), add("assistant\n")
        return ids, mask

    def fingerprint(self):
        """A hash of all that decides which ids a text gets."""
        parts = [sorted((i, t.hex()) for t, i in self.ranks.items()), sorted(self.special.items()), self.pattern, self.normal_form]
        parts += [self.added] if self.added else []
        parts += [self.unknown, self.fuse_unknown] if self.unknown is not None else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def tiktoken_file(self):
        """The ranks in tiktoken's format."""
        return "".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in sorted(self.ranks.items(), key=lambda entry: entry[1]))

    def save(self, directory):
        """Write tokenizer.tiktoken and, for Hugging Face from the same ranks, tokenizer.json, its config and the stop tokens."""
        directory = Path(directory)
        by_rank = sorted(self.ranks, key=self.ranks.get)
        write(directory / "tokenizer.tiktoken", self.tiktoken_file())
        symbol = byte_symbols()
        written = {token: "".join(symbol[b] for b in token) for token in by_rank}
        merges = [[written[half] for half in halves(token, self.ranks)] for token in by_rank if len(token) > 1]
        kept = {t["id"]: t for t in self.base["added_tokens"]} if self.base else {}
        specials = []
        for token, i in sorted(self.special.items(), key=lambda entry: entry[1]):
            new = {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                   "normalized": False, "special": token not in TAGS}
            specials.append(kept[i] if i in kept and kept[i]["content"] == token else new)
        # A base's own file is kept, and the chat format's tokens are added to it.
        content = self.base and self.base | {"added_tokens": specials}
        write(directory / "tokenizer.json", json.dumps(content or {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": specials,
            "normalizer": {"type": self.normal_form} if self.normal_form else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
            "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {written[t]: self.ranks[t] for t in by_rank}, "merges": merges}}, ensure_ascii=False))
        write(directory / "tokenizer_config.json", json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": self.decode([self.end_of_text]),
            "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}, indent=1))
        write(directory / "generation_config.json", json.dumps({
            "eos_token_id": [self.im_end, self.end_of_text], "pad_token_id": self.end_of_text}))


def added_pattern(token):
    """An expression for where an added token of a tokenizer.json stands in text, by its flags."""
    text = re.escape(token["content"])
    text = rf"(?<!\w){text}(?!\w)" if token.get("single_word") else text
    return r"\s*" * bool(token.get("lstrip")) + text + r"\s*" * bool(token.get("rstrip"))


def with_chat_tokens(special, end):
    """Special tokens {text: id} with those of the chat format: missing ones take the places of reserved ones, or new ones from `end`."""
    missing = [t for t in SPECIAL_TOKENS if t not in special and not (t == "<|endoftext|>" and "<|end_of_text|>" in special)]
    reserved = sorted((t for t in special if re.search(r"reserved|unused|extra", t)), key=special.get)
    for token in missing:
        special[token] = special.pop(reserved.pop(0)) if reserved else end
        end = max(end, special[token] + 1)
    return special


# What Tokenizer.render writes, as a template for servers.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}<tools>
{% for f in tools | map(attribute='function') %}{{ dict(description=f.description or '', name=f.name, parameters=f.parameters or {}) | tojson }}
{% endfor %}</tools><|im_end|>
{% endif %}{%- for message in messages %}{% if not (message.role == 'system' and tools and loop.first) %}<|im_start|>{{ message.role }}
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


def python_pattern(pattern):
    r"""The pattern for Python's `re`, which knows no \p{L}: the classes written out as ranges of characters."""
    for category in "LN":
        members = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == category]
        breaks = [i for i in range(1, len(members)) if members[i] != members[i - 1] + 1]
        ranges = "".join(f"\\U{members[a]:08x}-\\U{members[b - 1]:08x}" for a, b in zip([0, *breaks], [*breaks, len(members)]))
        # inside brackets the ranges stand as they are, elsewhere they need brackets of their own
        pattern = re.sub(r"(\[[^\]]*)\\p\{%s\}" % category, lambda m: m[1] + ranges, pattern)
        pattern = pattern.replace(rf"\p{{{category}}}", f"[{ranges}]")
    return pattern


def train_bpe(words, vocab_size):
    """Ranks {token: id} after merging the most frequent pair of neighbouring tokens again and again.

    words: {bytes: count}. Ties go to the pair of lower ids. Only the words that hold the merged pair are touched, and a
    heap holds the pairs; its entries may be stale, so the count is checked when one comes up.
    """
    tokens = [bytes([b]) for b in range(256)]
    pieces, counts = [list(w) for w in words], list(words.values())
    pair_counts, pair_words = Counter(), defaultdict(set)
    for i, word in enumerate(pieces):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            pair_words[pair].add(i)
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in pair_words.pop(pair):
            word, merged, j = pieces[i], [], 0
            while j < len(word):
                hit = tuple(word[j:j + 2]) == pair
                merged.append(new if hit else word[j])
                j += 1 + hit
            for p in zip(word, word[1:]):
                pair_counts[p] -= counts[i]
                changed.add(p)
            for p in zip(merged, merged[1:]):
                pair_counts[p] += counts[i]
                pair_words[p].add(i)
                changed.add(p)
            pieces[i] = merged
        for p in changed:
            if pair_counts[p] > 0:
                heapq.heappush(heap, (-pair_counts[p], p))
    return {token: i for i, token in enumerate(tokens)}


def halves(token, ranks):
    """The two tokens whose merge made this one: merge its bytes by rank until two parts are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def read_pattern(pre_tokenizer):
    """The pattern by which a tokenizer.json cuts text, from its description there. Raises ValueError for others than byte-level ones."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *cuts, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError(f"pre_tokenizer {last}")
    match [cut["type"] for cut in cuts], last.get("use_regex", True):
        case [], True:
            return GPT2_PATTERN
        case ["Digits"], True if cuts[0]["individual_digits"]:
            return DIGITS_PATTERN
        case ["Split"], False if cuts[0]["behavior"] == "Isolated" and not cuts[0]["invert"]:
            return cuts[0]["pattern"]["Regex"]
    raise ValueError(f"pre_tokenizer {steps}")


def read_normal_form(normalizer):
    """The Unicode form to which a tokenizer.json brings text, None for none. Raises ValueError for other changes to the text."""
    if normalizer and normalizer["type"] == "Sequence" and len(normalizer["normalizers"]) < 2:
        normalizer = next(iter(normalizer["normalizers"]), None)
    if normalizer and normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"normalizer {normalizer}")
    return normalizer and normalizer["type"]


def byte_symbols():
    """GPT-2's printable character for every byte, in which Hugging Face writes byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def train_tokenizer(documents, dropped, divide, args):
    """The Tokenizer trained on a fair share of each domain's training text, or the one that was left when it was."""
    kept = hashlib.sha256(dropped.reason.tobytes()).hexdigest()
    path = documents.work / f"{hash_of(documents.names, kept, sorted(divide.heldout), args.fold, args.vocab_size)}.tiktoken"
    each(leave_ranks, [(path, documents, dropped, divide, args.vocab_size)], 0, "train the tokenizer")
    return Tokenizer(read_ranks(path))


def leave_ranks(path, documents, dropped, divide, vocab_size):
    """Leaves the ranks of a tokenizer trained on what is kept for training."""
    write(path, Tokenizer.train(training_texts(documents, dropped, divide), vocab_size).tiktoken_file())


def training_texts(documents, dropped, divide, limit=12_000_000):
    """A fair share of each domain's training text, in the order of a hash; conversations as their messages and tools."""
    for domain in DOMAINS:
        budget = limit // len(DOMAINS)
        chosen = np.flatnonzero(dropped.kept & documents.is_in(domain))
        for i in chosen[np.lexsort((documents.index["id"][chosen], documents.index["order"][chosen]))]:
            record = documents[i]
            if divide(i, record, domain) == "train":
                budget -= len(text := content_of(record))
                if budget < 0:
                    break
                yield text


def read_ranks(path):
    """{bytes: id} of a file in tiktoken's format: a token in base64 and its id in each line."""
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in Path(path).read_bytes().splitlines() if line)}


# ----------------------------------------------------------------------------------------------------------------------
# Bins


TOKENS = np.dtype([("row", "<u4"), ("length", "<u4"), ("bin", "u1"), ("side", "u1"), ("lost", "<u4")])
MENTIONS = len(SPLITS)  # in place of a side


def assemble(out, documents, dropped, tokenized, heldout_apis, tokenizer):
    """Write the corpus from what the steps left, and remove of that what this corpus does not need. Returns the manifest."""
    tokens = [np.load(path) for path in tokenized]
    number = np.concatenate([documents.first[n] + t["row"] for n, t in enumerate(tokens)]).astype(np.int64)  # of each entry's document
    tokenizer.save(out)
    files = {}
    for code, domain in enumerate(BINS):
        for side, split in enumerate(SPLITS):
            chosen = [(t["bin"] == code) & (t["side"] == side) for t in tokens]
            files |= write_bin(out, f"{domain}.{split}", chosen, tokens, tokenized, number, documents, tokenizer)
    sides = np.concatenate([t["side"] for t in tokens])
    conversations = [i for i in number[sides == SPLITS.index("heldout")] if BINS[documents.index["bin"][i]] == "instruction"]
    lines = [r.to_json() for r in sorted((documents[i] for i in conversations), key=lambda r: (unit_hash(r.id), r.id))]
    rejected, masked = account(documents, dropped, number[sides == MENTIONS])
    write(out / "heldout_apis.json", json.dumps(heldout_apis, indent=0))
    write(out / "heldout.jsonl", "".join(line + "\n" for line in lines))
    write(out / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected.sample))
    for path in documents.work.iterdir():  # of other inputs and options
        if path.name.partition(".")[0] not in each.used:
            path.unlink()
    shares = {d: files[f"{d}.train.bin"]["tokens"] for d in BINS}
    total = max(1, sum(shares.values()))
    lost = sum(int(t["lost"].sum()) for t in tokens)
    return {"vocab_size": tokenizer.vocab_size, "lost_bytes": lost,
            "tokenizer_sha256": sha256(out / "tokenizer.json"),
            "files": files, "heldout_apis": len(heldout_apis),
            "dropped": dict(sorted(rejected.reasons.items())), "masked": dict(sorted(masked.items())), "shares": {d: n / total for d, n in shares.items()},
            "stages": {stage: [f"{d}.train.bin" for d in bins if shares[d]] for stage, bins in STAGES.items()}}


def account(documents, dropped, mentioning):
    """What was dropped, by reason with examples, and what was masked, by kind: in cleaning, and since."""
    rejected, masked = Rejected(), Counter()
    for name in documents.names:
        left = read_json(documents.work / f"{name}.json")
        rejected.merge(left["reasons"], left["sample"])
        masked.update(left["masked"])
    ids = documents.index["id"]
    for i in np.flatnonzero(dropped.reason).tolist():
        more = {"of": ids[dropped.copy_of[i]].decode("utf-8", "replace")} if dropped.copy_of[i] >= 0 else {}
        if i in dropped.match:
            more = dict(zip(("match", "file"), dropped.match[i]))
        elif documents.score[i]:
            more |= {"probability": round(float(documents.score[i]), 4)}
        rejected.add(Dropped.REASONS[dropped.reason[i]], ids[i].decode("utf-8", "replace"), **more)
    for i in mentioning:
        rejected.add(f"{BINS[documents.index['bin'][i]]} mentions a held-out API", ids[i].decode("utf-8", "replace"))
    rejected.shrink()
    return rejected, masked


def write_bin(out, name, chosen, tokens, tokenized, number, documents, tokenizer):
    """Write <name>.bin and .idx, .mask for instructions, .score for what was retrieved: the chosen documents in the order of a hash of
    their ids, copied piece by piece to where they belong. Returns the manifest entries."""
    which = number[np.concatenate(chosen)]
    lengths = np.concatenate([t["length"][c] for t, c in zip(tokens, chosen)]).astype(np.int64)
    order = np.lexsort((documents.index["id"][which], documents.index["order"][which]))
    starts = np.concatenate([[0], np.cumsum(lengths[order])])
    place = np.empty(len(order), np.int64)
    place[order] = starts[:-1]
    contents = {"bin": ("ids", tokenizer.dtype)} | ({"mask": ("mask", np.dtype(np.uint8))} if name.startswith("instruction") else {})
    entries = {}
    for suffix, (left, dtype) in contents.items():
        with writing_array(out / f"{name}.{suffix}", dtype, starts[-1]) as array:
            done = 0
            for path, entry, rows in zip(tokenized, tokens, chosen):
                counted = entry["length"] * (entry["bin"] == BINS.index("instruction") if left == "mask" else 1)
                first, counts = (np.cumsum(counted) - counted)[rows].astype(np.int64), counted[rows].astype(np.int64)
                source = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
                array[source + np.repeat(place[done:done + len(first)] - first, counts)] = np.load(path.with_suffix(f".{left}.npy"))[source]
                done += len(first)
        entries[f"{name}.{suffix}"] = {"dtype": str(dtype), "count": int(starts[-1])}
    small = {"idx": starts.astype(np.uint64)} | ({"score": documents.score[which[order]]} if name.startswith("retrieved") else {})
    for suffix, array in small.items():
        write(out / f"{name}.{suffix}", array.tobytes())
        entries[f"{name}.{suffix}"] = {"dtype": str(array.dtype), "count": len(array)}
    for file, entry in entries.items():
        entry["sha256"] = sha256(out / file)
    entries[f"{name}.bin"] |= {"tokens": int(starts[-1]), "documents": len(order)}
    return entries


@contextlib.contextmanager
def writing_array(path, dtype, count):
    """An array on disk to be filled, without holding it in memory; the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"")
    array = np.memmap(temporary, dtype, "w+", shape=count) if count else np.zeros(0, dtype)
    yield array
    if count:
        array.flush()
    temporary.replace(path)


class Corpus:
    """Opens a corpus directory read-only, memory-mapped, and refuses one that does not match its manifest.

    Raises ValueError naming the file that differs.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        if not (self.directory / "manifest.json").exists():
            raise ValueError(f"{self.directory}: no manifest.json. Run `python build_corpus.py` to its end first")
        self.manifest = json.loads((self.directory / "manifest.json").read_text())
        self.sha256 = sha256(self.directory / "manifest.json")
        for name, entry in self.manifest["files"].items():
            if not (self.directory / name).exists() or sha256(self.directory / name) != entry["sha256"]:
                raise ValueError(f"{self.directory / name}: missing or not what the manifest says. Run `python build_corpus.py` again")
        if sha256(self.directory / "tokenizer.json") != self.manifest["tokenizer_sha256"]:
            raise ValueError(f"{self.directory / 'tokenizer.json'}: not the tokenizer this corpus was made with")
        self.tokenizer = Tokenizer.load(self.directory)

    def read(self, domain, split, suffix="bin"):
        """Token ids ("bin"), document starts and the end ("idx") or learned-token mask ("mask"), as a memory map."""
        name = f"{domain}.{split}.{suffix}"
        entry = self.manifest["files"][name]
        if not entry["count"]:
            return np.zeros(0, entry["dtype"])
        return np.memmap(self.directory / name, entry["dtype"], "r")

    def documents(self, domain, split):
        """Each document's token ids."""
        ids, starts = self.read(domain, split), self.read(domain, split, "idx").astype(np.int64)
        return [ids[a:b] for a, b in zip(starts, starts[1:])]


def write_array(path, array):
    """Write an array in numpy's format, whole or not at all."""
    np.save(content := io.BytesIO(), array)
    write(path, content.getvalue())


def write_arrays(path, **arrays):
    """The same for several, by name."""
    np.savez(content := io.BytesIO(), **arrays)
    write(path, content.getvalue())


def read_json(path):
    """The JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_manifest(directory):
    """The manifest of a corpus, or None."""
    try:
        return read_json(directory / "manifest.json")
    except (FileNotFoundError, ValueError):
        return None


def write(path, content):
    """Write text or bytes; the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256(path):
    """A file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def report(manifest, seconds):
    """Print what a corpus holds, and what was dropped and masked on the way to it."""
    print(f"{'domain':<12} {'documents':>20} {'tokens':>22} {'share':>7}\n{'':<12} {'train':>10} {'held out':>9} {'train':>12} {'held out':>9}")
    for domain in BINS:
        train, heldout = (manifest["files"][f"{domain}.{s}.bin"] for s in SPLITS)
        if train["documents"] or domain != "retrieved":
            print(f"{domain:<12} {train['documents']:>10,} {heldout['documents']:>9,} {train['tokens']:>12,} {heldout['tokens']:>9,} "
                  f"{manifest['shares'][domain]:>7.1%}")
    for what in ("dropped", "masked"):
        for kind, count in manifest[what].items():
            print(f"{what} {count:,}: {kind}")
    if lost := manifest.get("lost_bytes"):
        print(f"lost {lost:,} bytes: the tokenizer has no token for them")
    if figures := manifest["retrieval"]:
        print(f"retrieved {figures['taken']:,} of the pool's {figures['pool']:,} documents, of probability {figures['least']:.3f} and more. "
              f"Of {figures['tested']:,.0f} documents not learned from: precision {figures['precision']:.3f}, recall {figures['recall']:.3f}, "
              f"F1 {figures['f1']:.3f}, calibration error {figures['calibration_error']:.3f}")
    kept, tokens = (sum(entry.get(what, 0) for entry in manifest["files"].values()) for what in ("documents", "tokens"))
    print(f"{kept:,} of {kept + sum(manifest['dropped'].values()):,} records kept, {manifest['heldout_apis']:,} APIs held out, vocabulary {manifest['vocab_size']:,}, "
          f"{seconds:.0f} s" + f", {tokens / max(1, seconds):,.0f} tokens/s" * (seconds >= 1))


def show(args):
    """Print documents of one bin after another, token by token in two shades; what is learned in tuning in green."""
    try:
        corpus = Corpus(args.out)
    except ValueError as error:
        fail(error)
    present = [(d, s) for s in SPLITS for d in BINS if corpus.manifest["files"][f"{d}.{s}.bin"]["documents"]]
    for k in range(args.show):
        (domain, split), turn = present[k % len(present)], k // len(present)
        starts = corpus.read(domain, split, "idx").astype(np.int64)
        number = turn * 7919 % (len(starts) - 1)  # a prime, to come around
        start, end = starts[number:number + 2]
        ids = corpus.read(domain, split)[start:end]
        mask = corpus.read(domain, split, "mask")[start:end] if domain == "instruction" else np.zeros(len(ids), np.uint8)
        text = corpus.tokenizer.decode(ids[:-1])
        [measured] = measure([text], *shingle_hashes([text]))
        scores = [f"{name} {value:,.2f}" for name, value in measured.items()] + [f"learned {mask.mean():.0%}"] * (domain == "instruction")
        if domain == "retrieved":
            scores.append(f"probability {corpus.read(domain, split, 'score')[number]:.3f}")
        print(f"--- {domain}.{split}, document {number:,}: {len(ids):,} tokens, {len(text) / len(ids):.1f} characters each; {', '.join(scores)}")
        print("".join(coloured(corpus.tokenizer.decode([i]), n, learned) for n, (i, learned) in enumerate(zip(ids.tolist(), mask))) + "\n")


def coloured(token, n, learned):
    """A token for a terminal; without one, or with NO_COLOR, tokens have a bar between them, and two where they are learned."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return token + ("‖" if learned else "|")
    lines = token.split("\n")  # a background that goes over a line's end would fill the screen
    return "\n".join(f"\033[{'32' if learned else '39'};48;5;{(236, 239)[n % 2]}m{line}\033[0m" if line else "" for line in lines)


if __name__ == "__main__":
    run_main(main)
