"""Step 4 of 6: continual pre-training in two stages, and the control that shows what the agent data did.

In:   data/corpus (build_corpus.py); a checkpoint directory with --init, or nothing: a small base is trained.
Out:  out/base             trained on code and text alone (not with --init)
      out/stage1           from the base: the wide mixture, agent : code : text by --mix; what was retrieved
                           is a part of agent
      out/stage2           from stage 1: the agent data, with --replay of code and text
      out/control-stage1, out/control-stage2    from the same base for the same tokens, without agent data
      each a Hugging Face checkpoint directory with metrics.jsonl and train_state/
      out/scaling          with --scaling-law instead: the losses of many small runs, scaling_law.jsonl

Laptop:      python pretrain.py
One GPU:     python pretrain.py --preset 124m --seq-len 1024 --batch-tokens 262144 --base-tokens 2e9 \\
                 --stage1-tokens 2e9 --stage2-tokens 5e8
One node:    torchrun --nproc_per_node=8 pretrain.py --init DIR --shard --stage1-tokens 1e10 \\
                 --stage2-tokens 2e9
Many nodes:  torchrun --nnodes=12:16 --nproc_per_node=8 --max-restarts=9 --rdzv_backend=c10d \\
                 --rdzv_endpoint=HOST:29500 pretrain.py --init DIR ...
What fits:   python pretrain.py --preset 8b --plan --gpus 128 --gpu a100-40g
How much agent data:  python pretrain.py --scaling-law, or under torchrun, where every process trains runs of
                 its own

After a kill or a stop the same command (or --resume) goes on from the last checkpoint, bit for bit on a CPU.
A batch is a function of the options and the step alone, whatever the number of processes. The recipe is that
of Hephaestus (arXiv 2502.06589, section 4).

Shapes: B sequences, T tokens of a sequence.
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
import timeit
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import groupby, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import model as transformer
from build_corpus import Corpus, Tokenizer, read_json, write
from collect import HelpFormatter, claim, fail, positive, run_main, shares

AGENT = {"api_doc": 0.7, "trajectory": 0.3}  # what the agent share consists of
RETRIEVED = 0.3  # what was retrieved from a pool, as a part of stage 1's agent share, where the corpus has it
VALIDATED = ("api_doc", "trajectory", "code", "text")


def main():
    """Train the base, stage 1, stage 2 and the control; or run the mixture law, or print the plan."""
    args = parse_args()
    if args.plan:
        return plan(args)
    setup(args, together=not args.scaling_law)
    corpus = open_corpus(args.corpus)
    agent_share, code, text = args.mix
    if not code + text:
        fail("--mix has neither code nor text, which the base and the control are trained on")
    if args.scaling_law:
        return scaling_law(corpus, args)

    general = {"code": code, "text": text}
    wide = wide_mixture(agent_share, general, corpus, args)
    seed_data = normalise(args.agent, 1 - args.replay) | normalise(general, args.replay)
    stages = [  # name, the run that it goes on from, what it trains on, for how many tokens
        ("base", None, general, args.base_tokens),
        ("stage1", "base", wide, args.stage1_tokens),
        ("stage2", "stage1", seed_data, args.stage2_tokens),
        ("control-stage1", "base", general, args.stage1_tokens),
        ("control-stage2", "control-stage1", general, args.stage2_tokens)]
    if args.init:
        del stages[0]
    if not args.control:
        del stages[-2:]
    args.all_tokens = sum(tokens for *_, tokens in stages)

    runs = {None: None, "base": args.init}
    for name, start, weights, tokens in stages:
        runs[name] = pretrain(name, runs[start], weights, tokens, corpus, args) if tokens else runs[start]
    if is_main():
        report([runs[name] for name, *_, tokens in stages if tokens])
    if dist.is_initialized():
        dist.destroy_process_group()


def wide_mixture(agent_share, general, corpus, args):
    """Weights of the domains for a share of agent data, a part of it retrieved where the corpus has that; the
    rest is code and text as in `general`.
    """
    retrieved = RETRIEVED if "retrieved.train.bin" in corpus.manifest["stages"]["wide"] else 0.0
    weights = normalise(args.agent, agent_share * (1 - retrieved))
    return weights | {"retrieved": agent_share * retrieved} | normalise(general, 1 - agent_share)


def pretrain(name, init, weights, tokens, corpus, args):
    """One stage: from a checkpoint directory, or fresh weights. Returns the run directory out/<name>."""
    batch_size = args.batch_tokens // args.seq_len
    steps = tokens // (batch_size * args.seq_len)
    if steps < 1:
        fail(f"{name}: {tokens:,} tokens are less than a step of --batch-tokens {args.batch_tokens:,}; see "
             "--base-tokens, --stage1-tokens and --stage2-tokens")
    mask = args.document_mask == "yes" or args.document_mask == "auto" and args.device == "cpu"
    seed = [args.seed, sum(name.encode())]
    get_batch, epochs = window_batches(corpus, weights, steps * batch_size, args.seq_len, batch_size, seed,
                                       args.practice, mask)
    run = Path(args.out) / name
    options = {"init": str(init), "begins": weights_of(init), "weights": weights, "steps": steps,
               "preset": args.preset, "document_mask": mask,
               "practice": args.practice} | training_options(corpus, args)

    def make_model():
        return load_checkpoint(init, corpus, dtype=None) if init else fresh_model(corpus, args)

    settle_options(run, options)
    if is_main() and not args.scaling_law:
        write(Path(args.out) / "options.json", json.dumps(vars(args), indent=1))
    train(run, make_model, get_batch, held_out_windows(corpus, args, mask), options, corpus, args)
    if is_main():
        print(f"{name}: epochs " + ", ".join(f"{d} {e:.2f}" for d, e in epochs.items()))
    return run


def window_batches(corpus, weights, n_windows, seq_len, batch_size, seed, practice=0.0, document_mask=False):
    """get_batch(step, rows) -> ids, targets (len(rows), T) of those rows of a step's batch, and the epochs of
    each domain.

    seed: a list of integers. practice: the share of windows turned into copying practice. document_mask:
    get_batch gives doc_ids (len(rows), T) too, which number a window's documents.
    """
    bins = {name: corpus.read(name, "train") for name, weight in weights.items() if weight > 0}
    available = {name: (len(ids) - 1) // seq_len for name, ids in bins.items()}
    for name, count in available.items():
        if count < 1:
            fail(f"{corpus.directory}: the domain {name} has no window of {seq_len} tokens to train on")
    names, order, windows, epochs = plan_windows(available, weights, n_windows, seed)

    def get_batch(step, rows):
        chosen = step * batch_size + np.asarray(rows)
        batch = [bins[names[order[i]]][windows[i] * seq_len:][:seq_len + 1] for i in chosen]
        return split_windows(np.stack(batch), corpus, document_mask)              # (rows, T + 1)

    if practice:
        get_batch = with_copying_practice(get_batch, practice, batch_size, seed)
    return get_batch, epochs


def train(run, make_model, get_batch, held_out, options, corpus, args, save=transformer.save):
    """Train for options["steps"] optimizer steps and write a checkpoint directory to `run`; go on where an
    earlier run stopped.

    get_batch(step, rows) gives ids, targets and perhaps doc_ids of those rows of a step's batch; each process
    takes its own. held_out: {domain: (ids, targets[, doc_ids])}, for validation. save(model, run, trained
    tensors by name) writes the result.
    """
    if any((run / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return
    lock = claim(run, "train_state")  # held until this returns, so that no second command trains it
    steps, batch_size = options["steps"], args.batch_tokens // args.seq_len
    step_tokens = batch_size * args.seq_len
    model = make_model()
    if args.seq_len > model.config.max_seq_len:
        fail(f"--seq-len {args.seq_len}: the model has {model.config.max_seq_len} positions")
    model.checkpointing = args.activation_checkpointing
    flops = model.flops_per_token(args.seq_len)
    wrapped = wrap_model(model, args)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=(0.9, 0.95), fused=True)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    checkpoints = Checkpoints(run / "train_state", args.keep, model, optimizer)
    start, skipped = checkpoints.load()
    metrics, in_a_row = Metrics(run, start, options, args), 0
    batches = prefetch(get_batch, batch_size, range(start, steps), args)
    bar = tqdm(total=steps, initial=start, desc=run.name, disable=None if is_main() else True)

    for step in range(start, steps + 1):
        # ---- once in a while: validation (not again after a resume), a checkpoint, the end
        if (step == 0 or step > start) and (step % args.val_every == 0 or step == steps):
            metrics.log(step=step, **validation(model, held_out, args, autocast))
        # If one process was asked to stop, all stop, at the same step.
        stop = all_reduce(torch.tensor(float(STOP.is_set()))).item()
        if step > start and (step % args.save_every == 0 or step == steps or stop):
            checkpoints.save(step, skipped)
        if step == steps or stop:
            break

        # ---- a single training step
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        n_targets = int(all_reduce((batch[1] >= 0).sum()))
        if not n_targets:
            fail(f"{run}, step {step}: no token to learn from; are the masks of {corpus.directory} empty?")
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        loss, norm = forward_and_backward(model, wrapped, batch, n_targets, autocast, args)
        finite = math.isfinite(loss + norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        skipped += not finite
        in_a_row = 0 if finite else in_a_row + 1

        # ---- what it was like
        seconds = time.perf_counter() - started
        speed = step_tokens / seconds
        metrics.log(step=step + 1, tokens=(step + 1) * step_tokens, loss=loss, lr=lr, grad_norm=norm,
                    ms=1000 * seconds, tokens_per_second=speed,
                    **model_flops_utilization(speed * flops, args), data_wait=waited / seconds,
                    memory_gb=memory_gb(args.device), skipped=skipped)
        bar.update()
        checkpoints.finish(wait=False)
        if step == start + 5:  # the first step compiles
            tell_duration(run, speed, steps * step_tokens, args)
        if in_a_row == 10:
            checkpoints.finish()
            fail(f"{run}: loss or gradient was not finite in ten steps in a row; the last checkpoint is "
                 f"{checkpoints.newest() or 'none'}")

    bar.close()
    batches.close()
    checkpoints.finish()
    if step < steps:
        if is_main():
            print(f"{run.name}: stopped after step {step} of {steps}" + ", which is saved" * (step > 0)
                  + "; the same command goes on")
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(0)
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = dcp_state.get_model_state_dict(model, options=whole)
    if is_main():
        corpus.tokenizer.save(run)
        save(model, run, weights)  # last: with the weights the run is finished
    if dist.is_initialized():
        dist.barrier()
    lock.close()


def forward_and_backward(model, wrapped, batch, n_targets, autocast, args):
    """Put the clipped gradient of a step's mean loss into the model. Returns the loss (nats per target token)
    and the gradient's norm.

    The loss is the sum over the target tokens, divided once by their number over all processes and
    micro-batches.
    """
    total, (_, world) = torch.zeros((), device=args.device), rank_and_world()
    parts = micro_batches(batch, args)
    for i, part in enumerate(parts, 1):
        if wrapped is not model:  # DDP adds up over processes once, at the last
            wrapped.require_backward_grad_sync = i == len(parts)
        with autocast:
            loss = wrapped(*part)
        (loss * (world / n_targets)).backward()  # DDP and FSDP average over processes
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return all_reduce(total).item() / n_targets, (norm.full_tensor() if args.shard else norm).item()


def learning_rate(step, steps, args):
    """Linear warm-up; then a cosine to a tenth of the peak or, with wsd (arXiv 2404.06395), the peak and over
    the last fifth a line to a tenth of it.
    """
    warmup = max(1, int(args.warmup * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "wsd":
        return args.lr * min(1.0, 0.1 + 0.9 * (steps - step) / (0.2 * steps))
    progress = (step - warmup) / max(1, steps - warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


# ============================================================================================================
# Below: flags; processes and devices; data; training; checkpoints; metrics; the mixture law; the plan; for
# tiny models only.

# ------------------------------------------------------------------------------------------------------------
# Flags, and the defaults for a base

# The peak rate of a model of up to so many parameters, for a base and from scratch. From scratch: Llama 3
# 8B's (arXiv 2407.21783, table 3), and higher for smaller ones. For a base a tenth of it (1e-4 to 3e-4 for
# small ones: huggingface.co/codelion/SmolLM2-70M): re-warm to a rate such as the base's training ended with,
# then decay (arXiv 2407.07263); higher rates learn more of the new and forget more of the old (arXiv
# 2403.08763).
RATES = [(5e8, 2e-4, 2e-3), (3e9, 1e-4, 1e-3), (math.inf, 3e-5, 3e-4)]
# From a billion parameters on, on GPUs: the sequences and the batch that the largest Llama 3 began with
# (arXiv 2407.21783, section 3.4). Below, the flags' defaults: an eighth of that batch.
LARGE = {"seq_len": 4096, "batch_tokens": 2**22, "micro_batch": 1, "save_every": 20,
         "stage1_tokens": 10**10, "stage2_tokens": 2 * 10**9}
# On a CPU: 8 sequences a step, so that a million tokens are over a hundred steps.
ON_CPU = {"seq_len": 1024, "batch_tokens": 2**13, "micro_batch": 4, "val_windows": 8,
          "base_tokens": 1_500_000, "stage1_tokens": 900_000, "stage2_tokens": 600_000}

GPUS = {  # part of the device's name, dense bfloat16 FLOP/s, GB of memory: from the makers' datasheets
    "a100-40g": ("A100", 312e12, 40), "a100-80g": ("A100", 312e12, 80), "h100-80g": ("H100", 989e12, 80),
    "h200-141g": ("H200", 989e12, 141), "b200-180g": ("B200", 2250e12, 180),
    "rtx4090-24g": ("4090", 165e12, 24)}


def parse_args():
    """The flags, with defaults that suit the model and the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_flags(parser.add_mutually_exclusive_group(), {
        "init": (None, "continue from this checkpoint directory instead of training a base; its tokenizer "
                 "must be the corpus's"),
        "resume": (False, "go on with what is in --out, with the options it was started with; the same "
                   "command goes on as well"),
        "scaling-law": (False, "train small models at many shares of agent data, fit loss against share, and "
                        "check the best one; the same command goes on")})
    add_flags(parser, {
        "corpus": ("data/corpus", "corpus directory"),
        "out": ("out", "directory for the runs"),
        "preset": ("tiny", "shape of the model, where there is no --init: one of "
                   f"{', '.join(transformer.PRESETS)}, or LAYERSxWIDTH such as 4x256", shape),
        "stages and mixture": {
            "base-tokens": (2 * 10**9, "tokens the base is trained on (1e9 is understood)"),
            "stage1-tokens": (2 * 10**9, "tokens of stage 1; 0 leaves it out"),
            "stage2-tokens": (5 * 10**8, "tokens of stage 2; 0 leaves it out"),
            "agent": (AGENT, "what the agent data consists of, by tokens", shares(tuple(AGENT))),
            "mix": ("1:1:1", "agent : code : text in stage 1, by tokens", ratio),
            "replay": (0.25, "share of code and text in stage 2, in the ratio of --mix"),
            "control": (True, "also train the control without agent data"),
            "document-mask": ("auto", "let no token see another document of its window; auto: on a CPU",
                              AUTO)}})
    add_training_flags(parser)
    add_flags(parser, {"with --scaling-law": {
        "ratios": ("0,0.1,0.25,0.4,0.6,0.8,0.95", "shares of agent data; the rest is code and text as in "
                   "--mix", listed(share)),
        "sizes": ("2x192,4x192,4x256", "shapes, or checkpoint directories to begin from; the last is left "
                  "out of the fit, for the check", listed(shape)),
        "tokens": ("150e3,300e3,450e3", "tokens of a run; the last is for the check", listed(number)),
        "seeds": (2, "runs of each kind in the grid, and twice as many in the check"),
        "weights": ("agent=1,code=1,text=1", "what the losses count, each relative to the base's",
                    shares(TARGETS))
    }, "what a run needs": {
        "plan": (False, "print memory, tokens/s and days of such a run on --gpus of the kind --gpu, and end"),
        "gpus": (8, "how many of them"),
        "gpu": ("h100-80g", "which of these kinds", list(GPUS)),
        "mfu": (0.4, "the share of the GPU's peak that training reaches")
    }, "for tiny models only": {
        "practice": (0.0, "share of all windows turned into copying practice")}})
    args = with_defaults(parser, suited)
    del args.resume
    return args


