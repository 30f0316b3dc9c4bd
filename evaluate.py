"""Step 6 of 6: measure models as agents, on APIs held out from the corpus and on the benchmarks of the paper
(arXiv 2502.06589), and compare them.

In:   checkpoint directories (out/control and out/ours, or --model), or URLs of OpenAI-compatible endpoints;
      data/corpus for the suite heldout, the benchmarks' own files beneath --data for the others
Out:  out/eval/results.json, one object per score with its 95% interval; out/eval/report.md, the same as
      tables, and what failed, with examples; out/eval/items/<model>/<suite>.jsonl, one record per item

Laptop:    python evaluate.py
Others:    python evaluate.py --model out/stage2 path/to/Qwen3-0.6B --suite bfcl mmlu --data benchmarks/
           python evaluate.py --model http://localhost:8000/v1 --suite bfcl agentbench-db --data benchmarks/
One node:  torchrun --nproc_per_node=8 evaluate.py --model DIR --suite bfcl --data benchmarks/
Ask:       python evaluate.py --ask "What is the mean of 3 and 4?" --tools FILE.py
Serve:     python evaluate.py --serve out/ours --port 8000

Suites
  heldout        of documents and APIs that no model was trained on:
                   loss: mean loss of each document, nats per token, by domain: what was forgotten shows too;
                   choice: one tool of four fits; by likelihood: which name is likeliest after the request,
                     direct, and which tool makes the request likeliest, channel, arXiv 2108.04106;
                   next: with which of four calls a trajectory begins, by likelihood, for models that cannot
                     chat yet; the idea of APTBench, arXiv 2510.24397;
                   calls: the share of right answers, first of calls that have arguments, then by number of
                     arguments and kind of conversation; decoded freely and, as calls-constrained, within
                     the names and schemas of the tools at hand
  bfcl           the Berkeley Function Calling Leaderboard's categories of v1 to v3; multi-turn where the
                 package bfcl-eval is installed
  agentbench-db, agentbench-os    AgentBench: SQL in SQLite, a shell in a sandbox, several rounds per item
  api-bank       API-Bank's calls, by exact match of name and arguments; its own execution is less strict
  mmlu           multiple choice by likelihood, for what is kept of general ability

Likelihoods (heldout, mmlu) need a checkpoint directory. Each model is compared with the first by a paired
bootstrap over items. An answer that fails in any way counts as wrong.
"""
import argparse
import ast
import codecs
import contextlib
import copy
import csv
import hashlib
import importlib
import inspect
import itertools
import json
import operator
import os
import platform
import queue
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import threading
import time
import unicodedata
import uuid
import warnings
from collections import Counter, defaultdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model as transformer
from build_corpus import CHAT_TEMPLATE, Tokenizer, is_main, print_tokens, read_json, sha256, write
from collect import (TYPE_NAMES, HelpFormatter, Record, ask_endpoint, canonical, chat_message, claim,
                     definition, fail, fingerprint, fits, mapping, read_values, run_main, source_apis,
                     unit_hash, visible)
from pretrain import VALIDATED, add_flags, load_checkpoint, open_corpus, optional, read_metrics

VERDICTS = "right wrong abstained unparseable error".split()  # abstained: no call where one was wanted
HEADLINE = "name and arguments"  # of calls that have arguments: the first metric of the table
HELDOUT = "loss choice next calls calls-constrained".split()  # what the suite heldout consists of
LEGEND = "\n\n* the interval excludes 0. Loss: nats per token, lower is better. The rest: higher is better."


def suites():
    """{name: function of the options (for HELDOUT, of corpus and options) that gives (id, episode) items}"""
    return {
        "loss": document_losses, "choice": tool_choices, "next": next_calls, "calls": heldout_calls,
        "calls-constrained": partial(heldout_calls, most=300),
        "bfcl": bfcl, "agentbench-db": agentbench_db, "agentbench-os": agentbench_os, "api-bank": api_bank,
        "mmlu": mmlu}


def main():
    """Measure the models on the suites and write the report; or serve one, or ask it."""
    args = parse_args()
    if args.serve:
        return serve(args)
    if args.ask is not None:
        return show_answer(args)
    parts = [{"heldout": HELDOUT}.get(suite, [suite]) for suite in args.suite]
    names = dict.fromkeys(name for suite in parts for name in suite)
    pyplot = args.plot and optional("matplotlib.pyplot", "--plot")
    started, out = time.time(), Path(args.out) / "eval"
    corpus = open_corpus(args.corpus) if names.keys() & HELDOUT else None
    chosen = {}  # {suite: its episodes}
    for name in names:
        of_corpus = name in HELDOUT
        suite = name + "-constrained" * (args.constrained and not of_corpus and name != "mmlu")
        chosen[suite] = suites()[name](*[corpus] * of_corpus, args)
    published = read_reference(args.reference, chosen)
    benchmarks = listing(args.data)
    settings = [sha256(__file__), args.limit, args.seq_len, args.max_tokens, args.mode]
    items = {suite: {} for suite in chosen}  # {suite: {model: its items}}
    paths = args.model or [f"{args.out}/{name}" for name in ("control", "ours")]
    labels = [name_model(path, paths) for path in paths]
    lock = claim(args.out, "eval")  # is held until this ends
    for label, path in zip(labels, paths):
        model = open_model(path, corpus, args)
        for suite, episodes in chosen.items():
            identity = [model.identity, corpus.sha256 if suite in HELDOUT else benchmarks, *settings]
            items[suite][label] = play_all(suite, episodes, model, identity, out / "items" / label, args)
        del model  # before the next is loaded
    if not is_main():
        return
    results = [row for suite in chosen for row in summarise(suite, items[suite], labels)]
    write(out / "results.json", json.dumps(results, indent=1))
    tables = "\n\n".join(table(suite, results, labels, published) for suite in chosen) + LEGEND
    print(tables)
    failed = "\n".join(failures(suite, items[suite], labels) for suite in chosen)
    write(out / "report.md", visible(f"# {', '.join(labels)}\n\n{tables}\n\n{failed}"))
    if pyplot:
        draw(results, labels, paths, out, pyplot)
    for item in items.get("calls", {}).get(labels[-1], [])[:3]:
        show_item(item, labels[-1], corpus.tokenizer)
    print(f"\n{time.time() - started:.0f} s; the report is {out}/report.md, every item is in {out}/items")


def play(episodes, reply):
    """Run episodes [(id, function)] together, with one batched reply per round. Returns their records.

    An episode is a generator: it yields (messages, tools) and is sent an Answer, or a list of (context,
    continuation) and is sent their log-likelihoods, and returns its record.
    """
    running = {id_: begin() for id_, begin in episodes}
    records = {id_: {"id": id_} for id_ in running}
    answers = dict.fromkeys(running)  # to the episodes that go on
    while answers:
        asked = {}
        for id_, answer in answers.items():
            try:
                asked[id_] = running[id_].send(answer)
                if isinstance(asked[id_], tuple):
                    records[id_].setdefault("prompt", asked[id_])
            except StopIteration as end:
                records[id_] |= end.value
        answers = dict(zip(asked, reply([*asked.values()]))) if asked else {}
    return [*records.values()]


def play_all(suite, episodes, model, identity, directory, args):
    """The records of a suite's episodes, from disk or played now; a finished one is on disk at once.

    Episodes are played in groups, which ranks share out: what a batch holds depends on neither the number of
    ranks nor what was done before. Each rank writes a part, and the first joins them.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    directory.mkdir(parents=True, exist_ok=True)
    done = read_items(directory, suite, identity)

    def unfinished(some):
        return any(id_ not in done for id_, _ in some)

    if unfinished(episodes):
        part = directory / f"{suite}.part{rank}.jsonl"
        write(part, json_lines([identity, *done.values()]))
        groups = [episodes[i:i + model.group] for i in range(0, len(episodes), model.group)]
        todo = [group for group in groups[rank::world] if unfinished(group)]
        longest = args.max_tokens or (160 if suite in HELDOUT else 1024)
        reply = partial(model.reply, max_tokens=longest, constrained=suite.endswith("-constrained"))
        with open(part, "a", encoding="utf-8") as file, ThreadPool(model.workers) as pool:
            played = (map if model.workers == 1 else pool.imap_unordered)(partial(play, reply=reply), todo)
            for records in tqdm(played, f"{directory.name}: {suite}", len(todo), leave=False,
                                disable=not is_main() or None):
                file.write(json_lines(records))
                file.flush()
    if not is_main():
        return None
    while unfinished(episodes):  # for the other ranks
        done = read_items(directory, suite, identity)
        time.sleep(0.05)
    items = [done[name] for name, _ in episodes]
    write(directory / f"{suite}.jsonl", json_lines([identity, *items]))
    for path in directory.glob(f"{suite}.part*.jsonl"):
        path.unlink()
    return items


def check_call(tools, calls, gold, language="python"):
    """Whether calls are the gold ones in any order, and the nearest miss of KINDS: (bool, kind or None).

    tools: function definitions, with BFCL's names of types or JSON Schema's; calls: [(name, arguments)];
    gold: [{name: {parameter: [acceptable values]}}], where "" among the values lets the parameter be left
    out. Each gold call in turn takes the first call left that fits; BFCL's simple and multiple categories are
    the case of one. Where BFCL's checker raises an exception, the answer is wrong.

    >>> f = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    >>> gold = [{"f": {"a": [1, 2]}}]
    >>> check_call([f], [("f", {"a": 1})], gold), check_call([f], [("f", {"a": 1.0})], gold)
    ((True, None), (False, 'wrong type'))
    """
    if len(calls) != len(gold):
        return False, "wrong count"
    left = list(calls)
    try:
        for (name, acceptable), in map(dict.items, gold):
            tool, kinds = next((t for t in tools if t["name"] == name), None), []
            for i, call in enumerate(left):
                kinds.append(mismatch(tool, *call, acceptable, language))
                if not kinds[-1]:
                    del left[i]
                    break
            else:
                return False, max(kinds, key=KINDS.index)
    except UNREADABLE:
        return False, "wrong value"
    return True, None


def summarise(suite, items, models):
    """What out/eval/results.json holds of a suite: an object for each metric and model, the others' compared
    with the first's.

    Metrics are means over the items that have them; totals are formulas of these means (TOTALS).
    """
    rng = np.random.default_rng(0)  # metrics have draws of their own, since their items differ
    rows = {}  # {metric: [the models' records of an item]}
    for row in zip(*(items[model] for model in models)):
        for metric in row[0]["scores"]:
            rows.setdefault(metric, []).append(row)
    means = {}  # {metric: (1 + resamples, models)}: the mean of all items, then those of the resamples
    for metric in sorted(rows, key=lambda metric: metric != HEADLINE):
        values = np.array([[item["scores"][metric] for item in row] for row in rows[metric]])  # (N, models)
        means[metric] = np.vstack([values.mean(0), resample(values, rng)])
    for total, formula in TOTALS.get(suite.removesuffix("-constrained"), {}).items():
        with contextlib.suppress(KeyError):  # not all of its parts were measured
            means[total], rows[total] = total_of(formula, means, rows)
    results = []
    for metric, mean in means.items():
        for m, model in enumerate(models):
            n, verdicts = len(rows[metric]), Counter(row[m].get("verdict") for row in rows[metric])
            result = {"model": model, "suite": suite, "metric": metric, "n": n, "score": mean[0, m],
                      **interval("", mean[1:, m])}
            if None not in verdicts:
                result["verdicts"] = {v: verdicts[v] / n for v in VERDICTS}
            if m:
                difference = mean[:, m] - mean[:, 0]
                result |= {"baseline": models[0], "difference": difference[0],
                           **interval("difference_", difference[1:])}
            results.append(result)
    return results


def interval(prefix, draws):
    """The 95% bootstrap interval, from the percentiles."""
    return dict(zip((f"{prefix}low", f"{prefix}high"), np.percentile(draws, [2.5, 97.5]).tolist()))


def table(suite, results, models, published=()):
    """A suite's results as a table in Markdown, a row a metric and model, published ones after measured."""
    rows = [["metric", "n", "model", "score", "95% interval", f"minus {models[0]}, 95% interval", *VERDICTS]]
    of_suite = [r for r in results if r["suite"] == suite]
    of_suite += [r for r in published if r["suite"] == suite.removesuffix("-constrained")]
    for metric in dict.fromkeys(r["metric"] for r in of_suite):
        for i, r in enumerate(r for r in of_suite if r["metric"] == metric):
            head = ["", ""] if i else [metric, f"{r['n']:,}" if "n" in r else ""]
            within = f"[{r['low']:.3f}, {r['high']:.3f}]" if "n" in r else ""
            difference = ""
            if "baseline" in r:
                low, high = r["difference_low"], r["difference_high"]
                star = " *" * (r["n"] > 1 and (low > 0 or high < 0))
                difference = f"{r['difference']:+.3f} [{low:+.3f}, {high:+.3f}]{star}"
            shares = [f"{share:.0%}" for share in r.get("verdicts", {}).values()]
            rows.append([*head, r["model"], f"{r['score']:.3f}", within, difference, *shares])
    return f"### {suite}\n\n{markdown(rows)}"


# ============================================================================================================
# Below: options; items; models and endpoints; constrained decoding; a section a benchmark; the sandbox; the
# report; the server.

# ------------------------------------------------------------------------------------------------------------
# Options


def parse_args():
    """The flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", nargs="+", help="checkpoint directories, or URLs of OpenAI-compatible "
                        "endpoints such as http://localhost:8000/v1 (the key is taken from OPENAI_API_KEY), "
                        "with #NAME where one serves several models; the first is what the others are "
                        "compared with (default: control and ours under --out)")
    parser.add_argument("--suite", nargs="+", default=["heldout"], choices=["heldout", *suites()],
                        help="what to measure; heldout: its five parts")
    add_flags(parser, {"what is read and written": {
        "data": ("data/benchmarks", "directory that holds, at any depth, the official files of the "
                 "benchmarks"),
        "corpus": ("data/corpus", "corpus directory"),
        "out": ("out", "directory of the runs; results go to its eval/"),
        "reference": (None, "JSON list of published scores, objects with model, suite, metric, score (a "
                      "share) and source, which the tables show beside the measured ones"),
        "plot": (False, "draw out/eval/report.png with matplotlib: scores and intervals, the models' "
                 "training as curves")
    }, "how it is measured": {
        "limit": (None, "items of a category at most (default: all; in heldout 600 calls, 300 constrained "
                  "ones, 150 of all else)", int),
        "mode": ("native", "of the benchmarks: tools given as such, calls made as the model was trained to; "
                 "or tools and the form of an answer described in words", ["native", "prompt"]),
        "constrained": (False, "in the benchmarks too, decode calls within the names and schemas of the "
                        "tools at hand"),
        "max-tokens": (None, "tokens of an answer at most; one that is longer is cut off, and counts as such "
                       "(default: 1024; 160 in heldout)", int),
        "seq-len": (768, "of heldout: tokens of a document that are read, and of a conversation that is "
                    "asked"),
        "batch-size": (32, "items that a checkpoint works on at once"),
        "parallel": (16, "items that an endpoint works on at once"),
        "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    }, "instead": {
        "serve": (None, "answer OpenAI's API with the model in this directory, on 127.0.0.1"),
        "port": (8000, "of --serve"),
        "ask": (None, "show what the first --model (default: ours under --out) is given for this request, "
                "what it writes, and the calls in it, of which none is made"),
        "tools": (None, "of --ask: a Python file, whose public functions are the tools and which is not run, "
                  "or a JSON list of tools")}})
    args = parser.parse_args()
    if args.constrained and args.mode == "prompt":
        fail("--constrained keeps to the schemas of tools, which --mode prompt does not give as such")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # a GPU a rank
    return args


# ------------------------------------------------------------------------------------------------------------
# Items


class Answer(NamedTuple):
    """What a model writes."""
    text: str                   # all of it, calls in Hermes form included
    calls: list | None = None   # [(name, arguments)]; None if what it writes as a call is not one
    ended: bool = True          # by itself: not cut off at the limit of tokens
    error: str | None = None    # why there is none


def turn(answer, mode="native"):
    """The assistant's message that an Answer is, as the conversation goes on."""
    calls = answer.calls if mode == "native" else None
    text = answer.text.partition("<tool_call>")[0].rstrip("\n") if calls else answer.text
    return chat_message("assistant", text, calls)


