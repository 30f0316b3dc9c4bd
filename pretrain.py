"""Step 4 of 6: continual pre-training in two stages, and the control that shows what the agent data did.

In:   data/corpus (build_corpus.py); a checkpoint directory with --init, or nothing, and a small base is trained first.
Out:  out/base             trained on code and text alone (not with --init)
      out/stage1           from the base: the wide mixture, agent : code : text by --mix; what was retrieved is a part of agent
      out/stage2           from stage 1: the agent data, with --replay of code and text
      out/control-stage1, out/control-stage2    from the same base for the same tokens, without agent data
      each a Hugging Face checkpoint directory with metrics.jsonl and train_state/

Laptop:      python pretrain.py
One GPU:     python pretrain.py --preset 124m --seq-len 1024 --batch-tokens 262144 --base-tokens 2e9 --stage1-tokens 2e9 --stage2-tokens 5e8
One node:    torchrun --nproc_per_node=8 pretrain.py --init DIR --attention-lr 1 --practice 0 --stage1-tokens 1e10 ...
Many nodes:  torchrun --nnodes=16 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --init DIR ...

Killed or stopped, the same command goes on from the last saved step, bit for bit on a CPU. A batch is a function of (seed,
step) alone, whatever the number of processes. The recipe is that of Hephaestus (arXiv 2502.06589, section 4).
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as transformer
from build_corpus import Corpus, Tokenizer, write
from collect import HelpFormatter, fail, run_main

AGENT = {"api_doc": 0.7, "trajectory": 0.3}  # what the agent share consists of
RETRIEVED = 0.3  # share of what was retrieved from a pool in the agent share of stage 1, where the corpus has it
VALIDATED = ("api_doc", "trajectory", "code", "text")
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bf16, from the makers' datasheets


def main():
    args = parse_args()
    setup(args)
    corpus = open_corpus(args.corpus)
    agent, code, text = args.mix
    general = {"code": code, "text": text}
    retrieved = RETRIEVED * ("retrieved.train.bin" in corpus.manifest["stages"]["wide"])
    wide = {name: agent * (1 - retrieved) * share for name, share in AGENT.items()} | {"retrieved": agent * retrieved} | general
    seed_data = {name: (1 - args.replay) * share for name, share in AGENT.items()} | normalise(general, args.replay)
    out = Path(args.out)

    base = args.init
    if not base:
        base = pretrain("base", None, general, args.base_tokens, corpus, args)
    stage1 = pretrain("stage1", base, wide, args.stage1_tokens, corpus, args)
    pretrain("stage2", stage1, seed_data, args.stage2_tokens, corpus, args)
    if args.control:
        stage1 = pretrain("control-stage1", base, general, args.stage1_tokens, corpus, args)
        pretrain("control-stage2", stage1, general, args.stage2_tokens, corpus, args)

    if is_main():
        runs = ["base"] * (not args.init) + ["stage1", "stage2"] + ["control-stage1", "control-stage2"] * args.control
        report([out / run for run in runs])
    if dist.is_initialized():
        dist.destroy_process_group()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--corpus", default="data/corpus", help="corpus directory")
    add("--out", default="out", help="directory for the runs")
    add("--init", default=None, metavar="DIR", help="continue from this checkpoint directory instead of training a base; its "
        "tokenizer must be the corpus's")
    add("--preset", default="tiny", choices=transformer.PRESETS, help="shape of the model, where there is no --init")
    add("--base-tokens", type=number, default=1_200_000, help="tokens the base is trained on (1e9 is understood)")
    add("--stage1-tokens", type=number, default=1_600_000, help="tokens of stage 1")
    add("--stage2-tokens", type=number, default=1_600_000, help="tokens of stage 2")
    add("--mix", type=ratio, default="1:1:1", help="agent : code : text in stage 1, by tokens")
    add("--replay", type=float, default=0.25, help="share of code and text in stage 2, in the ratio of --mix")
    add("--practice", type=float, default=0.1, help="share of all windows turned into copying practice, which a base that was trained at "
        "length does not need")
    add("--control", action=argparse.BooleanOptionalAction, default=True, help="also train the control without agent data")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add_training_flags(parser, lr=1.5e-3)
    return parser.parse_args()


def add_training_flags(parser, lr):
    """Flags that pre-training and tuning share."""
    add = parser.add_argument
    add("--seq-len", type=int, default=384, help="tokens of a window")
    add("--batch-tokens", type=number, default=1536, help="tokens of an optimizer step, over all processes")
    add("--micro-batch", type=int, default=16, help="windows of one forward pass; gradients of several add up to a step")
    add("--lr", type=float, default=lr, help="peak learning rate; linear warm-up over 5%% of the steps, cosine decay to a tenth")
    add("--attention-lr", type=float, default=0.3, help="rate of the attention weights, as a share of --lr: below 1, copying heads "
        "outlive a short training from scratch; with a base from elsewhere take 1")
    add("--weight-decay", type=float, default=0.1, help="decoupled decay of the matrices")
    add("--val-windows", type=int, default=32, help="held-out windows of each domain in a validation, before the first step and after the last")
    add("--seed", type=int, default=0, help="seed of weights and data order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the matrix products; auto: bfloat16 where this "
        "machine multiplies it faster")
    add("--activation-checkpointing", action="store_true", help="keep no layer's activations but compute them again in the backward pass: "
        "less memory, for one more forward pass")
    add("--compile", default="auto", choices=["auto", "yes", "no"], help="torch.compile; auto: where there is a C++ compiler")


def number(text):
    """An integer that may be written as 1e9."""
    return int(float(text))


def ratio(text):
    """'agent:code:text' as shares that add up to 1."""
    parts = [float(p) for p in text.split(":")]
    if len(parts) != 3 or min(parts) < 0 or sum(parts) <= 0:
        raise argparse.ArgumentTypeError("three numbers such as 1:1:1")
    return [p / sum(parts) for p in parts]


def normalise(weights, total=1.0):
    """The weights, scaled to add up to `total`."""
    return {name: total * w / sum(weights.values()) for name, w in weights.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Processes and devices


def setup(args):
    """Join the process group that torchrun made, if any, and settle what 'auto' means on this machine."""
    if args.batch_tokens < args.seq_len:
        fail(f"--batch-tokens {args.batch_tokens} is less than one window of --seq-len {args.seq_len}")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" or bfloat16_pays() else "float32"
    if args.compile == "auto":
        args.compile = "yes" if shutil.which(os.environ.get("CXX", "c++")) or shutil.which("cl") else "no"
    torch.set_float32_matmul_precision("high")
    # Compiled for a CPU, the gradient of the embedding is else added up in whatever order the threads arrive.
    torch.use_deterministic_algorithms(args.device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False


def bfloat16_pays():
    """Whether this CPU multiplies bfloat16 at least half again as fast as float32: as a rule either 3 times or not at all."""
    def seconds(dtype):
        a = torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)
    return seconds(torch.float32) > 1.5 * seconds(torch.bfloat16)


def rank_and_world():
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return rank_and_world()[0] == 0


def open_corpus(directory):
    """The Corpus, or exit with what is wrong with it."""
    try:
        return Corpus(directory)
    except ValueError as error:
        fail(error)


def load_checkpoint(directory, corpus, device):
    """The model in a checkpoint directory, with room for every token of the corpus, or an error if their tokenizers differ."""
    try:
        model = transformer.load(directory, device)
    except ValueError as error:
        fail(error)
    ours, named = corpus.tokenizer, (Path(directory) / "tokenizer.json").exists()
    if named and not ours.same_as(Tokenizer.load(directory)):
        fail(f"{directory}: its tokenizer is not the corpus's; build one with `python build_corpus.py --tokenizer {directory}`")
    if model.config.vocab_size < len(ours.ranks) or not named and model.config.vocab_size != ours.vocab_size:
        fail(f"{directory}: vocabulary of {model.config.vocab_size}, but the corpus has {ours.vocab_size}")
    if model.config.vocab_size < ours.vocab_size:  # it lacks some of the chat format's tokens
        transformer.grow_vocabulary(model, ours.vocab_size)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Data: which windows a step sees


def plan_windows(corpus, weights, n_windows, seq_len, seed):
    """The order of a whole run: (domain index, window index), each (n_windows,), and {domain: epochs}.

    Domains are shared out by weight exactly; each one's windows come in a permutation, without replacement, and in a new
    one every epoch. All follows from the seed.
    """
    rng = np.random.default_rng(seed)
    names = [d for d, w in weights.items() if w > 0]
    exact = np.array([weights[d] for d in names]) / sum(weights[d] for d in names) * n_windows
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact)[:n_windows - counts.sum()]] += 1  # largest remainders
    order = rng.permutation(np.repeat(np.arange(len(names)), counts))
    windows, epochs = np.zeros(n_windows, np.int64), {}
    for i, name in enumerate(names):
        available = (len(corpus.read(name, "train")) - 1) // seq_len
        if available < 1:
            fail(f"{corpus.directory}: the domain {name} has no window of {seq_len} tokens to train on")
        epochs[name] = counts[i] / available
        drawn = [rng.permutation(available) for _ in range(math.ceil(epochs[name]))]
        windows[order == i] = np.concatenate(drawn or [np.zeros(0, np.int64)])[:counts[i]]
    return names, order, windows, epochs


def copying_practice(window, rng):
    """The tokens of a window (T + 1,) in random order, with spans of them written again further on.

    Nothing but copying foretells such a span, and as distances differ, only copying by content does.
    """
    window = rng.permutation(window)
    at = rng.integers(8, 40)
    while at < len(window) - 2:
        start = rng.integers(at - 2)
        length = min(rng.integers(3, 25), at - start, len(window) - at)
        window[at:at + length] = window[start:start + length]
        at += length + rng.integers(12)
    return window


def window_batches(corpus, weights, n_windows, seq_len, batch_size, seed, practice=0.0):
    """get_batch(step) -> ids, targets (batch_size, T) of a whole optimizer step, and the epochs of each domain.

    seed: a list of integers. practice: the share of windows turned into copying practice.
    """
    names, order, windows, epochs = plan_windows(corpus, weights, n_windows, seq_len, seed)
    bins = [corpus.read(name, "train") for name in names]

    def get_batch(step):
        chosen = range(step * batch_size, (step + 1) * batch_size)
        rows = np.stack([bins[order[i]][windows[i] * seq_len:][:seq_len + 1] for i in chosen]).astype(np.int64)
        rng = np.random.default_rng([*seed, step])
        for row in np.flatnonzero(rng.random(batch_size) < practice):
            rows[row] = copying_practice(rows[row], rng)
        return rows[:, :-1], rows[:, 1:]

    return get_batch, epochs


# ----------------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def wire_copying_heads(model):
    """Set five heads of a fresh model so that together they copy from the context, as minutes on a CPU would not teach it to.

    In layer 0, three heads note at each position the token before it, the one before that, and the mean of the two dozen
    before. In layer 1, two heads look for an earlier place that came after the token we are at, and raise the likelihood of
    what stands there: after ... a b ... a they say b (induction heads, Olsson et al. 2022, arXiv 2209.11895). The one prefers
    places where the second token before agrees too, the other places in a similar context. Large models learn such heads by
    themselves; to start from them is in the spirit of mimetic initialisation (arXiv 2305.09828). Needs biases, an untied head
    and three heads of enough width, as `tiny` and `124m` have; another model is left as it is.
    """
    c = model.config
    C, D = c.dim, c.head_dim
    # Rotary scores turn with the distance. Fast pairs of coordinates tell one position from the next, middle ones a dozen
    # positions from another dozen, and slow ones, which hardly turn within a window, compare what stands in them.
    pair, frequency = torch.arange(D // 2), model.frequencies
    fast, slow = pair[frequency > 0.1], pair[frequency < 0.01]
    middle = pair[(0.03 < frequency) & (frequency < 0.1)]
    W = len(slow) // 2 * 2
    if not (c.model_type == "qwen2" and not c.tie_embeddings and c.n_layers > 1 and c.n_kv_heads == c.n_heads >= 3 and len(middle) and C >= 4 * W):
        return
    first, second = (model.model["layers"][i].self_attn for i in (0, 1))
    # The residual stream's last coordinates are kept free for the notes, W for each; a note is a short code of a token.
    model.model["embed_tokens"].weight[:, -3 * W:] = 0
    model.lm_head.weight[:, -3 * W:] = 0
    token = F.pad(torch.linalg.qr(torch.randn(C - 3 * W, C - 3 * W))[0][:W], (0, 3 * W))  # (W, C): reads the code
    notes = previous, second_previous, context = torch.eye(C)[-3 * W:].view(3, W, C)      # (W, C) each: read a note
    for h, (pairs, distance, sharpness, size) in enumerate([(fast, 1, 35, 1), (fast, 2, 35, 1), (middle, 14, 12, 4)]):
        for projection in (first.q_proj, first.k_proj, first.v_proj):
            projection.weight[h * D:(h + 1) * D] = 0
        amplitude = (sharpness * D ** 0.5 / len(pairs)) ** 0.5  # constant q and k: k is turned so that they agree at the distance
        first.q_proj.bias[h * D + pairs] = amplitude
        first.k_proj.bias[h * D + pairs] = amplitude * (frequency[pairs] * distance).cos()
        first.k_proj.bias[h * D + D // 2 + pairs] = amplitude * (frequency[pairs] * distance).sin()
        first.v_proj.weight[h * D:h * D + W] = token
        first.o_proj.weight[:, h * D:h * D + W] = size * notes[h].T
    copied = torch.linalg.qr(torch.randn(C, C))[0][:D]
    for h, match in enumerate([[(16, token, previous), (11, previous, second_previous)],
                               [(48, token, previous), (12, context, context)]]):
        here = slice(h * D, (h + 1) * D)
        second.q_proj.weight[here] = second.k_proj.weight[here] = 0
        for pairs, (weight, query, key) in zip((slow[0:W:2], slow[1:W:2]), match):
            rows = h * D + torch.cat([pairs, pairs + D // 2])
            second.q_proj.weight[rows], second.k_proj.weight[rows] = weight * query, key
        second.v_proj.weight[here], second.o_proj.weight[:, here] = copied, 6 * copied.T


def pretrain(name, init, weights, tokens, corpus, args):
    """One stage: from a checkpoint directory (or fresh weights) to the run directory out/<name>, which is returned."""
    batch_size = args.batch_tokens // args.seq_len
    steps = max(1, tokens // (batch_size * args.seq_len))
    get_batch, epochs = window_batches(corpus, weights, steps * batch_size, args.seq_len, batch_size,
                                       [args.seed, sum(name.encode())], args.practice)
    run = Path(args.out) / name
    options = {"init": str(init), "weights": weights, "steps": steps, "corpus": corpus.sha256, "preset": args.preset,
               **{k: getattr(args, k) for k in ("seq_len", "batch_tokens", "micro_batch", "practice", "lr", "attention_lr", "weight_decay", "seed",
                                             "dtype", "compile")}}

    def make_model():
        if init:
            return load_checkpoint(init, corpus, args.device)
        torch.manual_seed(args.seed)
        config = transformer.Config(vocab_size=corpus.tokenizer.vocab_size, **transformer.PRESETS[args.preset])
        model = transformer.Transformer(config)
        wire_copying_heads(model)
        return model.to(args.device)

    train(run, make_model, get_batch, steps, options, corpus, args)
    if is_main() and epochs:
        print(f"{name}: epochs " + ", ".join(f"{d} {e:.2f}" for d, e in epochs.items()))
    return run


def train(run, make_model, get_batch, steps, options, corpus, args):
    """Train for `steps` optimizer steps and leave a checkpoint directory in `run`; go on where an earlier run stopped.

    get_batch(step) gives ids, targets (and segments) of the whole step; each process takes its rows. The loss is the sum over the
    targets, divided once by their number over all processes and micro-batches.
    """
    rank, world = rank_and_world()
    state_file = run / "train_state" / "state.pt"
    state = torch.load(state_file, map_location=args.device, weights_only=True) if state_file.exists() else None
    if state and state["options"] != options:
        changed = [f"{k} was {state['options'].get(k)!r}, now {v!r}" for k, v in options.items() if state["options"].get(k) != v]
        fail(f"{run} holds a run with other options: {'; '.join(changed)}. Remove it, or choose another --out")
    if state and state["step"] == steps and any((run / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return
    (run / "train_state").mkdir(parents=True, exist_ok=True)

    model = make_model()
    model.checkpointing = args.activation_checkpointing
    batch_size = len(get_batch(0)[0])
    if batch_size % world:
        fail(f"a step of {batch_size} windows cannot be divided among {world} processes: change --batch-tokens")
    if args.seq_len > model.config.max_seq_len:
        fail(f"--seq-len {args.seq_len}: the model has {model.config.max_seq_len} positions")
    optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=(0.9, 0.95), fused=True)
    start = 0
    if state:
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    forward = torch.compile(model) if args.compile == "yes" else model
    ddp = DistributedDataParallel(forward) if world > 1 else forward
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    peak = next((f for device, f in PEAK_FLOPS.items() if args.device == "cuda" and device in torch.cuda.get_device_name()), None)
    metrics = keep_metrics(run, start)

    bar = tqdm(total=steps, initial=start, desc=run.name, disable=None if rank == 0 else True)
    clock, logged, waited = time.perf_counter(), start, 0.0
    for step in range(start, steps + 1):
        if step == 0 or step == steps > start:
            losses = validation(forward, corpus, args, autocast)
            log(metrics, rank, step=step, **{f"loss/{d}": v for d, v in losses.items()})
        if step == steps or (step > start and step % args.save_every == 0):
            save_state(state_file, model, optimizer, step, options, rank)
        if step == steps:
            break

        fetched = time.perf_counter()
        arrays = get_batch(step)
        learned = int((arrays[1] >= 0).sum())
        rows = [torch.from_numpy(np.ascontiguousarray(a[rank::world])).to(args.device, non_blocking=True) for a in arrays]
        waited += time.perf_counter() - fetched
        lr = learning_rate(step, steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        total = torch.zeros((), device=args.device)
        for i in range(0, len(rows[0]), args.micro_batch):
            last = i + args.micro_batch >= len(rows[0])
            with contextlib.nullcontext() if last or world == 1 else ddp.no_sync():
                with autocast:
                    loss = ddp(*(a[i:i + args.micro_batch] for a in rows))
                (loss * (world / learned)).backward()  # DDP averages over processes
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()

        if (step + 1) % 10 == 0 or step + 1 == steps:
            if world > 1:
                dist.all_reduce(total)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            rate = (step + 1 - logged) * batch_size * args.seq_len / seconds
            mfu = rate * model.flops_per_token(args.seq_len) / (peak * world) if peak else None
            log(metrics, rank, step=step + 1, tokens=(step + 1) * batch_size * args.seq_len, loss=total.item() / learned, lr=lr,
                grad_norm=norm.item(), tokens_per_second=rate, mfu=mfu, data_wait=waited / seconds)
            bar.set_postfix_str(f"loss {total.item() / learned:.3f}, {rate:,.0f} tokens/s")
            logged, waited = step + 1, 0.0
    bar.close()
    if rank == 0:
        corpus.tokenizer.save(run)
        transformer.save(model, run)  # last: with the weights the run is finished
    if world > 1:
        dist.barrier()


def parameter_groups(model, args):
    """Matrices decay, vectors do not; attention learns at its own rate."""
    groups = {}
    for name, p in model.named_parameters():
        attention, matrix = "self_attn" in name, p.dim() >= 2
        groups.setdefault((attention, matrix), []).append(p)
    return [{"params": parameters, "weight_decay": args.weight_decay if matrix else 0.0,
             "lr_scale": args.attention_lr if attention else 1.0} for (attention, matrix), parameters in groups.items()]


def learning_rate(step, steps, peak):
    """Linear warm-up over the first 5% of the steps, then a cosine to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def validation(forward, corpus, args, autocast):
    """Mean loss (nats a token) on the first held-out windows of each domain, which no step trains on."""
    losses = {}
    for domain in VALIDATED:
        ids = corpus.read(domain, "heldout")
        count = min(args.val_windows, (len(ids) - 1) // args.seq_len)
        if count == 0:
            continue
        rows = torch.from_numpy(np.stack([ids[i * args.seq_len:][:args.seq_len + 1] for i in range(count)]).astype(np.int64)).to(args.device)
        total = torch.zeros((), device=args.device)
        for i in range(0, count, args.micro_batch):
            batch = rows[i:i + args.micro_batch]
            with autocast:
                total += forward(batch[:, :-1], batch[:, 1:].contiguous())
        losses[domain] = total.item() / (count * args.seq_len)
    return losses


def save_state(path, model, optimizer, step, options, rank):
    """Everything a run needs to go on, in one file that appears whole or not at all."""
    if rank == 0:
        temporary = path.with_name("state.tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "options": options}, temporary)
        temporary.replace(path)


def keep_metrics(run, step):
    """The metrics file, cut back to the step that training goes on from."""
    path = run / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step] if path.exists() and step else []
    if is_main():
        write(path, "".join(line + "\n" for line in kept))
    return path


def log(path, rank, **values):
    """Append one line to the metrics, without the values that are None."""
    if rank == 0:
        with open(path, "a") as file:
            file.write(json.dumps({k: v for k, v in values.items() if v is not None}) + "\n")


def report(runs):
    print(f"{'run':<16} {'steps':>6} {'tokens':>12} {'tokens/s':>9}   held-out loss at the end (nats a token)")
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "tokens" in line][-1]
        rates = sorted(line["tokens_per_second"] for line in lines if "tokens" in line)
        losses = [line for line in lines if "loss/code" in line][-1]
        print(f"{run.name:<16} {last['step']:>6,} {last['tokens']:>12,} {rates[len(rates) // 2]:>9,.0f}   "
              + ", ".join(f"{d} {losses[f'loss/{d}']:.3f}" for d in VALIDATED if f"loss/{d}" in losses))


if __name__ == "__main__":
    run_main(main)