def suited(args):
    """{flag: default} where they depend on the other flags: on what is resumed, the base and the device."""
    if args.resume:
        if not (saved := Path(args.out) / "options.json").exists():
            fail(f"--resume: there is no {saved}, so nothing to go on with")
        return read_json(saved)
    base = args.init or args.scaling_law and next((s for s in args.sizes if Path(s).is_dir()), None)
    if not base and (args.scaling_law or is_tiny(args.preset)):
        return TINY
    size = count_parameters(meta_model(base, args.preset, 128_256))
    on_gpu = args.device == "cuda" or args.plan
    lengths = ON_CPU if not on_gpu else LARGE if size >= 1e9 else {}
    for_base, from_scratch = rates_for(size)
    return lengths | ({"lr": for_base, "warmup": 0.01} if base else {"lr": from_scratch})


def with_defaults(parser, suited):
    """The arguments. suited(arguments) gives {flag: default} that depend on others of them; --help shows
    them.
    """
    known, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])
    parser.set_defaults(**suited(known))
    return parser.parse_args()


def add_training_flags(parser):
    """Flags that pre-training and tuning share."""
    parser.set_defaults(all_tokens=0)  # of all runs, where they are known beforehand
    at_least_1 = positive(number)
    add_flags(parser, {"training": {
        "seq-len": (2048, "tokens of a window", at_least_1),
        "batch-tokens": (2**19, "tokens of an optimizer step, over all processes", at_least_1),
        "micro-batch": (16, "windows of one forward pass; gradients of several add up to a step", at_least_1),
        "lr": (2e-4, "peak learning rate, decayed to a tenth"),
        "schedule": ("cosine", "after a linear warm-up the rate decays as a cosine, or it stays "
                     "(warmup-stable-decay) and falls linearly over the last fifth", ["cosine", "wsd"]),
        "warmup": (0.05, "share of the steps in which the rate rises"),
        "attention-lr": (1.0, "rate of the attention weights, as a share of --lr: below 1, for tiny models "
                         "only, copying heads outlive a short training from scratch"),
        "weight-decay": (0.1, "decoupled decay of the matrices"),
        "seed": (0, "seed of weights and data order", int)
    }, "once in a while": {
        "val-windows": (32, "held-out windows of each domain in a validation"),
        "val-every": (1000, "steps between validations; one is before the first step and one after the last",
                      at_least_1),
        "save-every": (200, "steps between checkpoints", at_least_1),
        "keep": (2, "checkpoints kept of a run", at_least_1),
        "wandb": (None, "log to this project of Weights & Biases too (pip install wandb)")
    }, "the machine": {
        "device": ("cuda" if torch.cuda.is_available() else "cpu", "one of cpu and cuda"),
        "dtype": ("auto", "of the matrix products; auto: bfloat16 where this machine multiplies it faster",
                  ["auto", "float32", "bfloat16"]),
        "shard": (False, "divide weights, gradients and optimizer among the processes (FSDP2), for a model "
                  "that does not fit otherwise"),
        "activation-checkpointing": (False, "keep no layer's activations but compute them again in the "
                                     "backward pass: less memory, for one more forward pass"),
        "compile": ("auto", "torch.compile; auto: where there is a C++ compiler", AUTO)}})