def verdict(answer, calls, wanted, right, why=""):
    """The start of an item's record: which of VERDICTS, why if it is not right, the calls that were made, and
    the output.

    wanted: whether there should be a call; right: whether what was written is right, if it can be read; why:
    what is wrong with it, if not.
    """
    if answer.error:
        failure = re.sub(r"\d+", "N", answer.error)
        return {"verdict": "error", "failure": failure, "calls": None, "output": "", "error": answer.error}
    if calls is None:
        found, why = "unparseable", "no call that can be read"
    elif not calls and not is_refusal(answer):
        found, why = "unparseable", "neither a call nor words" if answer.ended else "cut off"
    elif not calls and wanted:
        found, why = "abstained", "no call"
    elif calls and not wanted:
        found, why = "wrong", "a call where none fits"
    else:
        found = "right" if right else "wrong"
    item = {"verdict": found, "calls": calls, "output": answer.text}
    return item if found == "right" else item | {"failure": why}


def is_refusal(answer):
    """Whether an answer without a call can be a refusal: at least three different words (or characters that
    are words), no markup, nothing like a call, not cut off; or the empty list. "abc" is garbage.

    >>> texts = ["No function fits.", "abc", "</tool_call> I do not know", "I call f(a=1) now."]
    >>> [is_refusal(Answer(text)) for text in texts]
    [True, False, False, False]
    """
    text = after_thought(answer.text)
    words = set(re.findall(r"[\u3040-\ud7ff]|[^\W\d_]+", text.lower()))
    plain_words = len(words) >= 3 and not holds_call(text) and not re.search(r"<[/|]?\w", text)
    return answer.ended and (text == "[]" or plain_words)


