"""Step 5 of 6: instruction tuning on tool-use conversations, the same for every model compared.

In:   out/stage2 and out/control-stage2 (pretrain.py), or any checkpoint directory with --init; the
      conversations of data/corpus (build_corpus.py), or of chat records given with --data, in any format that
      collect.py knows
Out:  out/ours and out/control, or out/<name>: Hugging Face checkpoint directories with chat template and stop
      tokens, in the form that transformers and
      `vllm serve DIR --enable-auto-tool-choice --tool-call-parser hermes` read

Laptop:    python finetune.py
One GPU:   python finetune.py --init DIR --data chats.jsonl --epochs 3 --seq-len 4096 --batch-tokens 131072 \\
               --micro-batch 1 --lora-rank 16 --lr 2e-4 --activation-checkpointing
One node:  torchrun --nproc_per_node=8 finetune.py --init DIR --name tuned --shard --epochs 2 \\
               --seq-len 8192 --batch-tokens 1048576 --micro-batch 1 --lr 1e-5 --activation-checkpointing
Look:      python finetune.py --show 3

The loss is on what the assistant writes: its words, its thoughts, its calls and the end of its turn.
Conversations are packed into windows whole; none sees another. What is longer than a window is left out and
counted. The loop is pretrain.py's: killed or stopped, the same command goes on.
"""
import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import model as transformer
from build_corpus import Tokenizer, print_tokens, write
from collect import HelpFormatter, Record, fail, read_values, run_main, shares, unit_hash, value_records
from pretrain import (ON_CPU, add_flags, add_training_flags, count_parameters, held_out_windows, is_main,
                      load_checkpoint, meta_model, number, open_corpus, plan_windows, rates_for, report,
                      settle_options, setup, train, training_options, weights_of, with_defaults)

LORA_TARGETS = "q,k,v,o,gate,up,down"  # the projections of a layer
PROJECTIONS = [f"{name}_proj" for name in LORA_TARGETS.split(",")]
# Models of up to so many parameters, as the default run's, have defaults of their own.
TINY, FOR_TINY = 5e7, {"lr": 5e-4, "batch_tokens": 1536, "seq_len": 768}
VALIDATION_SHARE = 0.05  # of the conversations of --data


def main():
    """Tune both models, or the one of --init."""
    args = parse_args()
    if args.lora_rank < 0 or args.keep_adapter and not args.lora_rank:
        fail("--lora-rank: at least 1, or 0 for none, which leaves --keep-adapter nothing to write")
    if args.data and not args.init:
        fail("--data needs --init: the model to tune, whose tokenizer the conversations are written in")
    corpus = ChatFiles(args.data, args.init) if args.data else open_corpus(args.corpus)
    if args.show:
        return show(corpus, args)
    setup(args)
    out = Path(args.out)
    jobs = {"control": out / "control-stage2", "ours": out / "stage2"}
    if args.init:
        jobs = {args.name: args.init}
    for name, init in jobs.items():
        tune(out / name, init, corpus, args)
    if is_main():
        report([out / name for name in jobs])
    if dist.is_initialized():
        dist.destroy_process_group()


def tune(run, init, corpus, args):
    """Tune the model in directory `init` on the corpus's conversations; the result lies in `run`."""
    windows, too_long = {}, 0
    for kind, chosen in by_kind(corpus, args.mix).items():
        windows[kind], left_out = pack(corpus, "train", chosen, args.seq_len)
        too_long += left_out
    positions = sum(map(len, windows.values())) * args.seq_len
    batch_size = args.batch_tokens // args.seq_len
    tokens = int(args.epochs * positions) if args.epochs else args.tokens
    steps = tokens // (batch_size * args.seq_len)
    if steps < 1:
        fail(f"--tokens or --epochs: {tokens:,} tokens are less than --batch-tokens {args.batch_tokens:,}")
    args.all_tokens = tokens * (1 if args.init else 2)
    order, epochs = window_order(windows, args.mix, steps * batch_size, args.seed)
    get_batch = packed_batches(corpus, "train", order, batch_size, args)
    held_out = held_out_windows(corpus, args, document_mask=True) | held_out_conversations(corpus, args)
    options = {
        "init": str(init), "begins": weights_of(init), "steps": steps,
        "lora": [args.lora_rank, args.lora_projections] if args.lora_rank else None,
        "learned": [args.last_turn, args.thoughts], "mix": args.mix,
    } | training_options(corpus, args)
    settle_options(run, options)

    def make_model():
        model = load_checkpoint(init, corpus, dtype=None)
        if args.lora_rank:
            torch.manual_seed(args.seed)
            add_lora(model, init, args)
        return model

    def save_merged(model, run, updates):
        if args.keep_adapter:
            save_adapter(updates, init, run / "adapter", args)
        base = load_checkpoint(init, corpus, dtype=None)
        merge(base, updates)
        transformer.save(base, run)

    train(run, make_model, get_batch, held_out, options, corpus, args,
          save_merged if args.lora_rank else transformer.save)
    if is_main():
        lengths = [end - start for kind in windows.values() for window in kind for start, end in window]
        print(f"{run.name}: {len(lengths):,} conversations in {positions // args.seq_len:,} windows, "
              f"{sum(lengths) / positions:.1%} of positions used, {too_long:,} too long for a window; epochs "
              + ", ".join(f"{kind} {e:.2f}" for kind, e in epochs.items()))


