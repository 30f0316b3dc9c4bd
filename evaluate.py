"""Step 6 of 6: measure the models on APIs that none of them has seen, and compare.

In:   out/base, out/control, out/ours (or --model DIR ...); data/corpus
Out:  out/eval/results.json, one object a score with its 95% interval; out/eval/items/<model>/<suite>.jsonl, one record an item

Laptop:   python evaluate.py
Others:   python evaluate.py --model out/stage2 out/ours

Suites, all on held-out documents and APIs
  loss     mean loss of each document, in nats a token, by domain (so what was forgotten shows too); lower is better
  choice   four tools, one fits; chance is 25%. Chosen by likelihood in two ways: which name is likeliest in a call after the
           request (direct), and which tool, given alone, makes the request likeliest (channel, arXiv 2108.04106)
  calls    the model answers the request: right function name, and right name with exactly the right arguments, decoded
           freely (calls) and within the names and schemas of the tools at hand (calls-constrained)

The last model is compared with each other one by a paired bootstrap over items.
"""
import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as transformer
from build_corpus import sha256, write
from collect import HelpFormatter, Record, fail, run_main, unit_hash
from pretrain import VALIDATED, load_checkpoint, open_corpus

VERDICTS = ("right", "wrong", "abstained", "unparseable", "error")


def main():
    args = parse_args()
    started = time.time()
    corpus = open_corpus(args.corpus)
    models = [Path(m) for m in args.model or [f"{args.out}/{name}" for name in ("base", "control", "ours")]]
    conversations = heldout_conversations(corpus, args)
    scores = {}  # {(suite, metric): {model: one number an item}}
    for path in models:
        model = load_checkpoint(path, corpus, args.device).eval()
        identity = [[sha256(file) for file in sorted(path.glob("model*.safetensors"))], corpus.sha256, args.limit, args.seq_len]
        suites = {"loss": lambda: document_losses(model, corpus, args),
                  "choice": lambda: tool_choices(model, corpus.tokenizer, conversations, args),
                  "calls": lambda: calls(model, corpus.tokenizer, conversations, args, constrained=False),
                  "calls-constrained": lambda: calls(model, corpus.tokenizer, conversations, args, constrained=True)}
        for suite, run in suites.items():
            items = cached(Path(args.out) / "eval" / "items" / path.name / f"{suite}.jsonl", identity, run)
            for item in items:
                for metric, value in item["scores"].items():
                    scores.setdefault((suite, metric), {}).setdefault(path.name, []).append(value)
            if suite == "calls" and path == models[-1]:
                shown = items
    names = [m.name for m in models]
    results = summarise_scores(scores, names)
    write(Path(args.out) / "eval" / "results.json", json.dumps(results, indent=1))
    print_table(results, names)
    for item in shown[:3]:
        print(f"\n--- {names[-1]}, a conversation about an API it has never seen: {item['verdict']}\n{item['prompt']}{item['output']}")
    print(f"\n{time.time() - started:.0f} s; every item is in {args.out}/eval/items")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help="checkpoint directories; the last is compared with the others "
        "(default: base, control and ours under --out)")
    add("--corpus", default="data/corpus", help="corpus directory")
    add("--out", default="out", help="directory of the runs; results go to its eval/")
    add("--limit", type=int, default=1000, help="items of a suite (of a domain, in the loss suite) at most")
    add("--seq-len", type=int, default=384, help="tokens of a document that the loss suite reads; longest prompt and answer")
    add("--batch-size", type=int, default=32, help="sequences of one forward pass")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args()


def cached(path, identity, run):
    """The items of a finished suite from its file, or run it and write them. identity says what they depend on."""
    if path.exists():
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(head) == identity:
            return [json.loads(line) for line in lines]
    items = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in [identity, *items]))
    return items