def read_items(directory, suite, identity):
    """{id: item} of a suite's file and of its parts, those that were written under this identity, but for
    last lines that were cut off.
    """
    found = {}
    for path in directory.glob(f"{suite}.*jsonl"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            head, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            if json.loads(head) == identity:
                found |= {item["id"]: item for item in map(json.loads, lines)}
    return found


def json_lines(values):
    """Values as lines of a file."""
    return "".join(json.dumps(value) + "\n" for value in values)


def listing(directory):
    """A hash of which files a directory holds, their sizes and times."""
    files = [(str(path), path.stat()) for path in sorted(Path(directory).rglob("*")) if path.is_file()]
    return fingerprint(None, [(path, about.st_size, about.st_mtime_ns) for path, about in files])


def find_data(directory, pattern):
    """The files (or directories) of that name, which may hold wildcards, anywhere beneath a directory; at
    least one, or this is the end.
    """
    found = sorted(Path(directory).rglob(pattern))
    if not found:
        fail(f"{directory}: there is no {pattern} in it; --data DIR says where the benchmarks' files are")
    return found


def literal_value(text):
    """The value that a Python literal in a text stands for, or None."""
    try:
        return ast.literal_eval(text)
    except UNREADABLE:
        return None


def read_all(path):
    """The JSON values of a file, or exit with the line that is none."""
    values = []
    for where, value in read_values(path):
        if isinstance(value, ValueError):
            fail(f"{path}, line {where}: not JSON")
        values.append(value)
    return values


# ------------------------------------------------------------------------------------------------------------
# What answers: a checkpoint directory or an endpoint


def open_model(path, corpus, args):
    """The Local or Endpoint that a --model stands for."""
    if not re.match("https?://", path):
        return Local(path, corpus, args)
    local = {"--constrained": args.constrained, "--suite heldout": corpus,
             "--suite mmlu": "mmlu" in args.suite, "--ask": args.ask is not None}
    for flag, given in local.items():
        if given:
            fail(f"--model {path}: {flag} needs a checkpoint directory")
    return Endpoint(path, args)


def name_model(path, paths):
    """What a model is called in tables: the last part of its path, if no other's is the same. A password in
    a URL is left out.
    """
    def safe(text):
        return re.sub(r"[^\w.-]+", "_", re.sub("//[^/]*@", "//", text))

    def last(path):
        name = re.sub(".*(#|://([^/]*@)?)", "", path)
        return safe(name if name != path else Path(path).resolve().name)

    return last(path) if [last(p) for p in paths].count(last(path)) == 1 else safe(path)


class Local:
    """A checkpoint directory, which works on a batch at a time."""
    workers = 1

    def __init__(self, path, corpus, args):
        self.args, self.group = args, args.batch_size
        dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        if corpus:
            self.model, self.tokenizer = load_checkpoint(path, corpus, args.device, dtype), corpus.tokenizer
            longest = self.model.config.max_seq_len
            if args.seq_len > longest:
                fail(f"--seq-len {args.seq_len} is more than the {longest} positions of {path}")
        else:
            try:
                self.model, self.tokenizer = transformer.load(path, args.device, dtype), Tokenizer.load(path)
            except ValueError as error:
                fail(error)
            size = self.tokenizer.vocab_size
            if self.model.config.vocab_size < size:  # it lacks some of the chat format's tokens
                transformer.grow_vocabulary(self.model, size, self.tokenizer.special_pieces())
        self.model.eval()
        torch.backends.cuda.enable_cudnn_sdp(False)  # would plan anew for each length of a text
        if other_template(Path(path)):
            tqdm.write(f"{path}: its chat template is not the one used here (ChatML with Hermes calls). To "
                       "measure it in its own, serve it with its own server: --model http://HOST:8000/v1")
        files = sorted(Path(path).glob("*.json")) + sorted(Path(path).glob("*.safetensors"))
        code = transformer.__file__, inspect.getfile(Tokenizer)
        self.identity = [args.device, *map(sha256, (*code, *files))]

    def reply(self, requests, max_tokens, constrained=False):
        """What episodes, all of a kind, asked: an Answer to each (messages, tools), or log-likelihoods for
        each list of pairs.
        """
        if isinstance(requests[0], tuple):
            return self.answer(requests, max_tokens, constrained)
        likelihoods = iter(self.score(itertools.chain(*requests)))
        return [[next(likelihoods) for _ in pairs] for pairs in requests]

    def answer(self, chats, max_tokens, constrained=False):
        """The Answers to [(messages, tools)], decoded greedily."""
        prompts = [self.tokenizer.render(*chat, answer=True)[0] for chat in chats]
        window = self.model.config.max_seq_len
        answers = [Answer("", None, False, f"a prompt of {len(p)} tokens, and a window of {window}")
                   for p in prompts]
        if fit := [i for i, p in enumerate(prompts) if len(p) <= window]:
            tools = [chats[i][1] for i in fit]
            outputs = self.generate([prompts[i] for i in fit], tools, max_tokens, constrained)
            for i, output in zip(fit, outputs):
                text = self.tokenizer.decode(output)
                ended = len(output) < min(max_tokens, window - len(prompts[i]) + 1)
                answers[i] = Answer(text, parse_calls(text), ended)
        return answers

    def generate(self, prompts, tools, max_tokens, constrained):
        """What the model writes after each prompt, all of them ids; tools: a list for each."""
        choose = Constraint(self.tokenizer, tools) if constrained else None
        ends = [self.tokenizer.im_end, self.tokenizer.end_of_text]
        return transformer.generate(self.model, prompts, max_tokens, ends, choose=choose)

    @torch.inference_mode()
    def score(self, pairs):
        """The log-likelihood, in nats, of each continuation after its context, both texts or ids; None where
        they do not fit the window.
        """
        found, places = [], defaultdict(list)  # {the tokens that are read: [(which pair, what is predicted)]}
        for i, pair in enumerate(pairs):
            context, continuation = (p if isinstance(p, list) else self.tokenizer.encode(p) for p in pair)
            places[*context, *continuation[:-1]].append((i, continuation))
            found.append(None)
        longest = self.model.config.max_seq_len
        fit = sorted((ids for ids in places if len(ids) <= longest), key=len)  # little padding
        for at in range(0, len(fit), self.args.batch_size):
            rows = [torch.tensor(ids) for ids in fit[at:at + self.args.batch_size]]
            ids = pad_sequence(rows, batch_first=True).to(self.args.device)
            for x, row in zip(self.model.hidden(ids), rows):  # (T, C)
                for i, continuation in places[*row.tolist()]:
                    logits = self.model.lm_head(x[len(row) - len(continuation):len(row)]).float()
                    targets = torch.tensor(continuation, device=x.device)
                    found[i] = -F.cross_entropy(logits, targets, reduction="sum").item()
        return found


def other_template(directory):
    """Whether a checkpoint directory brings a chat template, and not ours."""
    file, template = directory / "chat_template.jinja", CHAT_TEMPLATE
    with contextlib.suppress(OSError, *UNREADABLE):
        config = directory / "tokenizer_config.json"
        template = file.read_text("utf-8") if file.exists() else read_json(config)["chat_template"]
    return template != CHAT_TEMPLATE


class Endpoint:
    """A server of OpenAI's API, by its URL (http://host:port/v1), with #NAME of the model if it is not the
    first; threads may share it.
    """
    group = 1
    timeout, tries = 180.0, 6  # seconds that an answer may take; how often it is asked for
    backoff = 1.0              # seconds between the first two, then doubled

    def __init__(self, url, args):
        self.workers, self.limit = args.parallel, "max_tokens"
        self.options = {"temperature": 0, "seed": 0}
        self.url, self.name = canonical(url), url.partition("#")[2]
        try:
            self.name = self.name or self.ask("models")["data"][0]["id"]
        except (OSError, LookupError, TypeError) as error:
            reason = error if isinstance(error, OSError) else "it lists no model, URL#NAME names one"
            fail(f"--model {self.url or url}: {reason}")
        self.identity = [self.url, self.name]

    def reply(self, requests, max_tokens, constrained=False):
        """What episodes asked: an Answer to each (messages, tools)."""
        return [self.answer(*request, max_tokens) for request in requests]

    def answer(self, messages, tools, max_tokens):
        """The Answer to a chat. One that fails after all tries has its `error`."""
        body = {"model": self.name, "messages": for_servers(messages)}
        if tools:
            body["tools"] = [allowed(tool) for tool in tools]
        names = {allowed(tool)["function"]["name"]: tool["function"]["name"] for tool in tools or []}
        try:
            choice = self.complete(body, max_tokens)["choices"][0]
            message, reason = choice["message"], str(choice.get("finish_reason")).lower()
            if reason == "error":
                raise OSError(f"the server failed as it answered: {short(choice.get('error'))}")
            text = message.get("content")
            if isinstance(text, list):
                text = "".join(part.get("text") or part.get("refusal") or "" for part in text)
            text = text or message.get("refusal") or ""
            for call in message.get("tool_calls") or []:
                name, arguments = call["function"]["name"], call["function"].get("arguments") or ""
                text += "\n" * bool(text) + hermes_call(names.get(name, name), arguments)
            calls = parse_calls(text)  # those that the server has left in the text have its names, too
            calls = calls and [(names.get(name, name), arguments) for name, arguments in calls]
            return Answer(text, calls, not re.search("length|max_", reason))  # model_length, MAX_TOKENS
        except OSError as error:
            return Answer("", None, False, str(error))
        except UNREADABLE:
            return Answer("", None, False, "not a chat completion")

    def complete(self, body, max_tokens):
        """The server's answer to a chat. Where it wants the limit by its newer name, no temperature or no
        seed, it gets that, now and from then on.
        """
        limit, options = self.limit, self.options  # another thread may learn meanwhile what to send
        try:
            return self.ask("chat/completions", body | options | {limit: max_tokens})
        except OSError as error:
            said, newer = str(error), "max_completion_tokens"
            left = {name: value for name, value in options.items() if name not in said}
            if newer in said and limit != newer:
                self.limit = newer
            elif left != options:
                self.options = left
            else:
                raise
            return self.complete(body, max_tokens)

    def ask(self, path, body=None):
        """The server's answer. Raises OSError with the reason if there is none after all tries."""
        backoff = self.backoff * random.uniform(0.5, 1.5)  # what failed together shall not return together
        base, *query = self.url.split("?")  # Azure's version of its API
        url = "?".join([f"{base.rstrip('/')}/{path}", *query])
        return ask_endpoint(url, body, self.timeout, self.tries - 1, backoff)


def allowed(value):
    """A tool or a call whose name has an underscore for what OpenAI's API refuses, such as a dot."""
    name = re.sub(r"[^a-zA-Z0-9_-]", "_", value["function"]["name"])
    return value | {"function": value["function"] | {"name": name}}


def for_servers(messages):
    """The messages in the form that all servers take: allowed names; ids of calls, nine letters and digits,
    that differ over the whole conversation. Every call has its result, in the order of the calls.
    """
    made, answered, found = itertools.count(), itertools.count(), []
    for message in messages:
        if calls := message.get("tool_calls"):
            calls = [allowed(call) | {"id": f"call{next(made):05}"} for call in calls]
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool":
            message = message | {"tool_call_id": f"call{next(answered):05}"}
        found.append(message)
    return found


def hermes_call(name, arguments):
    """A call, whose arguments are JSON or an object, as Tokenizer.render writes it."""
    if isinstance(arguments, dict):
        arguments = in_json(arguments)
    arguments = re.sub(r"\A\s*(null\s*)?\Z", "{}", arguments)  # what servers write for none
    call = f'{{"name": {in_json(name)}, "arguments": {arguments}}}'
    call = re.sub("<(/?tool_call>)", r"\\u003c\1", call)
    return f"<tool_call>\n{call}\n</tool_call>"


BEGIN_CALL, END_CALL = re.compile(r"<think>|<tool_call>\s*"), re.compile(r"\s*</tool_call>")


def parse_calls(output, most=None):
    """[(name, arguments)] in a model's answer, [] if it makes no call, None if what it writes as a call is
    not one. What stands between <think> and </think> is none. After `most` calls nothing is read.

    >>> parse_calls('<tool_call>\\n{"name": "f", "arguments": {"x": 1}}\\n</tool_call>')
    [('f', {'x': 1})]
    >>> parse_calls('No tool fits.'), parse_calls('<tool_call>\\n{"name": ')
    ([], None)
    """
    calls, at, last = [], 0, output.rfind("</think>")
    while len(calls) != most and (tag := BEGIN_CALL.search(output, at)):
        at = tag.end()
        if tag[0] == "<think>":
            at = output.index("</think>", at) if at <= last else at
            continue
        try:  # JSON says where it ends: its strings may hold the tags
            call, end = json.JSONDecoder().raw_decode(output, at)
            name, arguments = call["name"], call["arguments"]
            at = END_CALL.match(output, end).end()
        except UNREADABLE:
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        calls.append((name, arguments))
    return calls


# ------------------------------------------------------------------------------------------------------------
# Constrained decoding: the likeliest token after which the text can still become a legal call


class Constraint:
    """Picks tokens for `generate`. Plain answers are free; once a call is begun it must name a tool and fit
    its schema. With a schema, as read_schema returns it, an answer is a JSON value that fits this.
    """

    def __init__(self, tokenizer, tools, schema=None):
        self.tokenizer, self.schema = tokenizer, schema
        rows = [[tool["function"] for tool in row] for row in tools]
        self.tools = [{f["name"]: read_schema(f["parameters"]) for f in row} for row in rows]

    def __call__(self, row, new_ids, logits):
        start, end = self.tokenizer.special["<tool_call>"], self.tokenizer.im_end
        written, logits = b"".join(map(self.tokenizer.token_bytes, new_ids)), logits.clone()
        for _ in range(len(logits)):
            token = logits.argmax().item()
            logits[token] = -torch.inf
            piece = self.tokenizer.token_bytes(token)
            if not piece:
                continue
            if self.schema is None and start not in [*new_ids, token]:
                return token
            text = written + piece * (token != end)
            if token != self.tokenizer.end_of_text and may_become(
                    text, token == end, self.tools[row], self.schema):
                return token
        return end

    @staticmethod
    def legal(text, tools, finished):
        """Whether a text is the beginning (or, if finished, the whole) of one or more calls of the tools."""
        return may_become(text.encode(), finished, tools)


def read_schema(schema):
    """A copy of a JSON Schema in which what a "$ref" such as "#/$defs/name" names stands in its place, beside
    what is stated with it, so that a schema may hold itself.
    """
    references = []

    def note(part):
        if "$ref" in part:
            references.append(part)
        return part

    schema = json.loads(in_json(schema).encode(), object_hook=note)
    whole = schema | {}
    for part in references:
        with contextlib.suppress(LookupError, TypeError, AttributeError):  # what is nowhere stays as it is
            for _ in range(9):  # a name of a name; one of itself has no end
                named = {"#": whole}
                for step in part["$ref"].split("/"):
                    named = named[step.replace("~1", "/").replace("~0", "~")]
                named = named | {}
                del part["$ref"]
                if both := part.keys() & named.keys() - ANNOTATIONS:
                    named["allOf"] = [{key: part[key] for key in both}]  # which is not followed
                part.update(named)
    return schema


END = b"\xff"  # stands after a text that is finished; none in UTF-8 holds it


def may_become(text, finished, tools, schema=None):
    """Whether a text (bytes) is the beginning (or, if finished, the whole) of one or more calls of the tools
    {name: schema of the parameters} or, if there is a schema, of a value that fits this.
    """
    if END in text:  # a token may be any byte
        return False
    text += END * finished
    try:
        if schema is None:
            scan_calls(text, tools)
        else:
            scan(scan_value(text, schema), [END])
        return True
    except (ValueError, RecursionError):  # brackets in brackets without end
        return False


def scan(text, options):
    """What follows the longest of the options with which a text begins. Raises ValueError if there is none.

    Here and below, nothing follows if the text ends within what is read: so far it is legal.
    """
    begun = [option for option in options if option.startswith(text[:len(option)])]
    return text[len(max(begun, key=len)):]


def scan_calls(text, tools):
    """Read a text from its first call on: one or more, each of a tool with its parameters."""
    begin, end = b'<tool_call>\n{"name": ', b"}\n</tool_call>"
    schemas = {in_json(name).encode() + b', "arguments": {': schema | {"additionalProperties": False}
               for name, schema in tools.items()}
    text = scan(text[text.index(b"<tool_call>"):], [begin])
    while text:
        rest = scan(text, schemas)
        rest = scan_members(rest, schemas.get(text.removesuffix(rest), {}))
        text = scan(rest, [end + b"\n" + begin, end + END])


def scan_members(text, schema):
    """What follows the members of an object, and its bracket: each at most once and all required ones; of
    other names only where the schema allows others, or states none.
    """
    required, properties = schema.get("required") or [], schema.get("properties") or {}
    others = schema.get("additionalProperties", not properties)
    known = {name: others or {} for name in required} | properties
    seen, separator = set(), b""
    while text:
        names = [in_json(p).encode() for p in known.keys() - seen] if others is False else [b'"']
        brackets = [b"}"] * seen.issuperset(required)
        rest = scan(text, [separator + name for name in names] + brackets)
        if not rest or text.startswith(b"}"):
            return rest
        text = text.removeprefix(separator)
        rest = scan_value(text, {"type": "string"})
        try:
            name = json.loads(text.removesuffix(rest).decode(errors="replace"))
        except ValueError:  # the text ends within it
            return rest
        if name in seen:
            raise ValueError
        seen.add(name)
        text = scan_value(scan(rest, [b": "]), known.get(name, others))
        separator = b", "
    return text


def in_json(value):
    """A value in JSON."""
    return json.dumps(value, ensure_ascii=False)


INTEGER = rb"-?(?:\Z|0|[1-9]\d*)"  # \Z: or the text ends there
PATTERNS = {
    "integer": INTEGER, "number": INTEGER + rb"(?:\.(?:\Z|\d+))?(?:[eE][+-]?(?:\Z|\d+))?",
    "string": rb'"(?:[^"\\\x00-\x1f\xff]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*'
              rb'(?:"|(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z)'}
FEW = {"boolean": [True, False], "null": [None]}  # types that have these values only
SCHEMA_TYPES = (*PATTERNS, *FEW, "array", "object")


def scan_value(text, schema):
    """What follows a JSON value that has the schema (or any, where it is True); if it has any of several, the
    longest such value.
    """
    if schema is False:
        raise ValueError
    if not text:
        return text
    schema = mapping(schema)
    kind, choices = schema.get("type"), schema.get("anyOf") or schema.get("oneOf")
    if schema.get("nullable"):
        choices = [schema | {"nullable": False}, {"type": "null"}]
    elif kind not in SCHEMA_TYPES and not choices:  # several, none, or one that JSON does not have
        several = kind if kind and isinstance(kind, list) else SCHEMA_TYPES
        choices = [schema | {"type": one} for one in several]
    if choices:
        rests = []
        for choice in choices:
            with contextlib.suppress(ValueError):
                rests.append(scan_value(text, choice))
        return min(rests, key=len)  # a ValueError if there is none
    listed = [schema["const"]] if "const" in schema else schema.get("enum") or FEW.get(kind)
    if listed:
        return scan(text, [in_json(value).encode() for value in listed])
    if kind in PATTERNS:
        if found := re.match(PATTERNS[kind], text):
            return text[found.end():]
        raise ValueError
    if kind == "object":
        return scan_members(scan(text, [b"{"]), schema)
    text = scan(text, [b"["])
    if text.startswith(b"]"):
        return text[1:]
    while text:
        text = scan_value(text, schema.get("items"))
        if text.startswith(b"]"):
            return text[1:]
        text = scan(text, [b", "])
    return text


# ------------------------------------------------------------------------------------------------------------
# heldout: documents and APIs that no model was trained on


def document_losses(corpus, args):
    """Mean cross-entropy of each held-out document's first tokens."""
    def episode(domain, ids):
        (log_likelihood,) = yield [(ids[:1], ids[1:])]
        return {"scores": {f"loss {domain}": -log_likelihood / (len(ids) - 1)}}

    return [(f"{domain}:{i}", partial(episode, domain, ids[:args.seq_len + 1].tolist()))
            for domain in VALIDATED
            for i, ids in enumerate(corpus.documents(domain, "heldout")[:args.limit or 150])]


def conversations(corpus, args):
    """Held-out conversations that fit the model's context, in the order of a hash, each cut after the message
    that is asked for.

    That is the last message with calls or, if there is none, the last of all. The first of a conversation's
    APIs is what it is about: it must be held out itself, not only another that is offered or called beside
    it.
    """
    heldout = {*read_json(corpus.directory / "heldout_apis.json")}
    lines = (corpus.directory / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    fit = []
    for record in sorted(map(Record.from_json, lines), key=lambda record: unit_hash(record.id)):
        while calls_in(*record.messages) and not calls_in(record.messages[-1]):
            record.messages.pop()
        about_heldout = heldout.intersection(record.apis[:1])
        if about_heldout and len(corpus.tokenizer.render(record.messages, record.tools)[0]) <= args.seq_len:
            fit.append(record)
    return fit or fail(f"{corpus.directory}/heldout.jsonl: no conversation of at most {args.seq_len} tokens")


def tool_choices(corpus, args):
    """Which of four tools a model takes for the right one, by likelihood, in both directions."""
    render, encode, special = corpus.tokenizer.render, corpus.tokenizer.encode, corpus.tokenizer.special

    def episode(request, tools, right):
        gold = [t["function"]["name"] for t in tools].index(right)
        tools, gold = [*tools[:3], tools[max(gold, 3)]], min(gold, 3)
        names = [t["function"]["name"] for t in tools]
        prompt = render([request], tools, answer=True)[0]
        prompt += [special["<tool_call>"], *encode('\n{"name": "')]
        pairs = [(prompt, encode(f'{name}",')) for name in names]
        asked, begun = encode(request["content"]), [special["<|im_start|>"], *encode("user\n")]
        pairs += [(render([], [t])[0] + begun, asked) for t in tools]
        likelihoods = np.reshape((yield pairs), (2, -1))  # of each name after the request, and the reverse
        direct, channel = (float(row.argmax() == gold) for row in likelihoods)
        return {"scores": {"direct": direct, "channel": channel}, "tools": names, "gold": gold,
                "log_likelihoods": likelihoods.tolist()}

    episodes = []
    for record in conversations(corpus, args):
        *before, answer = record.messages
        calls = calls_in(answer)
        if len(record.tools) >= 4 and len(before) == len(calls) == 1:
            episodes.append((record.id, partial(episode, *before, record.tools, calls[0][0])))
    return episodes[:args.limit or 150]


def next_calls(corpus, args):
    """Which of four calls a held-out trajectory begins with, by likelihood a token: the others are later ones
    of it, or else calls of the same tool in other trajectories. (Of what was called before, a model that
    copies would like any better than what is new.)
    """
    begin, end = (corpus.tokenizer.special[tag] for tag in ("<tool_call>", "</tool_call>"))
    name_of = lambda call: corpus.tokenizer.decode(call).partition('", "arguments"')[0]
    trajectories, by_name = [], defaultdict(list)  # of each: what stands before its first call, and the calls
    for ids in corpus.documents("trajectory", "heldout"):
        ids = ids[:args.seq_len].tolist()
        starts = [i for i, token in enumerate(ids, 1) if token == begin and end in ids[i:]]
        calls = [(*ids[i:ids.index(end, i)], end) for i in starts]
        if calls:
            trajectories.append((ids[:starts[0]], calls))
        for call in calls:
            by_name[name_of(call)].append(call)

    def episode(before, options):
        likelihoods = yield [(before, [*call]) for call in options]
        rates = np.divide(likelihoods, [*map(len, options)])
        return {"scores": {"next call": float(rates.argmax() == 0)}, "log_likelihoods": likelihoods}

    episodes = []
    for i, (before, (call, *later)) in enumerate(trajectories):
        rng, others = random.Random(i), by_name[name_of(call)]
        options = [call, *rng.sample(later, len(later)), *rng.sample(others, len(others))]
        options = [*dict.fromkeys(options)][:4]
        if len(options) == 4:
            episodes.append((str(i), partial(episode, before, options)))
    return episodes[:args.limit or 150]


def heldout_calls(corpus, args, most=600):
    """Answers to the requests, and what they are worth."""
    def episode(record):
        return judge(record, (yield record.messages[:-1], record.tools))

    return [(r.id, partial(episode, r)) for r in conversations(corpus, args)[:args.limit or most]]


def judge(record, answer):
    """The item of an answer: its calls against the recorded ones, as BFCL compares them. To ask for a
    required parameter is to name it, which the recorded answer does in backticks.

    The recorded calls themselves are right, though BFCL's checker refuses some lists of several types.
    """
    *before, expected = record.messages
    tools = [t["function"] for t in record.tools]
    gold, called, made = calls_in(expected), calls_in(*before), answer.calls or []
    required = {p for t in tools for p in t["parameters"].get("required") or []}
    missing = required.intersection(re.findall(r"`([^`]+)`", expected["content"]))
    kinds = {  # the first that holds is the item's
        "mended after an error": called and called[-1][0] == gold[0][0], "uses a result": called,
        "asks what is missing": not gold and missing, "no tool fits": not gold,
        "calls once told": len(before) > 1, "two calls": len(gold) > 1, "one tool": len(tools) == 1,
        "one of several tools": True}
    kind = next(kind for kind, holds in kinds.items() if holds)
    if gold:
        ours, theirs = (converted(tools, calls, with_floats) for calls in (made, gold))
        right, why = check_call(tools, ours, as_gold(tools, theirs))
        right = right or same_json(ours, theirs)
    else:
        right = all(re.search(rf"\b{re.escape(p)}\b", answer.text) for p in missing)
        why = "does not ask for it"
    item = verdict(answer, answer.calls, bool(gold), right, why)
    right, scores = item["verdict"] == "right", {}
    if gold:
        count = max(len(arguments) for _, arguments in gold)
        if count:
            scores[HEADLINE] = right
        scores[f"arguments: {('none', 'one', 'two', 'three and more')[min(count, 3)]}"] = right
        scores["name"] = sorted(n for n, _ in made) == sorted(n for n, _ in gold)
    scores |= {f"right: {kind}": right,
               "a call or clean words": item["verdict"] not in ("unparseable", "error"),
               "stops by itself": answer.ended and not answer.error}
    return item | {"scores": {metric: float(score) for metric, score in scores.items()}, "gold": gold}


def calls_in(*messages):
    """The calls [(name, arguments)] of messages."""
    functions = [call["function"] for message in messages for call in message.get("tool_calls") or []]
    return [(f["name"], json.loads(f["arguments"])) for f in functions]


def same_json(a, b):
    """Whether two values are the same in JSON, in which a tuple is a list; those that it does not know are
    not.
    """
    try:
        return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    except UNREADABLE:
        return False


# ------------------------------------------------------------------------------------------------------------
# Scores of calls, equal to those of BFCL's own checker (package bfcl-eval 2026.3.23), whose oddities are kept

KINDS = (  # from far to near
    "wrong count,wrong name,missing parameter,unexpected parameter,wrong type,wrong value".split(","))
TYPES = {name: kind for kind, names in {
    str: "string String any char",
    int: "integer byte short long Bigint",
    float: "float number double",
    bool: "boolean Boolean",
    dict: "dict object HashMap Hashtable",
    list: "array tuple Array ArrayList Queue Stack"}.items() for name in names.split()}
UNREADABLE = (  # what reading a value that is not as it should be may raise
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    SyntaxError)


def mismatch(tool, name, arguments, gold, language):
    """What keeps a call from being the gold one, of KINDS, or None."""
    if name != tool["name"]:
        return "wrong name"
    parameters = tool.get("parameters") or {}
    properties = parameters.get("properties") or {}
    if not all(p in arguments for p in parameters.get("required") or []):
        return "missing parameter"
    for p, value in arguments.items():
        if p not in properties or p not in gold:
            return "unexpected parameter"
        if kind := value_mismatch(value, properties[p], gold[p], language):
            return kind
    return None if all(p in arguments or "" in gold[p] for p in gold) else "missing parameter"


def value_mismatch(value, schema, options, language):
    """"wrong type", "wrong value" or None. The type is checked exactly, one level deep: True is no integer,
    nor is 1.0.
    """
    stated, items = stated_types(schema)
    if language != "python":
        if type(value) is not str:
            return "wrong type"
        value = (java_value if language == "java" else javascript_value)(value, stated, items)
    elif stated in ("float", "number") and type(value) is int:
        value = float(value)
    elif stated == "tuple" and type(value) is tuple:
        value = list(value)
    given = type_of(options)
    expected = TYPES.get(stated) or given or str
    inner = TYPES.get(items) if expected is list else None
    # A value of the gold's type instead of the schema's stands for a variable's name.
    variable = type(value) is not expected
    if variable and type(value) is not given:
        return "wrong type"
    fits = lambda option: type(option) is not list or all(type(v) in (inner, type_of(option)) for v in value)
    if not variable and inner and not any(map(fits, options)):
        return "wrong type"
    if variable or given not in (expected, None):
        right = value in options
    else:
        right = any(same_value(value, option, expected, inner) for option in options)
    return None if right else "wrong value"


def stated_types(schema):
    """The names of the type and of the items' type that a schema states, each None if it states none or
    several.
    """
    kinds = []
    for _ in range(2):
        kind, schema = mapping(schema).get("type"), mapping(schema).get("items")
        kinds.append(kind if isinstance(kind, str) else None)
    return kinds


def type_of(options):
    """The type of the first acceptable value that is not ""."""
    return next((type(o) for o in options if o != ""), None)


def plain(value):
    """A string without what BFCL thinks of no account; any other value as it is."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if type(value) is str else value


def same_value(value, gold, kind=None, inner=None):
    """Whether a value is the gold one. In an object each value must be among those that the gold has for its
    key, and no key missing but such as may be left out.
    """
    if kind is dict:
        known = gold != "" and all(k in gold and plain(v) in map(plain, gold[k]) for k, v in value.items())
        return known and all(k in value or "" in gold[k] for k in gold)
    if kind is list:
        kind = dict if inner is dict else None
        return len(value) == len(gold) and all(same_value(v, g, kind) for v, g in zip(value, gold))
    return plain(value) == plain(gold)


def as_gold(tools, calls):
    """Recorded calls [(name, arguments)] as gold of check_call: each value is the only acceptable one.

    For "" stands " ", to BFCL the same text: "" would let the parameter be left out.
    """
    def wrap(value, kind, inner=None):
        kind = type(value) if TYPES.get(kind, type(value)) is type(value) else None
        if kind is dict:
            return {k: [v] for k, v in value.items()}
        return [wrap(v, inner) for v in value] if kind is list and inner else value

    options = lambda value, schema: [" " if value == "" else wrap(value, *stated_types(schema))]
    return [{name: arguments} for name, arguments in converted(tools, calls, options)]


def converted(tools, calls, convert):
    """Calls [(name, arguments)] with convert(value, its schema if there is one) for each value."""
    schemas = {t["name"]: (t.get("parameters") or {}).get("properties") or {} for t in tools}
    return [(name, {p: convert(v, schemas.get(name, {}).get(p)) for p, v in arguments.items()})
            for name, arguments in calls]


def with_floats(value, schema):
    """A value with floats for integers, except where the schema allows integers and no other numbers.

    BFCL takes an integer for a float, but neither in a list nor where a schema states several types.
    """
    stated = json.dumps(schema)
    if '"integer"' in stated and '"number"' not in stated:
        return value
    return json.loads(json.dumps(value), parse_int=float)


# ------------------------------------------------------------------------------------------------------------
# Values of Java and JavaScript: source texts, converted by pattern; what fits no pattern stays a text. The
# patterns match what BFCL's match, but some of those take exponential or quartic time on what a model that
# repeats itself writes.

DIGITS, DECIMAL = r"(-?\d+)", r"(-?\d+(?:\.\d+)?)"
NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
LITERALS = {
    "java": {"byte": DIGITS, "short": DIGITS, "integer": DIGITS, "long": f"{DIGITS}[lL]",
             "float": f"{NUMBER}[fF]", "double": NUMBER},
    "javascript": {"integer": DIGITS, "Bigint": f"{DIGITS}n", "float": DECIMAL}}
PARTS = r"(?:^|,)([^,]*)"  # what stands between commas
JAVA = {  # type: [(pattern, what its parts are in the group)], of which the first that is found counts
    "ArrayList": [
        (r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", PARTS),
        (r"(?s)new\s+ArrayList<\w*>\(\)\s*\{\{\s*+(.+?)\}\}", r"add\((.+?)\)"),
        (r"new\s+ArrayList<\w*>\(\)()", r"add\((.+?)\)")],
    "Array": [(r"new\s+\w+\[\]\s*\{(.*?)\}", r"[^,\s](?:[^,]*[^,\s])?")],  # no part of an array is blank
    "HashMap": [
        (r"(?s)new\s+HashMap<.*?>\s*\(\)\s*\{([^}]*)\}", r'put\("(.*?)",\s*(.*?)\)'),
        (r"new\s+HashMap<.*?>\s*\(\)()", r'put\("(.*?)",\s*(.*?)\)')]}


def literal(text, language, *kinds):
    """The number or truth value of one of these types that a text is in a language, else the text."""
    for kind in kinds:
        if kind in ("boolean", "Boolean") and text in ("true", "false"):
            return text == "true"
        if found := re.match(LITERALS[language].get(kind, "(?!)") + "$", text):
            return TYPES[kind](found[1])
    return text


def unquoted(text, quotes="\"'"):
    """A text without the quotes around it."""
    return text[1:-1] if text and text[0] in quotes and text[0] == text[-1] else text


def untyped(text, language):
    """The value of a text whose type is not known."""
    text = text.strip()
    inside = unquoted(text, '"' if language == "java" else "\"'")
    if inside is not text:
        return inside
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    return literal(text, language, "boolean", "long", "float")


def java_value(text, kind, nested=None):
    """A Java expression as the value that BFCL takes it for.

    >>> java_value("5L", "long"), java_value("new int[]{1, 2}", "Array", "integer")
    (5, [1, 2])
    >>> java_value('new HashMap<>() {{ put("a", 1f); }}', "HashMap")
    {'a': 1.0}
    """
    for pattern, part in JAVA.get(kind, []):
        if found := re.search(pattern, text):
            parts = re.findall(part, found[1])
            if kind == "HashMap":
                return {key: untyped(value, "java") for key, value in parts}
            parts = map(str.strip, parts)
            if kind == "ArrayList" and nested in ("char", "String"):
                return [part[1:-1] for part in parts]  # without quotes, which an Array keeps
            return [java_value(part, nested) if nested else untyped(part, "java") for part in parts]
    return literal(text, "java", kind)


def javascript_value(text, kind, nested=None):
    """A JavaScript expression as the value that BFCL takes it for.

    >>> javascript_value("5n", "Bigint"), javascript_value("[1, 'a']", "array")
    (5, [1, 'a'])
    >>> javascript_value("{a: [1], 'b': true}", "dict")
    {'a': [1], 'b': True}
    """
    if kind == "String":
        return unquoted(text)
    if kind not in ("array", "dict"):
        return literal(text, "javascript", kind)
    text = text.strip()
    if kind == "dict":
        if not (found := re.match(r"\{(.*?)\}", text)):
            return text
        result = {}
        for key, value in re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", found[1]):
            value, listed = value.strip(), re.fullmatch(r"\[.*\]", value)
            value = javascript_value(value, "array") if listed else untyped(value.strip("'\""), "javascript")
            result[key.strip().strip("'\"")] = value
        return result
    joined = re.sub(r"\]\s*,\s*\[", "],[", text)  # no line feed in a value, but perhaps between arrays
    if found := re.match(r"\[\s*\[.*?\]\s*\]|new\s+Array\(\s*\[.*?\]\s*\)", joined):
        first, *rows = re.findall(r"\[(.*?)\]", found[0])
        rows = [first.strip().removeprefix("["), *rows]
        return [[untyped(value, "javascript") for value in row.split(",")] for row in rows]
    if not (found := re.match(r"\[(.*?)\]|new\s+Array\((.*?)\)", text)):
        return text
    parts = found[found.lastindex].strip()
    return [javascript_value(part.strip(), nested) if nested else untyped(part, "javascript")
            for part in (parts.split(",") if parts else [])]


# ------------------------------------------------------------------------------------------------------------
# Calls written as source text: parsed, never run

OPERATORS = {"Add": "add", "Sub": "sub", "Mult": "mul", "Div": "truediv", "FloorDiv": "floordiv",
             "Mod": "mod", "Pow": "pow"}  # {class of ast: function of operator}


def parse_python_calls(text):
    """The calls [(name, arguments)] of a list like "[f(a=1), g(b='x')]", its brackets optional; None if it is
    not one.

    >>> parse_python_calls("[f.g(a=[1, -2.5], b={'c': None}), h(d=name)]")
    [('f.g', {'a': [1, -2.5], 'b': {'c': None}}), ('h', {'d': 'name'})]
    >>> parse_python_calls("No function fits.")
    """
    text = text.strip("`\n ").removeprefix("[").removesuffix("]")
    try:
        with warnings.catch_warnings():  # of backslashes in strings
            warnings.simplefilter("ignore")
            return [python_call(node) for node in ast.parse(f"[{text}]", mode="eval").body.elts]
    except UNREADABLE:
        return None


def python_call(node):
    """(name, keyword arguments) of a call's node, its positional arguments left out, as BFCL does."""
    names, function = [], node.func
    while isinstance(function, ast.Attribute):
        names.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        names.append(function.id)
    return ".".join(reversed(names)), {k.arg: python_value(k.value) for k in node.keywords}


def python_value(node):
    """The value of a constant, list, tuple, dict or sum of numbers; a name is a string, and so is the source
    of what else BFCL takes.
    """
    match node:
        case ast.Constant():
            return "..." if node.value is ... else node.value
        case ast.UnaryOp(operand=ast.Constant()):
            return -node.operand.value  # whichever the operator is
        case ast.List():
            return [*map(python_value, node.elts)]
        case ast.Tuple():
            return tuple(map(python_value, node.elts))
        case ast.Dict():
            return dict(zip(map(python_value, node.keys), map(python_value, node.values)))
        case ast.BinOp():
            return calculate(node)
        case ast.Name():
            return node.id
        case ast.Call():
            return dict([python_call(node)]) if node.keywords else ast.unparse(node)
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
    raise ValueError


def calculate(node):
    """The value of an expression of numbers, like 5 / 100. The original evaluates whatever stands there."""
    match node:
        case ast.BinOp():
            left, right = calculate(node.left), calculate(node.right)
            operate = getattr(operator, OPERATORS[type(node.op).__name__])
            operate(float(left), float(right))  # raises OverflowError where it would take too long
            return operate(left, right)
        case ast.UnaryOp(op=ast.USub()):
            return -calculate(node.operand)
        case ast.Constant() if type(node.value) in (int, float):
            return node.value
    raise ValueError


SOURCE_TOKEN = re.compile(r"""(?xs) "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | `(?:\\.|[^`\\])*`
                              | <[\w\s,.?<>\[\]]*> | [(){}\[\],;"'`]""")
CLOSING = {"(": ")", "[": "]", "{": "}"}


def split_source(text):
    """Yield the pieces of a text between the commas and semicolons outside brackets, quotes and type
    parameters. Raises LookupError or ValueError if these do not balance.
    """
    start, expected = 0, []
    for token in SOURCE_TOKEN.finditer(text):
        if token[0] in CLOSING:
            expected.append(CLOSING[token[0]])
        elif token[0] in ")]}" and expected.pop() != token[0]:
            raise ValueError
        elif token[0] in ",;" and not expected:
            yield text[start:token.start()]
            start = token.end()
        elif token[0] in "\"'`":
            raise ValueError  # never closed
    if expected:
        raise ValueError
    if text.strip():
        yield text[start:]


def parse_source_calls(text):
    """The calls of a list like "[f(a=1, b=new int[]{1, 2})]" of Java or JavaScript, each value its source
    text; None if it is not one.

    BFCL's parsers differ where they fall short: they drop the body of new HashMap<>() {{ put(...); }}, see
    the first of several calls only, and a call in x = f(a=1) too, and may fail on Java without a semicolon.

    >>> parse_source_calls('[A.f(a="x", b=new HashMap<String, Object>(), c=-5L)]')
    [('A.f', {'a': 'x', 'b': 'new HashMap<String, Object>()', 'c': '-5L'})]
    >>> parse_source_calls("f(a=(1)")
    """
    text = text.strip("`\n ").removeprefix("[").removesuffix("]").strip().removesuffix(";")
    try:
        return [source_call(piece) for piece in split_source(text)]
    except UNREADABLE:
        return None


def source_call(text):
    """(name, arguments) of a call's source text. Raises one of UNREADABLE if it is none."""
    name, inside = re.fullmatch(r"(?s)\s*([\w.$]+)\s*\((.*)\)\s*", text).groups()
    arguments = {}
    for part in split_source(inside):
        p, value = re.fullmatch(r"(?s)\s*(?:([\w.$]+)\s*=(?![=>]))?\s*(.*?)\s*", part).groups()
        if p in arguments or not value:
            raise ValueError
        if p:
            arguments[p] = unquoted(value)
        elif re.fullmatch(r"[^\W\d]\w*", value):  # of values without a name BFCL sees only names
            arguments[p] = value
    return name, arguments


# ------------------------------------------------------------------------------------------------------------
# BFCL (Patil et al. 2025): whether a model calls the right functions with the right arguments, in one turn or
# several. Rules of bfcl-eval 2026.3.23.

LANGUAGES = {"simple_java": "java", "simple_javascript": "javascript"}
SINGLE_TURN = """
    simple_python simple_java simple_javascript multiple parallel parallel_multiple irrelevance live_simple
    live_multiple live_parallel live_parallel_multiple live_irrelevance live_relevance""".split()
MULTI_TURN = "multi_turn_base multi_turn_miss_func multi_turn_miss_param multi_turn_long_context".split()
SIMULATED = {
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TwitterAPI": "posting_api", "TicketAPI": "ticket_api", "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking", "VehicleControlAPI": "vehicle_control"}
JSON_TYPES = {TYPES[name]: name for name in "string integer number boolean array object".split()}
NAMED = {"python": "Python 3", "java": "Java 8", "javascript": "JavaScript"}
PROMPT = """You answer requests by calling functions. Write nothing but the calls, as one list in this form:
[function(a=1, b="x"), other.function(c=[2.5, True])]
Name every argument. If no function fits the request, or a required argument is not given in it, say so in \
words instead. After a call you are told its result; call on until the request is done, then say so in words.
The functions, one JSON object a line:
"""


def bfcl(args):
    """Single-turn categories of BFCL v4, of which v1 and v2 are subsets, and v3's multi-turn ones where the
    package bfcl-eval is installed.
    """
    episodes, docs = [], {}
    for category in SINGLE_TURN + MULTI_TURN:
        path = find_data(args.data, f"BFCL_v4_{category}.json")[0]  # the next has the answers
        entries, gold = read_all(path)[:args.limit], {}
        if not category.endswith("relevance"):
            rows = read_all(path.parent / "possible_answer" / path.name)
            gold = {row["id"]: row["ground_truth"] for row in rows}
        if category == MULTI_TURN[0]:
            try:
                docs = {name: read_all(find_data(args.data, f"multi_turn_func_doc/{module}.json")[0])
                        for name, module in SIMULATED.items() if simulated(name)}
            except ImportError as error:
                print(f"bfcl: no multi-turn categories without {error.name}: "
                      "pip install --no-deps bfcl-eval mpmath")
                break
        play = partial(multi_turn, docs) if docs else single_turn
        episodes += [(entry["id"], partial(play, entry, gold.get(entry["id"]), category, args))
                     for entry in entries]
    return episodes


def single_turn(entry, gold, category, args):
    """The episode of a single-turn item. Officially garbage scores as a refusal; the verdict tells them
    apart.
    """
    language, functions = LANGUAGES.get(category, "python"), entry["function"]
    given = [described(f, language) for f in functions]
    answer, calls = yield from ask(entry["question"][0], given, args, language)
    wanted = not category.endswith("irrelevance")
    right, why = bool(calls) == wanted, ""
    if gold is not None:
        right, why = check_call(functions, calls or [], gold, language)
    item = verdict(answer, calls, wanted, right, why)
    scores = {category: float(right and not answer.error)}
    return item | {"scores": scores, "calls": show(calls), "gold": gold}


def described(function, language="python"):
    """A definition of BFCL as one of OpenAI's, with JSON Schema's types. Parameters of Java and JavaScript
    become strings, as officially.
    """
    function = copy.deepcopy({key: function[key] for key in ("name", "description", "parameters")})
    function["description"] += f" It is a function of {NAMED[language]}."
    if language != "python":
        for schema in function["parameters"]["properties"].values():
            inner = schema.pop("items", None) or schema.pop("properties", None)
            kind = schema["type"] + (f" of {json.dumps(inner)}" if inner else "")
            hint = f"Its type is {kind}, given as {NAMED[language]} source text in a string."
            schema |= {"type": "string", "description": f"{schema.get('description', '')} {hint}"}
    rename_types(function["parameters"])
    return function


def rename_types(schema):
    """Change BFCL's types in a schema to JSON Schema's. What names no known type is a string, as
    officially.
    """
    schema["type"] = JSON_TYPES[TYPES.get(schema.get("type"), str)]
    for inner in [*schema.get("properties", {}).values(), schema.get("items")]:
        if inner is not None:
            rename_types(inner)


def ask(messages, functions, args, language="python"):
    """Part of an episode: returns the Answer and the calls in it, [] if it makes none, None if what it writes
    as a call is not one. In prompt mode the functions stand in the system message.
    """
    if args.mode == "native":
        answer = yield messages, [{"type": "function", "function": f} for f in functions]
        return answer, answer.calls
    system = PROMPT + "\n".join(map(in_json, functions))
    if messages[0]["role"] == "system":
        system, messages = f"{system}\n\n{messages[0]['content']}", messages[1:]
    answer = yield [chat_message("system", system), *messages], None
    text = after_thought(answer.text)
    calls = parse_python_calls(text) if language == "python" else parse_source_calls(text)
    return answer, [] if calls is None and not holds_call(text) else calls


def tool_messages(calls, results, args):
    """The messages of calls and of their results, which are texts."""
    if args.mode == "native":
        return [chat_message("assistant", "", calls), *result_messages(results)]
    rows = [{"call": call, "result": result} for call, result in zip(show(calls), results)]
    return [chat_message("assistant", f"[{', '.join(show(calls))}]"), chat_message("user", in_json(rows))]


def result_messages(results):
    """The results, which are texts, of the calls of a message."""
    return [chat_message("tool", text) | {"tool_call_id": f"call_{i}"} for i, text in enumerate(results)]


def after_thought(text):
    """What stands after a thought, without a fence around it."""
    return text.rpartition("</think>")[2].strip("`\n ")


def holds_call(text):
    """Whether a text is a list or object, or something in it is written like a call with arguments."""
    return re.match(r"(?:\w+\n)?\s*[\[{]", text) or re.search(r"\w\((?:\)|[^()]*['\"=])", text)


def show(calls):
    """Calls as texts, for the record: a value may be one that JSON does not know, or too deep for it."""
    try:
        return calls and [f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
                          for name, arguments in calls]
    except (ValueError, RecursionError):
        return ["..."] * len(calls)


# ------------------------------------------------------------------------------------------------------------
# BFCL's multi-turn items: simulated APIs, whose state and results are compared with those of the gold calls
# after each turn


SIMULATION = threading.Lock()  # the modules of the APIs share some state


def simulated(name):
    """A class of the package bfcl-eval."""
    package = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
    return getattr(importlib.import_module(f"{package}.{SIMULATED[name]}"), name)


class World:
    """The simulated APIs of an item, in the state in which it begins."""

    def __init__(self, entry):
        self.apis, self.methods = {name: simulated(name)() for name in entry["involved_classes"]}, {}
        long = "long_context" in entry["id"]
        for name, api in self.apis.items():
            if name != "MathAPI":  # has no state
                api._load_scenario(copy.deepcopy(entry["initial_config"].get(name, {})), long_context=long)
            self.methods |= inspect.getmembers(api, inspect.ismethod)

    def call(self, name, arguments, positional=()):
        """The result of a call as text, or the text of its error."""
        try:
            if name.startswith("_") or name not in self.methods:
                raise NameError(f"name {name!r} is not defined")
            powers = [arguments.get(k) for k in ("exponent", "precision", "decimal_places")]
            numbers = all(isinstance(v, (int, float)) for v in arguments.values())
            if any(type(v) is int and abs(v) > 1000 for v in powers) or name == "multiply" and not numbers:
                raise ValueError("out of range")  # would take hours or all memory
            with SIMULATION:
                result = self.methods[name](*positional, **copy.deepcopy(arguments))
                with contextlib.suppress(TypeError, ValueError):
                    return json.dumps(result) if type(result) is dict else str(result)
                return str(result)
        except Exception as error:  # of the package's code
            return f"Error during execution: {error}"

    def differs(self, gold):
        """Whether a public attribute of an API is not as in the gold's world."""
        return any(getattr(self.apis[name], attribute, None) != value for name, api in gold.apis.items()
                   for attribute, value in vars(api).items() if not attribute.startswith("_"))


def multi_turn(docs, entry, gold, category, args, max_steps=20):
    """The episode of a multi-turn item. It ends with the first turn that fails, since the rest no longer
    counts.
    """
    ours, theirs = World(entry), World(entry)
    functions = [described(f) for name in entry["involved_classes"] for f in docs[name]]
    withheld = entry.get("missed_function", {})  # {number of a turn: the names of functions until then}
    messages, results, outputs, made, why = [], [], [], [], ""
    for number, (request, expected) in enumerate(zip(entry["question"], gold)):
        made.append([])
        if str(number) in withheld:
            request = [chat_message("user", "There are more functions now. Go on with them.")]
        hidden = [name for at, names in withheld.items() if int(at) > number for name in names]
        known = [f for f in functions if f["name"] not in hidden]
        messages = messages + request
        for _ in range(max_steps + 1):
            answer, calls = yield from ask(messages, known, args)
            outputs.append(answer.text)
            messages = [*messages, turn(answer, args.mode)]
            if not calls:
                break
            made[-1].append(show(calls))
            step = [ours.call(*call) for call in calls]
            messages += tool_messages(calls, step, args)[1:]
            results += step
        wanted = [theirs.call(*gold_call(text)) for text in expected]
        if answer.error or expected and not made[-1]:
            break
        if calls:
            why = "too many steps"
        elif expected and ours.differs(theirs):
            why = "wrong state"
        elif Counter(wanted) - Counter(results):
            why = "wrong result"
        calls = made
        if why:
            break
    item = verdict(answer, calls, True, not why, why) | {"calls": made, "output": "\n\n".join(outputs)}
    return scored(item, gold, [category])


def gold_call(text):
    """(name, keyword arguments, positional arguments) of a gold call's source text."""
    node = ast.parse(text, mode="eval").body
    return *python_call(node), [*map(python_value, node.args)]


# ------------------------------------------------------------------------------------------------------------
# Totals

SIMPLE = "simple_python simple_java simple_javascript".split()
NON_LIVE = (SIMPLE, "multiple", "parallel", "parallel_multiple")
LIVE = frozenset("live_simple live_multiple live_parallel live_parallel_multiple".split())
# The official formulas, from the repository's eval_runner_helper.py: a list is the mean of its parts, a set
# the mean over all its items. The first three are parts of version 4's score, "overall" is their mean; "v3"
# was the overall score from April to August 2025, "v2" that of August 2024 but for four sets of executed
# calls, which have been withdrawn.
BFCL_TOTALS = {
    "non-live": NON_LIVE, "live": LIVE, "multi-turn": MULTI_TURN, "overall": (NON_LIVE, LIVE, MULTI_TURN),
    "v3": ((*NON_LIVE, "irrelevance"), LIVE | {"live_irrelevance", "live_relevance"}, MULTI_TURN),
    "v2": ((SIMPLE, "live_simple"), *((c, f"live_{c}") for c in (*NON_LIVE[1:], "irrelevance")),
           "live_relevance")}


# ------------------------------------------------------------------------------------------------------------
# AgentBench (Liu et al. 2023, arXiv 2308.03688): rounds with a database or a shell, until the model commits
# its answer. The rules are those of github.com/THUDM/AgentBench: tools, rounds and comparison of its version
# with function calls; the markers of the mode prompt of version 0.2. Metrics of the development split carry
# its name.

TOTALS = {"bfcl": BFCL_TOTALS, "agentbench-db": {"overall": ("SELECT", "INSERT", "UPDATE")}}


def run_rounds(environment, task, mode, run, judge):
    """An episode's rounds; returns the start of its record.

    environment: prompt, the system message; form, what this says in the mode prompt about how to call; read,
    a function of a text in this form that gives the calls, or None; tools, of which the first runs something,
    and the others commit an answer; rounds, in the modes native and prompt; most, how many calls of a turn
    count. run(text) carries out what a model gives to the first tool, and returns its result, or None if
    nothing can follow; judge(committed) is whether all is right in the end, given a list of the answer that
    was committed, which may be None, or an empty one. In the mode prompt, turns are plain text, and one that
    cannot be read ends the episode.
    """
    prompted, (runs, *commits) = mode == "prompt", [t["function"]["name"] for t in environment.tools]
    system = environment.prompt + environment.form * prompted
    messages = [chat_message("system", system), chat_message("user", task)]
    made, log, committed = [], [], []
    for _ in range(environment.rounds[prompted]):
        answer = yield messages, None if prompted else environment.tools
        calls = environment.read(answer.text) if prompted else answer.calls
        results = []
        for name, arguments in (calls or [])[:environment.most]:
            made.append((name, arguments))
            value = next(iter(arguments.values()), None)
            result = "Error: there is no such tool, or it wants other arguments."
            if name == runs and isinstance(value, str):
                result = run(value)
            elif name in commits and (arguments or name == "finish_action"):
                result = None
            if result is None:
                committed = [value]
                break
            results.append(result)
        log += [answer.text, *results]
        if committed or answer.error or prompted and calls is None:
            break
        if calls:
            results += ["Not run: too many calls in a turn."] * (len(calls) - len(results))
        else:
            results = ["There is no call in this that can be read. Call one of the tools."]
        replies = [chat_message("user", text) for text in results]
        if calls and not prompted:
            replies = result_messages(results)
        messages = [*messages, turn(answer, mode), *replies]
    right = judge(committed)
    if calls is not None or right:  # a table may be right though the last turn cannot be read
        calls = made
    why = "another result than expected" if committed else "nothing committed"
    return verdict(answer, calls, True, right, why) | {"output": "\n\n".join(log)}


def scored(record, gold, metrics):
    """A record with its scores: 1 in each of the metrics if it is right, else 0."""
    return record | {"gold": gold, "scores": dict.fromkeys(metrics, float(record["verdict"] == "right"))}


def limited(rows, args):
    """The items (id, episode) of rows (category, id, episode): --limit of each category at most."""
    number = defaultdict(itertools.count)
    most = args.limit or len(rows)
    return [(name, episode) for category, name, episode in rows if next(number[category]) < most]


def tool(name, description, /, **parameters):
    """A function as the chat API defines it, with parameters {name: schema} that are all required."""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": parameters, "required": list(parameters)}}}


# ------------------------------------------------------------------------------------------------------------
# agentbench-db: each item has a table of its own, in SQLite where the original has MySQL

MODIFICATIONS = ("INSERT", "UPDATE", "DELETE")


def agentbench_db(args):
    """An item is a question about a table (right: the values) or a modification of it (right: the hash of the
    table as it then is).
    """
    rows = []
    for path in find_data(args.data, "dbbench/*.jsonl")[::-1]:  # standard before dev
        split = "dev: " * (path.stem == "dev")
        rows += [(split + item["type"][0], f"{path.stem}-{i}", partial(db_episode, item, split, args.mode))
                 for i, item in enumerate(read_all(path))]
    return limited(rows, args)


def db_episode(item, split, mode):
    """Rounds with a database."""
    kind, table = item["type"][0], item["table"]
    with contextlib.closing(open_table(table)) as database:
        def judge(committed):
            if kind not in MODIFICATIONS:
                return committed and same_values(committed[0], item["label"])
            # In its prompt mode the original looks at the table however the rounds end.
            if committed or mode == "prompt":
                return any(hashed in item["answer_md5"] for hashed in table_hashes(database, table))

        asked = f"{item['description']}\n{item['add_description']}".strip()
        record = yield from run_rounds(DB, asked, mode, partial(run_sql, database), judge)
    metrics = [kind] if kind in MODIFICATIONS else ["SELECT", kind]
    return scored(record, item["label"], [split + metric for metric in metrics])


def read_db_action(text):
    """The call that a text makes with the markers of version 0.2, or None.

    >>> read_db_action('Think.\\nAction: Operation\\n```sql\\nSELECT 1;\\n```')
    [('execute_sql', {'query': 'SELECT 1;'})]
    >>> read_db_action('Action: Answer\\nFinal Answer: ["a"]')
    [('commit_final_answer', {'answers': ' ["a"]'})]
    """
    action = re.search(r"Action: (.*?)\n", text)
    if action and action[1] == "Operation":
        sql = re.search(r"(?s)```sql\n(.*?)\n```", text)
        return sql and [("execute_sql", {"query": sql[1].strip().replace("\n", " ")})]
    final = re.search(r"\nFinal Answer:(.*)", text)
    return final and [("commit_final_answer", {"answers": final[1]})]


DB = SimpleNamespace(
    prompt="""You work with a table in a SQLite database, to answer a question about it or to change it as \
you are asked. In each turn run one SQL statement and look at what it returns. When you are done, commit the \
final answer: exactly the values that are asked for and nothing else; after a change of the table any answer \
will do.""",
    form=""" To run a statement, on one line, write

Action: Operation
```sql
SELECT ...;
```

and to commit the answer

Action: Answer
Final Answer: ["first value", "second value"]""",
    read=read_db_action,
    tools=[
        tool("execute_sql", "Run one SQL statement and see what it returns.",
             query={"type": "string", "description": "the statement"}),
        tool("commit_final_answer", "Give the final answer, once all is done.",
             answers={"type": "array", "items": {"type": "string"},
                      "description": "the values asked for, one string each"})],
    rounds=(15, 16),  # one more to answer in
    most=99)


def quote(name):
    """A name as SQL has it, whatever it holds."""
    return "`" + name.replace("`", "``") + "`"


def open_table(table):
    """A database in memory with the item's table, every column TEXT as in the original; it reaches nothing
    else.
    """
    database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    database.create_collation("mysql", lambda a, b: (fold(a) > fold(b)) - (fold(a) < fold(b)))
    name, columns = quote(table["table_name"]), columns_of(table)
    typed = ", ".join(f"{column} TEXT COLLATE mysql" for column in columns)
    database.execute(f"CREATE TABLE {name} ({typed})")
    row = ", ".join("?" * len(columns))
    database.executemany(f"INSERT INTO {name} VALUES ({row})", table["table_info"]["rows"])
    # No file; 64 MiB; 128 MiB for all of them.
    database.executescript("PRAGMA temp_store = MEMORY; PRAGMA max_page_count = 16384; "
                           "PRAGMA hard_heap_limit = 134217728")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
    database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 20_000)
    database.set_authorizer(authorize)
    return database


def columns_of(table):
    """The names of an item's columns, as SQL has them."""
    return [quote(column["name"]) for column in table["table_info"]["columns"]]


def authorize(action, _, name, *__):
    """Whether a statement may do something: what reads or changes tables, and loads no code."""
    return sqlite3.SQLITE_OK if action in ALLOWED and name != "load_extension" else sqlite3.SQLITE_DENY


ALLOWED = {getattr(sqlite3, f"SQLITE_{action}") for action in """
    SELECT READ FUNCTION RECURSIVE INSERT UPDATE DELETE TRANSACTION SAVEPOINT
    CREATE_TABLE DROP_TABLE ALTER_TABLE CREATE_INDEX DROP_INDEX REINDEX""".split()}


def fold(text):
    """What MySQL's default collation compares: it tells neither case nor accents apart."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


def execute(database, sql, seconds=5):
    """Yield the rows of one statement, which is stopped when its time is up."""
    deadline = time.monotonic() + seconds
    database.set_progress_handler(lambda: time.monotonic() > deadline, 100)
    yield from database.execute(sql)


def run_sql(database, sql):
    """What a model sees of a statement: rows in the original's form, cut after 800 characters, or the
    error.
    """
    rows, shown = [], "[]"
    try:
        for row in execute(database, to_sqlite(sql)):
            rows.append(row)
            shown = str(rows)
            if len(shown) > 801:
                break
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        return f"Error: {str(error) or 'out of memory'}"
    return shown if len(shown) <= 801 else shown[:800] + "[TRUNCATED]"


MYSQL_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
# Strings, names in quotes of three kinds, comments of two, numbers, names that begin with a digit, words.
SQL_TOKEN = re.compile(
    r"""(?s)(?P<string>'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*")|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/"""
    r"""|(?i:\d+(?:e\d*)?|0x[0-9a-f]+)\b|(?P<name>\d\w*)|\w+""")
def to_sqlite(sql):
    r"""SQL whose strings with MySQL's backslashes, and names that begin with a digit, are written as in
    SQLite.

    >>> print(to_sqlite(r"INSERT INTO 1952_race VALUES (1e5, 'it\'s', 'C:\\')"))
    INSERT INTO `1952_race` VALUES (1e5, 'it''s', 'C:\')
    """
    def unescape(match):
        return MYSQL_ESCAPES.get(match[1], match[1] or match[2])

    def rewrite(match):
        if match["name"]:
            return f"`{match[0]}`"
        if match["string"] and "\\" in match[0]:
            text = re.sub(r"(?s)\\(.)|(['\"])\2", unescape, match[0][1:-1])
            return "'" + text.replace("'", "''") + "'"
        return match[0]

    return SQL_TOKEN.sub(rewrite, sql)


def table_hashes(database, table):
    """The md5 of the rows' sorted hashes, of which each is 5 digits of the md5 of a row's values; whole, and
    cut at 1,024 characters as MySQL's GROUP_CONCAT cuts, since the recorded ones are of both kinds. None of
    them where the table or a column is gone.
    """
    def md5(text):
        return hashlib.md5(text.encode("utf-8", "replace")).hexdigest()

    sql = f"SELECT {', '.join(columns_of(table))} FROM {quote(table['table_name'])}"
    try:
        rows = [",".join(str(v) for v in row if v is not None) for row in execute(database, sql)]
    except (sqlite3.Error, MemoryError):
        return set()
    joined = ",".join(sorted(md5(row)[:5] for row in rows))
    return {md5(joined), md5(joined[:1024])}


def same_values(answer, gold):
    """Whether an answer (a list, or the text of one or of a value) holds the label's values, in any order:
    numbers within 0.01, or the same texts.

    >>> same_values(["1,174"], ["1174.0"]), same_values('[("b",), ("a",)]', ["a", "b"])
    (True, True)
    >>> same_values("", ["none"]), same_values(["12"], ["12.5"])
    (True, False)
    """
    given, wanted = compared_values(answer), compared_values(gold)
    try:
        given_numbers, left = [float(v) for v in given], [float(v) for v in wanted]
    except ValueError:
        return {*given} == {*wanted}
    for number in given_numbers:
        match = next((n for n in left if abs(number - n) <= 0.01), None)
        if match is None:
            return False
        left.remove(match)
    return not left


NOTHING = {"", *"none null undefined nan inf infinity -inf -infinity".split()}


def compared_values(answer):
    """An answer's values as texts: no quotes around them, no percent sign, no commas, and 0 for all that
    stands for nothing.
    """
    if isinstance(answer, str) and re.fullmatch(r"(?s)\s*\[.*\]\s*", answer):
        parsed = literal_value(answer.strip())
        if not isinstance(parsed, list):  # commas divide it but within quotes of any kind, which are lost
            parts = re.findall(r"""(?:['"][^'"]*(?:['"]|$)|[^,'"])+""", answer.strip()[1:-1])
            parsed = [re.sub("['\"]", "", part) for part in parts]
        answer = parsed
    values = []
    for value in answer if isinstance(answer, (list, tuple)) else [answer]:
        text = str(value[0] if isinstance(value, tuple) and len(value) == 1 else value)
        text = text.strip().strip("'\"").strip()
        if text.endswith("%"):
            text = text[:-1].strip()
        else:
            text = text if re.search(r"^\[|\]$", text) else text.replace(",", "")
            text = "0" if text.lower() in NOTHING else text
        values.append(text)
    return values


# ------------------------------------------------------------------------------------------------------------
# agentbench-os: each item has a shell of its own, in a sandbox of bubblewrap where the original has Docker

CHECKS = {  # what the original's scripts of these names do with the answer and what the example puts out
    "integer-match.py": lambda answer, output: int(answer) == int(output),
    "string-match.py": operator.eq,
    "containing.py": operator.contains,
    "in.py": lambda answer, output: answer in output,
    "size-match.py": lambda answer, output: size_of(answer) == size_of(output)}


def agentbench_os(args):
    """An item is a task in a shell; right is what its answer is compared with, or what scripts find that
    check the answer and the system.

    Items that need a file which is not there (the original has them in a folder scripts), or the network, are
    left out, and said to be.
    """
    if not shutil.which("bwrap"):
        fail("agentbench-os needs a sandbox: apt-get install bubblewrap")
    try:
        Sandbox().close()
    except (OSError, SandboxEnded) as error:
        fail(f"agentbench-os needs a sandbox, and bubblewrap makes none here: {error}")
    rows, left_out = [], Counter()
    for path in find_data(args.data, "os_interaction/**/*.json"):
        folder = "dev" if path.stem == "dev" else path.parent.name
        if not re.fullmatch("dev|[1-7]", folder) or "scripts" in path.parts:
            continue
        name = "dev-001" if folder == "dev" else f"std-00{folder}"
        metric = "dev: " * (folder == "dev") + "accuracy"
        for i, item in enumerate(read_all(path)):
            try:
                episode = partial(os_episode, os_task(item, path, folder), metric, args.mode)
                rows.append((name, f"{name}-{path.stem}-{i}", episode))
            except LookupError as error:
                left_out[error.args[0]] += 1
    if left_out:
        needs = ", ".join(f"{n} items that need {what}" for what, n in sorted(left_out.items()))
        print(f"agentbench-os: left out {needs}")
    return limited(rows, args)


def os_task(item, path, folder):
    """An item, each script of it as (language, text) or a name in CHECKS. Raises LookupError, which says what
    it lacks.
    """
    def script(value):
        if value is None:  # as the first check: what the example puts out is compared with the answer
            value = evaluation["example"]
        value = {"code": value} if isinstance(value, str) else value
        name = value.get("file", "")
        if Path(name).name in CHECKS:
            return Path(name).name
        places = [directory / "scripts" / folder / name for directory in path.parents]
        found = [place.read_text(encoding="utf-8") for place in places if place.is_file()]
        text = [*found, value.get("code")][0]
        if text is None:
            raise LookupError(name)
        if re.search(r"\bapt(-get)? ", text):
            raise LookupError("the network")
        return value.get("language", "bash"), text

    evaluation, task = item["evaluation"], {"description": item["description"]}
    sources = {"init": mapping(item, "create"), "start": item, "check": evaluation, "example": evaluation}
    for key, source in sources.items():
        values = source.get(key, [])
        task[key] = [script(v) for v in (values if isinstance(values, list) else [values])]
    match = evaluation.get("match")
    return task | {"match": {"answer": match, "strip": True} if isinstance(match, str) else match}


def os_episode(task, metric, mode):
    """Rounds with a shell."""
    def run(script):
        with contextlib.suppress(SandboxEnded):
            output = sandbox.run(script)[1]
            output = output if len(output) <= 800 else output[:780] + "\n[cut: the output is too long]"
            return f"Output of the system:\n\n{output}" if output else "The system puts out nothing."

    def judge(committed):
        return committed and not sandbox.ended and os_right(sandbox, task, committed[0])

    try:
        with contextlib.closing(Sandbox()) as sandbox:
            for script in task["init"]:
                status, output = sandbox.run_apart(script)
                if status:
                    raise SandboxEnded(f"status {status} of {script[1][:100]}, {output[-100:]}")
            for script in task["start"]:  # it may leave a shell of another user, which reads what follows
                sandbox.run(script[1], stdin="")
            record = yield from run_rounds(OS, task["description"], mode, run, judge)
            if sandbox.ended:
                record["failure"] = sandbox.ended
    except (OSError, SandboxEnded) as error:
        record = verdict(Answer("", error=f"cannot be set up: {error}"), None, True, False)
    return scored(record, task["match"] or task["check"] + task["example"], [metric])


def os_right(sandbox, task, answer):
    """Whether an answer matches, or every check succeeds, given the answer and what the checks before it put
    out.
    """
    if match := task["match"]:
        if not isinstance(answer, str):
            return False
        answer = answer.strip() if match.get("strip") else answer
        return answer == match["answer"] if "answer" in match else re.search(match["regex"], answer)
    given = [str(answer)]
    try:
        sandbox.settle()
        for script in task["check"]:
            if isinstance(script, str):
                compared = (text.replace("\r\n", "\n").strip() for text in given[:2])
                status, output = not CHECKS[script](*compared), ""
            else:
                status, output = sandbox.run_apart(script, *given)
            # What an example puts out counts though find ends with status 1, as it does where only the
            # host's root may look.
            if status and not (script in task["example"] and output.strip()):
                return False
            given.append(output)
    except (ValueError, SandboxEnded):
        return False
    return True


def size_of(text):
    """Bytes of a size such as 300, 12K or 1.5 MB. Raises ValueError."""
    number, unit = re.fullmatch(r"(.*?)\s*([KMGTP]?)(?:B|Byte)?", text, re.S).groups()
    return float(number) * 1024 ** " KMGTP".index(unit or " ")


def read_os_action(text):
    """The call that a text makes with the markers of version 0.2, the last if there are several, or None.

    >>> read_os_action("Think: easy.\\n\\nAct: answer(42)")
    [('answer_action', {'answer': '42'})]
    >>> read_os_action("Act: bash\\n\\n```bash\\nls\\n```")
    [('bash_action', {'script': 'ls'})]
    >>> read_os_action("Act: finish"), read_os_action("abc")
    ([('finish_action', {})], None)
    """
    for action in reversed(re.findall(r"Act:\s*(.+)", text)):
        found = re.match(r"(?ai)(bash)|(finish)|answer.*?\((.*)\)", action)
        if found and found[1]:
            scripts = re.findall(r"(?s)```bash\n(.*?)\n```", text)
            return [("bash_action", {"script": "\n\n".join(scripts)})]
        if found:
            return [("finish_action", {}) if found[2] else ("answer_action", {"answer": found[3]})]
    return None


OS = SimpleNamespace(
    prompt="""You work as root in the shell of a Linux system, to do what you are asked or to answer a \
question about the system. In each turn think first, then do one of three things: run a script in bash and \
look at its output; give the answer, exactly and without a sentence around it; or finish, if no answer is \
asked for. A script must not wait for input, and of a long output only the beginning is shown.""",
    form=""" Write it in one of these forms:

Think: your thoughts

Act: bash

```bash
the script
```

or, as the last line, `Act: answer(the answer)` or `Act: finish`.""",
    read=read_os_action,
    tools=[
        tool("bash_action", "Run a script in the shell and see its output.",
             script={"type": "string", "description": "what to run, in bash"}),
        tool("answer_action", "Answer the question, which ends the task.",
             answer={"type": "string", "description": "the answer, and nothing else"}),
        tool("finish_action", "End a task that asks for no answer, once it is done.",
             thought={"type": "string", "description": "why it is done"})],
    rounds=(8, 8),
    most=1)


# ------------------------------------------------------------------------------------------------------------
# The sandbox: namespaces made by bubblewrap. Of the host it sees /usr and a few files of /etc; what it writes
# is kept in memory and ends with it; there is no network. Its root is no one outside: where this runs as
# root, the sandbox's users are 65,536 of the host's that nobody has, else all it has is this user. Limits: of
# processes and of memory, together and each; of every file system; of the time and the output of one script.

PROCESSES, MEMORY, DISK, OUTPUT = 64, 1 << 30, 128 << 20, 32 << 20  # all but the first in bytes
CHUNK = 1 << 16  # bytes of output that are read at once
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BWRAP = f"""bwrap --unshare-all --unshare-user --uid 0 --gid 0 --cap-add ALL --hostname linux --new-session
    --die-with-parent --clearenv --setenv PATH {PATHS} --setenv HOME /root --setenv LANG C.UTF-8
    --setenv TERM dumb --size {DISK} --tmpfs / --ro-bind /usr /usr --symlink usr/bin /bin
    --symlink usr/sbin /sbin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc --dev /dev
    --size {DISK} --tmpfs /dev/shm --remount-ro /dev --size {DISK} --tmpfs /mnt --ro-bind /etc /mnt/etc
    --dir /root --chdir /root"""
# Run first, with capabilities that are given up for good at the end: what is written to /usr goes to memory;
# no user namespaces from here on, as in one of its own anyone may mount file systems without a limit. Files
# of the host belong to no one here, and an item changes the mode of find: it is copied. In the end there are
# two shells: the model's, and one for checks, which has a capability more, so that the other can neither
# trace it nor open its files.
CAPABILITIES = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+sys_chroot,+audit_write"
SETUP = f"""set -e
ulimit -u {PROCESSES} -v {MEMORY * 3 >> 12} -f {DISK >> 10} -t 60 -c 0 -n 256
mkdir -p /mnt/upper/bin /mnt/upper/sbin /mnt/upper/local/bin /mnt/work
mkdir -p /etc /home /opt /srv /run /var/log /var/mail /var/tmp
mkdir -m 1777 /tmp
cp /usr/bin/find /mnt/upper/bin/
mount -t overlay overlay -o lowerdir=/usr,upperdir=/mnt/upper,workdir=/mnt/work /usr
cd /mnt/etc
cp -r alternatives bash.bashrc default host.conf inputrc ld.so* localtime login.defs nsswitch.conf \\
    os-release pam.d profile protocols security services shells skel /etc 2> /dev/null || true
for file in passwd group; do awk -F: '$3 < 1000 || $3 == 65534' $file > /etc/$file; done
awk -F: '{{print $1 ":*:19000:0:99999:7:::"}}' /etc/passwd > /etc/shadow
awk -F: '{{print $1 ":!::"}}' /etc/group > /etc/gshadow
chmod 640 /etc/shadow /etc/gshadow
echo 127.0.0.1 localhost > /etc/hosts
date > /var/log/boot.log
for place in / /mnt /dev/shm; do mount -o remount,nosuid,nodev,nr_inodes=50000 tmpfs $place; done
cd /root
umount -l /mnt  # from here on only the first process has it; /mnt stays a mount, so that none can remove it
mount --bind /mnt /mnt
umount /proc/sys 2> /dev/null || true
echo 0 > /proc/sys/user/max_user_namespaces
echo 1000 > /proc/self/oom_score_adj
close="$1<&- $2>&-"
eval "setpriv --inh-caps -all --bounding-set {CAPABILITIES},+wake_alarm bash <&$1 >&$2 2>&1 $close &"
eval "exec $close"
exec setpriv --inh-caps -all --bounding-set {CAPABILITIES} bash -c 'while :; do bash --login; done'"""
# Files that no process has mapped are not seen in what processes hold, so nobody makes any outside the file
# systems: (AUDIT_ARCH of linux/audit.h, numbers of the calls shmget, memfd_create and memfd_secret).
MACHINES = {"x86_64": (0xC000003E, 29, 319, 447), "aarch64": (0xC00000B7, 194, 279, 447)}
PROGRAMS = [Path(place) for place in ("bin", "sbin", "local/bin", "local/sbin")]  # below /usr
LINKS = ("bin", "sbin", "lib", "lib64")  # to their namesakes there
LOADED = ("etc", "etc/alternatives", "etc/ld.so.cache", "etc/ld.so.preload")  # what a program is found by


class SandboxEnded(Exception):
    """Why there is no sandbox any more."""


def readable(file, seconds=0):
    """Whether a file or socket can be read within some seconds. Its descriptor may be any, where that of
    select.select is below 1,024.
    """
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Sandbox:
    """A shell that goes on until close(), or until it breaks a limit: `ended` then says which; and a second
    one, for checks.
    """

    def __init__(self):
        self.ended, options = None, {}
        calls, commands, results = seccomp_filter(), os.pipe(), os.pipe()
        inside = [calls, commands[0], results[1]]
        command = f"{BWRAP} --seccomp {calls} unshare --mount bash -c".split()
        command += [SETUP, "setup", str(commands[0]), str(results[1])]
        root = os.geteuid() == 0 and "4294967295" in Path("/proc/self/uid_map").read_text()
        if root:
            # As another user: the limit on processes does not hold for root, and holds so for all users of
            # the sandbox together.
            base, info, go = 0x40000000 + 0x10000 * secrets.randbelow(0x4000), os.pipe(), os.pipe()
            limited = f"prlimit --nproc={PROCESSES} bwrap --info-fd {info[1]} --userns-block-fd {go[0]}"
            command[:1] = limited.split()
            inside += [info[1], go[0]]
            options = {"user": base, "group": base, "extra_groups": []}
        # A process in the sandbox can read the environment that is given here.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, cwd="/", bufsize=0, env={"PATH": PATHS},
                                        pass_fds=inside, **options)
        for descriptor in inside:
            os.close(descriptor)
        if root:  # bwrap says its child's number, and waits until that has its users
            with open(info[0], "rb") as info, open(go[1], "wb") as go:
                if said := info.read():
                    for kind in ("uid_map", "gid_map"):
                        Path(f"/proc/{json.loads(said)['child-pid']}/{kind}").write_text(f"0 {base} 65536")
                    go.write(b"\n")
        self.shell = self.process.stdin, self.process.stdout
        self.checker = open(commands[1], "wb", buffering=0), open(results[0], "rb", buffering=0)
        for commands, _ in (self.shell, self.checker):
            os.set_blocking(commands.fileno(), False)  # nobody may read them
        threading.Thread(target=self.watch, daemon=True).start()
        self.run("true")
        # The sandbox's first process sees /usr as it was; its main one is the parent of all the others.
        _, self.first, self.main, checker = [*processes(self.process.pid)][:4]
        self.trusted = {self.first, checker}

    def watch(self):
        while self.process.poll() is None:
            if sum(memory for _, memory in processes(self.process.pid).values()) > MEMORY:
                self.close("it took too much memory")
            time.sleep(0.2)

    def close(self, why="it was closed"):
        """End it and all that runs in it."""
        self.ended = self.ended or why
        self.process.kill()
        self.process.wait()

    def fail(self, why):
        """End it, and raise SandboxEnded."""
        self.close(why)
        raise SandboxEnded(self.ended)

    def run(self, script, stdin="< /dev/null", seconds=30, shell=None):
        """Run a script in a shell, the model's by default, whose directory and variables the next one finds;
        returns its status and what it puts out.

        Raises SandboxEnded where that takes too long, puts out too much, or ends the sandbox, and of a script
        that is longer than the 64 KiB that a pipe holds.
        """
        mark = "end" + secrets.token_hex(8)
        # The status comes with a line of its own: another shell follows one that the script exits from, and
        # reads on.
        text = f"eval {shlex.quote(script)} {stdin}; {mark}=$?\necho {mark} ${{{mark}-1}} {mark}\n"
        found = re.compile(rf"{mark} (\d+) {mark}\n".encode())
        commands, results = shell or self.shell
        output, deadline = bytearray(), time.monotonic() + seconds
        todo = text.replace("\0", "").encode("utf-8", "replace")
        with contextlib.suppress(OSError):  # it has ended, as the results will show
            if commands.write(todo) != len(todo):
                self.fail("a script was too long")
        while not (end := found.search(output, max(0, len(output) - 2 * CHUNK))):
            left = deadline - time.monotonic()
            if left < 0 or not readable(results, left):
                self.fail("its time was up")
            chunk = results.read(CHUNK)
            output += chunk
            if not chunk:
                self.fail(f"it ended {output[-300:].decode(errors='replace')}".strip())
            if len(output) > OUTPUT:
                self.fail("it put out too much")
        return int(end[1]), output[:end.start()].decode(errors="replace")

    def run_apart(self, script, *arguments):
        """Run a (language, text) in a process and an environment of its own, from the shell for checks;
        returns its status and standard output.
        """
        language, text = script
        # Nothing of what a user can give Python to run before the script.
        python = "python3 -ISB -X pycache_prefix=/dev/null -c {}"
        program = (python if language == "python" else "bash -c {} --").format(shlex.quote(text))
        command = f"/usr/bin/env -i PATH={PATHS} HOME=/root LANG=C.UTF-8 {program} {shlex.join(arguments)}"
        return self.run(f"(cd /root; exec {command} 2> /dev/null)", shell=self.checker)

    def settle(self):
        """Stop whatever runs but the shell for checks, which from now on nothing can disturb. Raises
        SandboxEnded where that does not help, as the programs that it runs are not the host's any more.
        """
        for _ in range(100):
            for pid in processes(self.first).keys() - self.trusted:  # all, whatever they wait for now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            if all(state in "TtZXD" for pid, (state, _) in processes(self.first).items()
                   if pid not in self.trusted):  # stopped, dead or in the kernel
                break
            time.sleep(0.01)
        else:
            self.fail("its processes cannot be stopped")
        if self.is_changed():
            self.fail("it changed programs that the checks run")

    def is_changed(self):
        """Whether programs or libraries are not what they are on the host, or others come before them. New
        programs are allowed, and whatever /usr/share and the like have besides.
        """
        inside, upper = Path(f"/proc/{self.main}/root"), Path(f"/proc/{self.first}/root/mnt/upper")
        programs = [path for place in PROGRAMS for path in Path("/usr", place).glob("*")]
        same = [*(Path("/", path) for path in LOADED), *Path("/etc/alternatives").glob("*")]
        pairs = [(inside / path.relative_to("/"), path) for path in same]
        for folder, directories, files in os.walk(upper):
            for path in (Path(folder, name) for name in directories + files):
                if "__pycache__" not in path.parts and (path.is_symlink() or not path.is_dir()):
                    pairs += [(path, original) for original in originals(path.relative_to(upper))]
        try:
            return not (all(is_kept(inside / path.relative_to("/"), path) for path in programs)
                        and all(os.readlink(inside / name) == f"usr/{name}" for name in LINKS)
                        and all(content(path) == content(original) for path, original in pairs))
        except OSError:
            return True