AUTO = ["auto", "yes", "no"]


def add_flags(group, flags):
    """Add {name: (default, help)} to a group, or (default, help, type or list of choices), or {heading: such
    flags}. Else the type is the default's; False makes a switch, True one with a --no- too.
    """
    types = {int: number, float: float}
    for name, flag in flags.items():
        if isinstance(flag, dict):
            add_flags(group.add_argument_group(name), flag)
            continue
        default, text, *given = flag
        kind = given[0] if given else types.get(type(default))
        how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction if default else "store_true"}
        group.add_argument(f"--{name}", default=default, help=text, **how)


def meta_model(directory, preset="tiny", vocab_size=None):
    """The model in a checkpoint directory, or without one of a preset's shape, on the meta device: no
    weights.
    """
    try:
        if directory:
            config = transformer.read_config(directory)
        else:
            config = transformer.Config(vocab_size=vocab_size, **shape_of(preset))
    except ValueError as error:
        fail(error)
    with torch.device("meta"):
        return transformer.Transformer(config)


def count_parameters(model):
    """How many numbers the model has learned."""
    return sum(p.numel() for p in model.parameters())


def rates_for(size):
    """The peak learning rates for a base of so many parameters, and for such a model from scratch."""
    return next(rates for limit, *rates in RATES if size < limit)


