"""Step 3 of 6: the model, a decoder-only transformer in the manner of Llama, from scratch.

In and out: a Hugging Face checkpoint directory (config.json and safetensors, in one file or several), which
transformers loads as it is: of Llama (2 to 3.2, TinyLlama, SmolLM), Mistral, Qwen2, Qwen2.5 or Qwen3, without
conversion. Run `python model.py` for a table of the presets; the other scripts import Config, Transformer,
load, save and generate.

RMSNorm (arXiv 1910.07467) before each sub-layer, rotary positions (arXiv 2104.09864), grouped-query attention
(arXiv 2305.13245), SwiGLU (arXiv 2002.05202), no dropout. Parameters bear Hugging Face's names, so there is
nothing to convert.

Shapes: B sequences, T tokens, C = dim, H query heads, K key-value heads, D = head_dim, V = vocab_size.
"""
import dataclasses
import json
import math
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

# Without it, MKL does not promise that two runs round alike. It costs nothing measurable.
os.environ.setdefault("MKL_CBWR", "AUTO")

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",  # has biases on q, k and v
    "qwen3",  # has norms on q and k
]


@dataclasses.dataclass
class Config:
    """A model's shape, by the field's names (HF_NAMES has Hugging Face's). The default is the preset 124m,
    GPT-2 small's depth and width; how many parameters that makes depends on the vocabulary.
    """
    vocab_size: int = 128_256           # Llama 3's
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = 12
    head_dim: int = 64
    hidden_dim: int = 2048              # of the feed-forward layer
    max_seq_len: int = 2048             # context length
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    model_type: str = "llama"           # one of FAMILIES
    attention_bias: bool = False        # of llama: biases on q, k, v and o, which Meta's models have not
    rope_scaling: dict | None = None    # linear or Llama 3.1's, as config.json has it
    sliding_window: int | None = None   # of mistral: how many tokens one sees, itself included

    def to_hf(self, dtype="float32"):
        """The config.json that Hugging Face reads; read_config is the way back."""
        config = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "torch_dtype": dtype,
            **{hf: getattr(self, name) for name, hf in HF_NAMES.items()},
        }
        if self.rope_scaling:
            config["rope_scaling"] = self.rope_scaling
        if self.model_type == "llama":
            config["attention_bias"] = self.attention_bias
        if self.model_type == "mistral":
            config["sliding_window"] = self.sliding_window
        return config


class Attention(nn.Module):
    """Rotary, grouped-query self-attention: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = D = config.head_dim
        bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.dim, config.n_heads * D, bias)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * D, bias)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * D, bias)
        self.o_proj = nn.Linear(config.n_heads * D, config.dim, config.attention_bias)
        norm = partial(nn.RMSNorm, D, config.norm_eps) if config.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, rope, attend):
        """rope: cosines and sines (T, D/2). attend: a function of q, k and v, see choose_attention."""
        projections = self.q_proj, self.k_proj, self.v_proj
        # (B, H, T, D), and for k and v (B, K, T, D)
        q, k, v = (p(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        y = attend(q, k, v)                                                          # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward layer: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        C, hidden = config.dim, config.hidden_dim
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Token ids to logits, or to a loss. Fresh weights follow init_weights; `load` gives a trained model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
            "layers": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "norm": nn.RMSNorm(config.dim, config.norm_eps)})
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie_weights()
        self.checkpointing = False  # recompute each layer's activations in the backward pass, and keep none
        self.frequencies = rope_frequencies(config)  # no buffer, which .to(bfloat16) would round
        self.init_weights()

    def tie_weights(self):
        """Where the config says so, head and embedding are one matrix."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    @torch.no_grad()
    def init_weights(self):
        """Normal with deviation 1/sqrt(dim); output projections are zero, so each block starts as the
        identity. (For tiny models pretrain.py changes this.)
        """
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=self.config.dim ** -0.5)

    def forward(self, ids, targets=None, doc_ids=None):
        """Logits (B, T, V) of ids (B, T); with targets (B, T), the sum of the cross-entropies (nats).
        Targets of -100 do not count.

        doc_ids (B, T) number the documents of a packed sequence: no token sees another document. Positions
        need not restart, since rotary attention depends on their differences alone.
        """
        x = self.hidden(ids, doc_ids)
        if targets is None:
            return self.lm_head(x)
        return head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def hidden(self, ids, doc_ids=None, positions=None, attend=None):
        """The last layer's normed output (B, T, C). Generation says the positions (T,), and how to attend."""
        if attend is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            attend = choose_attention(self.config, ids, positions, doc_ids)
        angles = positions[:, None] * self.frequencies.to(ids.device)                # (T, D/2)
        rope = angles.cos(), angles.sin()
        x = self.model["embed_tokens"](ids)                                          # (B, T, C)
        for layer in self.model["layers"]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend, use_reentrant=False)
            else:
                x = layer(x, rope, attend)
        return self.model["norm"](x)

    def flops_per_token(self, seq_len):
        """Of a training step (arXiv 2204.02311): 6 per weight that multiplies (4 if it is frozen), and
        12·layers·heads·head_dim·T for attention.
        """
        c = self.config
        flops = 12 * c.n_layers * c.n_heads * c.head_dim * seq_len
        for name, p in self.named_parameters():
            if p.dim() == 2 and (c.tie_embeddings or name != EMBEDDING):
                flops += (6 if p.requires_grad else 4) * p.numel()
        return flops