def is_kept(path, original):
    """Whether a program can still be run, by those who may run the original."""
    return not original.lstat().st_mode & ~path.lstat().st_mode & 0o170111


def originals(path):
    """The files of the host from which a file that was written to /usr, at this path, may not differ; of a
    program, those of its name in all places. In a library's place nothing new may be.
    """
    library = path.as_posix().startswith(("lib", "local/lib"))
    places = [place / path.name for place in PROGRAMS] if path.parent in PROGRAMS else [path]
    files = [Path("/usr", place) for place in places]
    return [file for file in files if library or os.path.lexists(file)]


def content(path):
    """What a link leads to, or what a regular file holds; None of anything else."""
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() else None


def seccomp_filter():
    """A pipe that holds a program for bwrap, in classic BPF, which refuses the calls in MACHINES and those of
    other architectures. Raises OSError where the machine is none of these.
    """
    if platform.machine() not in MACHINES:
        raise OSError(f"the numbers of system calls are not known for {platform.machine()}")
    # Each step: its code, how many to skip if so, how many if not, a value. Load the architecture; refuse
    # another than this machine's; load the call's number; refuse those of x32, and three; refuse; allow.
    program = """20 0 0 4  15 0 5 {:x}  20 0 0 0  35 3 0 40000000  15 2 0 {:x}  15 1 0 {:x}  15 0 1 {:x}
                 06 0 0 50001  06 0 0 7fff0000""".format(*MACHINES[platform.machine()])
    numbers = [int(number, 16) for number in program.split()]
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write(struct.pack("HBBI" * 9, *numbers))
    return reader