def number(text):
    """An integer that may be written as 1e9."""
    value = float(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(value)


def listed(kind):
    """The type of a list of different values with commas between."""
    return lambda text: list(dict.fromkeys(kind(part) for part in text.split(",")))


def share(text):
    """A number from 0 to below 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return float(text)


def shape(text):
    """A preset, LAYERSxWIDTH or a checkpoint directory."""
    if not Path(text).is_dir():
        shape_of(text)
    return text


def shape_of(name):
    """The fields of a Config for a preset, or for LAYERSxWIDTH with heads of 64."""
    if name in transformer.PRESETS:
        return transformer.PRESETS[name]
    layers, dim = (int(part) if part.isdecimal() else 0 for part in name.partition("x")[::2])
    if layers < 1 or dim < 64 or dim % 64:
        fail(f"{name} is none of {', '.join(transformer.PRESETS)}, nor LAYERSxWIDTH with a multiple of 64")
    return dict(n_layers=layers, dim=dim, n_heads=dim // 64, n_kv_heads=dim // 64,
                hidden_dim=64 * round(dim * 8 / 3 / 64), attention_bias=True)


def ratio(text):
    """'agent:code:text' as shares that add up to 1."""
    parts = [float(p) for p in text.split(":")]
    if len(parts) != 3 or min(parts) < 0 or sum(parts) <= 0:
        raise argparse.ArgumentTypeError("three numbers such as 1:1:1")
    return [p / sum(parts) for p in parts]


def normalise(weights, total):
    """The weights, scaled to add up to `total`."""
    return {name: total * w / sum(weights.values()) for name, w in weights.items()}


# ------------------------------------------------------------------------------------------------------------
# Processes and devices

STOP = threading.Event()  # set by SIGTERM or Ctrl-C: training saves and ends


def setup(args, together=True):
    """Settle what 'auto' means on this machine, end in order when asked to, and, to train together, join the
    group that torchrun made.
    """
    if args.batch_tokens < args.seq_len:
        fail(f"--batch-tokens {args.batch_tokens} is less than one window of --seq-len {args.seq_len}")
    if "RANK" in os.environ and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "RANK" in os.environ and together:
        # A worker that torchrun started again must not read from the store the address that its dead
        # predecessor left there.
        store, rank, world = next(rendezvous("env://"))
        store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} of {world}", store)
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    elif args.shard:
        fail("--shard divides the model among the processes of torchrun: torchrun --nproc_per_node=8 ...")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" or bfloat16_pays() else "float32"
    if args.compile == "auto":
        args.compile = "yes" if shutil.which(os.environ.get("CXX", "c++")) else "no"
    torch.set_float32_matmul_precision("high")
    # Compiled for a CPU, the gradient of the embedding is else added up in whatever order the threads arrive.
    torch.use_deterministic_algorithms(args.device == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # glibc keeps what a step frees for the next: the system would clear every page that it lends anew.
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: what is free at the heap's end does not go back
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: nor do single blocks below this size
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: STOP.set())


def bfloat16_pays():
    """Whether this CPU multiplies bfloat16 at least half again as fast as float32: as a rule either 3 times
    or not at all.
    """
    def seconds(dtype):
        a = torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1))
    return seconds(torch.float32) > 1.5 * seconds(torch.bfloat16)


def rank_and_world():
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this process is the one that prints and writes."""
    return rank_and_world()[0] == 0


def all_reduce(x):
    """The tensor, summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def optional(module, flag):
    """A module of a package that only this flag needs, or exit with how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        fail(f"{flag} needs the package {package}: pip install {package}")


def open_corpus(directory):
    """The Corpus, or exit with what is wrong with it."""
    try:
        return Corpus(directory)
    except ValueError as error:
        fail(error)


def load_checkpoint(directory, corpus, device="cpu", dtype=torch.float32):
    """The model in a checkpoint directory, with room for every token of the corpus, or an error if their
    tokenizers differ.
    """
    try:
        model = transformer.load(directory, device, dtype)
    except ValueError as error:
        fail(error)
    named = (Path(directory) / "tokenizer.json").exists()
    ours, room = corpus.tokenizer, model.config.vocab_size
    if named and not ours.same_as(Tokenizer.load(directory)):
        fail(f"{directory}: its tokenizer is not the corpus's; build one with "
             f"`python build_corpus.py --tokenizer {directory}`")
    if room < len(ours.ranks) or not named and room != ours.vocab_size:
        fail(f"{directory}: vocabulary of {room}, but the corpus has {ours.vocab_size}")
    if room < ours.vocab_size:  # it lacks some of the chat format's tokens
        transformer.grow_vocabulary(model, ours.vocab_size, ours.special_pieces())
    return model


def wrap_model(model, args):
    """The model as it is trained: what learns in float32, on its device, compiled, and with several processes
    a copy in each (DDP) or, with --shard, a part of every tensor in each (FSDP2): a layer's weights are
    brought together when it runs.
    """
    def in_float32(module):
        for p in module.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        return module

    layers = model.model["layers"]
    model.frequencies = model.frequencies.to(args.device)  # once, not in every step
    if args.compile == "yes":  # many layers one by one: what is compiled for the first serves all
        for module in layers if args.shard or len(layers) > 8 else [model]:
            module.compile()
    if not args.shard:
        in_float32(model).to(args.device)
        alone = not dist.is_initialized()
        return model if alone else DistributedDataParallel(model, gradient_as_bucket_view=True)
    types = (torch.bfloat16, torch.float32) if args.dtype == "bfloat16" else ()
    policy = MixedPrecisionPolicy(*types, cast_forward_inputs=False)  # rotary angles need float32
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    for module in [*layers, model]:  # one by one, so that no process ever holds the whole in float32
        fully_shard(in_float32(module), mesh=mesh, mp_policy=policy)
    return model


def fresh_model(corpus, args):
    """A model of the shape --preset with fresh weights."""
    torch.manual_seed(args.seed)
    config = transformer.Config(vocab_size=corpus.tokenizer.vocab_size, **shape_of(args.preset))
    model = transformer.Transformer(config)
    if is_tiny(args.preset):
        begin_as_faint_copy(model)
        wire_copying_heads(model)
    return model


# ------------------------------------------------------------------------------------------------------------
# Data: which windows a step sees


def plan_windows(available, weights, n_windows, seed):
    """The order of a whole run, from {domain: number of windows} and {domain: weight}: the domains' names,
    (domain index, window index), each (n_windows,), and {domain: epochs}.

    Domains are shared out by weight exactly; each one's windows come in a permutation, without replacement,
    and in a new one every epoch. All follows from the seed.
    """
    rng = np.random.default_rng(seed)
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    exact = np.array([*weights.values()]) / sum(weights.values()) * n_windows
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact)[:n_windows - counts.sum()]] += 1  # largest remainders
    order = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    windows, epochs = np.zeros(n_windows, np.int64), {}
    for i, name in enumerate(weights):
        epochs[name] = counts[i] / available[name]
        drawn = [rng.permutation(available[name]) for _ in range(math.ceil(epochs[name]))]
        windows[order == i] = np.concatenate([windows[:0], *drawn])[:counts[i]]
    return [*weights], order, windows, epochs


def split_windows(windows, corpus, document_mask):
    """ids, targets (B, T) of windows (B, T + 1), and with document_mask doc_ids (B, T): how many documents of
    its window have ended before each token.
    """
    windows = windows.astype(np.int64)
    ids, targets = windows[:, :-1], windows[:, 1:]
    if not document_mask:
        return ids, targets
    ends = ids == corpus.tokenizer.end_of_text
    return ids, targets, ends.cumsum(1, dtype=np.int32) - ends


def held_out_windows(corpus, args, document_mask):
    """{domain: (ids, targets[, doc_ids])}, (B, T) each: its first held-out windows, never trained on."""
    found, T = {}, args.seq_len
    for domain in VALIDATED:
        ids = corpus.read(domain, "heldout")
        count = min(args.val_windows, (len(ids) - 1) // T)
        if count > 0:
            windows = np.stack([ids[i * T:][:T + 1] for i in range(count)])      # (B, T + 1)
            found[domain] = split_windows(windows, corpus, document_mask)
    return found


def rank_rows(count, rank, world):
    """A rank's rows of a batch: each rank has as many; from those past `count` nothing is learned."""
    return np.arange(rank, math.ceil(count / world) * world, world)


def rank_tensors(get_rows, count):
    """The tensors of this rank's rows, (rows, T) each, from get_rows(rows) -> ids, targets and perhaps
    doc_ids of those of `count` rows.
    """
    rows = rank_rows(count, *rank_and_world())
    ids, targets, *doc_ids = get_rows(rows % count)
    targets = np.where(rows[:, None] < count, targets, -100)
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in (ids, targets, *doc_ids)]


def prefetch(get_batch, batch_size, steps, args):
    """Yields each step's tensors of this rank's rows, (rows, T), while a thread reads the next step's."""
    def fetch(step):
        tensors = rank_tensors(lambda rows: get_batch(step, rows), batch_size)
        return [t.pin_memory() for t in tensors] if args.device == "cuda" else tensors

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(fetch, steps[0])
        for step in steps:
            ready, ahead = ahead, pool.submit(fetch, min(step + 1, steps[-1]))
            yield ready.result()


def micro_batches(batch, args):
    """The tensors of a batch on the device, --micro-batch rows at a time."""
    on_device = (tensor.to(args.device, non_blocking=True) for tensor in batch)
    return list(zip(*(tensor.split(args.micro_batch) for tensor in on_device)))


# ------------------------------------------------------------------------------------------------------------
# Training