def head_loss(x, weight, targets):
    """Sum of the cross-entropies of x (N, C) times weight (V, C) against targets (N,), -100 for none.

    The logits are made for a few tokens at a time, CHUNK numbers at most, and again in the backward pass, so
    that never all of them are held. (F.linear_cross_entropy does this too, but not under torch.compile.)
    """
    def loss(x, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    size = max(1, CHUNK // len(weight))
    if len(x) <= size:
        return loss(x, targets)
    chunks = zip(x.split(size), targets.split(size))
    return sum(checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop=(), temperature=0.0, top_p=1.0, seed=0, choose=None):
    """Continue each prompt (a list of ids) by max_new_tokens, as far as the model's positions go, or until a
    stop: an id or a list of ids. Returns lists of ids, without the stop.

    temperature and top_p: see sample. choose(row, new_ids, logits) may pick a row's next id itself, for
    decoding under constraints. Raises ValueError for a prompt that is empty or too long.
    """
    context_length = model.config.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) <= context_length:
            raise ValueError(f"a prompt of {len(prompt)} tokens: empty, or more than the model's "
                             f"{context_length} positions")
    stops = [[s] if isinstance(s, int) else list(s) for s in stop]
    # The last token needs no position.
    limits = [min(max_new_tokens, context_length - len(p) + 1) for p in prompts]
    steps = max(limits)
    uniforms = torch.rand(len(prompts), steps, generator=torch.Generator().manual_seed(seed))
    output = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompts the rows of the batch continue
    batch = Batch(model)
    logits = batch.add(prompts, steps)
    for at in range(steps):
        chosen = sample(logits, temperature, top_p, uniforms[rows, at])
        for i, row in enumerate(rows):
            text = output[row]
            if len(text) == limits[row]:
                continue  # it has ended
            if choose:
                chosen[i] = choose(row, text, logits[i])
            text.append(chosen[i])
            for ending in stops:
                if text[-len(ending):] == ending:
                    del text[-len(ending):]
                    limits[row] = len(text)
                    break
        left = [i for i, row in enumerate(rows) if len(output[row]) < limits[row]]
        if not left:
            break
        if len(left) <= 0.75 * len(rows):  # else it is not worth the copying
            batch.keep(left)
            rows, chosen = [rows[i] for i in left], [chosen[i] for i in left]
        logits = batch.step(chosen)
    return output


# ============================================================================================================
# Below: checks of a Config; attention; checkpoints; generation; what is for tiny models only.

# ------------------------------------------------------------------------------------------------------------
# Configurations

HF_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}

