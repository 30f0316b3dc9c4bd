"""Step 4 of 6: continual pre-training in two stages, and the control that shows what the agent data did.

In:   data/corpus (build_corpus.py); a checkpoint directory with --init, or nothing, and a small base is trained first.
Out:  out/base             trained on code and text alone (not with --init)
      out/stage1           from the base: the wide mixture, agent : code : text by --mix; what was retrieved is a part of agent
      out/stage2           from stage 1: the agent data, with --replay of code and text
      out/control-stage1, out/control-stage2    from the same base for the same tokens, without agent data
      each a Hugging Face checkpoint directory with metrics.jsonl and train_state/
      out/scaling          with --scaling-law instead: the losses of many small runs, scaling_law.jsonl, and with --plot a picture

Laptop:      python pretrain.py
One GPU:     python pretrain.py --preset 124m --seq-len 1024 --batch-tokens 262144 --base-tokens 2e9 --stage1-tokens 2e9 --stage2-tokens 5e8
One node:    torchrun --nproc_per_node=8 pretrain.py --init DIR --shard --stage1-tokens 1e10 --stage2-tokens 2e9
Many nodes:  torchrun --nnodes=12:16 --nproc_per_node=8 --max-restarts=9 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --init DIR ...
What fits:   python pretrain.py --preset 8b --plan --gpus 128 --gpu a100-40g
How much agent data:  python pretrain.py --scaling-law, or under torchrun, where every process trains runs of its own

Killed or stopped, the same command (or --resume) goes on from the last checkpoint, bit for bit on a CPU. A batch is a function of
(seed, step) alone, whatever the number of processes. The recipe is that of Hephaestus (arXiv 2502.06589, section 4).
"""
import argparse
import contextlib
import ctypes
import importlib
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as transformer
from build_corpus import Corpus, Tokenizer, read_json, write
from collect import HelpFormatter, fail, run_main, shares

AGENT = {"api_doc": 0.7, "trajectory": 0.3}  # what the agent share consists of
RETRIEVED = 0.3  # share of what was retrieved from a pool in the agent share of stage 1, where the corpus has it
EQUAL = round(1 / 3, 3)  # the share of agent data in 1 : 1 : 1
VALIDATED = ("api_doc", "trajectory", "code", "text")

# Defaults with --init, for a base that was trained at length; those of --help are for a model from scratch.
CONTINUED = {"attention_lr": 1.0, "practice": 0.0, "warmup": 0.01}
# The peak rate for a base of up to so many parameters: a tenth of Llama 3 8B's (arXiv 2407.21783, table 3);
# smaller ones train at higher rates (1e-4 to 3e-4: huggingface.co/codelion/SmolLM2-70M). Re-warm to a rate
# such as the base's training ended with, then decay (arXiv 2407.07263); higher rates learn more of the new and
# forget more of the old (arXiv 2403.08763).
RATES = [(5e8, 2e-4), (3e9, 1e-4), (math.inf, 3e-5)]
# The window and the batch. GPU: what the largest Llama 3 began with (arXiv 2407.21783, section 3.4), an
# eighth of it below a billion parameters. CPU: 8 windows, so that a million tokens are over a hundred steps.
LONG, SHORT = {"seq_len": 4096, "batch_tokens": 2**22}, {"seq_len": 2048, "batch_tokens": 2**19}
ON_CPU = {"seq_len": 1024, "batch_tokens": 2**13, "micro_batch": 4, "val_windows": 8}

GPUS = {  # part of the device's name, dense bfloat16 FLOP/s, GB of memory: from the makers' datasheets
    "a100-40g": ("A100", 312e12, 40), "a100-80g": ("A100", 312e12, 80), "h100-80g": ("H100", 989e12, 80), "h200-141g": ("H200", 989e12, 141),
    "b200-180g": ("B200", 2250e12, 180), "rtx4090-24g": ("4090", 165e12, 24)}


def main():
    args = parse_args()
    if args.plan:
        return plan(args)
    setup(args, together=not args.scaling_law)
    corpus = open_corpus(args.corpus)
    both = args.stage1_tokens + args.stage2_tokens
    args.all_tokens = (not args.init) * args.base_tokens + (1 + args.control) * both
    if args.scaling_law:
        args.all_tokens = 0  # many short runs, of which none says how long they take
        return scaling_law(corpus, args)
    agent, code, text = args.mix
    general = {"code": code, "text": text}
    wide = wide_mixture(agent, general, corpus)
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


def wide_mixture(agent, general, corpus):
    """Weights of the domains for a share of agent data, the rest being code and text in the ratio of `general`."""
    retrieved = RETRIEVED * ("retrieved.train.bin" in corpus.manifest["stages"]["wide"])
    return {d: agent * (1 - retrieved) * share for d, share in AGENT.items()} | {"retrieved": agent * retrieved} | normalise(general, 1 - agent)


def pretrain(name, init, weights, tokens, corpus, args):
    """One stage: from a checkpoint directory (or fresh weights) to the run directory out/<name>, which is returned."""
    batch_size = args.batch_tokens // args.seq_len
    steps = tokens // (batch_size * args.seq_len)
    if steps < 1:
        fail(f"{name}: {tokens:,} tokens are less than a step of --batch-tokens {args.batch_tokens:,}; see --base-tokens, --stage1-tokens "
             "and --stage2-tokens")
    mask = args.document_mask == "yes" or args.document_mask == "auto" and args.device == "cpu"
    get_batch, epochs = window_batches(corpus, weights, steps * batch_size, args.seq_len, batch_size,
                                       [args.seed, sum(name.encode())], args.practice, mask)
    run = Path(args.out) / name
    options = {"init": str(init), "weights": weights, "steps": steps, "preset": args.preset, "document_mask": mask,
               "practice": args.practice} | training_options(corpus, args)

    def make_model():
        if init:
            return load_checkpoint(init, corpus, dtype=None)
        torch.manual_seed(args.seed)
        config = transformer.Config(vocab_size=corpus.tokenizer.vocab_size, **shape_of(args.preset))
        model = transformer.Transformer(config)
        wire_copying_heads(model)
        return model

    settle_options(run, options)
    if is_main() and not args.scaling_law:
        write(Path(args.out) / "options.json", json.dumps(vars(args), indent=1))
    train(run, make_model, get_batch, batch_size, steps, held_out_windows(corpus, args, mask), options, corpus, args)
    if is_main():
        print(f"{name}: epochs " + ", ".join(f"{d} {e:.2f}" for d, e in epochs.items()))
    return run


