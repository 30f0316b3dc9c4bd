"""Step 2 of 6: build the corpus that is trained on.

In:   data/raw/*.jsonl, the records that collect.py wrote (or your own, in the same form).
Out:  data/corpus/
        tokenizer.tiktoken, tokenizer.json, tokenizer_config.json   one byte-level BPE tokenizer, for tiktoken and Hugging Face
        <domain>.<split>.bin, .idx                                  token ids and document starts; split is train or heldout
        instruction.<split>.mask                                    1 where a token is learned in tuning
        heldout_apis.json, heldout.jsonl                            APIs no training document mentions; their conversations
        manifest.json, rejected.jsonl                               counts and hashes of all this; a sample of what was dropped

Laptop:         python build_corpus.py
Larger models:  python build_corpus.py --vocab-size 32768
A base's own:   python build_corpus.py --tokenizer path/to/Qwen3-8B-Base
Own data:       python build_corpus.py --raw my/records --out my/corpus

Exact duplicates are dropped, near duplicates by --near-duplicates, what is
in test data by --benchmarks. APIs are held out by a hash of their name, so the same API falls on the same side in every
corpus. A finished build is not redone; a changed input or option is noticed by its hash.
"""
import argparse
import base64
import hashlib
import heapq
import json
import multiprocessing
import os
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from collect import (DOMAINS, HelpFormatter, Record, attempt, calls_in, fail, python_calls, read_values, run_main,
                     unit_hash)

SPLITS = ("train", "heldout")
FILES_HELDOUT = 0.1  # share of code and text documents kept from training
MAX_REJECTED = 100   # examples kept of each reason


def main():
    args = parse_args()
    started = time.time()
    out = Path(args.out)
    shards = sorted(Path(args.raw).glob("*.jsonl"))
    if not shards:
        fail(f"{args.raw}: no *.jsonl files. Run `python collect.py` first, or name the directory with --raw")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    options = {"tokenizer": tokenizer and sha256(Path(args.tokenizer) / "tokenizer.json"), "vocab_size": args.vocab_size,
               "heldout": args.heldout, "fold": args.fold, "near_duplicates": args.near_duplicates,
               "benchmarks": [sha256(f) for f in benchmark_files(args.benchmarks)], "inputs": {s.name: sha256(s) for s in shards}}
    if (out / "manifest.json").exists() and json.loads((out / "manifest.json").read_text())["options"] == options:
        print(f"{out} is up to date")
        return report(json.loads((out / "manifest.json").read_text()), time.time() - started)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)  # from here until it is written again the corpus is not valid

    records, rejected = read_records(shards)
    records = drop_duplicates(records, rejected)
    if args.near_duplicates:
        records = drop_near_duplicates(records, args.near_duplicates, args.workers, rejected)
    if args.benchmarks:
        records = drop_contaminated(records, args.benchmarks, rejected)
    heldout_apis = sorted({a for r in records if r.domain == "api_doc" for a in r.apis if in_fold(a, args.heldout, args.fold)})
    splits = split(records, heldout_apis, args.fold, rejected)
    tokenizer = tokenizer or Tokenizer.train(training_texts(splits), args.vocab_size)
    tokenizer.save(out)

    files, shares = {}, {}
    for domain in DOMAINS:
        for name in SPLITS:
            kept = sorted(splits.get((domain, name), []), key=lambda r: hashlib.sha256(r.id.encode()).digest())
            files |= write_bin(out, domain, name, kept, tokenizer, args.workers)
        shares[domain] = files[f"{domain}.train.bin"]["tokens"]
    write(out / "heldout_apis.json", json.dumps(heldout_apis, indent=0))
    write(out / "heldout.jsonl", "".join(r.to_json() + "\n" for r in splits.get(("instruction", "heldout"), [])))
    write(out / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected.sample))
    total = max(1, sum(shares.values()))
    manifest = {
        "options": options, "vocab_size": tokenizer.vocab_size, "tokenizer_sha256": sha256(out / "tokenizer.json"), "files": files,
        "heldout_apis": len(heldout_apis), "dropped": dict(rejected.reasons), "shares": {d: n / total for d, n in shares.items()}}
    write(out / "manifest.json", json.dumps(manifest, indent=1))
    report(manifest, time.time() - started)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--raw", default="data/raw", help="directory of records")
    parser.add_argument("--out", default="data/corpus", help="directory for the corpus")
    parser.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer of this model (byte-level BPE: Llama 3, Qwen, GPT-2, ...) "
                        "instead of training one; for pretrain.py --init DIR")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of the tokenizer trained here, special ones included")
    parser.add_argument("--near-duplicates", type=float, default=0.0, metavar="J", help="drop documents whose sets of 5-word runs have at least "
                        "this Jaccard similarity to those of a longer one, such as 0.8; 0 keeps them")
    parser.add_argument("--benchmarks", metavar="PATH", help="drop documents that share 13 words in a row, or a call with its arguments, with "
                        "this file or directory of test data (JSON, JSON lines, CSV, text)")
    parser.add_argument("--heldout", type=float, default=0.04, help="share of APIs kept from training")
    parser.add_argument("--fold", type=int, default=1, help="which share of the APIs is held out, 0 being the first: choose settings on one "
                        "fold and report another (our defaults were chosen on fold 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenize; the result is the same for any number")
    args = parser.parse_args()
    if not 0 < args.heldout < 1:
        fail(f"--heldout {args.heldout}: must be between 0 and 1")
    if not 0 <= args.near_duplicates <= 1:
        fail(f"--near-duplicates {args.near_duplicates}: must be between 0 and 1")
    if args.benchmarks and not benchmark_files(args.benchmarks):
        fail(f"--benchmarks {args.benchmarks}: no such file, or no JSON, CSV or text files in it")
    if args.vocab_size < 256 + len(SPECIAL_TOKENS):
        fail(f"--vocab-size {args.vocab_size}: must be at least {256 + len(SPECIAL_TOKENS)}, the bytes and the special tokens")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Records in, duplicates out