PRESETS = {  # the vocabulary is the tokenizer's; sizes of 1b and 8b are those of Llama 3
    "tiny": dict(dim=256, n_layers=3, n_heads=4, n_kv_heads=4, hidden_dim=704, attention_bias=True),
    "124m": dict(),
    "1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, max_seq_len=8192,
               tie_embeddings=True),
    "8b": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336,
               max_seq_len=8192),
}

ROPE_SCALING = {  # the numbers that each type needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

ONLY = {  # of these keys this model has one value
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "quantization_config": None,
    "is_causal": True,
    "full_attention": None,  # rope_parameters by type of layer
}

ABSENT = {  # what Hugging Face takes where a key is absent
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "sliding_window": 4096,
}

ALLOWED = {  # values, or what a number stays below; 2**24 for other keys. It is beyond any model.
    "num_hidden_layers": 2**12,
    "rope_theta": math.inf,
    "rms_norm_eps": math.inf,
    "tie_word_embeddings": [False, True],
}


def read_config(directory):
    """The Config of a checkpoint directory, from its config.json. Raises ValueError naming the key and value
    that this model cannot represent.
    """
    config = read_json(Path(directory) / "config.json")
    # transformers 5 writes rope_parameters, but takes rope_scaling where both are there.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        rope = {"type": rope}
    given, length = ONLY | ABSENT, "original_max_position_embeddings"  # which goes before rope's
    given["rope scaling"] = rope.get("rope_type", rope.get("type", "default"))
    for part in (config, rope, {length: config.get(length)}):
        given |= {key: value for key, value in part.items() if value is not None}

    def read(key, allowed=2**24):
        """What a key holds: one of a list, or a number between 0 and `allowed`, whole where that is."""
        value = given.get(key)
        if isinstance(allowed, list):
            right = value in allowed
        else:
            right = type(value) in (int, type(allowed)) and 0 < value < allowed
        if not right:
            raise ValueError(f"config.json: {key} {value!r} is not supported")
        return value

    for key, value in ONLY.items():
        read(key, [value])
    kind, rope_type = read("model_type", FAMILIES), read("rope scaling", [*ROPE_SCALING])
    heads = read("num_attention_heads")
    given.setdefault("head_dim", 128 if kind == "qwen3" else read("hidden_size") // heads)
    if kind == "llama":
        given.setdefault("num_key_value_heads", heads)
    fields = {name: read(hf, ALLOWED.get(hf, 2**24)) for name, hf in HF_NAMES.items()}
    if heads % fields["n_kv_heads"] or fields["head_dim"] % 2:
        raise ValueError("config.json: num_attention_heads no multiple of num_key_value_heads, "
                         "or head_dim odd")
    numbers = {key: read(key, math.inf) for key in ROPE_SCALING[rope_type]}
    window = None  # of mistral; where it says null, none
    if kind == "mistral" and config.get("sliding_window", 0) is not None:
        window = read("sliding_window")
    read("layer_types", [None] if window else [None, ["full_attention"] * fields["n_layers"]])
    return Config(
        **fields,
        model_type=kind,
        attention_bias=read("attention_bias", [False, kind == "llama"]),
        rope_scaling={"rope_type": rope_type, **numbers} if numbers else None,
        sliding_window=window)


# ------------------------------------------------------------------------------------------------------------
# Attention: who sees whom, and how it is computed


def choose_attention(config, ids, positions, doc_ids=None):
    """How all layers attend in this forward pass: a function of q (B, H, T, D), k and v (B, K, T, D).

    A token sees itself and those before it. With doc_ids (B, T) it sees none of another document: by a mask
    in short sequences, in others because each document is computed for itself. positions: (T,).
    """
    T, window = len(positions), config.sliding_window
    if doc_ids is None and T <= SHORT and compiled_for_cpu(ids):
        doc_ids = torch.zeros_like(ids)  # a row is one document, for the sake of the mask
    if doc_ids is None:
        return partial(fused_attention, window=window)
    if T > SHORT:
        return partial(packed_attention, starts=document_starts(doc_ids), window=window)
    same = doc_ids[:, None, :, None] == doc_ids[:, None, None]                       # (B, 1, T, T)
    return partial(fused_attention, mask=same & seen_keys(positions, T, window))


def seen_keys(positions, size, window=None):
    """(..., size) Which of the keys at positions 0 to size - 1 the tokens at `positions` (...) see: their own
    and those before it, or the last `window` of these.
    """
    queries, keys = positions[..., None], torch.arange(size, device=positions.device)
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


def fused_attention(q, k, v, mask=None, window=None):
    """Of q (B, H, T, D) over k and v (B, K, T, D), K dividing H, in one kernel. Each token sees itself and
    those before it, or the last `window` of these, or where mask (T, T) or (B, 1, T, T) is true.
    """
    T = q.shape[2]
    if window and T > window:
        mask = seen_keys(torch.arange(T, device=q.device), T, window)
    if mask is not None and q.dtype == torch.bfloat16 and compiled_for_cpu(q):
        return compiled_attention(q, k, v, mask)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def document_starts(doc_ids):
    """Whether each token (B, T) is the first of its document; on the CPU, that no layer waits for a GPU."""
    return (doc_ids.diff(prepend=doc_ids[:, :1] - 1) != 0).cpu()


@torch.compiler.disable  # the number of documents differs from batch to batch
def packed_attention(q, k, v, starts, window=None):
    """Causal attention within each document of packed sequences: none sees another.

    starts (B, T): see document_starts.
    """
    B, H, T, D = q.shape
    bounds = starts.flatten().nonzero()[:, 0]  # where each document begins
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))                   # (B * T, H or K, D)
    attend = varlen_attention if q.is_cuda and v.dtype != torch.float32 else attention_by_document
    return attend(q, k, v, bounds, window).view(B, T, H, D).transpose(1, 2)