def processes(pid):
    """{number: (the letter of its state, bytes of memory that it holds)} of a process and all beneath it,
    parents first and the oldest child first; nothing if it has gone.
    """
    found = {}
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[pid] = fields[0], int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= processes(int(child))
    return found


# ------------------------------------------------------------------------------------------------------------
# api-bank and mmlu


def api_bank(args):
    """Each call of API-Bank's dialogues (Li et al. 2023, arXiv 2304.08244) is an item: given all that was
    said before, what is called next?

    At hand are the APIs that the dialogue calls or, where it begins with a search for tools, the search and
    what it has found so far.
    """
    known = {"ToolSearcher": {
        "name": "ToolSearcher", "description": "Searches for tools by keywords.",
        "input_parameters": {"keywords": {"type": "str"}}}}
    for row in read_all(find_data(args.data, "*all_apis.csv")[0]):
        texts = dict(re.findall(r"(?sm)^(\w+) = (.*?)(?=^\w+ = |\Z)", row["api_info"]))
        stated = {key: literal_value(text) for key, text in texts.items()}
        known[row["类名"]] = stated | {"name": row["类名"]}
    episodes = []
    for path in find_data(args.data, "*level*.jsonl"):
        lines = read_all(path)
        if "role" in lines[0]:  # the file is one dialogue, a turn a line
            lines = [{"file": path.name, "turns": lines}]
        for dialogue in lines:
            if "turns" in dialogue:
                episodes += bank_dialogue(dialogue, known, args)
    return episodes[:args.limit]


