"""Step 5 of 6: instruction tuning on function-calling conversations, the same for every model compared.

In:   out/stage2 and out/control-stage2 (pretrain.py), or any checkpoint directory with --init; data/corpus (build_corpus.py)
Out:  out/ours and out/control, or the directory given with --name: Hugging Face checkpoint directories with a chat template

Laptop:    python finetune.py
One GPU:   python finetune.py --init out/stage2 --name ours --tokens 2e7 --seq-len 1024 --batch-tokens 65536 --lr 3e-4
One node:  torchrun --nproc_per_node=8 finetune.py --init DIR --name NAME ...

The loss is on what the assistant writes: its words, its calls and the end of its turn. Conversations are packed into
windows whole; none sees another. What is longer than a window is left out and counted.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch.distributed as dist

from collect import HelpFormatter, fail, run_main
from pretrain import add_training_flags, is_main, load_checkpoint, number, open_corpus, report, settle_options, setup, train, training_options


def main():
    args = parse_args()
    setup(args)
    corpus = open_corpus(args.corpus)
    out = Path(args.out)
    jobs = [(args.name, Path(args.init))] if args.init else [("control", out / "control-stage2"), ("ours", out / "stage2")]
    for name, init in jobs:
        tune(out / name, init, corpus, args)
    if is_main():
        report([out / name for name, _ in jobs])
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--corpus", default="data/corpus", help="corpus directory")
    add("--out", default="out", help="directory of the runs")
    add("--init", default=None, metavar="DIR", help="checkpoint directory to tune (default: both models of pretrain.py)")
    add("--name", default="tuned", help="name of the run, with --init")
    add("--tokens", type=number, default=1_200_000, help="tokens trained on, whatever their number in the corpus")
    add_training_flags(parser, lr=5e-4)
    parser.set_defaults(seq_len=768)  # so that nearly every conversation fits, and windows are full
    return parser.parse_args()


def tune(run, init, corpus, args):
    """Tune the model in directory `init` on the corpus's conversations; the result lies in `run`."""
    windows, too_long = pack(corpus, args.seq_len)
    batch_size = args.batch_tokens // args.seq_len
    steps = args.tokens // (batch_size * args.seq_len)
    if steps < 1:
        fail(f"--tokens {args.tokens:,} are less than a step of --batch-tokens {args.batch_tokens:,}")
    get_batch = packed_batches(corpus, windows, steps, batch_size, args.seq_len, args.seed)
    options = {"init": str(init), "steps": steps} | training_options(corpus, args)
    settle_options(run, options)
    train(run, lambda: load_checkpoint(init, corpus, dtype=None), get_batch, batch_size, steps, options, corpus, args)
    if is_main():
        count, used = sum(map(len, windows)), sum(b - a for w in windows for a, b in w) / (len(windows) * args.seq_len)
        print(f"{run.name}: {count:,} conversations in {len(windows):,} windows, {used:.1%} of positions used, "
              f"{too_long:,} too long for a window; epochs {steps * batch_size / len(windows):.2f}")


def pack(corpus, seq_len):
    """Conversations to windows of seq_len + 1 tokens by best fit: longest first, each into the fullest window it fits.

    Returns a list of windows, each a list of (start, end) in the bin, and the number of conversations too long for one.
    """
    starts = corpus.read("instruction", "train", "idx").astype(np.int64)
    lengths = np.diff(starts)
    with_room = [[] for _ in range(seq_len + 2)]  # with_room[r]: windows with r tokens left
    windows = []
    for i in np.argsort(-lengths, kind="stable"):
        if lengths[i] > seq_len:
            continue
        room = next((r for r in range(lengths[i], seq_len + 1) if with_room[r]), None)
        window = with_room[room].pop() if room is not None else len(windows)
        if room is None:
            windows.append([])
            room = seq_len
        windows[window].append((starts[i], starts[i + 1]))
        with_room[room - lengths[i]].append(window)
    if not windows:
        fail(f"{corpus.directory}: no conversation fits a window of {seq_len} tokens; see --seq-len")
    return windows, int((lengths > seq_len).sum())


def packed_batches(corpus, windows, steps, batch_size, seq_len, seed):
    """get_batch(step, rows) -> ids, targets, segments (len(rows), T) of those rows: targets are -100 where nothing is learned."""
    ids, mask = corpus.read("instruction", "train"), corpus.read("instruction", "train", "mask")
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(windows)) for _ in range(math.ceil(steps * batch_size / len(windows)))])
    padding = corpus.tokenizer.end_of_text

    def get_batch(step, rows):
        x = np.full((len(rows), seq_len), padding, np.int64)
        y = np.full((len(rows), seq_len), -100, np.int64)
        segments = np.full((len(rows), seq_len), -1, np.int32)
        for row, window in enumerate(order[step * batch_size + np.asarray(rows)]):
            at = 0
            for n, (start, end) in enumerate(windows[window]):
                conversation = ids[start:end].astype(np.int64)
                x[row, at:at + end - start] = conversation
                segments[row, at:at + end - start] = n
                y[row, at:at + end - start - 1] = np.where(mask[start + 1:end], conversation[1:], -100)
                at += end - start
        return x, y, segments

    return get_batch


if __name__ == "__main__":
    run_main(main)