def pack(corpus, split, chosen, seq_len):
    """The chosen conversations in windows of seq_len tokens by best fit: longest first, each into the fullest
    window it fits.

    Returns a list of windows, each a list of (start, end) in the bin, and the number of conversations too
    long for one.
    """
    starts = read_starts(corpus, split)
    lengths = np.diff(starts)[chosen]
    too_long = (lengths > seq_len).sum()
    windows, with_room = [], [[] for _ in range(seq_len + 1)]  # with_room[r]: windows with r tokens left
    for i in np.argsort(-lengths, kind="stable")[too_long:]:
        room = next((r for r in range(lengths[i], seq_len) if with_room[r]), seq_len)
        window = with_room[room].pop() if room < seq_len else []
        if not window:
            windows.append(window)
        window.append((starts[chosen[i]], starts[chosen[i] + 1]))
        with_room[room - lengths[i]].append(window)
    if not windows and split == "train":
        fail(f"{corpus.directory}: no conversation fits a window of {seq_len} tokens; "
             "see --seq-len and --mix")
    return windows, too_long


def packed_batches(corpus, split, order, batch_size, args):
    """get_batch(step, rows) -> ids, targets, doc_ids (len(rows), T) of those rows: a target is -100 where the
    loss is not.
    """
    ids, mask = corpus.read("instruction", split), corpus.read("instruction", split, "mask")

    def get_batch(step, rows):
        shape = len(rows), args.seq_len
        x = np.full(shape, corpus.tokenizer.end_of_text, np.int64)  # padding
        y = np.full(shape, -100, np.int64)
        doc_ids = np.full(shape, -1, np.int32)
        for i, row in enumerate(rows):
            at = 0
            for n, (start, end) in enumerate(order[step * batch_size + row]):
                conversation = ids[start:end].astype(np.int64)
                is_target = loss_mask(conversation, mask[start:end], corpus.tokenizer, args)
                to = at + len(conversation)
                x[i, at:to], doc_ids[i, at:to] = conversation, n
                y[i, at:to - 1] = np.where(is_target[1:], conversation[1:], -100)
                at = to
        return x, y, doc_ids

    return get_batch


def loss_mask(ids, mask, tokenizer, args):
    """(N,) Whether the loss is on each token of a conversation: what the assistant writes by `mask`, less
    what the flags leave out.
    """
    is_target = mask.astype(bool)
    if not args.thoughts:
        begins, ends = (ids == tokenizer.special[tag] for tag in ("<think>", "</think>"))
        is_target &= (begins.cumsum() == ends.cumsum()) & ~ends
    if args.last_turn:
        user = [tokenizer.special["<|im_start|>"], *tokenizer.encode("user")]
        turns = [at for at in np.flatnonzero(ids == user[0]) if ids[at:at + len(user)].tolist() == user]
        is_target[:max(turns, default=0)] = False
    return is_target


# ============================================================================================================
# Below: options; conversations; LoRA.

# ------------------------------------------------------------------------------------------------------------
# Options