def bank_dialogue(dialogue, known, args):
    """Yield the items of one dialogue."""
    name, turns, messages = dialogue["file"].removesuffix(".jsonl"), dialogue["turns"], []
    metrics = ["exact match", re.sub(r".*level-(\d).*", r"exact match: level \1", name)]
    called = sorted({t["api_name"] for t in turns if t["role"] == "API"})
    called = ["ToolSearcher"] if "ToolSearcher" in called else called
    tools = {n: known.get(n, {"name": n}) for n in called}
    for n, t in enumerate(turns):
        if t["role"] != "API":
            messages.append(chat_message("user" if t["role"] == "User" else "assistant", t["text"]))
            continue
        gold, output = (t["api_name"], t["param_dict"]), t["result"].get("exception") or t["result"]["output"]
        functions = [bank_tool(api) for api in tools.values()]
        yield f"{name}:{n}", partial(bank_episode, [*messages], functions, gold, metrics, args)
        text = output if isinstance(output, str) else in_json(output)
        messages += tool_messages([gold], [text], args)
        if t["api_name"] == "ToolSearcher":
            for f in output if isinstance(output, list) else [output]:
                tools[f["name"]] = f


def bank_tool(api):
    """A function's definition, from API-Bank's parameters {name: {"type": a Python type, "description"}}."""
    properties = {}
    for name, stated in mapping(api, "input_parameters").items():
        kind = TYPE_NAMES.get(re.match(r"\w*", stated["type"])[0], "string")
        properties[name] = {"type": kind, "description": stated.get("description", "")}
    return tool(api["name"], api.get("description") or "", **properties)["function"]