class Rejected:
    """Counts what is dropped by reason, and keeps some examples of each."""

    def __init__(self):
        self.reasons, self.sample = Counter(), []

    def add(self, reason, record_id, **more):
        self.reasons[reason] += 1
        if self.reasons[reason] <= MAX_REJECTED:
            self.sample.append({"reason": reason, "id": record_id, **more})


def read_records(shards):
    """The records of all shards, and the Rejected that counts lines which are none."""
    rejected, records = Rejected(), []
    for shard in tqdm(shards, desc="read", disable=None):
        with open(shard, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    records.append(Record.from_json(line))
                except ValueError as error:
                    print(f"{shard}:{number}: left out: {error}", file=sys.stderr)
                    rejected.add("not a record", f"{shard.name}:{number}")
    return records, rejected


def content_of(record):
    """What a record says, as one text."""
    return record.text if record.text is not None else json.dumps([record.messages, record.tools], ensure_ascii=False)


def drop_duplicates(records, rejected):
    """Keep one of the records whose content is equal up to case and white space: the one with the first id."""
    kept, seen = [], set()
    for record in sorted(records, key=lambda r: (r.domain, r.id)):
        digest = hashlib.sha256(" ".join(content_of(record).lower().split()).encode("utf-8", "replace")).digest()
        if digest in seen:
            rejected.add("duplicate", record.id)
        else:
            seen.add(digest)
            kept.append(record)
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# Near duplicates: MinHash (Broder 1997) and banded locality-sensitive hashing (Mining of Massive Datasets, chapter 3)

SHINGLE = 5          # words that are hashed together
BANDS, ROWS = 18, 7  # a pair of Jaccard similarity s is found with probability 1 - (1 - s^7)^18: 0.99 at 0.8, 0.13 at 0.5
WORD_BYTES = np.array([bytes([b]).isalnum() or b >= 128 for b in range(256)])


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
    encoded = [text.lower().encode("utf-8", "replace") + b" " for text in texts]
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


def minhash(texts):
    """Signatures (len(texts), BANDS * ROWS) uint32: two texts agree at a place with a probability that is the Jaccard
    similarity of their sets of shingles. The hashes are of the form (a·x + b mod 2^64) / 2^32 with x below 2^32, which is
    universal (Dietzfelbinger 1996) and needs no wider numbers.
    """
    hashes, starts = shingle_hashes(texts)
    x = hashes >> np.uint64(32)
    a, b = np.random.default_rng(0).integers(2**64, size=(2, BANDS * ROWS), dtype=np.uint64)
    signatures = np.empty((BANDS * ROWS, len(texts)), np.uint32)
    for i in range(BANDS * ROWS):
        signatures[i] = np.minimum.reduceat((x * (a[i] | np.uint64(1)) + b[i]) >> np.uint64(32), starts[:-1])
    return signatures.T


def drop_near_duplicates(records, threshold, workers, rejected):
    """Keep of records that are nearly the same the longest."""
    resembles = near_duplicates([content_of(r) for r in records], [r.id for r in records], threshold, workers)
    for i, kept in sorted(resembles.items()):
        rejected.add("near duplicate", records[i].id, of=records[kept].id)
    return [r for i, r in enumerate(records) if i not in resembles]


def near_duplicates(texts, ids, threshold, workers=1):
    """{position of a dropped text: that of the text it resembles}: a text is dropped if its Jaccard similarity to a kept one is
    at least the threshold. Longer texts come first, then those of lower id, so that the order of the input does not matter.
    """
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), ids[i]))
    batches = [[texts[i] for i in order[at:at + 500]] for at in range(0, len(order), 500)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        signatures = np.concatenate(list(tqdm(pool.imap(minhash, batches), total=len(batches), desc="minhash", disable=None)))
    pairs = np.unique(np.concatenate([band_pairs(signatures[:, at:at + ROWS]) for at in range(0, BANDS * ROWS, ROWS)]), axis=0)
    sets = lru_cache(100_000)(lambda i: np.unique(shingle_hashes([texts[order[i]]])[0]))
    dropped = {}
    for j, i in pairs.tolist():  # in the order of j: whether i, which is before it, is kept is known then
        if i not in dropped and j not in dropped:
            common = len(np.intersect1d(sets(i), sets(j), assume_unique=True))
            if common >= threshold * (len(sets(i)) + len(sets(j)) - common):
                dropped[j] = i
    return {order[j]: order[i] for j, i in dropped.items()}


def band_pairs(rows, near=16):
    """(M, 2) pairs j > i of texts that agree in a band: each with the first that has its values, and with the `near` before it."""
    weights = mix(np.arange(1, ROWS + 1, dtype=np.uint64))
    keys = mix((rows * weights).sum(1, dtype=np.uint64))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    heads = np.searchsorted(keys, keys)  # where each run of equal keys begins
    found = [np.stack([order, order[heads]], 1)[heads < np.arange(len(keys))]]
    for step in range(1, near + 1):
        equal = np.flatnonzero(keys[step:] == keys[:-step])
        found.append(np.stack([order[equal + step], order[equal]], 1))
    return np.concatenate(found)


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
    return re.findall(r"[a-z0-9\u0080-\U0010ffff]+", text.lower())


def telling(text):
    """(N,) Whether each run of OVERLAP words has eight different ones of two letters or more: counting and JSON have not."""
    words = [w if len(w) > 1 and not w.isdigit() else "" for w in words_of(text)]
    return np.array([len({*words[i:i + OVERLAP]} - {""}) >= 8 for i in range(len(words) - OVERLAP + 1)], bool)


def whole_runs(texts):
    """The hashes of each text's runs of exactly OVERLAP words."""
    hashes, starts = shingle_hashes(texts, OVERLAP)
    return [hashes[a:max(a, b - OVERLAP + 1)] for a, b in zip(starts, starts[1:])]


def drop_contaminated(records, path, rejected):
    """Drop the records that share something with the test data at a path, and keep what it is for the report."""
    benchmarks, kept = Benchmarks(benchmark_files(path)), []
    for record in tqdm(records, desc="decontaminate", disable=None):
        if found := benchmarks.match(content_of(record), record.messages):
            rejected.add("shares words or a call with a benchmark", record.id, match=found[0], file=found[1])
        else:
            kept.append(record)
    return kept


def benchmark_files(path):
    """The files of --benchmarks: none, one, or those in a directory."""
    if not path or not Path(path).is_dir():
        return [Path(path)] if path and Path(path).is_file() else []
    return sorted(p for p in Path(path).rglob("*") if re.search(r"\.(json|jsonl|csv|txt|md)(\.gz)?$", p.name))


# ----------------------------------------------------------------------------------------------------------------------
# Split: what a model is tested on is never in what it learned from


def in_fold(name, share, fold):
    """Whether a hash of the name falls into the given one of the 1 / share folds. Folds are counted round, from 0."""
    return int(unit_hash(name) / share) == fold % int(1 / share)


def split(records, heldout_apis, fold, rejected):
    """{(domain, split): records}.

    Of api_doc, trajectory and instruction, a record that documents or calls a held-out API is held out, and one that
    only mentions such an API by its qualified name is dropped. Code and text, which every compared model learns alike,
    are split by a hash of their id; they have fewer documents, so a larger share is held out.
    """
    heldout, mentions = set(heldout_apis), mention_finder(heldout_apis)
    splits = defaultdict(list)
    for record in tqdm(records, desc="split", disable=None):
        if record.domain in ("code", "text"):
            side = "heldout" if in_fold(record.id, FILES_HELDOUT, fold) else "train"
        elif heldout.intersection(record.apis):
            side = "heldout"
        elif mentions(content_of(record)):
            rejected.add(f"{record.domain} mentions a held-out API", record.id)
            continue
        else:
            side = "train"
        splits[record.domain, side].append(record)
    return splits


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

TOOL_TAGS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOOL_TAGS)
# What stands before a name, in a tool's definition as in a call; words with the space, dot or underscore before them; numbers
# of up to three digits; punctuation; white space. A qualified name so follows one token that nothing else follows, and is cut
# alike wherever it stands: to copy it a model need only look for what came after the same token before.
PATTERN = r'[ {](?="name": ")|"name": "|[ ._]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'
# How others cut, where their tokenizer.json only names it: GPT-2, and the same between single digits (SmolLM).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Tokenizer:
    """Byte-level BPE over tiktoken, with the chat format. Special ids come only from `render`, never from text.

    >>> tokenizer = Tokenizer.train(["low lower lowest"] * 9, 270)
    >>> tokenizer.decode(tokenizer.encode("lower <|im_end|>"))
    'lower <|im_end|>'
    """

    def __init__(self, ranks, special=None, pattern=PATTERN, normal_form=None):
        self.ranks = ranks  # {bytes: id}
        self.special = special or {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.pattern, self.normal_form = pattern, normal_form
        self.vocab_size = max(*ranks.values(), *self.special.values()) + 1
        self.end_of_text = next(self.special[t] for t in ("<|endoftext|>", "<|end_of_text|>") if t in self.special)
        self.im_end = self.special["<|im_end|>"]
        self.encoding = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)

    @classmethod
    def load(cls, directory):
        """From the tokenizer.json in a directory: ours, or that of a model with byte-level BPE such as GPT-2, Llama 3 and Qwen.

        Where the chat format's tokens are missing they take the places of reserved ones, or new ones at the end.
        """
        path = Path(directory) / "tokenizer.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            model, added = content["model"], {t["content"]: t["id"] for t in content["added_tokens"]}
            pattern, normal_form = read_pattern(content["pre_tokenizer"]), read_normal_form(content["normalizer"])
            byte = {symbol: i for i, symbol in enumerate(byte_symbols())}
            ranks = {bytes(byte[c] for c in token): i for token, i in model["vocab"].items() if token not in added}
            merged = [model["vocab"]["".join(m) if isinstance(m, list) else m.replace(" ", "")] for m in model["merges"]]
            if model["type"] != "BPE" or merged != sorted(merged) or any(bytes([i]) not in ranks for i in range(256)):
                raise ValueError("not a BPE over all bytes whose ids follow the order of its merges")
        except FileNotFoundError:
            fail(f"{path}: no such file; a directory with a tokenizer has one")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{path}: not a byte-level BPE tokenizer that can be read here ({error!r})")
        missing = [t for t in SPECIAL_TOKENS if t not in added and not (t == "<|endoftext|>" and "<|end_of_text|>" in added)]
        reserved = sorted((t for t in added if re.search(r"reserved|unused|extra", t)), key=added.get)
        end = max(*ranks.values(), *added.values(), -1) + 1
        for token in missing:
            added[token] = added.pop(reserved.pop(0)) if reserved else end
            end = max(end, added[token] + 1)
        return cls(ranks, added, pattern, normal_form)

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) until there are vocab_size tokens."""
        splitter = re.compile(python_pattern(PATTERN))
        words = Counter(word for text in texts for word in splitter.findall(text))
        return cls(train_bpe({w.encode("utf-8", "replace"): n for w, n in words.items()}, vocab_size - len(SPECIAL_TOKENS)))

    def same_as(self, other):
        """Whether both give every text and every special token the same ids."""
        return all(getattr(self, part) == getattr(other, part) for part in ("ranks", "special", "pattern", "normal_form"))

    def encode(self, text):
        """Ids of a text. What looks like a special token in it is ordinary text."""
        return self.encoding.encode_ordinary(unicodedata.normalize(self.normal_form, text) if self.normal_form else text)

    def decode(self, ids):
        return self.encoding.decode(ids)

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
            system = messages[0]["content"] + "\n" if messages and messages[0]["role"] == "system" else ""
            add("<|im_start|>"), add("system\n"), add_text(system), add("<tools>"), add("\n")
            for tool in tools:
                add_text(json.dumps(tool["function"], ensure_ascii=False) + "\n")
            add("</tools>"), add("<|im_end|>"), add("\n")
        for message in messages:
            role, content = message["role"], message.get("content") or ""
            if role == "system" and tools:
                continue  # stands above the tools
            learned = int(role == "assistant")
            add("<|im_start|>"), add(role + "\n")
            if role == "tool":
                add("<tool_response>"), add_text("\n" + content + "\n"), add("</tool_response>")
            else:
                add_text(content, learned)
            for i, call in enumerate(message.get("tool_calls") or []):
                name, arguments = json.dumps(call["function"]["name"], ensure_ascii=False), call["function"]["arguments"]
                if i or content:
                    add("\n", learned)
                add("<tool_call>", learned)
                add_text(f'\n{{"name": {name}, "arguments": {arguments}}}\n', learned)
                add("</tool_call>", learned)
            add("<|im_end|>", learned), add("\n")
        if answer:
            add("<|im_start|>"), add("assistant\n")
        return ids, mask

    def save(self, directory):
        """Write tokenizer.tiktoken and, for Hugging Face from the same ranks, tokenizer.json, its config and the stop tokens."""
        directory = Path(directory)
        by_rank = sorted(self.ranks, key=self.ranks.get)
        write(directory / "tokenizer.tiktoken", "".join(f"{base64.b64encode(t).decode()} {self.ranks[t]}\n" for t in by_rank))
        symbol = byte_symbols()
        written = {token: "".join(symbol[b] for b in token) for token in by_rank}
        merges = [[written[half] for half in halves(token, self.ranks)] for token in by_rank if len(token) > 1]
        specials = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                     "special": t not in TOOL_TAGS} for t, i in sorted(self.special.items(), key=lambda entry: entry[1])]
        write(directory / "tokenizer.json", json.dumps({
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


# What Tokenizer.render writes, as a template for servers.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}<tools>
{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}</tools><|im_end|>
{% endif %}{%- for message in messages %}{% if not (message.role == 'system' and tools) %}<|im_start|>{{ message.role }}
{% if message.role == 'tool' %}<tool_response>
{{ message.content }}
</tool_response>{% else %}{{ message.content or '' }}{% endif %}{% for call in message.tool_calls or [] %}{% if not loop.first or message.content %}{{ '\\n' }}{% endif %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}}
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
    if normalizer and normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"normalizer {normalizer}")
    return normalizer and normalizer["type"]


def byte_symbols():
    """GPT-2's printable character for every byte, in which Hugging Face writes byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def training_texts(splits, limit=12_000_000):
    """A fair share of each domain's training text, for the tokenizer; conversations as their messages and tools."""
    for domain in DOMAINS:
        budget = limit // len(DOMAINS)
        for record in sorted(splits.get((domain, "train"), []), key=lambda r: unit_hash(r.id)):
            text = record.text if record.text is not None else json.dumps([record.tools, record.messages], ensure_ascii=False)
            budget -= len(text)
            if budget < 0:
                break
            yield text