def training_options(corpus, args):
    """What a run's result depends on, and so may not change on the way."""
    names = ("seq_len", "batch_tokens", "lr", "schedule", "warmup", "attention_lr", "weight_decay", "seed",
             "dtype", "compile")
    return {"corpus": corpus.sha256, "tokenizer": corpus.manifest["tokenizer_sha256"],
            **{name: getattr(args, name) for name in names}}


def weights_of(init):
    """What tells the weights in a directory from others: the beginnings of their files hold checksums."""
    files = sorted(Path(init).glob("*.safetensors")) if init else []
    return [zlib.crc32(np.fromfile(file, np.uint8, 4096)) for file in files]


def settle_options(run, options):
    """Write down what a run depends on, or exit if it was begun with something else."""
    saved, now = run / "train_state" / "options.json", json.loads(json.dumps(options))
    before = read_json(saved) if saved.exists() else now
    changed = [f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in before | now
               if before.get(k) != now.get(k)]
    if changed:
        fail(f"{run} holds a run with other options: {'; '.join(changed)}. Remove it, or choose another "
             "--out")
    if is_main():
        saved.parent.mkdir(parents=True, exist_ok=True)
        write(saved, json.dumps(now))


def parameter_groups(model, args):
    """Matrices decay, vectors do not; attention learns at its own rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(("self_attn" in name, p.dim() >= 2), []).append(p)
    return [{"params": params, "weight_decay": args.weight_decay if is_matrix else 0.0,
             "lr_scale": args.attention_lr if in_attention else 1.0}
            for (in_attention, is_matrix), params in groups.items()]


@torch.no_grad()
def validation(model, held_out, args, autocast):
    """{"loss/<domain>": mean loss (nats per target token)} of `held_out`, whose windows the processes share
    out.
    """
    losses = {}
    for domain, arrays in held_out.items():
        batch = rank_tensors(lambda rows: [a[rows] for a in arrays], len(arrays[0]))
        total = torch.zeros((), device=args.device)
        for part in micro_batches(batch, args):
            with autocast:
                total += model(*part)
        losses[f"loss/{domain}"] = all_reduce(total).item() / (arrays[1] >= 0).sum()
    return losses


# ------------------------------------------------------------------------------------------------------------
# Checkpoints of a run that goes on


class Checkpoints:
    """The last `keep` states of a run, in directories step-<n>, in parts that fit any number of processes.

    A state is copied at once and written while training goes on. It counts from the moment when its index,
    .metadata, appears, which torch.distributed.checkpoint writes last and under another name first.
    """
    # Not strict: what is frozen is not in the state.
    options = dcp_state.StateDictOptions(ignore_frozen_params=True, strict=False)

    def __init__(self, directory, keep, model, optimizer):
        self.directory, self.keep, self.trained, self.saving = directory, keep, (model, optimizer), None
        # The writing thread's.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def whole(self):
        """The directories of whole states, the newest last."""
        return sorted((path.parent for path in self.directory.glob("step-*/.metadata")), key=step_of)

    def newest(self):
        """The directory of the newest whole state, or None."""
        return next(reversed(self.whole()), None)

    def state(self, skipped):
        weights, moments = dcp_state.get_state_dict(*self.trained, options=self.options)
        return {"model": weights, "optimizer": moments, "skipped": torch.tensor(skipped)}

    def save(self, step, skipped):
        """Begin to save the state before `step`: wait for the last one to be written, then copy this one."""
        self.finish()
        directory = self.directory / f"step-{step}"
        self.saving = dcp.async_save(self.state(skipped), checkpoint_id=directory, process_group=self.group)

    def finish(self, wait=True):
        """Once a state is saved, remove what is older than the last `keep`; a full disk ends the run."""
        if not self.saving or not wait and not self.saving.done():
            return
        try:
            self.saving.result()
        except (Exception, CheckpointException) as error:
            fail(f"{self.directory}: a checkpoint could not be saved: {first_cause(error)}. "
                 f"The last whole one is {self.newest() or 'none'}")
        self.saving = None
        if is_main():
            for state in {*self.directory.glob("step-*")} - {*self.whole()[-self.keep:]}:
                shutil.rmtree(state)

    def load(self):
        """Put the newest state into model and optimizer. Returns its step, and how many were skipped."""
        if not (newest := self.newest()):
            return 0, 0
        state = self.state(0)
        try:
            with open(newest / ".metadata", "rb") as index:
                IndexUnpickler(index).load()
            dcp.load(state, checkpoint_id=newest, process_group=self.group)
        except (Exception, CheckpointException) as error:
            fail(f"{newest} cannot be read: {first_cause(error)}. "
                 "Remove it to go on from the checkpoint before")
        dcp_state.set_state_dict(*self.trained, model_state_dict=state["model"],
                                 optim_state_dict=state["optimizer"], options=self.options)
        return step_of(newest), int(state["skipped"])


def step_of(directory):
    """The n of step-<n>."""
    return int(directory.name[5:])


def first_cause(error):
    """The exception that began it, in whichever process."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while before := error.__cause__ or error.__context__:
        error = before
    return error


class IndexUnpickler(pickle.Unpickler):
    """Reads a checkpoint's index, a pickle, only if it names nothing but what such an index consists of."""
    modules = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
               "torch.serialization", "pathlib")
    of_torch = ("Size", "float32", "bfloat16", "int64")

    def find_class(self, module, name):
        if module in self.modules or module == "torch" and name in self.of_torch:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index asks for {module}.{name}")


# ------------------------------------------------------------------------------------------------------------
# Metrics

STEP_LINE = ("loss {loss:.3f}  lr {lr:.2e}  norm {grad_norm:.2f}  {ms:,.0f} ms  {tokens_per_second:,.0f} "
             "tokens/s  data wait {data_wait:.1%}  skipped {skipped}")


class Metrics:
    """metrics.jsonl, cut back to the step that training goes on from; a dense line for each step; and Weights
    & Biases if asked for.
    """

    def __init__(self, run, start, options, args):
        self.run, self.steps, self.wandb = run, options["steps"], None
        if not is_main():
            return
        kept = [line for line in read_metrics(run) if line["step"] <= start] if start else []
        write(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        if args.wandb:
            self.wandb = optional("wandb", "--wandb").init(
                project=args.wandb, name=run.name, id=f"{run.parent.name}-{run.name}", config=options,
                resume="allow")

    def log(self, **values):
        if not is_main():
            return
        with open(self.run / "metrics.jsonl", "a") as file:  # JSON has no NaN
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()}) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])
        if "tokens" in values:
            line = (STEP_LINE + "  MFU {mfu:.1%}" * ("mfu" in values)).format(**values)
        else:
            losses = [f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k != "step"]
            line = "held-out loss: " + ", ".join(losses)
        tqdm.write(f"{self.run.name} {values['step']}/{self.steps}  {line}")


def read_metrics(run):
    """The lines of a run's metrics.jsonl, less what a crash left half written; none if it is gone."""
    path, lines = run / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def held_out_losses(run):
    """[{domain: loss}] of a run's validations."""
    return [{k.removeprefix("loss/"): v for k, v in line.items() if k.startswith("loss/")}
            for line in read_metrics(run) if "tokens" not in line]


def report(runs):
    """Print a line for each run: steps, tokens, median speed, the last held-out losses."""
    print("run               steps       tokens  tokens/s   held-out loss at the end (nats per token)")
    for run in runs:
        steps, losses = [line for line in read_metrics(run) if "tokens" in line], held_out_losses(run)
        if not steps or not losses:
            print(f"{run.name:<16} {run / 'metrics.jsonl'} is gone or cut off")
            continue
        last, rate = steps[-1], np.median([line["tokens_per_second"] for line in steps])
        print(f"{run.name:<16} {last['step']:>6,} {last['tokens']:>12,} {rate:>9,.0f}   "
              + ", ".join(f"{d} {math.nan if loss is None else loss:.3f}" for d, loss in losses[-1].items()))