def bank_episode(messages, tools, gold, metrics, args):
    """What is called after these messages?"""
    answer, calls = yield from ask(messages, tools, args)
    why = "wrong arguments"
    if len(calls or []) != 1:
        why = "wrong count"
    elif calls[0][0] != gold[0]:
        why = "wrong name"
    item = verdict(answer, calls, True, same_json(calls, [gold]), why)
    return scored(item, [gold], metrics) | {"calls": show(calls)}


def mmlu(args):
    """Multiple choice (Hendrycks et al. 2021, arXiv 2009.03300): the likeliest of the letters after five
    examples of the subject, or as many as the model's window has room for.
    """
    examples = questions(args.data, "dev")

    def shown(question):
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", question["choices"]))
        return f"{question['question']}{options}\nAnswer:"

    def episode(question):
        subject, asked, gold = question["subject"], shown(question), question["answer"]
        head = ("The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n")
        shots = [f"{shown(q)} {q['answer']}\n\n" for q in examples if q["subject"] == subject][:5]
        for n in range(len(shots), -1, -1):
            context = head + "".join(shots[:n]) + asked
            likelihoods = yield [(context, f" {letter}") for letter in "ABCD"]
            if None not in likelihoods:
                break
        item = {"question": asked, "log_likelihoods": likelihoods, "shots": n}
        if None in likelihoods:
            item |= {"verdict": "error", "failure": "too long for the window"}
        elif "ABCD"[np.argmax(likelihoods)] == gold:
            item["verdict"] = "right"
        else:
            item |= {"verdict": "wrong", "failure": "another letter"}
        return scored(item, gold, ["accuracy"])

    asked = questions(args.data, "test") or questions(args.data, "val")
    if not asked:
        fail(f"{args.data}: there is no mmlu_test.jsonl or mmlu_val.jsonl in it")
    return [(f"{q['subject']}:{i}", partial(episode, q)) for i, q in enumerate(asked[:args.limit])]


def questions(directory, split):
    """MMLU's questions of a split, from its own files <subject>_<split>.csv, or from mmlu_<split>.jsonl."""
    found = [q for path in sorted(Path(directory).rglob(f"mmlu_{split}.jsonl")) for q in read_all(path)]
    for path in sorted(Path(directory).rglob(f"*_{split}.csv")):
        subject, lines = path.stem.removesuffix(f"_{split}"), path.read_text(encoding="utf-8")
        for question, *choices, answer in csv.reader(lines.splitlines(keepends=True)):
            found.append({"subject": subject, "question": question, "choices": choices, "answer": answer})
    return found


# ------------------------------------------------------------------------------------------------------------
# Numbers and their uncertainty, and the report


def total_of(formula, means, rows):
    """A total's means and its items, from those of metrics: a list is the mean of its parts, a set the mean
    over all its items.
    """
    if isinstance(formula, str):
        return means[formula], rows[formula]
    pooled = isinstance(formula, frozenset)
    parts = [total_of(part, means, rows) for part in (sorted(formula) if pooled else formula)]
    weights = [len(items) if pooled else 1 for _, items in parts]
    mean = np.average([mean for mean, _ in parts], 0, weights)
    return mean, [item for _, items in parts for item in items]


def read_reference(path, measured):
    """The published scores in a file, as rows of the table; exits with what is wrong with it. Those of suites
    that are not measured are left out, and said to be.
    """
    try:
        given = read_json(Path(path)) if path else []
        if not isinstance(given, list):
            raise ValueError
    except OSError as error:
        fail(f"--reference {path}: {error.strerror}")
    except (ValueError, RecursionError):
        fail(f"--reference {path}: not a JSON list")
    found, keys = [], ("model", "metric", "source", "suite")
    for n, row in enumerate(given, 1):
        texts, score = [mapping(row).get(key) for key in keys], mapping(row).get("score")
        if not fits(texts, TEXTS):
            fail(f"--reference {path}, entry {n}: it needs {', '.join(keys)}, each a text, and score")
        model, metric, source, suite = (visible(" ".join(text.split())).replace("|", "/") for text in texts)
        most = float("inf") if suite == "loss" else 1
        if not fits(score, {"type": "number"}) or not 0 <= score <= most:
            fail(f"--reference {path}, entry {n}: the score is a share, from 0 to 1")
        found.append({"model": f"{model} (published: {source})", "suite": suite, "metric": metric,
                      "score": score})
    suites = {suite.removesuffix("-constrained") for suite in measured}
    if others := sorted({row["suite"] for row in found} - suites):
        print(f"--reference {path}: left out {', '.join(others)}, which is not measured")
    return found


def resample(values, rng, resamples=2000):
    """Means (resamples, M) of as many draws of N rows, with replacement, from values (N, M). The same rows
    for every column: paired.
    """
    n = len(values)
    # How often each row is drawn, (resamples, N).
    counts = rng.multinomial(n, np.full(n, 1 / n), resamples)
    return counts @ values / n


def markdown(rows):
    """A table of texts, the first row its head, in columns of even width; those that would be empty are left
    out.
    """
    columns = [column for column in itertools.zip_longest(*rows, fillvalue="") if any(column[1:])]
    columns = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    head, *body = [f"| {' | '.join(column[n] for column in columns)} |" for n in range(len(rows))]
    rule = f"|{'|'.join('-' * (len(column[0]) + 2) for column in columns)}|"
    return "\n".join([head, rule, *body])


def show_item(item, model, tokenizer):
    """Print a conversation as the model read it, and what it wrote."""
    prompt = tokenizer.decode(tokenizer.render(*item["prompt"], answer=True)[0])
    heading = f"{model}, a conversation about an API held out from the corpus: {item['verdict']}"
    print(visible(f"\n--- {heading}\n{prompt}{item['output']}"))


def failures(suite, items, models):
    """What failed in a suite, by kind, for each model, with an example of each kind of the last."""
    lines = []
    for model in models:
        failed = [item for item in items[model] if "failure" in item]
        kinds = [f"{kind} {n:,}" for kind, n in Counter(item["failure"] for item in failed).most_common()]
        if kinds:
            lines.append(f"- {model}: {', '.join(kinds)}")
    for kind, item in {item["failure"]: item for item in reversed(failed)}.items():
        asked = item["prompt"][0][-1]["content"] if "prompt" in item else item.get("question", "")
        gold = in_json(item.get("gold", ""))
        shown = f"\nasked: {asked[-600:]}\nwritten: {item.get('output', '')[:600]}\nexpected: {gold[:600]}"
        lines.append(f"\n{kind}, {item['id']}\n" + shown.replace("\n", "\n    "))
    heading = [f"## What failed in {suite}\n"] * bool(lines)
    return "\n".join([*heading, *lines]) + "\n"


def draw(results, models, paths, out, pyplot):
    """Draw out/eval/report.png: each suite's scores with their intervals, and the held-out losses of the
    models' training as curves.
    """
    suites = dict.fromkeys(r["suite"] for r in results)
    size = 12, 4 + 4 * len(suites)
    figure, axes = pyplot.subplots(len(suites) + 1, figsize=size, layout="constrained")
    for axis, suite in zip(axes, suites):
        for model in models:
            rows = [r for r in results if (r["suite"], r["model"]) == (suite, model)]
            score, *ends = np.array([[r[key] for r in rows] for key in ("score", "low", "high")])
            metrics = [r["metric"] for r in rows]
            axis.errorbar(score, metrics, xerr=np.abs(ends - score), fmt="o", label=model)
        axis.set_title(suite)
    for model, path in zip(models, paths):
        lines = read_metrics(Path(path))
        for key in (f"loss/{domain}" for domain in VALIDATED):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes[-1].plot(*zip(*points), label=f"{model}, {key}")
    axes[-1].set(title="held-out loss in training (nats per token)", xlabel="step")
    for axis in axes:
        if axis.has_data():
            axis.legend(fontsize=8)
        else:  # none of the models was trained here
            axis.remove()
    figure.savefig(out / "report.png", dpi=100)


# ------------------------------------------------------------------------------------------------------------
# --ask: one request, with tools of one's own


def show_answer(args):
    """Print the prompt as the model sees it, what it writes, token by token in two shades, and its calls."""
    path, tools = args.model[0] if args.model else f"{args.out}/ours", read_tools(args.tools)
    local = open_model(path, None, args)
    prompt = local.tokenizer.render([chat_message("user", args.ask)], tools, answer=True)[0]
    try:
        [ids] = local.generate([prompt], [tools], args.max_tokens or 1024, args.constrained)
    except ValueError as error:  # it does not fit
        fail(error)
    print(visible(local.tokenizer.decode(prompt)), end="")
    print_tokens(local.tokenizer, ids, [True] * len(ids))
    calls = parse_calls(local.tokenizer.decode(ids))
    found = show(calls) or ["none that can be read" if calls is None else "none"]
    print("calls, not made:", *map(visible, found), sep="\n")


def read_tools(path):
    """The tools in a file, or exit with what is wrong with it."""
    if not path:
        return []
    if not Path(path).is_file():
        fail(f"--tools {path}: no such file")
    try:
        if path.endswith(".py"):
            apis = list(source_apis(Path(path), Path(path).name, ""))
            if wrong := next((api for api in apis if isinstance(api, dict)), None):
                fail(f"{path}, line {wrong['line'] or 1}: {wrong['reason']}")
            tools = [definition(api, api.name) for api in apis if api.usable]
        else:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            tools = [read_tool(t if "function" in t else {"type": "function", "function": t}) for t in given]
    except (OSError, *UNREADABLE):
        fail(f"{path}: not a JSON list of tools, each a function with a name and a schema")
    return tools or fail(f"{path}: no public function in it")


# ------------------------------------------------------------------------------------------------------------
# --serve: OpenAI's chat API for a checkpoint directory, on this machine alone