def parse_args():
    """The flags, with defaults that suit the model that is tuned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_flags(parser, {
        "corpus": ("data/corpus", "corpus directory"),
        "out": ("out", "directory of the runs"),
        "init": (None, "checkpoint directory to tune (default: both models of pretrain.py); above 50 million "
                 "parameters the defaults of rates and batch follow its size"),
        "name": ("tuned", "name of the run, with --init"),
        "mix": (None, "shares of conversations with tools and without, by tokens, such as tools=3,chat=1 "
                "(default: as they are)", shares(("tools", "chat"))),
        "last-turn": (False, "learn only what follows the last message of the user, not all that the "
                      "assistant writes"),
        "thoughts": (True, "learn what the assistant writes between <think> and </think> too"),
        "lora-rank": (0, "train only a low-rank update of this rank for each projection (LoRA), which is "
                      "added to the weights at the end; 0: train all weights"),
        "lora-projections": (LORA_TARGETS, "which have an update", projections),
        "keep-adapter": (False, "write the updates to adapter/ of the run too, in PEFT's format"),
        "show": (None, "print so many conversations with what is learned marked, and end", number)})
    add_flags(parser.add_mutually_exclusive_group(), {
        "tokens": (2_600_000, "tokens trained on, whatever their number in the data"),
        "epochs": (None, "how often to train on all of it instead", float)})
    parser.add_argument("--data", nargs="+", metavar="FILE", help="conversations from these files instead; "
                        "one in twenty is kept for validation")
    add_training_flags(parser)
    return with_defaults(parser, suited)


def suited(args):
    """{flag: default} where they depend on the model that is tuned. Most conversations fit the sequences."""
    base = Path(args.init or Path(args.out) / "control-stage2")
    size = count_parameters(meta_model(base)) if (base / "config.json").exists() else 0
    if size <= TINY:  # in the default job, attention stays near what pre-training made it
        return FOR_TINY | {"attention_lr": 1.0 if args.init else 0.1}
    on_gpu = {"batch_tokens": 2**17, "micro_batch": 1 if size >= 1e9 else 16}
    return (ON_CPU if args.device == "cpu" else on_gpu) | {"seq_len": 768, "lr": rates_for(size)[0]}


def projections(text):
    """'q,up' as the names of the projections in a layer, for argparse."""
    names = [f"{part}_proj" for part in text.split(",")]
    if not {*names} <= {*PROJECTIONS}:
        raise argparse.ArgumentTypeError(f"some of {LORA_TARGETS}")
    return names


# ------------------------------------------------------------------------------------------------------------
# Conversations


class ChatFiles:
    """Conversations in files, in the place of a corpus that has nothing else. They are read into memory and
    encoded at once.
    """

    def __init__(self, files, init):
        self.directory, self.tokenizer = " ".join(files), Tokenizer.find(init)
        parts = {"train": [], "heldout": []}
        for file in files:
            for record in read_chats(Path(file)):
                ids, mask = self.tokenizer.render(record.messages, record.tools)
                # By the first request: a log may hold a conversation again with its next turn.
                asked = next((m["content"] or "" for m in record.messages if m["role"] == "user"), "")
                split = "heldout" if unit_hash(asked) < VALIDATION_SHARE else "train"
                parts[split].append(np.array([[*ids, self.tokenizer.end_of_text], [*mask, 0]], np.uint32))
        self.arrays = {}
        for split, pairs in parts.items():
            ids, mask = np.concatenate([np.zeros((2, 0), np.uint32), *pairs], 1)
            self.arrays[split, "bin"], self.arrays[split, "mask"] = ids, mask.astype(np.uint8)
            self.arrays[split, "idx"] = np.cumsum([0, *(pair.shape[1] for pair in pairs)])
        self.sha256 = hashlib.sha256(b"".join(a.tobytes() for a in self.arrays.values())).hexdigest()
        self.manifest = {"tokenizer_sha256": self.tokenizer.fingerprint()}

    def read(self, domain, split, suffix="bin"):
        """As Corpus.read: ids, document starts or mask of the conversations, and nothing of other domains."""
        return self.arrays[split, suffix] if domain == "instruction" else np.zeros(0, np.uint32)


def read_chats(path):
    """The Records of a file of conversations, or exit with the line that is none."""
    if not path.is_file():
        fail(f"{path}: no such file")
    records = list(value_records(read_values(path), str(path), "unknown", "instruction"))
    for record in records:
        if not isinstance(record, Record):
            fail(f"{path}, line {record['line']}: {record['reason']}. "
                 f"`python collect.py --chat-domain instruction chat:{path}` converts what it can")
    if not records:
        fail(f"{path}: holds no conversation")
    return records


def read_starts(corpus, split):
    """Where each conversation of the split begins in the bin, and the end."""
    return corpus.read("instruction", split, "idx").astype(np.int64)


def by_kind(corpus, mix):
    """{kind: the numbers of its conversations} for each kind in `mix`, told apart by whether they list tools;
    without `mix`, {"all": all}.
    """
    starts = read_starts(corpus, "train")
    if not mix:
        return {"all": np.arange(len(starts) - 1)}
    opens_tools = corpus.read("instruction", "train") == corpus.tokenizer.special["<tools>"]
    with_tools = np.logical_or.reduceat(opens_tools, starts[:-1])
    found = {"tools": with_tools, "chat": ~with_tools}
    return {kind: np.flatnonzero(found[kind]) for kind, share in mix.items() if share}


def window_order(windows, mix, count, seed):
    """The windows of a whole run in their order, kinds by their shares in `mix`, and {kind: epochs}."""
    available = {kind: len(found) for kind, found in windows.items()}
    kinds, order, which, epochs = plan_windows(available, mix or {"all": 1}, count, seed)
    return [windows[kinds[kind]][window] for kind, window in zip(order, which)], epochs


def held_out_conversations(corpus, args):
    """{"instruction": (ids, targets, doc_ids)} of windows of conversations that no step trains on, some of
    them at random; nothing if there are none.
    """
    count = len(read_starts(corpus, "heldout")) - 1
    windows = pack(corpus, "heldout", np.arange(count), args.seq_len)[0]  # those of long ones come first
    chosen = np.random.default_rng(0).permutation(len(windows))[:args.val_windows]
    windows = [windows[i] for i in chosen]
    batch = packed_batches(corpus, "heldout", windows, len(windows), args)(0, range(len(windows)))
    return {"instruction": batch} if (batch[1] >= 0).any() else {}


def show(corpus, args):
    """Print conversations token by token in two shades, those that the loss is on in green."""
    ids, mask = corpus.read("instruction", "train"), corpus.read("instruction", "train", "mask")
    starts = read_starts(corpus, "train")
    for i in np.random.default_rng(args.seed).permutation(len(starts) - 1)[:args.show]:
        span = slice(*starts[i:i + 2])
        is_target = loss_mask(ids[span], mask[span], corpus.tokenizer, args)
        print(f"--- conversation {i:,}: {len(is_target):,} tokens, {is_target.sum():,} of them learned")
        print_tokens(corpus.tokenizer, ids[span], is_target)


# ------------------------------------------------------------------------------------------------------------
# LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685)

SCALE = 2  # of every update, whatever its rank: LoRA's alpha is twice the rank


class LoRA(nn.Module):
    """A frozen linear layer and an update of low rank that is trained: x to W x + SCALE · B A x, with A
    (R, in) random and B (out, R) zero at first.
    """

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)

    def forward(self, x):
        return self.linear(x) + SCALE * (x @ self.lora_A.mT @ self.lora_B.mT)


def add_lora(model, init, args):
    """Freeze the model and give the chosen projections of every layer an update to learn."""
    if transformer.read_config(init).vocab_size < model.config.vocab_size:
        fail(f"{init} lacks tokens of the chat format, and LoRA would not learn their embeddings: "
             "pre-train or tune it in full first")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, part = name.rpartition(".")
        if not list(module.children()):  # frozen matrices are kept as they are multiplied
            module.to(getattr(torch, args.dtype) if part in PROJECTIONS else torch.float32)
        if part in args.lora_projections:
            setattr(model.get_submodule(parent), part, LoRA(module, args.lora_rank))


@torch.no_grad()
def merge(model, updates):
    """Add the updates, tensors by name, to the weights of a model that has none; summed in float32."""
    for name, weight in model.named_parameters():
        A, B = (updates.get(f"{name.removesuffix('.weight')}.lora_{part}") for part in "AB")
        if A is not None:
            weight.copy_(weight.float() + SCALE * B @ A)


def save_adapter(updates, init, directory, args):
    """Write the updates as PEFT does, to the base `init`: adapter_config.json, adapter_model.safetensors."""
    directory.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(init),
        "r": args.lora_rank, "lora_alpha": SCALE * args.lora_rank,
        "target_modules": args.lora_projections}
    write(directory / "adapter_config.json", json.dumps(config, indent=1))
    tensors = {f"base_model.model.{name}.weight": t for name, t in updates.items()}
    transformer.write_safetensors(tensors, directory / "adapter_model.safetensors")


if __name__ == "__main__":
    run_main(main)