def model_flops_utilization(flops, args):
    """{"mfu": the share of this GPU's peak, by GPUS, that so many FLOP/s of all processes are}; {} where it
    is unknown.
    """
    for part, peak, _ in GPUS.values():
        if args.device == "cuda" and part in torch.cuda.get_device_name():
            return {"mfu": flops / (peak * rank_and_world()[1])}
    return {}


def memory_gb(device):
    """The most that this process has held so far: on the GPU, or else in all."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if (status := Path("/proc/self/status")).exists():  # getrusage would count what the parent process held
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS


def tell_duration(run, rate, tokens, args):
    """Say how long a run, and all of them, will take at so many tokens/s."""
    if is_main() and args.all_tokens:
        tqdm.write(f"{run.name}: at {rate:,.0f} tokens/s its {tokens:,} tokens take "
                   f"{timedelta(seconds=round(tokens / rate))}, the {args.all_tokens:,} of all runs "
                   f"{timedelta(seconds=round(args.all_tokens / rate))}")


# ------------------------------------------------------------------------------------------------------------
# The scaling law of the mixture: small runs, curves of two forms fitted to them, a report

TARGETS = ("agent", "code", "text")
EQUAL = 0.333  # the share of agent data in 1 : 1 : 1
FORMS = {  # of the law: how many coefficients are searched, up to what. The others are linear: solved for.
    # c + k·r^alpha of the share of agent data r, the paper's: fitted to the runs of one size and budget.
    "power": (1, 8),
    # E + A/N^alpha + B·s^eta/D^beta + C/(s + epsilon)^gamma of N parameters, D tokens and the share s of the
    # data that is measured: Que et al. 2024, arXiv 2406.01375. Fitted to all runs at once. For code and text
    # s is the share of both together, of which each is a fixed part.
    "D-CPT": (5, 2)}


def scaling_law(corpus, args):
    """Train small models at many shares of agent data, fit their losses, and check the best share at a size
    and budget that were not fitted.

    Each run goes on from the base of its size. A run that is done is known by its result.json, so the same
    command goes on, and processes under torchrun share out the runs.
    """
    *sizes, largest = args.sizes
    *budgets, longest = args.tokens
    names = {Path(size).name for size in args.sizes}  # of which the runs have theirs
    if len(names) < max(3, len(args.sizes)) or len(budgets) < 2 or len(args.ratios) < 5 or args.seeds < 1:
        fail("--scaling-law needs at least three --sizes and --tokens, of which the last are left out of the "
             "fit, five --ratios and a seed; no two directories of --sizes may have the same name")
    out = Path(args.out) / "scaling"
    own = {k: getattr(args, k) for k in ("base_tokens", "mix", "practice", "document_mask", "val_windows")}
    settle_options(out, own | training_options(corpus, args))
    bases = {size: size if Path(size).is_dir() else out / f"base-{size}" for size in args.sizes}
    small_runs([(f"base-{size}", None, size, args.base_tokens, 0.0, args.seed)
                for size in args.sizes if bases[size] != size], corpus, args)

    def measure(sizes, budgets, ratios, n_seeds):
        grid = product(range(args.seed, args.seed + n_seeds), sizes, budgets, ratios)
        runs = small_runs([(f"{Path(size).name}-{tokens}-{r:g}-{seed}", bases[size], size, tokens, r, seed)
                           for seed, size, tokens, r in grid], corpus, args)
        for run in runs:
            run["loss"]["relative"] = relative(run["loss"], run["base"], args.weights)
        return runs

    runs = measure(sizes, budgets, args.ratios, args.seeds)
    laws = {form: Law(form, fitted_together(form, runs)[-1], draws=400) for form in FORMS}
    errors = {form: left_out_error(form, runs) for form in FORMS}
    chosen = min(errors, key=errors.get)
    shares = np.linspace(min(args.ratios), max(args.ratios), 191)
    target = shares, count_multiplying(bases[largest]), longest, args.weights
    best = round(float(shares[laws[chosen].relative_loss(*target)[0].argmin()]), 2)
    third = round((best + shares[-1]) / 2 if best < 0.5 else best / 2, 2)
    check = measure([largest], [longest], dict.fromkeys([best, EQUAL, third]), 2 * args.seeds)
    if int(os.environ.get("RANK", 0)):
        return
    write(out / "scaling_law.jsonl", "".join(json.dumps(run) + "\n" for run in runs + check))
    report_losses(runs + check, args.weights)
    print("\nBest share of agent data for the last size and budget, of which nothing was fitted, and root "
          "mean square\nerror of the losses at shares that were left out of a fit:")
    for form, law in laws.items():
        print(f"{form:<6} {best_share(law, *target)}; {errors[form]:.4f}")
    report_check(check, best)


def small_runs(jobs, corpus, args):
    """small_run for each of [(name, init, size, tokens, agent share, seed)] for which it is this process's
    turn; waits for the others. Returns what is in result.json of each.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for job in tqdm(jobs[rank::world], desc="runs", disable=None if rank == 0 else True):
        small_run(*job, corpus, args)
    files = [Path(args.out) / "scaling" / name / "result.json" for name, *_ in jobs]
    while not all(file.exists() for file in files):
        if STOP.wait(1):
            sys.exit(0)
    return [read_json(file) for file in files]


def small_run(name, init, size, tokens, ratio, seed, corpus, args):
    """Train one model of the law, if that is not done, and write result.json: its losses, by domain, and
    those of the base that it went on from.
    """
    run = Path(args.out) / "scaling" / name
    if not (run / "result.json").exists():
        own = argparse.Namespace(**vars(args) | {"seed": seed, "preset": size, "val_every": tokens})
        weights = wide_mixture(ratio, dict(zip(("code", "text"), args.mix[1:])), corpus, args)
        with contextlib.redirect_stdout(io.StringIO()):  # a line a step is too much; metrics.jsonl has them
            pretrain(f"scaling/{name}", init, weights, tokens, corpus, own)
        before, *_, after = held_out_losses(run) or [{}, {}]  # none where metrics.jsonl is gone
        for losses in (before, after):
            if any(losses.get(d) is None for d in VALIDATED):
                fail(f"{run}: no finite held-out loss of each of {', '.join(VALIDATED)}")
            losses["agent"] = sum(share * losses[d] for d, share in normalise(args.agent, 1).items())
        write(run / "result.json", json.dumps({
            "size": size, "parameters": count_multiplying(init or run), "tokens": tokens, "ratio": ratio,
            "seed": seed, "loss": after, "base": before}))
    shutil.rmtree(run / "train_state", ignore_errors=True)
    for weights_file in run.glob("model*") if init else []:  # nothing goes on from them
        weights_file.unlink()


def count_multiplying(directory):
    """How many parameters of a checkpoint multiply: all but the table of embeddings."""
    return meta_model(directory).flops_per_token(0) // 6


def where(run):
    """Share of agent data, parameters and tokens of a run."""
    return run["ratio"], run["parameters"], run["tokens"]


def by_cell(runs):
    """[The runs of one size and budget], from small to large."""
    def cell(run):
        return where(run)[1:]
    return [list(inside) for _, inside in groupby(sorted(runs, key=cell), cell)]


def fitted_together(form, runs):
    """[The runs that a form is fitted to at once], from small to large."""
    return by_cell(runs) if form == "power" else [runs]