def train(run, make_model, get_batch, batch_size, steps, held_out, options, corpus, args, save=transformer.save):
    """Train for `steps` optimizer steps and leave a checkpoint directory in `run`; go on where an earlier run stopped.

    get_batch(step, rows) gives ids, targets and perhaps segments of those rows of a step's batch; each process takes its own. The loss is
    the sum over the targets, divided once by their number over all processes and micro-batches. held_out has, by name, what validation
    runs over, all rows of it; save(model, run, what was trained by name) writes the result.
    """
    rank, world = rank_and_world()
    checkpoints = Checkpoints(run / "train_state", args.keep)
    if any((run / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return
    model = make_model()
    if args.seq_len > model.config.max_seq_len:
        fail(f"--seq-len {args.seq_len}: the model has {model.config.max_seq_len} positions")
    model.checkpointing = args.activation_checkpointing
    flops = model.flops_per_token(args.seq_len)
    forward = distribute(model, args)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=(0.9, 0.95), fused=True)
    start, skipped = checkpoints.load(model, optimizer)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    peak = next((peak for name, peak, _ in GPUS.values() if args.device == "cuda" and name in torch.cuda.get_device_name()), None)
    metrics = Metrics(run, start, options, args)
    in_a_row = 0

    batches = prefetch(get_batch, batch_size, range(start, steps), args)
    bar = tqdm(total=steps, initial=start, desc=run.name, disable=None if rank == 0 else True)
    for step in range(start, steps + 1):
        if (step == 0 or step > start) and (step % args.val_every == 0 or step == steps):
            metrics.log(step=step, **{f"loss/{d}": v for d, v in validation(model, held_out, args, autocast).items()})
        stop = add_up(torch.tensor(float(STOP.is_set()))).item()  # so that all processes stop at the same step
        if step > start and (step % args.save_every == 0 or step == steps or stop):
            checkpoints.save(step, skipped, model, optimizer)
        if step == steps or stop:
            break

        started = time.perf_counter()
        if step == start + 1:  # the first step compiles
            since = started
        elif step == start + 6 and rank == 0 and args.all_tokens:
            rate = 5 * batch_size * args.seq_len / (started - since)
            tokens = steps * batch_size * args.seq_len
            tqdm.write(f"{run.name}: at {rate:,.0f} tokens/s its {tokens:,} tokens take {duration(tokens / rate)}"
                       f", the {args.all_tokens:,} of all runs {duration(args.all_tokens / rate)}")
        tensors = next(batches)
        waited = time.perf_counter() - started
        learned = int(add_up((tensors[1] >= 0).sum()))
        if not learned:
            fail(f"{run}, step {step}: no token to learn from; are the masks of {corpus.directory} empty?")
        tensors = [t.to(args.device, non_blocking=True) for t in tensors]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args) * group["lr_scale"]
        loss, norm = forward_and_backward(model, forward, tensors, learned, autocast, args)
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        rate = batch_size * args.seq_len / seconds
        metrics.log(step=step + 1, tokens=(step + 1) * batch_size * args.seq_len, loss=loss, lr=learning_rate(step, steps, args), grad_norm=norm,
                    ms=1000 * seconds, tokens_per_second=rate, **{"mfu": rate * flops / (peak * world)} if peak else {},
                    data_wait=waited / seconds, memory_gb=memory_gb(args.device), skipped=skipped)
        bar.update()
        checkpoints.look_after()
        if in_a_row == 10:
            checkpoints.finish()
            fail(f"{run}: loss or gradient was not finite in ten steps in a row; the last checkpoint is {checkpoints.newest() or 'none'}")
    bar.close()
    batches.close()
    checkpoints.finish()
    if stop and step < steps:
        if rank == 0:
            print(f"{run.name}: stopped after step {step} of {steps}" + ", which is saved" * (step > 0) + "; the same command goes on")
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(0)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True))
    if rank == 0:
        corpus.tokenizer.save(run)
        save(model, run, weights)  # last: with the weights the run is finished
    if dist.is_initialized():
        dist.barrier()


def forward_and_backward(model, forward, tensors, learned, autocast, args):
    """Put the clipped gradient of a step's mean loss into the model. Returns the loss (nats a learned token) and the gradient's norm."""
    total, (_, world) = torch.zeros((), device=args.device), rank_and_world()
    for i in range(0, len(tensors[0]), args.micro_batch):
        last = i + args.micro_batch >= len(tensors[0])
        with contextlib.nullcontext() if last or forward is model else forward.no_sync():  # DDP adds up over processes once, at the last
            with autocast:
                loss = forward(*(t[i:i + args.micro_batch] for t in tensors))
            (loss * (world / learned)).backward()  # DDP and FSDP average over processes
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return add_up(total).item() / learned, (norm.full_tensor() if args.shard else norm).item()