def varlen_attention(q, k, v, bounds, window):
    """On a GPU one call for all documents: FlashAttention with the bounds between them. q, k, v (N, H, D)."""
    bounds = F.pad(bounds, (0, 1), value=len(q))
    longest = bounds.diff().max().item()
    bounds = bounds.to(q.device, torch.int32, non_blocking=True)
    before = window - 1 if window else -1  # tokens that one sees before itself
    return varlen_attn(q.to(v.dtype), k.to(v.dtype), v, bounds, bounds, longest, longest,
                       window_size=(before, 0), enable_gqa=True)


def attention_by_document(q, k, v, bounds, window):
    """The same on a CPU, one call a document: there torch 2.13 has no varlen_attn, and of FlexAttention only
    the forward pass, a third slower.
    """
    in_a_row = (x.transpose(0, 1)[None] for x in (q, k, v))                          # (1, H or K, B * T, D)
    documents = zip(*(x.tensor_split(bounds[1:], 2) for x in in_a_row))
    outputs = [fused_attention(*document, window=window) for document in documents]
    return torch.cat(outputs, 2)[0].transpose(0, 1)


def rope_frequencies(config):
    """Angles (D/2,) by which a step of one position turns each pair of coordinates, scaled as config says."""
    coordinates = torch.arange(0, config.head_dim, 2, device="cpu")
    f = config.rope_theta ** (-coordinates / config.head_dim)
    if scaling := config.rope_scaling:
        slow = f / scaling["factor"]  # stretches the context: position interpolation (arXiv 2306.15595)
        if scaling["rope_type"] == "linear":
            return slow
        # Llama 3.1: only what turns slowly over the original context is stretched, with a ramp between.
        turns = f * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        return torch.lerp(slow, f, ((turns - low) / (high - low)).clamp(0, 1))
    return f


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, H, T, D), in Hugging Face's layout: pairs are i and i + D/2."""
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


CHUNK = 2**25  # logits that head_loss holds at a time


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face directory

