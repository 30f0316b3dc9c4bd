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
import bisect
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import model as transformer
from build_corpus import Tokenizer, coloured, write
from collect import HelpFormatter, Record, fail, read_values, run_main, shares, unit_hash, value_records
from pretrain import (ON_CPU, add_training_flags, count_parameters, held_out_windows, is_main,
                      load_checkpoint, meta_model, number, open_corpus, plan_windows, rates_for, report,
                      settle_options, setup, train, training_options, with_defaults)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# For models of up to so many parameters only: what has more was trained at length. Attention stays near what
# pre-training made it.
TINY, FOR_TINY = 5e7, {"lr": 5e-4, "attention_lr": 0.1, "batch_tokens": 1536, "seq_len": 768}
KEPT_BACK = 0.05  # share of the conversations of --data that are for validation


def main():
    """Tune both models, or the one of --init."""
    args = parse_args()
    if args.keep_adapter and args.lora_rank < 1:
        fail("--keep-adapter: there is no adapter without --lora-rank")
    if args.lora_rank < 0:
        fail("--lora-rank: at least 1, or 0 for none")
    if args.data and not args.init:
        fail("--data needs --init: the model to tune, whose tokenizer the conversations are written in")
    corpus = ChatFiles(args.data, args.init) if args.data else open_corpus(args.corpus)
    if args.show:
        return show(corpus, args)
    setup(args)
    out = Path(args.out)
    jobs = {"control": out / "control-stage2", "ours": out / "stage2"}
    if args.init:
        jobs = {args.name: Path(args.init)}
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
        flag = "--epochs" if args.epochs else "--tokens"
        fail(f"{flag}: {tokens:,} tokens are less than a step of --batch-tokens {args.batch_tokens:,}")
    args.all_tokens = tokens * (1 if args.init else 2)
    order, epochs = window_order(windows, args.mix, steps * batch_size, args.seed)
    get_batch = packed_batches(corpus, "train", order, batch_size, args)
    held_out = held_out_windows(corpus, args, document_mask=True) | held_out_conversations(corpus, args)
    options = {
        "init": str(init), "steps": steps,
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

    save = save_merged if args.lora_rank else transformer.save
    train(run, make_model, get_batch, held_out, options, corpus, args, save)
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
    starts = corpus.read("instruction", split, "idx").astype(np.int64)
    lengths = np.diff(starts)[chosen]
    with_room = [[] for _ in range(seq_len + 1)]  # with_room[r]: windows with r tokens left
    rooms, windows = [], []                       # rooms: such r, sorted
    for i in np.argsort(-lengths, kind="stable"):
        if lengths[i] > seq_len:
            continue
        at = bisect.bisect_left(rooms, lengths[i])
        if at < len(rooms):
            room, window = rooms[at], with_room[rooms[at]].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, window = seq_len, len(windows)
            windows.append([])
        windows[window].append((starts[chosen[i]], starts[chosen[i] + 1]))
        if not with_room[room - lengths[i]]:
            bisect.insort(rooms, room - lengths[i])
        with_room[room - lengths[i]].append(window)
    if not windows and split == "train":
        fail(f"{corpus.directory}: no conversation fits a window of {seq_len} tokens; "
             "see --seq-len and --mix")
    return windows, int((lengths > seq_len).sum())


def packed_batches(corpus, split, order, batch_size, args):
    """get_batch(step, rows) -> ids, targets, doc_ids (len(rows), T) of those rows: a target is -100 where
    there is nothing to learn.
    """
    ids, mask = corpus.read("instruction", split), corpus.read("instruction", split, "mask")
    padding, T = corpus.tokenizer.end_of_text, args.seq_len

    def get_batch(step, rows):
        x = np.full((len(rows), T), padding, np.int64)
        y = np.full((len(rows), T), -100, np.int64)
        doc_ids = np.full((len(rows), T), -1, np.int32)
        for row, window in enumerate(step * batch_size + np.asarray(rows)):
            at = 0
            for n, (start, end) in enumerate(order[window]):
                conversation = ids[start:end].astype(np.int64)
                to = at + end - start
                learned = learned_tokens(conversation, mask[start:end], corpus.tokenizer, args)
                x[row, at:to], doc_ids[row, at:to] = conversation, n
                y[row, at:to - 1] = np.where(learned[1:], conversation[1:], -100)
                at = to
        return x, y, doc_ids

    return get_batch


def learned_tokens(ids, mask, tokenizer, args):
    """(N,) Whether each token of a conversation is learned: what the assistant writes by `mask`, less what
    the flags leave out.
    """
    learned = mask.astype(bool)
    if not args.thoughts:
        begun, ended = ((ids == tokenizer.special[tag]).cumsum() for tag in ("<think>", "</think>"))
        learned &= (begun == ended) & (ids != tokenizer.special["</think>"])
    if args.last_turn:
        user = [tokenizer.special["<|im_start|>"], *tokenizer.encode("user")]
        begins = [ids[k:len(ids) - len(user) + 1 + k] == token for k, token in enumerate(user)]
        at = np.flatnonzero(np.all(begins, axis=0))
        learned[:at[-1] if len(at) else 0] = False
    return learned


# ============================================================================================================
# Below: options; conversations; LoRA.

# ------------------------------------------------------------------------------------------------------------
# Options


def parse_args():
    """The flags, with defaults that suit the model that is tuned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--corpus", default="data/corpus", help="corpus directory")
    add("--data", nargs="+", metavar="FILE",
        help="conversations from these files instead; one in twenty is kept for validation")
    add("--out", default="out", help="directory of the runs")
    add("--init", default=None, metavar="DIR",
        help="checkpoint directory to tune (default: both models of pretrain.py); "
        "above 50 million parameters the defaults of rates and batch follow its size")
    add("--name", default="tuned", help="name of the run, with --init")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=number, default=2_600_000,
                        help="tokens trained on, whatever their number in the data")
    length.add_argument("--epochs", type=float, help="how often to train on all of it instead")
    add("--mix", type=shares(("tools", "chat")), metavar="KIND=SHARE,...",
        help="shares of conversations with tools and without, by tokens, such as tools=3,chat=1 "
        "(default: as they are)")
    add("--last-turn", action="store_true",
        help="learn only what follows the last message of the user, not all that the assistant writes")
    add("--thoughts", action=argparse.BooleanOptionalAction, default=True,
        help="learn what the assistant writes between <think> and </think> too")
    add("--lora-rank", type=int, default=0, metavar="R",
        help="train only a low-rank update of this rank for each projection (LoRA), which is added to the "
        "weights at the end; 0: train all weights")
    add("--lora-projections", type=projections, metavar="NAME,...", default=",".join(SHORT_NAMES),
        help="which have an update")
    add("--keep-adapter", action="store_true",
        help="write the updates to adapter/ of the run too, in PEFT's format")
    add("--show", type=int, metavar="N", help="print N conversations with what is learned marked, and end")
    add_training_flags(parser)
    return with_defaults(parser, suited)


def suited(args):
    """{flag: default} where they depend on the model that is tuned. Most conversations fit the sequences."""
    base = Path(args.init or Path(args.out) / "control-stage2")
    if not (base / "config.json").exists() or (size := count_parameters(meta_model(base))) <= TINY:
        return FOR_TINY
    batch = {"batch_tokens": 2**17}
    if args.device == "cpu":
        batch = {name: ON_CPU[name] for name in ("batch_tokens", "micro_batch", "val_windows")}
    return batch | {"seq_len": 768, "lr": rates_for(size)[0]}


SHORT_NAMES = [name.removesuffix("_proj") for name in PROJECTIONS]


def projections(text):
    """'q,up' as the names of the projections in a layer, for argparse."""
    names = [f"{part}_proj" for part in text.split(",")]
    if not {*names} <= {*PROJECTIONS}:
        raise argparse.ArgumentTypeError("some of " + ", ".join(SHORT_NAMES))
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
                split = "heldout" if unit_hash(json.dumps(record.messages)) < KEPT_BACK else "train"
                parts[split].append(np.array([[*ids, self.tokenizer.end_of_text], [*mask, 0]], np.uint32))
        self.arrays = {}
        for split, pairs in parts.items():
            starts = np.cumsum([0, *(pair.shape[1] for pair in pairs)])
            ids, mask = np.concatenate([np.zeros((2, 0), np.uint32), *pairs], 1)
            self.arrays[split, "bin"] = ids
            self.arrays[split, "mask"] = mask.astype(np.uint8)
            self.arrays[split, "idx"] = starts
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
    if bad := next((r for r in records if not isinstance(r, Record)), None):
        fail(f"{path}, line {bad['line']}: {bad['reason']}. "
             f"`python collect.py --chat-domain instruction chat:{path}` converts what it can")
    if not records:
        fail(f"{path}: holds no conversation")
    return records


def by_kind(corpus, mix):
    """{kind: the numbers of its conversations} for each kind in `mix`, told apart by whether they list tools;
    without `mix`, {"all": all}.
    """
    ids = corpus.read("instruction", "train")
    starts = corpus.read("instruction", "train", "idx").astype(np.int64)
    if not mix:
        return {"all": np.arange(len(starts) - 1)}
    places = np.flatnonzero(ids == corpus.tokenizer.special["<tools>"])
    with_tools = np.zeros(len(starts) - 1, bool)
    with_tools[np.searchsorted(starts, places, "right") - 1] = True
    kinds = {"tools": np.flatnonzero(with_tools), "chat": np.flatnonzero(~with_tools)}
    return {kind: kinds[kind] for kind, share in mix.items() if share}


def window_order(windows, mix, count, seed):
    """The windows of a whole run in their order, kinds by their shares in `mix`, and {kind: epochs}."""
    available = {kind: len(found) for kind, found in windows.items()}
    kinds, order, which, epochs = plan_windows(available, mix or {"all": 1}, count, seed)
    return [windows[kinds[kind]][window] for kind, window in zip(order, which)], epochs


def held_out_conversations(corpus, args):
    """{"instruction": (ids, targets, doc_ids)} of the first windows of conversations that no step trains on;
    nothing if there are none.
    """
    count = len(corpus.read("instruction", "heldout", "idx")) - 1
    windows, _ = pack(corpus, "heldout", np.arange(count), args.seq_len)
    windows = windows[:args.val_windows]
    batch = packed_batches(corpus, "heldout", windows, len(windows), args)(0, range(len(windows)))
    return {"instruction": batch} if (batch[1] >= 0).any() else {}


def show(corpus, args):
    """Print conversations token by token in two shades, what is learned in green."""
    ids, mask, starts = (corpus.read("instruction", "train", suffix) for suffix in ("bin", "mask", "idx"))
    starts = starts.astype(np.int64)
    for i in np.random.default_rng(args.seed).permutation(len(starts) - 1)[:args.show]:
        span = slice(*starts[i:i + 2])
        learned = learned_tokens(ids[span], mask[span], corpus.tokenizer, args)
        print(f"--- conversation {i:,}: {len(learned):,} tokens, {learned.sum():,} of them learned")
        for n, (token, green) in enumerate(zip(ids[span].tolist(), learned)):
            print(coloured(corpus.tokenizer.decode([token]), n, green), end="")
        print("\n")


# ------------------------------------------------------------------------------------------------------------
# LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685)

SCALE = 2  # of every update, whatever its rank: LoRA's alpha is twice the rank


class LoRA(nn.Module):
    """A frozen linear layer and a learned update of low rank: x to W x + SCALE · B A x, with A (R, in) random
    and B (out, R) zero at first.
    """

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + SCALE * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model, init, args):
    """Freeze the model and give the chosen projections of every layer an update to learn."""
    base = transformer.Config.from_hf(transformer.read_json(Path(init) / "config.json"))
    if base.vocab_size < model.config.vocab_size:
        fail(f"{init} lacks tokens of the chat format, and LoRA would not learn their embeddings: "
             "pre-train or tune it in full first")
    model.requires_grad_(False)
    for module in model.modules():  # frozen matrices are kept as they are multiplied
        if not list(module.children()):
            multiplied = isinstance(module, nn.Linear) and module is not model.lm_head
            half = multiplied and args.dtype == "bfloat16"
            module.to(torch.bfloat16 if half else torch.float32)
    for block in model.model["layers"]:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if name in args.lora_projections:
                    setattr(part, name, LoRA(linear, args.lora_rank))


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
        "r": args.lora_rank, "lora_alpha": SCALE * args.lora_rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": args.lora_projections}
    write(directory / "adapter_config.json", json.dumps(config, indent=1))
    tensors = {f"base_model.model.{name}.weight": t for name, t in updates.items()}
    transformer.write_safetensors(tensors, directory / "adapter_model.safetensors")


if __name__ == "__main__":
    run_main(main)