def learning_rate(step, steps, args):
    """Linear warm-up, then a cosine to a tenth of the peak, or (arXiv 2404.06395) the peak, and a line to its tenth over the last fifth."""
    warmup = max(1, int(args.warmup * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "wsd":
        return args.lr * min(1.0, 0.1 + 0.9 * (steps - step) / (0.2 * steps))
    progress = (step - warmup) / max(1, steps - warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def window_batches(corpus, weights, n_windows, seq_len, batch_size, seed, practice=0.0, document_mask=False):
    """get_batch(step, rows) -> ids, targets (len(rows), T) of those rows of a step's batch, and the epochs of each domain.

    seed: a list of integers. practice: the share of windows turned into copying practice. document_mask: get_batch gives segments too,
    which number a window's documents.
    """
    available = {name: (len(corpus.read(name, "train")) - 1) // seq_len for name, weight in weights.items() if weight > 0}
    if missing := [name for name, count in available.items() if count < 1]:
        fail(f"{corpus.directory}: the domain {missing[0]} has no window of {seq_len} tokens to train on")
    names, order, windows, epochs = plan_windows(available, weights, n_windows, seed)
    bins = [corpus.read(name, "train") for name in names]

    def get_batch(step, rows):
        chosen = step * batch_size + np.asarray(rows)
        batch = np.stack([bins[order[i]][windows[i] * seq_len:][:seq_len + 1] for i in chosen]).astype(np.int64)  # (rows, T + 1)
        segments = number_documents(batch[:, :-1], corpus.tokenizer.end_of_text) if document_mask else None
        for row, i in enumerate(chosen):
            rng = np.random.default_rng([*seed, i])
            if rng.random() < practice:
                batch[row] = copying_practice(batch[row], rng)
                if document_mask:
                    segments[row] = 0
        return batch[:, :-1], batch[:, 1:], *([segments] if document_mask else [])

    return get_batch, epochs


# ============================================================================================================
# Below: options; processes and devices; data; training; checkpoints and metrics; the mixture law; the plan.

# ------------------------------------------------------------------------------------------------------------
# Options


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--corpus", default="data/corpus", help="corpus directory")
    add("--out", default="out", help="directory for the runs")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--init", default=None, metavar="DIR", help="continue from this checkpoint directory instead of training a base; "
        "its tokenizer must be the corpus's. The defaults then follow its size and the device: see CONTINUED")
    begin.add_argument("--resume", action="store_true", help="go on with what is in --out, with the options it was started with; the same "
        "command goes on as well")
    begin.add_argument("--scaling-law", action="store_true", help="train small models at many shares of agent data, fit loss against share, and "
        "check the best one; the same command goes on")
    add("--preset", default="tiny", type=shape, metavar="SHAPE", help="shape of the model, where there is no --init: one of "
        f"{', '.join(transformer.PRESETS)}, or LAYERSxWIDTH such as 4x256")
    add("--base-tokens", type=number, default=1_200_000, help="tokens the base is trained on (1e9 is understood)")
    add("--stage1-tokens", type=number, default=1_600_000, help="tokens of stage 1")
    add("--stage2-tokens", type=number, default=2_400_000, help="tokens of stage 2")
    add("--mix", type=ratio, default="1:1:1", help="agent : code : text in stage 1, by tokens")
    add("--replay", type=float, default=0.25, help="share of code and text in stage 2, in the ratio of --mix")
    add("--practice", type=float, default=0.1, help="share of all windows turned into copying practice, which a base that was trained at "
        "length does not need")
    add("--document-mask", default="auto", choices=["auto", "yes", "no"], help="let no token see another document of its window; auto: on a CPU")
    add("--control", action=argparse.BooleanOptionalAction, default=True, help="also train the control without agent data")
    add("--ratios", type=listed(share), default="0,0.1,0.25,0.4,0.6,0.8,0.95", help="of --scaling-law: shares of agent data; the rest is "
        "code and text as in --mix")
    add("--sizes", type=listed(lambda text: text if Path(text).is_dir() else shape(text)), default="2x192,4x192,4x256", help="of --scaling-law: "
        "shapes, or checkpoint directories to begin from; the last is left out of the fit, for the check")
    add("--tokens", type=listed(number), default="150e3,300e3,450e3", help="of --scaling-law: tokens of a run; the last is for the check")
    add("--seeds", type=int, default=2, help="of --scaling-law: runs of each kind in the grid, and twice as many in the check")
    add("--weights", type=shares(TARGETS), default="agent=1,code=1,text=1",
        help="of --scaling-law: what the losses count, each relative to the base's")
    add("--plot", action="store_true", help="of --scaling-law: draw out/scaling/scaling_law.png, with matplotlib")
    add("--plan", action="store_true", help="print what such a run needs on --gpus of the kind --gpu, and end: memory, tokens/s, days")
    add("--gpus", type=int, default=8, help="of --plan: how many")
    add("--gpu", default="h100-80g", choices=GPUS, help="of --plan: which")
    add("--mfu", type=float, default=0.4, help="of --plan: the share of the GPU's peak that training reaches")
    add_training_flags(parser, lr=1.5e-3)
    args = parser.parse_args()
    if args.resume:
        if not (saved := Path(args.out) / "options.json").exists():
            fail(f"--resume: there is no {saved}, so nothing to go on with")
        parser.set_defaults(**read_json(saved))
    elif base := args.init or args.scaling_law and next((s for s in args.sizes if Path(s).is_dir()), None):
        parser.set_defaults(**continued(base, args.device))
    args = parser.parse_args()
    del args.resume
    return args


def continued(directory, device):
    """The defaults for going on with a base: by its size, and by whether there is a GPU."""
    size = parameters_in(directory)
    shape = ON_CPU if device == "cpu" else SHORT if size < 1e9 else LONG
    return CONTINUED | shape | {"lr": rate_for(size)}


def parameters_in(directory):
    """How many parameters the model in a checkpoint directory has, by its config.json."""
    try:
        config = transformer.Config.from_hf(transformer.read_json(Path(directory) / "config.json"))
    except ValueError as error:
        fail(error)
    with torch.device("meta"):
        return sum(p.numel() for p in transformer.Transformer(config).parameters())


def rate_for(size):
    """The peak learning rate for a base of so many parameters."""
    return next(rate for limit, rate in RATES if size < limit)


def add_training_flags(parser, lr):
    """Flags that pre-training and tuning share."""
    add = parser.add_argument
    add("--seq-len", type=int, default=384, help="tokens of a window")
    add("--batch-tokens", type=number, default=1536, help="tokens of an optimizer step, over all processes")
    add("--micro-batch", type=int, default=16, help="windows of one forward pass; gradients of several add up to a step")
    add("--lr", type=float, default=lr, help="peak learning rate, decayed to a tenth")
    add("--schedule", default="cosine", choices=["cosine", "wsd"], help="after a linear warm-up the rate decays as a cosine, or it stays "
        "(warmup-stable-decay) and falls linearly over the last fifth")
    add("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises")
    add("--attention-lr", type=float, default=0.3, help="rate of the attention weights, as a share of --lr: below 1, copying heads "
        "outlive a short training from scratch; with a base from elsewhere take 1")
    add("--weight-decay", type=float, default=0.1, help="decoupled decay of the matrices")
    add("--val-windows", type=int, default=32, help="held-out windows of each domain in a validation")
    add("--val-every", type=int, default=1000, help="steps between validations; there is one before the first step and after the last")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints kept of a run")
    add("--seed", type=int, default=0, help="seed of weights and data order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the matrix products; auto: bfloat16 where this "
        "machine multiplies it faster")
    add("--shard", action="store_true", help="divide weights, gradients and optimizer among the processes (FSDP2), for a model that does "
        "not fit otherwise")
    add("--activation-checkpointing", action="store_true", help="keep no layer's activations but compute them again in the backward pass: "
        "less memory, for one more forward pass")
    add("--compile", default="auto", choices=["auto", "yes", "no"], help="torch.compile; auto: where there is a C++ compiler")
    add("--wandb", default=None, metavar="PROJECT", help="log to this project of Weights & Biases too (pip install wandb)")


def number(text):
    """An integer that may be written as 1e9."""
    return int(float(text))


def listed(kind):
    """The type of a list with commas between."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    return parse


def share(text):
    """A number from 0 to below 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return float(text)


def shape(text):
    """The name of a preset, or LAYERSxWIDTH."""
    try:
        shape_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(transformer.PRESETS)}, nor LAYERSxWIDTH with a multiple of 64") from None
    return text


def shape_of(name):
    """The fields of a Config for a preset, or for LAYERSxWIDTH with heads of 64. Raises ValueError."""
    if name in transformer.PRESETS:
        return transformer.PRESETS[name]
    layers, dim = map(int, name.split("x"))
    if layers < 1 or dim < 64 or dim % 64:
        raise ValueError(name)
    return dict(n_layers=layers, dim=dim, n_heads=dim // 64, n_kv_heads=dim // 64, hidden_dim=64 * round(dim * 8 / 3 / 64))


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

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h: what is free at the heap's end, and single blocks, go back from this size on
STOP = threading.Event()  # set by SIGTERM or Ctrl-C: training saves and ends


def setup(args, together=True):
    """Settle what 'auto' means on this machine, end in order when asked to, and, to train together, join the group that torchrun made."""
    for name in ("seq_len", "batch_tokens", "micro_batch", "save_every", "val_every", "keep"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.batch_tokens < args.seq_len:
        fail(f"--batch-tokens {args.batch_tokens} is less than one window of --seq-len {args.seq_len}")
    if "RANK" in os.environ and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "RANK" in os.environ and together:
        # A worker that torchrun started again must not read from the store the address that its dead predecessor left there.
        store, rank, world = next(rendezvous("env://"))
        store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} of {world}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    elif args.shard:
        fail("--shard divides the model among the processes of torchrun: torchrun --nproc_per_node=8 ...")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" or bfloat16_pays() else "float32"
    if args.compile == "auto":
        args.compile = "yes" if shutil.which(os.environ.get("CXX", "c++")) or shutil.which("cl") else "no"
    torch.set_float32_matmul_precision("high")
    # Compiled for a CPU, the gradient of the embedding is else added up in whatever order the threads arrive.
    torch.use_deterministic_algorithms(args.device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # glibc keeps what a step frees for the next: the system would clear every page that it lends anew.
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: STOP.set())


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


def optional(module, flag):
    """A module of a package that only this flag needs, or exit with how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        fail(f"{flag} needs the package {package}: pip install {package}")


def is_main():
    """Whether this process is the one that prints and writes."""
    return rank_and_world()[0] == 0


def add_up(x):
    """The tensor, summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def open_corpus(directory):
    """The Corpus, or exit with what is wrong with it."""
    try:
        return Corpus(directory)
    except ValueError as error:
        fail(error)


def load_checkpoint(directory, corpus, device="cpu", dtype=torch.float32):
    """The model in a checkpoint directory, with room for every token of the corpus, or an error if their tokenizers differ."""
    try:
        model = transformer.load(directory, device, dtype)
    except ValueError as error:
        fail(error)
    ours, named = corpus.tokenizer, (Path(directory) / "tokenizer.json").exists()
    if named and not ours.same_as(Tokenizer.load(directory)):
        fail(f"{directory}: its tokenizer is not the corpus's; build one with `python build_corpus.py --tokenizer {directory}`")
    if model.config.vocab_size < len(ours.ranks) or not named and model.config.vocab_size != ours.vocab_size:
        fail(f"{directory}: vocabulary of {model.config.vocab_size}, but the corpus has {ours.vocab_size}")
    if model.config.vocab_size < ours.vocab_size:  # it lacks some of the chat format's tokens
        transformer.grow_vocabulary(model, ours.vocab_size, ours.special_pieces())
    return model


def distribute(model, args):
    """The model as it is trained: what learns in float32, on its device, compiled, and with several processes a copy in each (DDP) or,
    with --shard, a part of every tensor in each (FSDP2): a layer's weights are brought together when it runs."""
    def in_float32(module):
        for p in module.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        return module

    layers = model.model["layers"]
    if args.compile == "yes":
        for module in layers if args.shard else [model]:
            module.compile()
    if args.shard:
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # rotary angles need float32
        policy = half if args.dtype == "bfloat16" else MixedPrecisionPolicy()
        mesh = init_device_mesh(args.device, (dist.get_world_size(),))
        for module in [*layers, model]:  # one after the other, so that no process ever holds the whole in float32
            fully_shard(in_float32(module), mesh=mesh, mp_policy=policy)
        return model
    in_float32(model).to(args.device)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model


# ----------------------------------------------------------------------------------------------------------------------
# Data: which windows a step sees


def plan_windows(available, weights, n_windows, seed):
    """The order of a whole run, from {domain: number of windows} and {domain: weight}: the domains' names, (domain index, window index),
    each (n_windows,), and {domain: epochs}.

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
        epochs[name] = counts[i] / available[name]
        drawn = [rng.permutation(available[name]) for _ in range(math.ceil(epochs[name]))]
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


def number_documents(ids, end_of_text):
    """For each token of ids (B, T), how many documents of its window have ended before it."""
    ends = ids == end_of_text
    return ends.cumsum(1, dtype=np.int32) - ends


def own_rows(count, rank, world):
    """Every rank's rows of a batch: as many for each, of which those from `count` on are there to learn nothing."""
    return np.arange(rank, math.ceil(count / world) * world, world)


def prefetch(get_batch, batch_size, steps, args):
    """Yields for each step the tensors of this rank's rows, (rows, T) each, while a thread reads those of the next."""
    rows = own_rows(batch_size, *rank_and_world())

    def fetch(step):
        ids, targets, *segments = get_batch(step, rows % batch_size)
        targets = np.where(rows[:, None] < batch_size, targets, -100)
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in (ids, targets, *segments)]
        return [t.pin_memory() for t in tensors] if args.device == "cuda" else tensors

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fetch, steps[0]) if steps else None
        for step in steps:
            ready = coming.result()
            if step != steps[-1]:
                coming = pool.submit(fetch, step + 1)
            yield ready


# ----------------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def wire_copying_heads(model):
    """Set the first heads of a fresh model so that together they copy from the context, as minutes on a CPU would not teach it to.

    In layer 0, heads note at each position the token before it, the one before that, the mean of the dozen before and, where there
    is a fourth head, the third token before. In layer 1, two heads look for an earlier place that came after the token we are
    at, and raise the likelihood of what stands there: after ... a b ... a they say b (induction heads, Olsson et al. 2022, arXiv
    2209.11895). The one prefers places where the tokens before agree too, the other also places in a similar context. Large models
    learn such heads by themselves; to start from them is in the spirit of mimetic initialisation (arXiv 2305.09828). Needs biases, an
    untied head and three heads of enough width, as `tiny` and `124m` have; another model is left as it is.
    """
    c = model.config
    C, D = c.dim, c.head_dim
    N = min(c.n_heads, 4)  # notes, of which a copying head compares N - 1 with our own
    # Rotary scores turn with the distance. Fast pairs of coordinates tell one position from the next, middle ones some
    # positions from others further on, and slow ones, which hardly turn within a window, compare what stands in them.
    pair, frequency = torch.arange(D // 2), model.frequencies
    fast, slow = pair[frequency > 0.1], pair[frequency < 0.01]
    middle = pair[(0.05 < frequency) & (frequency < 0.2)]
    W = len(slow) // max(1, N - 1) * 2
    biased = c.model_type == "llama" and c.attention_bias
    if not (biased and not c.tie_embeddings and c.n_layers > 1 and c.n_kv_heads == c.n_heads >= 3 and len(middle) and C >= (N + 1) * W):
        return
    first, second = (model.model["layers"][i].self_attn for i in (0, 1))
    # The residual stream's last coordinates are kept free for the notes, W for each; a note is a short code of a token.
    model.model["embed_tokens"].weight[:, -N * W:] = 0
    model.lm_head.weight[:, -N * W:] = 0
    token = F.pad(torch.linalg.qr(torch.randn(C - N * W, C - N * W))[0][:W], (0, N * W))  # (W, C): reads the code
    notes = torch.eye(C)[-N * W:].view(N, W, C)                                          # (W, C) each: read a note
    for h, (pairs, distance, sharpness, size) in enumerate([(fast, 1, 35, 1), (fast, 2, 35, 1), (middle, 6, 12, 2), (fast, 3, 35, 1)][:N]):
        for projection in (first.q_proj, first.k_proj, first.v_proj):
            projection.weight[h * D:(h + 1) * D] = 0
        amplitude = (sharpness * D ** 0.5 / len(pairs)) ** 0.5  # constant q and k: k is turned so that they agree at the distance
        first.q_proj.bias[h * D + pairs] = amplitude
        first.k_proj.bias[h * D + pairs] = amplitude * (frequency[pairs] * distance).cos()
        first.k_proj.bias[h * D + D // 2 + pairs] = amplitude * (frequency[pairs] * distance).sin()
        first.v_proj.weight[h * D:h * D + W] = token
        first.o_proj.weight[:, h * D:h * D + W] = size * notes[h].T
    previous, second_previous, context, third_previous = notes[[0, 1, 2, N - 1]]
    copied = torch.linalg.qr(torch.randn(C, C))[0][:D]
    for h, match in enumerate([[(16, token, previous), (11, previous, second_previous), (8, second_previous, third_previous)],
                               [(24, token, previous), (12, context, context), (12, previous, second_previous)]]):
        here = slice(h * D, (h + 1) * D)
        second.q_proj.weight[here] = second.k_proj.weight[here] = 0
        for i, (weight, query, key) in enumerate(match[:N - 1]):
            pairs = slow[i:W // 2 * (N - 1):N - 1]
            rows = h * D + torch.cat([pairs, pairs + D // 2])
            second.q_proj.weight[rows], second.k_proj.weight[rows] = weight * query, key
        second.v_proj.weight[here], second.o_proj.weight[:, here] = copied, 6 * copied.T


def training_options(corpus, args):
    """What a run's result depends on, and so may not change on the way."""
    return {"corpus": corpus.sha256, "tokenizer": corpus.manifest["tokenizer_sha256"]} | {k: getattr(args, k) for k in (
        "seq_len", "batch_tokens", "lr", "schedule", "warmup", "attention_lr", "weight_decay", "seed", "dtype", "compile")}


def settle_options(run, options):
    """Write down what a run depends on, or exit if it was begun with something else."""
    saved, now = run / "train_state" / "options.json", json.loads(json.dumps(options))
    if saved.exists() and (before := read_json(saved)) != now:
        changed = [f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in before | now if before.get(k) != now.get(k)]
        fail(f"{run} holds a run with other options: {'; '.join(changed)}. Remove it, or choose another --out")
    if is_main() and not saved.exists():
        saved.parent.mkdir(parents=True, exist_ok=True)
        write(saved, json.dumps(now))


def duration(seconds):
    """A time as people read it.

    >>> duration(40), duration(719), duration(12_000)
    ('40 s', '12 min', '3 h 20 min')
    """
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def parameter_groups(model, args):
    """Matrices decay, vectors do not; attention learns at its own rate."""
    groups = {}
    for name, p in model.named_parameters():
        attention, matrix = "self_attn" in name, p.dim() >= 2
        if p.requires_grad:
            groups.setdefault((attention, matrix), []).append(p)
    return [{"params": parameters, "weight_decay": args.weight_decay if matrix else 0.0,
             "lr_scale": args.attention_lr if attention else 1.0} for (attention, matrix), parameters in groups.items()]


def held_out_windows(corpus, args, document_mask):
    """{domain: (ids, targets[, segments])}, (N, T) each: its first held-out windows, which no step trains on."""
    found = {}
    for domain in VALIDATED:
        ids = corpus.read(domain, "heldout")
        count = min(args.val_windows, (len(ids) - 1) // args.seq_len)
        if count > 0:
            windows = np.stack([ids[i * args.seq_len:][:args.seq_len + 1] for i in range(count)]).astype(np.int64)
            segments = [number_documents(windows[:, :-1], corpus.tokenizer.end_of_text)] if document_mask else []
            found[domain] = windows[:, :-1], windows[:, 1:], *segments
    return found


@torch.no_grad()
def validation(model, held_out, args, autocast):
    """Mean loss (nats a learned token) of each domain of `held_out`. Each process takes its share of the windows."""
    rank, world = rank_and_world()
    losses = {}
    for domain, (ids, targets, *segments) in held_out.items():
        rows = own_rows(len(ids), rank, world)
        own, padding = rows % len(ids), rows[:, None] >= len(ids)
        arrays = ids[own], np.where(padding, -100, targets[own]), *(s[own] for s in segments)
        batch = [torch.from_numpy(np.ascontiguousarray(a)).to(args.device) for a in arrays]
        total = torch.zeros((), device=args.device)
        for i in range(0, len(rows), args.micro_batch):
            with autocast:
                total += model(*(a[i:i + args.micro_batch] for a in batch))
        losses[domain] = add_up(total).item() / (targets >= 0).sum()
    return losses


def memory_gb(device):
    """The most that this process has held so far: on the GPU, or else in all."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if (status := Path("/proc/self/status")).exists():  # getrusage would count what the parent process held
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run that goes on, and its metrics


class Checkpoints:
    """The last `keep` states of a run, each in a directory step-<n>, in parts that fit any number of processes.

    A state is copied at once and written while training goes on. It counts from the moment when its index, .metadata, appears,
    which torch.distributed.checkpoint writes last and under another name first.
    """
    options = StateDictOptions(ignore_frozen_params=True, strict=False)  # not strict: what is frozen is not in the state

    def __init__(self, directory, keep):
        self.directory, self.keep, self.saving = directory, keep, None
        self.own_group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # the writing thread's
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def newest(self):
        """The directory of the newest whole state, or None."""
        return max((p.parent for p in self.directory.glob("step-*/.metadata")), key=lambda p: int(p.name[5:]), default=None)

    def save(self, step, skipped, model, optimizer):
        """Begin to save the state before `step`. Blocks while it is copied, and until the one before is written."""
        self.finish()
        weights, moments = get_state_dict(model, optimizer, options=self.options)
        state = {"model": weights, "optimizer": moments, "skipped": torch.tensor(skipped)}
        self.saving = dcp.async_save(state, checkpoint_id=self.directory / f"step-{step}", process_group=self.own_group,
                                     no_dist=self.own_group is None)

    def look_after(self):
        if self.saving and self.saving.done():
            self.finish()

    def finish(self):
        """Wait until what is being saved is saved, and remove what is older than the last `keep`; a full disk ends the run."""
        try:
            if self.saving:
                self.saving.result()
        except (Exception, CheckpointException) as error:
            fail(f"{self.directory}: a checkpoint could not be saved: {first_cause(error)}. The last whole one is {self.newest() or 'none'}")
        if self.saving and is_main():
            newest_last = sorted(self.directory.glob("step-*"), key=lambda p: ((p / ".metadata").exists(), int(p.name[5:])))
            for old in newest_last[:-self.keep]:
                shutil.rmtree(old)
        self.saving = None

    def load(self, model, optimizer):
        """Put the newest state into the model and optimizer. Returns its step and the number of steps skipped by then."""
        if not (newest := self.newest()):
            return 0, 0
        weights, moments = get_state_dict(model, optimizer, options=self.options)
        state = {"model": weights, "optimizer": moments, "skipped": torch.tensor(0)}
        try:
            with open(newest / ".metadata", "rb") as index:
                IndexUnpickler(index).load()
            dcp.load(state, checkpoint_id=newest, process_group=self.own_group, no_dist=self.own_group is None)
        except (Exception, CheckpointException) as error:
            fail(f"{newest} cannot be read: {first_cause(error)}. Remove it to go on from the checkpoint before")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=self.options)
        return int(newest.name[5:]), int(state["skipped"])


def first_cause(error):
    """The exception that began it, in whichever process."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while before := error.__cause__ or error.__context__:
        error = before
    return error


class IndexUnpickler(pickle.Unpickler):
    """Reads a checkpoint's index, which is a pickle, only if it names nothing but what such an index consists of."""

    def find_class(self, module, name):
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "torch.serialization", "pathlib") \
                or module == "torch" and name in ("Size", "float32", "bfloat16", "int64"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index asks for {module}.{name}")


class Metrics:
    """metrics.jsonl, cut back to the step that training goes on from; a dense line for each step; and Weights & Biases if asked for."""

    def __init__(self, run, start, options, args):
        self.path, self.steps, self.wandb = run / "metrics.jsonl", options["steps"], None
        if not is_main():
            return
        kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= start] if self.path.exists() and start else []
        write(self.path, "".join(line + "\n" for line in kept))
        if args.wandb:
            wandb = optional("wandb", "--wandb")
            self.wandb = wandb.init(project=args.wandb, name=run.name, config=options, resume="allow", id=f"{run.parent.name}-{run.name}")

    def log(self, **values):
        if not is_main():
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()}) + "\n")  # JSON has no NaN
        if self.wandb:
            self.wandb.log(values, step=values["step"])
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        line = "held-out loss: " + ", ".join(f"{d} {v:.3f}" for d, v in losses.items())
        if "tokens" in values:
            line = (f"loss {values['loss']:.3f}  lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  {values['ms']:,.0f} ms"
                    + f"  {values['tokens_per_second']:,.0f} tokens/s" + (f"  MFU {values['mfu']:.1%}" if "mfu" in values else "")
                    + f"  data wait {values['data_wait']:.1%}"
                    + f"  skipped {values['skipped']}" * (values["skipped"] > 0))
        tqdm.write(f"{self.path.parent.name} {values['step']}/{self.steps}  {line}")


def report(runs):
    """Print a line for each run: steps, tokens, median speed, the last held-out losses."""
    print(f"{'run':<16} {'steps':>6} {'tokens':>12} {'tokens/s':>9}   held-out loss at the end (nats a token)")
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "tokens" in line][-1]
        rates = sorted(line["tokens_per_second"] for line in lines if "tokens" in line)
        losses = [{k[5:]: v for k, v in line.items() if k.startswith("loss/")} for line in lines if "tokens" not in line][-1]
        print(f"{run.name:<16} {last['step']:>6,} {last['tokens']:>12,} {rates[len(rates) // 2]:>9,.0f}   "
              + ", ".join(f"{d} {math.nan if loss is None else loss:.3f}" for d, loss in losses.items()))


# ----------------------------------------------------------------------------------------------------------------------
# The scaling law of the mixture

TARGETS = ("agent", "code", "text")
FORMS = {  # of loss against the share of agent data r: coefficients that are searched, within bounds. The others are linear: solved for.
    "power": {"alpha": (0.05, 8)},      # c + k·r^alpha, the paper's
    "exponential": {"t": (-20, 20)},    # c + k·exp(t·r): Ye et al. 2024, arXiv 2403.16952
    # E + A/N^alpha + B·s^eta/D^beta + C/(s + epsilon)^gamma of N parameters, D tokens and the share s of the domain that is measured: Que et
    # al. 2024, arXiv 2406.01375. It is fitted to all runs at once, the others to each size and budget apart.
    "D-CPT": {"alpha": (0.05, 2), "eta": (0.05, 2), "beta": (0.05, 2), "epsilon": (0.01, 1), "gamma": (0.05, 2)}}


def scaling_law(corpus, args):
    """Train small models at many shares of agent data, fit their losses, and check the share found at a size and budget not fitted.

    Each run goes on from the base of its size. A run that is done is known by its result.json, so the same command goes on, and
    processes under torchrun share out the runs.
    """
    if min(len({Path(size).name for size in args.sizes}), len(set(args.tokens))) < 3 or len(set(args.ratios)) < 5 or args.seeds < 1:
        fail("--scaling-law needs at least three --sizes and --tokens, of which the last are left out of the fit, five --ratios and a seed")
    if not args.mix[1] + args.mix[2]:
        fail("--scaling-law: --mix tells how code and text divide what is not agent data, and here has neither")
    pyplot = args.plot and optional("matplotlib.pyplot", "--plot")
    out, seeds, rank = Path(args.out) / "scaling", range(args.seed, args.seed + args.seeds), int(os.environ.get("RANK", 0))
    while rank and not (out / "train_state" / "options.json").exists():  # which the first process writes
        time.sleep(0.1)
    settle_options(out, {k: getattr(args, k) for k in ("base_tokens", "mix", "practice", "document_mask", "val_windows")}
                   | training_options(corpus, args))
    bases = {size: size if Path(size).is_dir() else out / f"base-{size}" for size in args.sizes}
    small_runs({f"base-{size}": (None, size, args.base_tokens, 0.0, args.seed) for size in args.sizes if size != bases[size]}, corpus, args)

    def measure(sizes, budgets, ratios, seeds):
        return small_runs({f"{Path(size).name}-{tokens}-{r:g}-{seed}": (bases[size], size, tokens, r, seed)
                           for seed in seeds for size in sizes for tokens in budgets for r in ratios}, corpus, args)

    *sizes, largest = args.sizes
    *budgets, longest = args.tokens
    runs = measure(sizes, budgets, args.ratios, seeds)
    code_share = args.mix[1] / (args.mix[1] + args.mix[2])
    errors = {form: left_out_error(form, runs, code_share) for form in FORMS}
    law = Law(min(errors, key=errors.get), runs, code_share)
    target = parameters_of(largest, corpus), longest
    r = np.linspace(min(args.ratios), max(args.ratios), 191)
    best = round(float(r[law.objective(r, *target, args.weights)[0].argmin()]), 2)
    third = round((best + r[-1]) / 2 if best < 0.5 else best / 2, 2)
    check = measure([largest], [longest], dict.fromkeys([best, EQUAL, third]), range(args.seed, args.seed + 2 * args.seeds))
    if rank == 0:
        write(out / "scaling_law.jsonl", "".join(json.dumps(run) + "\n" for run in runs + check))
        laws = {form: Law(form, runs, code_share).with_draws(runs) for form in FORMS}
        law = laws[law.form]
        report_law(law, laws, errors, runs, check, args)
        if pyplot:
            draw_law(law, laws["D-CPT"], runs, check, args, pyplot)


def parameters_of(size, corpus):
    """How many weights multiply in a model of that shape or in that directory: all but the table of embeddings."""
    try:
        config = transformer.Config.from_hf(transformer.read_json(Path(size) / "config.json")) if Path(size).is_dir() \
            else transformer.Config(vocab_size=corpus.tokenizer.vocab_size, **shape_of(size))
    except ValueError as error:
        fail(error)
    with torch.device("meta"):
        return transformer.Transformer(config).flops_per_token(0) // 6


def small_runs(jobs, corpus, args):
    """Train what is not yet done of {name: (init, size, tokens, agent share, seed)}, as far as it is this process's turn, and wait for the
    rest. Returns what was measured: of each run its losses, and those of the base it began from."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    files = [Path(args.out) / "scaling" / name / "result.json" for name in jobs]
    bar = tqdm(jobs.values(), desc="runs", disable=None if rank == 0 else True)
    for i, (file, (init, size, tokens, r, seed)) in enumerate(zip(files, bar)):
        if i % world != rank:
            continue
        if not file.exists():
            write(file, json.dumps(small_run(file.parent.name, init, size, tokens, r, seed, corpus, args)))
        shutil.rmtree(file.parent / "train_state", ignore_errors=True)
        if init:  # nothing goes on from it
            for weights_file in file.parent.glob("model*"):
                weights_file.unlink()
    while not all(file.exists() for file in files):
        if STOP.wait(1):
            sys.exit(0)
    return [read_json(file) for file in files]


def small_run(name, init, size, tokens, ratio, seed, corpus, args):
    """Train one model of the law. Returns its losses, by domain, and those of the base that it went on from."""
    own = argparse.Namespace(**vars(args) | {"seed": seed, "preset": size, "val_every": tokens})
    weights = wide_mixture(ratio, dict(zip(("code", "text"), args.mix[1:])), corpus)
    with contextlib.redirect_stdout(io.StringIO()):  # a line a step would be too much; metrics.jsonl has them
        run = pretrain(f"scaling/{name}", init, weights, tokens, corpus, own)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = ({k.removeprefix("loss/"): v for k, v in line.items() if k.startswith("loss/")}
                     for line in (lines[0], lines[-1]))
    if absent := [d for d in VALIDATED if after.get(d) is None or before[d] is None]:
        fail(f"{run}: no finite held-out loss of {', '.join(absent)}")
    for losses in (before, after):
        losses["agent"] = sum(share * losses[d] for d, share in AGENT.items())
    tqdm.write(f"{name}: " + ", ".join(f"{d} {after[d]:.3f}" for d in TARGETS))
    return {"size": str(size), "parameters": parameters_of(size, corpus), "tokens": tokens, "ratio": ratio, "seed": seed,
            "loss": after, "base": before}


class Law:
    """Curves of loss against the share of agent data in one of FORMS, fitted to runs by variable projection (Golub & Pereyra 1973).

    losses: {target: (draws, runs)}, of which the first row leads the search; by default the runs' own. Every row is fitted.
    """

    def __init__(self, form, runs, code_share, losses=None):
        self.form, self.code_share, self.curves = form, code_share, {}
        self.base = max(runs, key=lambda run: run["parameters"])["base"]
        self.losses = losses or {t: np.array([[run["loss"][t] for run in runs]]) for t in TARGETS}
        self.points = n, d, r = [np.array([run[k] for run in runs], float) for k in ("parameters", "tokens", "ratio")]
        for cell in {self.cell(*nd) for nd in zip(n, d)}:
            inside = [self.cell(*nd) == cell for nd in zip(n, d)]
            for t in TARGETS:
                x = r[inside], n[inside], d[inside], self.share(t, r[inside])
                self.curves[cell, t] = fit(form, x, self.losses[t][:, inside])

    def cell(self, n, d):
        return None if self.form == "D-CPT" else (n, d)

    def share(self, target, r):
        """The share of the target's own domain where that of agent data is r."""
        return {"agent": r, "code": (1 - r) * self.code_share, "text": (1 - r) * (1 - self.code_share)}[target]

    def predict(self, target, r, n, d):
        """Losses (draws, len(r)). A form that knows neither size nor budget gives those of the largest it was fitted to."""
        cell = self.cell(n, d) if (self.cell(n, d), target) in self.curves else max(cell for cell, _ in self.curves)
        p, linear = self.curves[cell, target]
        return np.einsum("prm,pm->pr", basis(self.form, p, (r, np.full_like(r, n), np.full_like(r, d), self.share(target, r))), linear)

    def objective(self, r, n, d, weights):
        """The weighted mean of the losses, each relative to that of the largest base: (draws, len(r))."""
        return sum(w * self.predict(t, r, n, d) / self.base[t] for t, w in weights.items()) / sum(weights.values())

    def residuals(self, target):
        """Measured minus fitted loss of each run, (runs,)."""
        n, d, r = self.points
        return self.losses[target][0] - np.array([self.predict(target, r[i:i + 1], n[i], d[i])[0, 0] for i in range(len(r))])

    def with_draws(self, runs, draws=1000):
        """The same law, fitted to `draws` bootstrap samples besides: the residuals of whole runs, all targets together, are dealt out anew."""
        count = len(runs)
        free = count - len(self.curves) / len(TARGETS) * (len(FORMS[self.form]) + len(next(iter(self.curves.values()))[1][0]))
        rng = np.random.default_rng(0)
        dealt = rng.integers(count, size=(draws, count))
        spread = (count / rng.chisquare(free, (draws, 1))) ** 0.5  # residuals are smaller than the noise, and tell it inexactly
        losses = {}
        for t in TARGETS:
            residuals = self.residuals(t)
            losses[t] = np.concatenate([self.losses[t][:1], self.losses[t][:1] - residuals + spread * residuals[dealt]])
        return Law(self.form, runs, self.code_share, losses)


def basis(form, p, x):
    """The columns whose linear combination is the loss, (P, points, columns), for nonlinear coefficients p (P, k) of the form.

    x: the share of agent data, parameters, tokens and the share of the measured domain, (points,) each.
    """
    r, n, d, s = x
    p = p.T[:, :, None]                                                          # (k, P, 1)
    if form == "power":
        columns = [r ** p[0]]
    elif form == "exponential":
        columns = [np.exp(p[0] * r)]
    else:
        alpha, eta, beta, epsilon, gamma = p
        columns = [(n / 1e6) ** -alpha, s ** eta / (d / 1e6) ** beta, (s + epsilon) ** -gamma]
    return np.stack([np.ones_like(columns[0]), *columns], -1)


def fit(form, x, y, rounds=60, tries=20):
    """Least squares for each row of y (draws, points): nonlinear coefficients (draws, k) and linear ones (draws, columns).

    Given the nonlinear ones the best linear ones follow exactly, by an orthogonal projection. So only the former are searched: at random in
    a box that shrinks about the best for the first row. All rows share the candidates, which are many near that best, and their projections.
    """
    low, high = np.array(list(FORMS[form].values())).T
    rng, width = np.random.default_rng(0), high - low
    p, most = np.tile((low + high) / 2, (len(y), 1)), np.full(len(y), -np.inf)
    for _ in range(rounds):
        candidates = np.clip(p[0] + width * rng.uniform(-1, 1, (tries * len(low) ** 2, len(low))), low, high)
        q = np.linalg.qr(basis(form, candidates, x))[0]                          # (candidates, points, columns)
        explained = np.square(np.tensordot(y, q, (1, 1))).sum(-1)               # (draws, candidates)
        i = explained.argmax(1)
        better = explained.max(1) > most
        p[better], most[better] = candidates[i[better]], explained.max(1)[better]
        width = 0.9 * width
    linear = np.stack([np.linalg.lstsq(b, row, rcond=None)[0] for b, row in zip(basis(form, p, x), y)])
    return p, linear


def left_out_error(form, runs, code_share):
    """Root mean square error (nats) of the losses at each inner share, predicted from the runs at all other shares."""
    errors = []
    for r in sorted({run["ratio"] for run in runs})[1:-1]:
        law = Law(form, [run for run in runs if run["ratio"] != r], code_share)
        errors += [law.predict(t, np.array([r]), run["parameters"], run["tokens"])[0, 0] - run["loss"][t]
                   for run in runs if run["ratio"] == r for t in TARGETS]
    return float(np.sqrt(np.mean(np.square(errors))))


def report_law(law, laws, errors, runs, check, args):
    """Print what was measured, the fits in each form, the best share by the chosen law and its check, as tables and in words."""
    ratios = sorted(set(args.ratios))
    r = np.linspace(ratios[0], ratios[-1], 191)
    print(f"\nHeld-out loss (nats a token) by share of agent data, {args.seeds} seeds. Relative: the mean of loss / base's, "
          + ", ".join(f"{t} counted {w:g}" for t, w in args.weights.items()))
    print(f"{'size':<10}{'tokens':>12} {'':<9}" + "".join(f"{x:>7g}" for x in ratios) + "   best share [95%]")
    for (n, d, size), inside in cells(runs):
        for t in TARGETS:
            print(f"{size:<10}{d:>12,} {t:<9}" + row(inside, ratios, lambda run: run["loss"][t]))
        print(f"{'':<23}{'relative':<9}" + row(inside, ratios, lambda run: relative(run, run["base"], args), 4)
              + "   " + best_share(law, r, n, d, args))

    print(f"\n{'form':<13}{'of':<7}{'R2':>7}{'residual: rms':>15}{'largest, at share':>19}{'left-out error':>16}   searched coefficients, "
          "where each size and budget has its own: of the largest [95%]")
    for form, fitted in laws.items():
        for t in TARGETS:
            residual, (p, _) = fitted.residuals(t), fitted.curves[max(fitted.curves)[0], t]
            worst = np.abs(residual).argmax()
            print(f"{form:<13}{t:<7}{1 - residual.var() / fitted.losses[t][0].var():>7.4f}{np.sqrt(np.mean(residual ** 2)):>15.4f}"
                  f"{residual[worst]:>+14.4f} {runs[worst]['ratio']:<4g}{errors[form]:>16.4f}   "
                  + ", ".join(f"{name} {v[0]:.2f}{interval(v[1:])}" for name, v in zip(FORMS[form], p.T)))
    print(f"Chosen for its error on shares left out of the fit: {law.form}")

    shares = list(dict.fromkeys(run["ratio"] for run in check))
    (n, d, size), _ = cells(check)[0]
    seeds = sorted({run["seed"] for run in check})
    print(f"\nCheck at {size}, {d:,} tokens, of which nothing was fitted, {len(seeds)} seeds. In brackets what D-CPT foretold")
    print(f"{'share':>7}" + "".join(f"{t:>17}" for t in TARGETS) + f"{'relative':>10}   minus that of {shares[0]:g} [95%]")
    for x in shares:
        foretold = {t: laws["D-CPT"].predict(t, np.array([x]), n, d)[0, 0] for t in TARGETS}
        gap = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference(check, x, shares[0], args))
        print(f"{x:>7.3g}" + "".join(f"{row(check, [x], lambda run: run['loss'][t]):>9} ({foretold[t]:.3f})" for t in TARGETS)
              + f"{row(check, [x], lambda run: relative(run, run['base'], args), 4):>10}   {gap if x != shares[0] else ''}")

    curve = law.objective(r, n, d, args.weights)[0]
    middle, low, high = difference(check, EQUAL, shares[0], args)
    print(f"\nIn words: for {size} and {d:,} tokens the {law.form} law puts the best share of agent data at {best_share(law, r, n, d, args)}, with "
          f"{curve.min():.4f} of the base's loss against {np.interp(EQUAL, r, curve):.4f} at 1 : 1 : 1"
          + (f" (it knows no size or budget, and answers for the largest fitted; D-CPT, which does, says {best_share(laws['D-CPT'], r, n, d, args)})"
             if law.form != "D-CPT" else "") + ".")
    if curve.argmin() in (0, len(r) - 1):
        print("There is no optimum inside: the curve is lowest at an end of the shares that were tried.")
    print(f"Trained there, a share of {shares[0]:g} " + ("beats" if low > 0 else "loses to" if high < 0 else "is not to be told from")
          + f" 1 : 1 : 1, which has {middle:+.4f} [{low:+.4f}, {high:+.4f}] of the base's loss by comparison. The paper's best was near 0.36.")


def cells(runs):
    """[((parameters, tokens, name of the size), the runs of it), ...]"""
    keys = sorted({(run["parameters"], run["tokens"], run["size"]) for run in runs})
    return [((n, d, Path(size).name), [run for run in runs if (run["size"], run["tokens"]) == (size, d)]) for n, d, size in keys]


def row(runs, ratios, of, digits=3):
    """The mean of what `of` says of the runs at each share."""
    return "".join(f"{np.mean([of(run) for run in runs if run['ratio'] == x]):>7.{digits}f}" for x in ratios)


def relative(run, base, args):
    """What a run scored by --weights: the weighted mean of its losses over the base's."""
    return sum(w * run["loss"][t] / base[t] for t, w in args.weights.items()) / sum(args.weights.values())


def difference(check, share, best, args):
    """Of the relative loss, between two shares in pairs of one seed: mean, and Student's 95% interval."""
    score = {(run["ratio"], run["seed"]): relative(run, run["base"], args) for run in check}
    gaps = np.array([score[share, seed] - score[best, seed] for seed in {run["seed"] for run in check}])
    t = np.quantile(np.random.default_rng(0).standard_t(len(gaps) - 1, 10**6), 0.975)  # within 0.5% where there are four seeds
    return gaps.mean(), *(gaps.mean() + np.array([-t, t]) * gaps.std(ddof=1) / len(gaps) ** 0.5)


def interval(draws):
    """The middle 95% of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return f" [{low:.2f}, {high:.2f}]"


def best_share(law, r, n, d, args):
    """The share of least loss among r, with its interval, or at which end it lies."""
    best = r[law.objective(r, n, d, args.weights).argmin(1)]
    return f"{best[0]:.2f}{interval(best[1:])}" + (", the lowest tried" if best[0] == r[0] else ", the highest tried" if best[0] == r[-1] else "")


def draw_law(law, beyond, runs, check, args, pyplot):
    """Draw out/scaling/scaling_law.png: runs as dots, the law as lines; the check as stars, what a law foretold beyond the grid as broken lines."""
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    r = np.linspace(min(args.ratios), max(args.ratios), 191)
    for i, ((n, d, size), inside) in enumerate(cells(runs) + cells(check)):
        curve_of, dots, line, label = (law, "o", "-", law.form) if inside[0] in runs else (beyond, "*", "--", f"left out; {beyond.form}")
        curves = {t: (curve_of.predict(t, r, n, d)[0], [run["loss"][t] for run in inside]) for t in TARGETS}
        curves["relative"] = curve_of.objective(r, n, d, args.weights)[0], [relative(run, law.base, args) for run in inside]
        for axis, (title, (curve, losses)) in zip(axes, curves.items()):
            axis.plot([run["ratio"] for run in inside], losses, dots, color=f"C{i}", markersize=5)
            axis.plot(r, curve, line, color=f"C{i}", label=f"{size}, {d:,} tokens ({label})")
            axis.set(title=title, xlabel="share of agent data", ylabel="loss / largest base's" if title == "relative" else "loss (nats a token)")
    axes[-1].legend(fontsize=8)
    figure.savefig(Path(args.out) / "scaling" / "scaling_law.png", dpi=100)


# ----------------------------------------------------------------------------------------------------------------------
# What a run needs


def plan(args):
    """Print memory a GPU, speed and days of a run on --gpus of the kind --gpu; none of them is needed for it."""
    config = transformer.Config(vocab_size=128_256, **shape_of(args.preset))
    if args.init:
        try:
            config = transformer.Config.from_hf(transformer.read_json(Path(args.init) / "config.json"))
        except ValueError as error:
            fail(error)
    with torch.device("meta"):
        model = transformer.Transformer(config)
    _, peak, room = GPUS[args.gpu]
    flops = model.flops_per_token(args.seq_len)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {flops:.3g} FLOPs a token, windows of {args.seq_len:,} tokens, "
          f"{args.micro_batch} at a time, on {args.gpus} {args.gpu}\n")
    print("GB a GPU                     weights  gradients  optimizer  activations  logits    all        tokens/s  days for 103e9 tokens")
    for shard in (False, True):
        for checkpointing in (False, True):
            parts = memory(model, args.seq_len, args.micro_batch, args.gpus if shard else 1, shard, checkpointing, "bfloat16")
            total = sum(parts.values()) / 1e9
            rate = args.gpus * peak * args.mfu / flops * (0.75 if checkpointing else 1)  # of four passes, one is done again
            print(f"{'FSDP2 (--shard)' if shard else 'DDP':<16}{'checkpoint' if checkpointing else '':<10}"
                  + "".join(f"{b / 1e9:>{width}.1f}" for b, width in zip(parts.values(), (10, 11, 11, 13, 8)))
                  + f"{total:>7.1f} {'fits' if total < 0.9 * room else '':<4} {rate:>10,.0f} {103e9 / rate / 86400:>14.1f}")
    print(f"\nIt fits if a tenth of {room} GB is left for what is not counted. Speed is at {args.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s (--mfu). "
          "The paper's run, an 8B model on 128 A100s of 40 GB, took 11.1 days.")


def memory(model, seq_len, micro_batch, world, shard, checkpointing, dtype):
    """Bytes a process needs to train a model (on the meta device) without torch.compile: {"weights", "gradients", "optimizer", "activations",
    "logits"}. Activations are counted, not estimated: what autograd keeps of one layer that runs on fake tensors."""
    c, layers, bfloat16 = model.config, model.config.n_layers, dtype == "bfloat16"
    count, layer = (sum(p.numel() for p in module.parameters()) for module in (model, model.model["layers"][0]))
    whole = count - (layers - 2) * layer if shard else 0  # brought together: embedding and head, the layer that runs and the next
    stream = micro_batch * seq_len * c.dim * (2 if shard and bfloat16 else 4)  # what a layer begins with
    kept = kept_for_backward(model.model["layers"][0], seq_len, micro_batch, shard, dtype)
    if checkpointing:
        cast = 0 if shard or not bfloat16 else 2 * (layers - 1) * layer  # autocast remembers the weights in bfloat16
        activations = kept + cast + layers * stream
    else:
        activations = layers * kept
    return {"weights": 4 * count // world + whole * (2 if bfloat16 else 4), "gradients": 4 * count // world + whole * (2 if bfloat16 else 4),
            "optimizer": 8 * count // world, "activations": activations,
            "logits": 16 * min(micro_batch * seq_len * c.vocab_size, max(transformer.CHUNK, c.vocab_size))}  # in both types, with gradients


def kept_for_backward(layer, seq_len, micro_batch, shard, dtype):
    """Bytes that autograd keeps of one layer (on the meta device), without the layer's own parameters."""
    kept, c = {}, layer.self_attn.config

    def pack(tensor):
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        dtype_kept = torch.bfloat16 if shard and dtype == "bfloat16" else torch.float32
        own = {n: torch.empty(p.shape, dtype=dtype_kept, requires_grad=True) for n, p in layer.named_parameters()}
        x = torch.empty(micro_batch, seq_len, c.dim, dtype=dtype_kept, requires_grad=True)
        rope = torch.empty(2, 1, 1, seq_len, c.head_dim // 2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            torch.func.functional_call(layer, own, (x, tuple(rope)))
        return sum(storage.nbytes() for storage in kept.values()) - sum(p.nbytes for p in own.values() if id(p.untyped_storage()) in kept)


if __name__ == "__main__":
    run_main(main)