class Law:
    """Curves of loss against the share of agent data in one of FORMS, fitted to runs, and with `draws` to so
    many bootstrap samples of them besides.

    curves: {target: coefficients as `search` gives them}.
    """

    def __init__(self, form, runs, draws=0):
        self.form, self.curves = form, {}
        self.base = max(runs, key=lambda run: run["parameters"])["base"]
        x = np.array([where(run) for run in runs]).T                             # (3, runs)
        for t in TARGETS:
            y = np.array([[run["loss"][t] for run in runs]])                     # (1, runs)
            p, linear = self.curves[t] = search(form, t, x, y)
            if draws:
                y = resample(y, self.predict(t, *x), p.numel() + linear.numel(), draws)
                self.curves[t] = search(form, t, x, y)

    def predict(self, target, r, n, d):
        """Losses (1 + draws, len(r)). The power form knows neither size nor budget."""
        p, linear = self.curves[target]
        return np.einsum("prm,pm->pr", basis(self.form, target, (r, n, d), p), linear)

    def relative_loss(self, r, n, d, weights):
        """The weighted mean of the losses, each over that of the largest base: (1 + draws, len(r))."""
        return relative({t: self.predict(t, r, n, d) for t in weights}, self.base, weights)

    def residuals(self, runs):
        """Measured minus fitted losses of runs, every target's."""
        return [run["loss"][t] - self.predict(t, *where(run))[0, 0] for run in runs for t in TARGETS]


def relative(losses, base, weights):
    """The weighted mean of the losses, each over the base's."""
    return sum(w * losses[t] / base[t] for t, w in weights.items()) / sum(weights.values())


def resample(y, fitted, n_coefficients, draws):
    """(1 + draws, runs) The losses y (1, runs), and draws of them: to what was fitted, the residuals are
    dealt out anew, those of one run together for all targets.
    """
    rng, count = np.random.default_rng(0), y.size
    dealt = (y - fitted)[0, rng.integers(count, size=(draws, count))]
    # Residuals are smaller than the noise, and tell it inexactly.
    spread = (count / rng.chisquare(count - n_coefficients, (draws, 1))) ** 0.5
    return np.vstack([y, fitted + spread * dealt])