EMBEDDING = "model.embed_tokens.weight"
SAFETENSORS_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save(model, directory, weights=None, shard_bytes=5 * 10**9):
    """Write config.json and the weights, in the type they have: model.safetensors, or several such files and
    their index.

    weights: by name, where the model itself holds only a part of each. The file that makes the directory
    valid appears last, whole or not at all.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())  # a tied head is listed once
    tensors = {name: (weights or parameters)[name].detach().cpu().contiguous() for name in parameters}
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write(directory / "config.json", [json.dumps(model.config.to_hf(dtype), indent=1).encode()])
    sizes = [t.nbytes for t in tensors.values()]
    shards = [dict(shard) for shard in in_groups(tensors.items(), sizes, shard_bytes)]
    single, index = "model.safetensors", directory / "model.safetensors.index.json"
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else single
        write_safetensors(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) == 1:
        index.unlink(missing_ok=True)
        return
    content = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    write(index, [json.dumps(content).encode()])
    (directory / single).unlink(missing_ok=True)


def in_groups(items, sizes, limit):
    """Lists of consecutive items whose sizes add up to `limit` at most; a larger one has a list of its own.

    >>> in_groups("abcd", [2, 3, 9, 1], 5)
    [['a', 'b'], ['c'], ['d']]
    """
    groups, total = [[]], 0
    for item, size in zip(items, sizes):
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return groups


def load(directory, device="cpu", dtype=torch.float32):
    """The Transformer in a checkpoint directory, its weights as `dtype` (None: as they are in the file).

    Raises ValueError naming the file, key or tensor that is missing, unknown, misshapen or not supported.
    """
    directory = Path(directory)
    config = read_config(directory)
    files, index = [directory / "model.safetensors"], directory / "model.safetensors.index.json"
    if index.exists() and not files[0].exists():
        try:
            files = sorted({directory / Path(file).name for file in read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: has no weight_map of tensors to files") from None
    with torch.device("meta"):
        model = Transformer(config)
    tensors = {
        name: tensor.to(device, dtype)
        for file in files
        for name, tensor in read_safetensors(file)
        if not name.endswith("rotary_emb.inv_freq")  # of old checkpoints; follows from the config
    }
    if config.tie_embeddings and "lm_head.weight" in tensors:  # the same matrix again, or the only time
        head = tensors.pop("lm_head.weight")
        if not torch.equal(tensors.setdefault(EMBEDDING, head), head):
            raise ValueError(f"{directory}: the head differs from the embedding, but config.json ties them")
    found = {name: f"has shape {tuple(t.shape)}" for name, t in tensors.items()}
    expected = {name: f"has shape {tuple(p.shape)}" for name, p in model.named_parameters()}
    for name, _ in sorted(found.items() ^ expected.items()):
        here, there = found.get(name, "is missing"), expected.get(name, "is unknown")
        raise ValueError(f"{directory}: tensor {name} {here}; in this model, {name} {there}")
    model.load_state_dict(tensors, assign=True, strict=False)
    model.frequencies = model.frequencies.to(device)
    model.tie_weights()
    return model.requires_grad_()


@torch.no_grad()
def grow_vocabulary(model, size, pieces):
    """Make room for `size` tokens. The row of an added token starts as the mean of its pieces' rows, other
    rows as the mean of all.

    pieces: {id of an added token: ids of its text in the vocabulary as it was}. From the mean of all rows, a
    token would start as likely as the average one, and a short tuning would hardly ever write it.
    """
    for layer in (model.model["embed_tokens"], model.lm_head):
        old = layer.weight
        new = []
        for i in range(len(old), size):
            known = [piece for piece in pieces.get(i, []) if piece < len(old)]
            new.append(old[known or slice(None)].mean(0))
        layer.weight = nn.Parameter(torch.cat([old, torch.stack(new)]))
    model.tie_weights()
    model.config.vocab_size = size


def write(path, pieces):
    """Write pieces of bytes to a file, which appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path):
    """The JSON object in a file. Raises ValueError if there is none."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint directory has one") from None
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path}: not a JSON object")


def write_safetensors(tensors, path):
    """The safetensors format: the header's length (little-endian uint64), the header as JSON, the bytes.

    The CRC-32 of the bytes stands in the header, where other readers pass over it.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, data, end, crc = {}, [], 0, 0
    for name, t in tensors.items():
        data.append(t.view(-1).view(torch.uint8).numpy())
        crc = zlib.crc32(data[-1], crc)
        start, end = end, end + t.nbytes
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt", "crc32": str(crc)}, **header}).encode()
    # Mapped tensors begin at 64 bytes, as MKL wants them for equal rounding.
    text += b" " * (-(8 + len(text)) % 64)
    write(path, [len(text).to_bytes(8, "little"), text, *data])