MAX_BODY = 8 * 2**20  # bytes of a request
ROUTES = {"/v1/models": "GET", "/v1/chat/completions": "POST"}
FIELDS = {  # of a request: (type, lowest, highest, default, also for null); other fields are ignored
    "max_tokens": (int, 1, 2**31, 4096),
    "max_completion_tokens": (int, 1, 2**31, None),
    "temperature": (float, 0, 2, 1.0),
    "top_p": (float, 0, 1, 1.0),
    "seed": (int, -2**63, 2**63, None),
    "n": (int, 1, 1, 1),
    "logprobs": (bool, False, True, False),
    "top_logprobs": (int, 0, 20, 0),
    "parallel_tool_calls": (bool, False, True, True),
    "stream": (bool, False, True, False)}


def serve(args):
    """Answer requests until Ctrl-C."""
    local, name = Local(args.serve, None, args), Path(args.serve).resolve().name
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Api)
    except OSError as error:
        fail(f"--port {args.port}: {error.strerror}")
    server.socket.listen(128)  # clients that have not been accepted yet, where 5 are usual
    server.local, server.engine, server.names = local, Engine(local, args.batch_size), (name, args.serve)
    print(f"{name} answers at http://127.0.0.1:{server.server_port}/v1 until Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        os._exit(0)  # not as usual: the engine is at work


def write_answer(row, tokenizer):
    """Write a row's answer: is sent each (token, logits), and yields the token that is taken. Puts into
    row.events choices as the API has them: the pieces of a stream, and the last, which has a finish_reason.
    Then it yields None.

    It goes on up to a stop or, where one call is asked for, its end. Nothing is put that may still become a
    stop or a call, nor line ends before one; calls are put when they are whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
    token = reason = None
    text, sent, scores, role = tokenizer.decode(row.begun), 0, [], {"role": "assistant"}
    begun = len(text)

    def put(message, end, reason=None):
        """With the scores of the text from what is sent to an end."""
        entries = [entry for at, entry in scores if sent <= at < end]
        logprobs = {"content": entries, "refusal": None} if row.logprobs else None
        key = "delta" if row.stream else "message"
        row.events.put({"index": 0, key: message, "logprobs": logprobs, "finish_reason": reason})

    if row.stream:
        put(role | {"content": ""}, 0)
        role = {}
    while not reason:
        token, logits = yield token
        if row.constraint:
            token = row.constraint(0, row.begun + row.new, logits)
        at, data = len(text), b""
        if token in row.stop_ids:
            reason = "stop"
        else:
            data = tokenizer.token_bytes(token)
            row.new.append(token)
            reason = "length" if len(row.new) == row.limit else None
            if row.logprobs:
                scores.append((at, score(token, logits.log_softmax(-1), tokenizer, row.top_logprobs)))
        text += decoder.decode(data, bool(reason))
        if stop := row.stop.search(text, max(begun, at - row.held)):
            text, reason = text[:stop.start()], "stop"
        elif row.most == 1 and text.endswith("</tool_call>") and parse_calls(text, 1):
            reason = "stop"
        head = text.partition("<tool_call>")[0] if row.tools else text
        end = len(head[:max(0, len(text) - row.held)].rstrip("\n"))
        if row.stream and not reason and end > sent:
            put({"content": text[sent:end]}, end)
            sent = end
    content, calls, reason = result(text, row, reason)
    put(role | calls | {"content": content and content[sent:]}, len(text), reason)
    yield None


def score(token, logprobs, tokenizer, top):
    """The entry in logprobs of a token, with the likeliest ones."""
    entries = []
    for i in [token, *logprobs.topk(top).indices.tolist()]:
        data = tokenizer.token_bytes(i)
        text = data.decode("utf-8", "replace")
        entries.append({"token": text, "logprob": logprobs[i].item(), "bytes": list(data)})
    return entries[0] | {"top_logprobs": entries[1:]}


def result(text, row, reason):
    """(content, {"tool_calls": calls} or {}, finish_reason) of a text that has ended. A single call is whole
    whatever cuts off what follows it.
    """
    calls = parse_calls(text, row.most)
    if not calls:
        return text, {}, reason
    message = turn(Answer(text, calls))
    calls = [call | {"id": f"call_{uuid.uuid4().hex}", "index": i}
             for i, call in enumerate(message["tool_calls"])]
    reason = "tool_calls" if row.most or reason == "stop" else reason
    return message["content"] or None, {"tool_calls": calls}, reason


class Engine(threading.Thread):
    """The one thread that runs the model, on a batch of rows that join when there is room, and leave when
    they have ended.
    """

    def __init__(self, local, size):
        super().__init__(daemon=True)
        self.model, self.size, self.waiting = local.model, size, queue.SimpleQueue()
        self.start()

    @torch.inference_mode()
    def run(self):
        rows = []
        while True:
            if not rows:
                batch, logits = transformer.Batch(self.model), []
            with contextlib.suppress(queue.Empty):
                while len(rows) < self.size:
                    rows.append(self.waiting.get(block=not rows))
            try:
                if fresh := rows[len(logits):]:
                    logits += batch.add([row.ids for row in fresh])
                options = [(row.temperature, row.top_p, row.random()) for row in rows]
                chosen = transformer.sample(torch.stack(logits), *zip(*options))
                chosen = [self.take(*each) for each in zip(rows, chosen, logits)]
                left = [i for i, token in enumerate(chosen) if token is not None]
                rows = [rows[i] for i in left]
                if len(left) < len(chosen):
                    batch.keep(left)
                logits = [*batch.step([chosen[i] for i in left])] if left else []
            except Exception as error:  # out of memory, say: what was under way has failed, not the server
                for row in rows:
                    row.events.put(error)
                rows = []

    def take(self, row, token, logits):
        """The token that a row takes; None if it has ended, or its client is gone."""
        try:
            if readable(row.connection) and not row.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError
            return row.writing.send((token, logits))
        except Exception as error:  # also of a schema that cannot be followed
            row.events.put(error)


class HTTPError(Exception):
    """A request that is answered by an error: (status, the answer)."""


def failure(message, kind="invalid_request_error", param=None, code=None):
    """An error as the API has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def require(ok, message, param=None, status=400, code=None):
    """Refuse a request if something is not as it should be."""
    if not ok:
        raise HTTPError(status, failure(message, param=param, code=code))


class Api(BaseHTTPRequestHandler):
    """A connection, for one request: none stays open and idle."""
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that the other side may be silent while it is read or written to
    default_request_version = "HTTP/1.1"  # of what states none, lest its answer have no status
    error_content_type = "application/json"  # of what http.server itself refuses
    error_message_format = ('{"error": {"message": "%(explain)s", "type": "invalid_request_error", '
                            '"param": null, "code": null}}')

    def handle(self):
        with contextlib.suppress(OSError):  # the client is gone
            super().handle()

    def do_POST(self):
        try:
            self.respond(self.path.partition("?")[0], self.read_body())
        except HTTPError as refused:
            self.send_json(*refused.args)

    do_GET = do_DELETE = do_POST

    def log_message(self, *args):
        pass

    def send_json(self, status, value):
        self.send_head(status, "application/json")
        self.wfile.write(json.dumps(value).encode())

    def send_head(self, status, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()

    def read_body(self):
        """The bytes that were sent."""
        # A page whose own name leads here, by DNS rebinding, has that name as its host.
        host = ",".join(self.headers.get_all("Host", []))
        require(re.fullmatch(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", host, re.I),
                f"this answers on localhost, not as {short(host)}", status=403)
        length = ",".join(self.headers.get_all("Content-Length", ["0"]))
        require(re.fullmatch("[0-9]{1,18}", length) and "Transfer-Encoding" not in self.headers,
                "one Content-Length is needed", status=411)
        data = self.rfile.read(min(int(length), 4 * MAX_BODY))  # most clients send all before they read
        require(len(data) <= MAX_BODY, f"a body of {length} bytes, more than {MAX_BODY}", status=413)
        return data

    def respond(self, path, data):
        """Answer a request."""
        require(path in ROUTES, f"there is no {path}, only {', '.join(ROUTES)}", status=404)
        require(self.command == ROUTES[path], f"{path} takes {ROUTES[path]}", status=405)
        names = self.server.names
        if path == "/v1/models":
            model = {"id": names[0], "object": "model", "created": 0, "owned_by": "local"}
            return self.send_json(200, {"object": "list", "data": [model]})
        # Pages of other sites in a browser cannot send this type.
        require(self.headers.get_content_type() == "application/json",
                "Content-Type must be application/json", status=415)
        try:
            row = read_chat(json.loads(data), self.server.local, names)
        except UNREADABLE:
            require(False, "the body is not a JSON object that can be read")
        row.connection = self.connection
        self.server.engine.waiting.put(row)
        self.answer(row)

    def answer(self, row):
        """Send a row's answer, whole or, as a stream, in server-sent events: an object for each of its
        choices, then [DONE].
        """
        head = {"id": f"chat-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.server.names[0],
                "object": "chat.completion.chunk" if row.stream else "chat.completion"}

        def send(value):
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

        if row.stream:
            self.send_head(200, "text/event-stream")
        choice = {"finish_reason": None}
        while not choice["finish_reason"]:
            choice = row.events.get()
            if isinstance(choice, Exception):
                failed = failure(repr(choice), "server_error")
                return send(failed) if row.stream else self.send_json(500, failed)
            if row.stream:
                send(head | {"choices": [choice]})
        prompt, completion = len(row.ids), len(row.new)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion,
                 "total_tokens": prompt + completion}
        if not row.stream:
            return self.send_json(200, head | {"choices": [choice], "usage": usage})
        if row.include_usage:
            send(head | {"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")


def read_chat(body, local, names):
    """What a request asks for, as a row of the engine. Special tokens in messages are text. A call that must
    be made is begun, and kept within the tools' schemas.
    """
    tokenizer, context = local.tokenizer, local.model.config.max_seq_len
    require(body.get("model") in names, f"there is no model {short(body.get('model'))}, only {names[0]}",
            "model", 404, "model_not_found")
    row = SimpleNamespace(events=queue.SimpleQueue(), new=[], constraint=None)
    for name, (kind, low, high, default) in FIELDS.items():
        value = body.get(name)
        require(value is None or type(value) in (int, kind) and low <= value <= high,
                f"{name} must be {kind.__name__}, from {low} to {high}, not {short(value)}", name)
        setattr(row, name, default if value is None else value)
    row.random = random.Random(row.seed).random
    row.include_usage = mapping(body, "stream_options").get("include_usage") is True
    messages = read_list(body, "messages", read_message, "a role with a text, or texts, as its content")
    require(messages, "messages must not be empty", "messages")
    tools = read_list(body, "tools", read_tool, "a function with a name and a schema")

    chosen, schema = body.get("tool_choice") or "auto", read_format(body.get("response_format"))
    called = [tool for tool in tools
              if chosen == "required" or mapping(chosen, "function") == {"name": tool["function"]["name"]}]
    require(called or chosen in ("auto", "none"),
            f"tool_choice {short(chosen)} is not auto, none, required or one of the tools", "tool_choice")
    row.tools, row.most = tools, None  # how many calls count
    if not tools or chosen == "none":
        row.tools, row.most = [], 0
    elif isinstance(chosen, dict) or not row.parallel_tool_calls:
        row.most = 1
    row.begun = [tokenizer.special["<tool_call>"]] * bool(called)
    require(schema is None or not row.tools, "response_format does not go with tools", "response_format")
    for function in (tool["function"] for tool in called):
        check_schema(function["parameters"], "tools", function.get("strict") is True)
    if called or schema is not None:
        row.constraint = Constraint(tokenizer, [called], schema)

    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    require(fits(stop, TEXTS) and all(stop) and len(json.dumps(stop)) <= 2**14,
            "stop must be one or more strings, none of them empty, of at most 16,000 characters", "stop")
    row.stop = re.compile("|".join(map(re.escape, stop)) or "(?!)")
    row.held = max(map(len, [*stop, "<tool_call>"]))  # characters that may become one of these
    stop_ids = read_list(body, "stop_token_ids", operator.index, "an integer")
    row.stop_ids = {tokenizer.im_end, tokenizer.end_of_text, *stop_ids}

    row.ids = tokenizer.render(messages, row.tools, answer=True)[0] + row.begun
    room = context - len(row.ids) + 1  # the last token needs no position
    require(room > 0, f"a prompt of {len(row.ids)} tokens exceeds the context length of {context}",
            "messages", code="context_length_exceeded")
    row.limit = min(row.max_completion_tokens or row.max_tokens, room)
    row.writing = write_answer(row, tokenizer)
    next(row.writing)
    return row


def read_list(body, name, read, wanted):
    """What `read` makes of each value of a list in a request. Where it raises one of UNREADABLE, the value is
    not what is wanted.
    """
    found = []
    for n, value in enumerate(body.get(name) or []):
        try:
            found.append(read(value))
        except UNREADABLE:
            require(False, f"{name}[{n}] is not {wanted}: {short(value)}", name)
    return found


ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TEXTS = {"type": "array", "items": {"type": "string"}}


def read_message(message):
    """A message of a chat, with its content as a string: "" + is a TypeError for what is none."""
    role, content, calls = ROLES[message["role"]], message.get("content"), message.get("tool_calls") or []
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    if content or role != "assistant":
        content = "" + content
    calls = [{key: "" + call["function"][key] for key in ("name", "arguments")} for call in calls]
    return {"role": role, "content": content, "tool_calls": [{"function": call} for call in calls]}


def read_tool(tool):
    """A tool of a chat, with parameters."""
    f = tool["function"]
    f |= {"name": "" + f["name"], "parameters": {} | (f.get("parameters") or {})}
    return tool


def short(value):
    """The beginning of a value, for a message."""
    return json.dumps(value)[:100]


def read_format(value):
    """The schema that a request's response_format has; None if an answer is a text."""
    where = "response_format"
    formats = {"text": None, "json_object": {"type": "object"},
               "json_schema": mapping(value, "json_schema").get("schema")}
    kind = "text" if value is None else mapping(value).get("type")
    require(kind in formats, f"{where} must have the type {', '.join(formats)}, not {short(value)}", where)
    if kind == "text":
        return None
    require(isinstance(formats[kind], dict), f"{where} has no object as its json_schema.schema", where)
    return check_schema(formats[kind], where)


ANNOTATIONS = set("title description default examples deprecated readOnly writeOnly $schema $id $comment "
                  "$defs definitions".split())
KEYWORDS = {  # of the schema of an answer, each with the schema of its value; others are refused
    "type": {"anyOf": [{"enum": SCHEMA_TYPES}, {"type": "array", "items": {"enum": SCHEMA_TYPES}}]},
    "properties": {"type": "object"}, "required": TEXTS,
    "additionalProperties": {"type": ["object", "boolean"]}, "items": {"type": ["object", "boolean"]},
    "anyOf": {"type": "array"}, "enum": {"type": "array"}, "const": {}, "nullable": {"type": "boolean"}}


def check_schema(schema, where, strict=True):
    """A schema as read_schema returns it, if decoding keeps to all that is in it; else the request is
    refused. Unless it is strict, keywords such as `minimum` are passed over.
    """
    size = len(json.dumps(schema))
    require(size <= 2**16, f"{where}: a schema of {size:,} characters, more than 65,536", where)
    schema = read_schema(schema)
    wrong = unsupported(schema, strict, set())
    require(wrong is None, f"{where}: the schema's {wrong} is not supported", where)
    return schema


def unsupported(node, strict, seen):
    """What in a schema decoding does not keep to; None if all is well."""
    if node is True or id(node) in seen:
        return None
    if not isinstance(node, dict):
        return short(node)
    seen.add(id(node))
    stated = sorted(node.keys() - ANNOTATIONS if strict else node.keys() & KEYWORDS.keys())
    for key in stated:
        empty = key != "required" and node[key] == []
        if empty or key not in KEYWORDS or not fits(node[key], KEYWORDS[key]):
            return key
    if strict and "anyOf" in stated and len(stated) > 1:
        return " beside ".join(stated)
    properties = node.get("properties", {})
    if node.get("additionalProperties") is False and not properties.keys() >= {*node.get("required", [])}:
        return "required"
    for key in sorted({"const", "enum"} & node.keys()):  # what else is stated must allow the values
        rest = {k: node[k] for k in stated if k != key}
        values = node[key] if key == "enum" else [node[key]]
        if not all(may_become(in_json(value).encode(), True, {}, rest) for value in values):
            return key
    within = [*properties.values(), *node.get("anyOf", []), node.get("items", True),
              node.get("additionalProperties") or True]
    wrong = (unsupported(part, strict, seen) for part in within)
    return next((key for key in wrong if key is not None), None)


if __name__ == "__main__":
    run_main(main)