def heldout_conversations(corpus, args):
    """Held-out instruction records, in the order of a hash, that fit the model's window."""
    lines = (corpus.directory / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    records = sorted((Record.from_json(line) for line in lines), key=lambda r: unit_hash(r.id))
    fit = [r for r in records if len(corpus.tokenizer.render(r.messages, r.tools)[0]) <= args.seq_len]
    if not fit:
        fail(f"{corpus.directory}/heldout.jsonl: no conversation of at most {args.seq_len} tokens")
    return fit


# ----------------------------------------------------------------------------------------------------------------------
# Suites: each returns items, {"id", "scores": {metric: number}, ...}


def document_losses(model, corpus, args):
    """Mean cross-entropy of each held-out document's first tokens."""
    items = []
    for domain in VALIDATED:
        documents = [d[:args.seq_len + 1].astype(np.int64) for d in corpus.documents(domain, "heldout")[:args.limit]]
        losses = sequence_losses(model, documents, args)
        items += [{"id": f"{domain}:{i}", "scores": {f"loss {domain}": loss.mean().item()}} for i, loss in enumerate(losses)]
    return items


@torch.inference_mode()
def sequence_losses(model, sequences, args):
    """For each sequence of n ids, the n - 1 cross-entropies of its tokens after the first, in nats."""
    losses = [None] * len(sequences)
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # little padding
    for at in tqdm(range(0, len(sequences), args.batch_size), desc="losses", disable=None, leave=False):
        rows = by_length[at:at + args.batch_size]
        ids = torch.zeros(len(rows), max(len(sequences[i]) for i in rows), dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, :len(sequences[i])] = torch.as_tensor(sequences[i])
        ids = ids.to(args.device)
        loss = F.cross_entropy(model(ids[:, :-1]).float().transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T - 1)
        for row, i in enumerate(rows):
            losses[i] = loss[row, :len(sequences[i]) - 1].cpu()
    return losses


def tool_choices(model, tokenizer, conversations, args):
    """Which of four tools a model takes for the right one, by likelihood, in both directions."""
    items, sequences, spans = [], [], []
    for record in conversations:
        calls = record.messages[-1].get("tool_calls") or []
        if len(record.tools) != 4 or len(calls) != 1 or len(items) == args.limit:
            continue
        request, names = record.messages[:-1], [t["function"]["name"] for t in record.tools]
        prompt, _ = tokenizer.render(request, record.tools, answer=True)
        prompt = prompt + [tokenizer.special["<tool_call>"]] + tokenizer.encode('\n{"name": "')
        for tool, name in zip(record.tools, names):
            name_ids, request_ids = tokenizer.encode(f'{name}",'), tokenizer.encode(request[0]["content"])
            before = tokenizer.render([], [tool])[0] + [tokenizer.special["<|im_start|>"]] + tokenizer.encode("user\n")
            sequences += [prompt + name_ids, before + request_ids]
            spans += [len(name_ids), len(request_ids)]
        items.append({"id": record.id, "tools": names, "gold": names.index(calls[0]["function"]["name"])})
    losses = sequence_losses(model, sequences, args)
    likelihood = np.array([-loss[-n:].sum().item() for loss, n in zip(losses, spans)]).reshape(-1, 4, 2)
    for item, scores in zip(items, likelihood):
        item["log_likelihoods"] = scores.tolist()  # of each tool: [name after the request, request after the tool]
        direct, channel = scores.argmax(0) == item["gold"]
        item["scores"] = {"direct": float(direct), "channel": float(channel)}
    return items


def calls(model, tokenizer, conversations, args, constrained):
    """Answers to the requests, greedily decoded, and what they are worth."""
    items, records = [], conversations[:args.limit]
    for at in tqdm(range(0, len(records), args.batch_size), desc="calls", disable=None, leave=False):
        batch = records[at:at + args.batch_size]
        prompts = [tokenizer.render(r.messages[:-1], r.tools, answer=True)[0] for r in batch]
        choose = Constraint(tokenizer, [r.tools for r in batch]) if constrained else None
        longest = max(len(tokenizer.render(r.messages[-1:])[0]) for r in batch)
        outputs = transformer.generate(model, prompts, longest + 32, [tokenizer.im_end], choose=choose)
        for record, prompt, output in zip(batch, prompts, outputs):
            ended = len(output) < longest + 32 and len(prompt) + len(output) < model.config.max_seq_len
            items.append(judge(record, tokenizer.decode(prompt), tokenizer.decode(output), ended))
    return items


def judge(record, prompt, output, ended=True):
    """One item: the output's calls against the recorded ones, as a verdict of VERDICTS and scores.

    Without a call it is a refusal only if it is words and ended by itself; garbage must not look like wisdom. To ask for a parameter
    is to name it.
    """
    *before, answer = record.messages
    tools = [t["function"] for t in record.tools]
    gold = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in answer.get("tool_calls") or []]
    missing = re.findall(r"`([^`]+)`", answer["content"])  # what the recorded answer asks for
    calls = parse_calls(output)
    if calls is None or (not calls and not (ended and re.fullmatch(r"[^<>]*\w[^<>]*", output))):
        verdict = "unparseable"
    elif not calls:
        verdict = "abstained" if gold else "right" if all(name in output for name in missing) else "wrong"
    else:
        verdict = "right" if gold and check_call(tools, calls, gold) else "wrong"
    if before[-1]["role"] == "tool":
        kind = "mended after an error"
    elif not gold:
        kind = "asks what is missing" if missing else "no tool fits"
    elif len(before) > 1:
        kind = "calls once told"
    else:
        kind = "two calls" if len(gold) > 1 else "one tool" if len(tools) == 1 else "one of four tools"
    scores = {f"right: {kind}": float(verdict == "right"), "a call or clean words": float(verdict != "unparseable"), "stops by itself": float(ended)}
    if gold:
        name = Counter(n for n, _ in calls or []) == Counter(n for n, _ in gold)
        scores |= {"name": float(name), "name and arguments": float(verdict == "right")}
    return {"id": record.id, "verdict": verdict, "scores": scores, "prompt": prompt, "output": output, "calls": calls, "gold": gold}