def read_safetensors(path):
    """[(name, tensor)] of a safetensors file, mapped into memory: its bytes are read when first used, or here
    where the header has their checksum.

    Raises ValueError if the file is not what its header says: tensors must follow each other and fill it.
    """
    try:
        content = np.memmap(path, mode="c")  # what is written to a tensor stays private
        size = 8 + int.from_bytes(content[:8], "little")
        header, content = json.loads(content[8:size][:10**8].tobytes()), content[size:]
        crc = header.pop("__metadata__", {}).get("crc32")
        tensors, at = [], 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if start != at:
                raise ValueError
            data = torch.from_numpy(content[start:end]).view(SAFETENSORS_TYPES[entry["dtype"]])
            tensors.append((name, data.view(entry["shape"])))
            at = end
        if at != len(content):
            raise ValueError
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception:  # whatever a false header leads to
        known = ", ".join(SAFETENSORS_TYPES)
        raise ValueError(f"{path}: truncated, or not a safetensors file of {known} only") from None
    if crc is not None and crc != str(zlib.crc32(content)):
        raise ValueError(f"{path}: damaged: its bytes do not have the checksum that its header gives")
    return tensors


# ------------------------------------------------------------------------------------------------------------
# Generation

PREFILL = 2048  # tokens of prompts that are read at a time: what they activate should fit a CPU's cache


def prefill(model, prompts, cache):
    """Read prompts (lists of ids) as the documents of one packed sequence, without padding. Returns the
    logits (N, V) of what follows each.

    cache: see Batch, with a row for each prompt; their keys and values are put in.
    """
    tokens = [(token, row, at) for row, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
    ids, rows, positions = torch.tensor(tokens, device=cache.device).T               # (T,) each
    layers, starts = iter(cache), document_starts(rows[None])

    def attend(q, k, v):
        next(layers)[:, rows, :, positions] = torch.cat([k, v]).permute(2, 0, 1, 3)  # (T, 2, K, D)
        return packed_attention(q, k, v, starts, model.config.sliding_window)

    x = model.hidden(ids[None], positions=positions, attend=attend)[0]               # (T, C)
    return model.lm_head(x[starts[0].roll(-1)]).float()  # after the last token of each


def decode_one_token(model, ids, positions, cache):
    """The logits (B, V) of what follows a token a row: ids and positions (B,).

    cache: see Batch. The tokens' keys and values are put in.
    """
    layers, rows = iter(cache), torch.arange(len(ids), device=ids.device)
    mask = seen_keys(positions[:, None, None], cache.shape[4], model.config.sliding_window)  # (B, 1, 1, S)

    def attend(q, k, v):
        layer = next(layers)
        layer[:, rows, :, positions] = torch.cat([k, v]).permute(2, 0, 1, 3)         # (B, 2, K, D)
        # (B, K, H/K, D): the heads of a group see the same.
        q = q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1))
        y = F.scaled_dot_product_attention(q, *layer, mask)
        return y.flatten(1, 2).transpose(0, 1)[None]

    x = model.hidden(ids[None], positions=positions, attend=attend)[0]               # (B, C)
    return model.lm_head(x).float()