# ----------------------------------------------------------------------------------------------------------------------
# Bins


def encode_record(record):
    """(ids, mask) of a record, a special token at its end. Runs in worker processes, which inherit the tokenizer."""
    tokenizer = encode_record.tokenizer
    if record.text is not None:
        ids = tokenizer.encode(record.text)
        mask = [1] * len(ids)
    else:
        ids, mask = tokenizer.render(record.messages, record.tools)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return np.array([*ids, tokenizer.end_of_text], dtype), np.array([*mask, 0], np.uint8)


def write_bin(out, domain, name, records, tokenizer, workers):
    """Tokenize records into <domain>.<split>.bin and .idx, and .mask for instructions. Returns their manifest entries."""
    encode_record.tokenizer = tokenizer
    context = multiprocessing.get_context("fork")
    with context.Pool(workers) as pool:
        encoded = list(tqdm(pool.imap(encode_record, records, chunksize=64), total=len(records), desc=f"{domain}.{name}", disable=None))
    ids = np.concatenate([np.zeros(0, np.uint16), *(e[0] for e in encoded)])
    starts = np.cumsum([0] + [len(e[0]) for e in encoded], dtype=np.uint64)
    arrays = {"bin": ids, "idx": starts}
    if domain == "instruction":
        arrays["mask"] = np.concatenate([np.zeros(0, np.uint8), *(e[1] for e in encoded)])
    entries = {}
    for suffix, array in arrays.items():
        path = out / f"{domain}.{name}.{suffix}"
        write(path, array.tobytes())
        entries[path.name] = {"dtype": str(array.dtype), "count": len(array), "sha256": sha256(path)}
    entries[f"{domain}.{name}.bin"] |= {"tokens": len(ids), "documents": len(records)}
    return entries


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
    print(f"{'domain':<12} {'documents':>20} {'tokens':>22} {'share':>7}\n{'':<12} {'train':>10} {'held out':>9} {'train':>12} {'held out':>9}")
    for domain in DOMAINS:
        train, heldout = (manifest["files"][f"{domain}.{s}.bin"] for s in SPLITS)
        print(f"{domain:<12} {train['documents']:>10,} {heldout['documents']:>9,} {train['tokens']:>12,} {heldout['tokens']:>9,} "
              f"{manifest['shares'][domain]:>7.1%}")
    for reason, count in manifest["dropped"].items():
        print(f"dropped {count:,}: {reason}")
    print(f"{manifest['heldout_apis']:,} APIs held out, vocabulary {manifest['vocab_size']:,}, {seconds:.0f} s")


if __name__ == "__main__":
    run_main(main)