def parse_calls(output):
    """[(name, arguments)] in a model's answer, [] if it makes no call, None if what it writes as a call is not one.

    >>> parse_calls('<tool_call>\\n{"name": "f", "arguments": {"x": 1}}\\n</tool_call>')
    [('f', {'x': 1})]
    >>> parse_calls('No tool fits.'), parse_calls('<tool_call>\\n{"name": ')
    ([], None)
    """
    texts = re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", output, re.S)
    if output.count("<tool_call>") != len(texts):
        return None
    calls = []
    for text in texts:
        try:
            call = json.loads(text)
            name, arguments = call["name"], call["arguments"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        calls.append((name, arguments))
    return calls


def check_call(tools, calls, gold):
    """Whether the calls are the gold ones, in any order: names equal, all required parameters given, arguments exact.

    tools: function definitions; calls and gold: [(name, arguments)]. As in BFCL, True is no integer and 1.0 is none either,
    but an integer may stand for a number.
    """
    required = {t["name"]: t["parameters"].get("required", []) for t in tools}
    types = {(t["name"], p): s.get("type") for t in tools for p, s in t["parameters"].get("properties", {}).items()}

    def equal(given, expected):
        if given[0] != expected[0] or given[0] not in required or given[1].keys() != expected[1].keys():
            return False
        return set(required[given[0]]) <= given[1].keys() and all(
            same(v, expected[1][p], types.get((given[0], p)) == "number") for p, v in given[1].items())

    remaining = list(gold)
    for call in calls:
        match = next((g for g in remaining if equal(call, g)), None)
        if match is None:
            return False
        remaining.remove(match)
    return not remaining


def same(a, b, number=False):
    """Equality of JSON values with their types; with number=True an integer equals a float of its value."""
    if number and type(a) in (int, float) and type(b) in (int, float):
        return a == b
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


# ----------------------------------------------------------------------------------------------------------------------
# Constrained decoding: the likeliest token after which the text can still become a legal call


class Constraint:
    """Picks tokens for `generate`. Plain answers are free; once a call is begun it must name a tool and fit its schema."""

    def __init__(self, tokenizer, tools):
        self.tokenizer = tokenizer
        # A token may end within a character, so bytes are compared, each written as one character (Latin-1).
        self.tools = [{latin1(t["function"]["name"]): json.loads(latin1(json.dumps(t["function"]["parameters"], ensure_ascii=False)))
                       for t in row} for row in tools]

    def __call__(self, row, new_ids, logits):
        start, end = self.tokenizer.special["<tool_call>"], self.tokenizer.im_end
        for token in logits.argsort(descending=True).tolist():
            ids = [*new_ids, token]
            if start not in ids:
                return token
            text = self.tokenizer.encoding.decode_bytes([i for i in ids if i != end]).decode("latin-1")
            if self.legal(text[text.index("<tool_call>"):], self.tools[row], finished=token == end):
                return token
        return end

    @staticmethod
    def legal(text, tools, finished):
        """Whether a text is the beginning (or, if finished, the whole) of one or more calls of the tools."""
        at = 0
        try:
            while True:
                at = scan_call(text, at, tools)
                if at == len(text):
                    return True
                at = scan(text, at, ["\n"])
        except Incomplete:
            return not finished
        except ValueError:
            return False


def latin1(text):
    """The bytes of a text in UTF-8, each as one character."""
    return text.encode("utf-8").decode("latin-1")


class Incomplete(Exception):
    """The text ends where more is needed: so far it is legal."""


def scan(text, at, options):
    """The position after the longest of the options that stands at `at`. Raises Incomplete or ValueError."""
    if any(o.startswith(text[at:]) and o != text[at:] for o in options):
        raise Incomplete
    found = [o for o in options if text.startswith(o, at)]
    if not found:
        raise ValueError
    return at + len(max(found, key=len))


def scan_call(text, at, tools):
    """The position after the call at `at`: a tool's name, then its parameters, each at most once and all required ones."""
    start = scan(text, at, ['<tool_call>\n{"name": "'])
    at = scan(text, start, [f'{name}", "arguments": {{' for name in tools])
    name = next(n for n in tools if text.startswith(f'{n}", "arguments": {{', start))
    properties, missing, first = dict(tools[name].get("properties", {})), set(tools[name].get("required", [])), True
    while True:
        separator = "" if first else ", "
        at = scan(text, start := at, [f'{separator}"{p}": ' for p in properties] + ([] if missing else ["}}\n</tool_call>"]))
        if text.startswith("}", start):
            return at
        parameter = text[start + len(separator) + 1:at - 3]
        at = scan_value(text, at, properties.pop(parameter))
        missing.discard(parameter)
        first = False


INTEGER, CHARACTER = r"-?(?:0|[1-9]\d*)", r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))'
WHOLE = {"integer": INTEGER, "number": rf"{INTEGER}(?:\.\d+)?(?:[eE][+-]?\d+)?", "string": f'"{CHARACTER}*"'}
BEGUN = {"integer": rf"-|{INTEGER}", "number": rf"-|{INTEGER}(?:\.\d*)?|{INTEGER}(?:\.\d+)?[eE][+-]?\d*",
         "string": rf'"{CHARACTER}*(?:\\(?:u[0-9a-fA-F]{{0,3}})?)?'}