class Batch:
    """Texts that are continued together, a token of each at a time, in inference mode. Others may join, and
    those that have ended leave. Each is continued as it would be alone.
    """

    def __init__(self, model):
        c = model.config
        self.model, self.lengths = model, []  # tokens of each row
        # Keys and values (layers, 2, B, K, S, D), each at its token's position.
        self.cache = model.lm_head.weight.new_zeros(c.n_layers, 2, 0, c.n_kv_heads, 0, c.head_dim)

    def resize(self, size, new_rows=0):
        """Make room for `size` tokens a row, and for new rows below."""
        self.cache = F.pad(self.cache, (0, 0, 0, size - self.cache.shape[4], 0, 0, 0, new_rows))

    def add(self, prompts, spare=64):
        """Read prompts (lists of ids), as rows below those there are. Returns the logits (N, V) after each.

        spare: tokens that will follow; more may, but then the cache has to grow.
        """
        lengths, logits, row = [len(prompt) for prompt in prompts], [], len(self.lengths)
        self.lengths += lengths
        self.resize(max(self.lengths) + spare, len(prompts))
        for group in in_groups(prompts, lengths, PREFILL):
            logits.append(prefill(self.model, group, self.cache[:, :, row:]))
            row += len(group)
        return torch.cat(logits)

    def step(self, ids):
        """Go on by a token a row. Returns the logits (B, V) of what follows."""
        ids, positions = torch.tensor([ids, self.lengths], device=self.cache.device)
        self.lengths = [n + 1 for n in self.lengths]
        size = max(self.lengths)
        if size > self.cache.shape[4]:
            self.resize(size + 16 + size // 4)
        return decode_one_token(self.model, ids, positions, self.cache[..., :size, :])

    def keep(self, rows):
        """Let go of all rows but these."""
        self.lengths = [self.lengths[i] for i in rows]
        self.cache = self.cache[:, :, rows]


def sample(logits, temperature, top_p, uniforms):
    """A token a row, a list of ids, from logits (B, V). temperature, top_p and uniforms (in [0, 1)): a number
    for all rows, or one a row.

    Temperature 0 takes the likeliest; else one is drawn from the fewest tokens that have probability top_p
    together (arXiv 1904.09751).
    """
    if not np.any(temperature):
        return logits.argmax(-1).tolist()
    temperature, top_p, uniforms = (                                                 # (B or 1, 1) each
        torch.as_tensor(x, dtype=torch.float32, device=logits.device).clamp(min=1e-9).view(-1, 1)
        for x in (temperature, top_p, uniforms))
    p, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    p = p * (p.cumsum(-1) - p < top_p)
    total = p.cumsum(-1)
    drawn = uniforms * total[:, -1:] * (temperature > 1e-9)
    place = (total > drawn).int().argmax(-1, keepdim=True)  # the first that reaches beyond what is drawn
    return order.gather(1, place)[:, 0].tolist()


# ------------------------------------------------------------------------------------------------------------
# For tiny models only, which are trained on a CPU

# Sequences up to this are packed by a mask, longer ones document by document: on a CPU a mask lets
# torch.compile keep a layer in one piece, and from 1,024 on loses to the pieces (tests/bench.py packing).
SHORT = 768


def compiled_for_cpu(x):
    """Whether torch.compile is at work, for a CPU."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def compiled_attention(q, k, v, mask, block=128):
    """As fused_attention under a causal mask, a block of queries at a time over the keys up to its end: what
    torch.compile makes of this on a CPU takes half the time of the bfloat16 kernel that is there
    (tests/bench.py attention).
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))        # (B, H, T, D)
    blocks = []
    for a in range(0, q.shape[2], block):
        b = a + block
        scores = (q[:, :, a:b] @ k[:, :, :b].mT).float() * q.shape[3] ** -0.5        # (B, H, b - a, b)
        weights = scores.masked_fill(~mask[..., a:b, :b], -math.inf).softmax(-1)
        blocks.append(weights.to(v.dtype) @ v[:, :, :b])
    return torch.cat(blocks, 2)


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = Transformer(Config(**preset))
        print(f"{name:<8}{sum(p.numel() for p in model.parameters()):>16,} parameters: {model.config}")