def search(form, target, x, y):
    """Least squares for each row of losses y (P, runs) at x (3, runs): nonlinear coefficients (P, k) and
    linear ones (P, columns).

    By variable projection (Golub & Pereyra 1973): given the nonlinear ones the best linear ones follow
    exactly. So only the former are searched, by gradients.
    """
    y = torch.as_tensor(y)[:, :, None]                                           # (P, runs, 1)
    k, most = FORMS[form]
    place = torch.zeros(len(y), k, dtype=y.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([place], max_iter=200, line_search_fn="strong_wolfe")

    def solve():
        p = 0.01 + most * place.sigmoid()
        q, r = torch.linalg.qr(basis(form, target, x, p))                        # (P, runs, columns)
        linear = torch.linalg.solve_triangular(r, q.mT @ y, upper=True)
        return p, linear[:, :, 0], (q @ (q.mT @ y) - y).square().sum() / y.var()

    def error():
        optimizer.zero_grad()
        *_, value = solve()
        value.backward()
        return value

    optimizer.step(error)
    p, linear, _ = solve()
    return p.detach(), linear.detach()


def basis(form, target, x, p):
    """The columns whose linear combination is the loss, (P, points, columns), for nonlinear coefficients p
    (P, k).

    x: share of agent data, parameters and tokens, each (points,) or a number.
    """
    r, n, d = (torch.as_tensor(values, dtype=p.dtype) for values in x)
    p = p.T[:, :, None]                                                          # (k, P, 1)
    if form == "power":
        columns = [r ** p[0]]
    else:
        alpha, eta, beta, epsilon, gamma = p
        s = r if target == "agent" else 1 - r
        columns = [(n / 1e6) ** -alpha, s ** eta / (d / 1e6) ** beta, (s + epsilon) ** -gamma]
    return torch.stack(torch.broadcast_tensors(torch.ones_like(r), *columns), -1)


def left_out_error(form, runs):
    """Root mean square error (nats) of the losses at the inner shares, each predicted from the runs at all
    others.
    """
    errors = []
    for group, r in product(fitted_together(form, runs), sorted({run["ratio"] for run in runs})[1:-1]):
        law = Law(form, [run for run in group if run["ratio"] != r])
        errors += law.residuals([run for run in group if run["ratio"] == r])
    return np.square(errors).mean() ** 0.5


def best_share(law, r, n, d, weights):
    """The share of least loss among r, with its 95% interval by bootstrap, or at which end it lies."""
    best, *draws = r[law.relative_loss(r, n, d, weights).argmin(1)]
    low, high = np.quantile(draws, [0.025, 0.975])
    end = {r[0]: ", the lowest tried", r[-1]: ", the highest tried"}.get(best, "")
    return f"{best:.2f} [{low:.2f}, {high:.2f}]{end}"


def report_losses(runs, weights):
    """Print the mean losses of each size and budget by the share of agent data."""
    print("\nHeld-out loss (nats per token) by share of agent data. Relative: the mean of loss / base's, "
          + ", ".join(f"{t} counted {w:g}" for t, w in weights.items()))
    for inside in by_cell(runs):
        ratios = sorted({run["ratio"] for run in inside})
        print(f"\n{Path(inside[0]['size']).name + ',':<10}{inside[0]['tokens']:>12,} tokens"
              + "".join(f"{x:>8g}" for x in ratios))
        for t in (*TARGETS, "relative"):
            print(f"{t:>29}" + "".join(f"{losses_of(inside, t, x).mean():>8.4f}" for x in ratios))


def report_check(check, best):
    """Print in words whether the best share is better than 1 : 1 : 1, in pairs of one seed."""
    gaps = losses_of(check, "relative", EQUAL) - losses_of(check, "relative", best)   # (seeds,)
    # Student's 95% interval; the quantile is within 0.5% where there are four seeds.
    t = np.quantile(np.random.default_rng(0).standard_t(len(gaps) - 1, 10**6), 0.975)
    middle, reach = gaps.mean(), t * gaps.std(ddof=1) / len(gaps) ** 0.5
    verdict = "beats" if middle > 0 else "loses to"
    if abs(middle) <= reach:
        verdict = "is not to be told from"
    print(f"\nIn words: the form of less error predicts {best:g}. Trained there, a share of {best:g} "
          f"{verdict} 1 : 1 : 1, which has {middle:+.4f} [{middle - reach:+.4f}, {middle + reach:+.4f}] of "
          "the base's loss by comparison. The paper's best was near 0.36.")


def losses_of(runs, target, ratio):
    """(seeds,) The losses of a target at that share."""
    return np.array([run["loss"][target] for run in runs if run["ratio"] == ratio])


# ------------------------------------------------------------------------------------------------------------
# What a run needs


def plan(args):
    """Print memory a GPU, speed and days of a run on --gpus of the kind --gpu; none of them is needed for it.
    """
    model = meta_model(args.init, args.preset, 128_256)
    _, peak, room = GPUS[args.gpu]
    flops = model.flops_per_token(args.seq_len)
    print(f"{count_parameters(model):,} parameters, {flops:.3g} FLOPs a token, windows of "
          f"{args.seq_len:,} tokens, {args.micro_batch} at a time, on {args.gpus} {args.gpu}\n")
    print("GB a GPU                     weights  gradients  optimizer activations     logits        all"
          "        tokens/s  days for 103e9 tokens")
    for shard, checkpointing in product((False, True), repeat=2):
        world = args.gpus if shard else 1
        parts = memory(model, args.seq_len, args.micro_batch, world, shard, checkpointing, "bfloat16")
        sizes = [part / 1e9 for part in (*parts.values(), sum(parts.values()))]
        rate = args.gpus * peak * args.mfu / flops
        if checkpointing:
            rate *= 0.75  # of four passes, one is done again
        print(f"{'FSDP2 (--shard)' if shard else 'DDP':<16}{'checkpoint' if checkpointing else '':<10}"
              + "".join(f"{size:>11.1f}" for size in sizes)
              + f" {'fits' if sizes[-1] < 0.9 * room else '':<4} {rate:>10,.0f}{103e9 / rate / 86400:>15.1f}")
    print(f"\nIt fits if a tenth of {room} GB is left for what is not counted. Speed is at {args.mfu:.0%} of "
          f"{peak / 1e12:,.0f} TFLOP/s (--mfu). The paper's run, an 8B model on 128 A100s of 40 GB, took "
          "11.1 days.")


def memory(model, seq_len, micro_batch, world, shard, checkpointing, dtype):
    """Bytes a process needs to train a model (on the meta device) without torch.compile: {"weights",
    "gradients", "optimizer", "activations", "logits"}.
    """
    c, size = model.config, 2 if dtype == "bfloat16" else 4  # size: of a number in the matrix products
    count, layer = count_parameters(model), count_parameters(model.model["layers"][0])
    weights, tokens = 4 * count // world, micro_batch * seq_len
    # What autograd keeps of a layer, as torch 2.13 was seen to: six numbers in float32 of the residual stream
    # and its norms; queries, keys, values and what attention gives; four of the feed-forward layer.
    kept = tokens * (24 * c.dim + size * (c.head_dim * (3 * c.n_heads + 2 * c.n_kv_heads) + 4 * c.hidden_dim))
    activations = c.n_layers * kept
    if checkpointing:  # what a layer begins with, and one layer in full
        activations = c.n_layers * tokens * c.dim * (size if shard else 4) + kept
    if shard:  # brought together: embedding and head, the layer that runs and the next
        weights += size * (count - (c.n_layers - 2) * layer)
    elif size == 2:  # autocast remembers the layers' weights in bfloat16
        activations += 2 * c.n_layers * layer
    # In both types, with gradients.
    logits = 16 * min(tokens * c.vocab_size, transformer.CHUNK)
    return {"weights": weights, "gradients": weights, "optimizer": 8 * count // world,
            "activations": activations, "logits": logits}


# ------------------------------------------------------------------------------------------------------------
# For tiny models only: copying what stands in the context, which large models learn by themselves

# The default run, and the scaling law's: minutes on two cores. A base, or another preset, gets nothing of
# what stands in this section.
TINY = {"base_tokens": 1_200_000, "stage1_tokens": 1_600_000, "stage2_tokens": 2_400_000, "seq_len": 384,
        "batch_tokens": 1536, "lr": 1.5e-3, "attention_lr": 0.3, "practice": 0.1}


def is_tiny(preset):
    """Whether models of this preset, or of this LAYERSxWIDTH, get help to copy."""
    return preset == "tiny" or preset not in transformer.PRESETS


@torch.no_grad()
def begin_as_faint_copy(model):
    """Embeddings of deviation 1 keep their differences while training moves them; the head copies them."""
    torch.nn.init.normal_(model.model["embed_tokens"].weight)
    model.lm_head.weight.copy_(0.03 * model.model["embed_tokens"].weight)


def with_copying_practice(get_batch, share, batch_size, seed):
    """get_batch with that share of its windows turned into copying practice, each by itself."""
    def practised(step, rows):
        batch = ids, targets, *doc_ids = get_batch(step, rows)
        for row, i in enumerate(step * batch_size + np.asarray(rows)):
            rng = np.random.default_rng([*seed, i])
            if rng.random() < share:
                window = copying_practice(np.append(ids[row], targets[row, -1]), rng)
                ids[row], targets[row] = window[:-1], window[1:]
                for documents in doc_ids:
                    documents[row] = 0
        return batch
    return practised


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


@torch.no_grad()
def wire_copying_heads(model):
    """Set the first heads of a fresh model so that together they copy from the context, as minutes on a CPU
    would not teach it to.

    In layer 0, heads note at each position the token before it, the one before that, the mean of the dozen
    before and, where there is a fourth head, the third token before. In layer 1, two heads look for an
    earlier place that came after the token we are at, and raise the likelihood of what stands there: after
    ... a b ... a they say b (induction heads, Olsson et al. 2022, arXiv 2209.11895). The one prefers places
    where the tokens before agree too, the other also places in a similar context. To start from such heads is
    in the spirit of mimetic initialisation (arXiv 2305.09828). Needs biases, an untied head and three heads
    of enough width; another model is left as it is.
    """
    c = model.config
    if c.tie_embeddings or not c.attention_bias or c.n_layers < 2 or not c.n_kv_heads == c.n_heads >= 3:
        return
    first, second = (model.model["layers"][i].self_attn for i in (0, 1))
    C, D, N = c.dim, c.head_dim, min(c.n_heads, 4)  # N features, of which a copying head compares N - 1
    # Rotary scores turn with the distance. Fast pairs of coordinates tell one position from the next, middle
    # ones some positions from others further on, and slow ones, which hardly turn within a window, compare
    # what stands in them.
    fast, middle, slow = torch.arange(6), torch.arange(4, 8), torch.arange(12, 32)
    # The residual stream's last coordinates are kept free for the features, W for each; a feature is a short
    # code of a token.
    W = len(slow) // (N - 1) * 2
    model.model["embed_tokens"].weight[:, -N * W:] = 0
    model.lm_head.weight[:, -N * W:] = 0
    code = torch.linalg.qr(torch.randn(C - N * W, C - N * W))[0][:W]
    token = F.pad(code, (0, N * W))                                              # (W, C): reads the code
    features = torch.eye(C)[-N * W:].view(N, W, C)                               # (W, C) each: read a feature

    noted = [(fast, 1, 35, 1), (fast, 2, 35, 1), (middle, 6, 12, 2), (fast, 3, 35, 1)]
    for projection in (first.q_proj, first.k_proj, first.v_proj):
        projection.weight[:N * D] = 0
    first.v_proj.weight.view(-1, D, C)[:N, :W] = token
    q, k = (projection.bias.view(-1, 2, D // 2) for projection in (first.q_proj, first.k_proj))
    for h, (pairs, distance, sharpness, size) in enumerate(noted[:N]):
        # Constant q and k: k is turned so that they agree at the distance.
        amplitude, angle = (sharpness * D ** 0.5 / len(pairs)) ** 0.5, model.frequencies[pairs] * distance
        q[h, 0, pairs] = amplitude
        k[h, 0, pairs], k[h, 1, pairs] = amplitude * angle.cos(), amplitude * angle.sin()
        first.o_proj.weight[:, h * D:h * D + W] = size * features[h].T

    previous, second_previous, context, third_previous = features[[0, 1, 2, -1]]
    copied = torch.linalg.qr(torch.randn(C, C))[0][:D]
    matches = [[(16, token, previous), (11, previous, second_previous), (8, second_previous, third_previous)],
               [(24, token, previous), (12, context, context), (12, previous, second_previous)]]
    for h, match in enumerate(matches):
        here = slice(h * D, (h + 1) * D)
        q, k = second.q_proj.weight[here].view(2, -1, C), second.k_proj.weight[here].view(2, -1, C)
        q[:], k[:] = 0, 0
        for i, (weight, query, key) in enumerate(match[:N - 1]):
            pairs = slow[i:W // 2 * (N - 1):N - 1]
            q[:, pairs], k[:, pairs] = weight * query.view(2, -1, C), key.view(2, -1, C)
        second.v_proj.weight[here], second.o_proj.weight[:, here] = copied, 6 * copied.T


if __name__ == "__main__":
    run_main(main)