def scan_value(text, at, schema):
    """The position after the JSON value at `at` that has the schema's type (any type where it states none)."""
    if schema.get("enum"):
        return scan(text, at, [json.dumps(v, ensure_ascii=False) for v in schema["enum"]])
    kind = schema.get("type")
    if at == len(text):
        raise Incomplete
    if not isinstance(kind, str):
        kind = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}.get(text[at], "number")
    if kind in ("boolean", "null"):
        return scan(text, at, ["true", "false"] if kind == "boolean" else ["null"])
    if kind in WHOLE:
        if re.compile(BEGUN[kind]).fullmatch(text, at):  # a number at the end of the text may go on, too
            raise Incomplete
        whole = re.compile(WHOLE[kind]).match(text, at)
        if not whole:
            raise ValueError
        return whole.end()
    close = "]" if kind == "array" else "}"
    at = scan(text, at, ["[" if kind == "array" else "{"])
    if at < len(text) and text[at] == close:
        return at + 1
    while True:
        if kind == "object":
            at = scan(text, scan_value(text, at, {"type": "string"}), [": "])
        at = scan_value(text, at, schema.get("items", {}) if kind == "array" else {})
        at = scan(text, at, [", ", close])
        if text[at - 1] == close:
            return at


# ----------------------------------------------------------------------------------------------------------------------
# Numbers and their uncertainty


def summarise_scores(scores, names):
    """One object a model and metric, and one a comparison of the last model with another, as out/eval/results.json holds."""
    results = []
    for (suite, metric), by_model in scores.items():
        for name in names:
            values = np.array(by_model[name])
            low, high = bootstrap(values)
            result = {"model": name, "suite": suite, "metric": metric, "n": len(values), "score": values.mean(), "low": low, "high": high}
            if name == names[-1] and len(names) > 1:
                for other in names[:-1]:
                    difference = values - np.array(by_model[other])
                    low, high = bootstrap(difference)
                    results.append(result | {"baseline": other, "difference": difference.mean(), "difference_low": low, "difference_high": high})
            else:
                results.append(result)
    return results


def bootstrap(values, resamples=2000):
    """95% interval of the mean, from the percentiles of the means of resamples. Paired when given differences."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    return np.percentile(means, 2.5), np.percentile(means, 97.5)


def print_table(results, names):
    baseline = names[-2] if len(names) > 1 else None
    head = "".join(f"{n:>9}" for n in names)
    print(f"{'suite':<18} {'metric':<28} {'n':>4} {head}   {f'{names[-1]} - {baseline}, 95% interval' if baseline else ''}")
    for suite, metric in dict.fromkeys((r["suite"], r["metric"]) for r in results):
        rows = {(r["model"], r.get("baseline")): r for r in results if (r["suite"], r["metric"]) == (suite, metric)}
        cells = "".join(f"{next(r['score'] for (m, _), r in rows.items() if m == n):>9.3f}" for n in names)
        line = f"{suite:<18} {metric:<28} {next(iter(rows.values()))['n']:>4} {cells}"
        if baseline:
            r = rows[names[-1], baseline]
            mark = "  *" if r["difference_low"] > 0 or r["difference_high"] < 0 else ""
            line += f"   {r['difference']:+.3f}  [{r['difference_low']:+.3f}, {r['difference_high']:+.3f}]{mark}"
        print(line)
    print("* the interval excludes 0. Loss: nats a token, lower is better; the rest: share of items, higher is better.")


if __name__ == "__main__":
    run_main(main)
