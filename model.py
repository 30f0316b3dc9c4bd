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
import mmap
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Without it, MKL does not promise that two runs round alike. It costs nothing measurable.
os.environ.setdefault("MKL_CBWR", "AUTO")

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",  # has biases on q, k and v
    "qwen3": "Qwen3ForCausalLM",  # has norms on q and k
}


@dataclasses.dataclass
class Config:
    """A model's shape, by the field's names (HF_NAMES has Hugging Face's). The default is the preset 124m."""
    vocab_size: int = 128_256
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
        """The config.json that Hugging Face reads."""
        config = {
            "architectures": [FAMILIES[self.model_type]],
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

    @classmethod
    def from_hf(cls, config):
        """From the contents of a config.json.

        Raises ValueError naming the key and value that this model cannot represent.
        """
        return cls(**checked_fields(config))


class Attention(nn.Module):
    """Rotary, grouped-query self-attention: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        everywhere = c.model_type == "llama" and c.attention_bias
        bias = everywhere or c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=everywhere)
        if c.model_type == "qwen3":
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps), nn.RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, rope, attend=None):
        """rope: cosines and sines (B or 1, 1, T, D/2). attend: see choose_attention; by default causal."""
        B, T, _ = x.shape
        c = self.config
        q = self.q_proj(x).view(B, T, -1, c.head_dim)                                # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, c.head_dim)                                # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)                # (B, K, T, D)
        if c.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), *rope)                                         # (B, H, T, D)
        k = rotate(k.transpose(1, 2), *rope)                                         # (B, K, T, D)
        attend = attend or partial(causal_attention, window=c.sliding_window)
        y = attend(q, k, v)                                                          # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward layer: (B, T, C) to (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

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

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
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
        if not self.lm_head.weight.is_meta:  # else load() puts the weights in
            self.init_weights()

    def tie_weights(self):
        """Where the config says so, head and embedding are one matrix."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    @torch.no_grad()
    def init_weights(self):
        """Normal with deviation 1/sqrt(dim).

        What writes to the residual stream starts at zero, so every block does nothing.
        """
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=self.config.dim ** -0.5)

    def forward(self, ids, targets=None, doc_ids=None):
        """Logits (B, T, V) of ids (B, T); with targets (B, T), the sum of the cross-entropies (nats) where
        target >= 0.

        doc_ids (B, T) number the documents of a packed sequence: no token sees another document. Positions
        need not restart, since rotary attention depends on their differences alone.
        """
        x = self.hidden(ids, doc_ids)
        if targets is None:
            return self.lm_head(x)
        return head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def hidden(self, ids, doc_ids=None, positions=None, attends=None):
        """The last layer's normed output (B, T, C).

        For generation: positions (B, T), and attends, for each layer the function of q, k and v that attends.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)[None]  # (1, T)
            attends = [choose_attention(self.config, positions, doc_ids)] * self.config.n_layers
        angles = (positions[..., None] * self.frequencies.to(ids.device))[:, None]   # (B, 1, T, D/2)
        rope = angles.cos(), angles.sin()
        x = self.model["embed_tokens"](ids)                                          # (B, T, C)
        for layer, attend in zip(self.model["layers"], attends):
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
        matrices = {name: p for name, p in self.named_parameters() if p.dim() == 2}
        flops = {name: (6 if p.requires_grad else 4) * p.numel() for name, p in matrices.items()}
        head = flops.pop(EMBEDDING) * c.tie_embeddings
        return sum(flops.values()) + head + 12 * c.n_layers * c.n_heads * c.head_dim * seq_len


def head_loss(x, weight, targets):
    """Sum of the cross-entropies of x (N, C) times weight (V, C) against targets (N,), -100 for none.

    The logits are made for a few tokens at a time, CHUNK numbers at most, and again in the backward pass, so
    that never all of them are held. (F.linear_cross_entropy does this too, but not under torch.compile.)
    """
    def loss(x, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-100, reduction="sum")

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
    longest, context_length = max(map(len, prompts)), model.config.max_seq_len
    if longest > context_length:
        raise ValueError(f"a prompt of {longest} tokens does not fit the model's {context_length} positions")
    if not all(prompts):
        raise ValueError("a prompt is empty")
    stops = [list(s) if isinstance(s, (list, tuple)) else [s] for s in stop]
    # The last token needs no position.
    limits = [min(max_new_tokens, context_length - len(p) + 1) for p in prompts]
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts), max(limits), generator=generator).tolist()
    output = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompts the rows of the batch continue
    running = set(rows)
    batch = Batch(model)
    logits = batch.add(prompts, max(limits))
    for at in range(max(limits)):
        drawn = [uniforms[row][at] for row in rows]
        chosen = sample(logits, [temperature] * len(rows), [top_p] * len(rows), drawn)
        for i, row in enumerate(rows):
            if row in running:
                if choose:
                    chosen[i] = choose(row, output[row], logits[i])
                output[row].append(chosen[i])
                ended = next((s for s in stops if output[row][-len(s):] == s), [])
                if ended or len(output[row]) == limits[row]:
                    running.remove(row)
                del output[row][len(output[row]) - len(ended):]
        if not running:
            break
        left = [i for i, row in enumerate(rows) if row in running]
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

LARGEST = {"n_layers": 2**12, "head_dim": 2**12}  # beyond any model; of other fields 2**24

ROPE_SCALING = {  # the numbers that each type needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def checked_fields(config):
    """The fields of Config by name, from the contents of a config.json. Raises ValueError as from_hf."""
    def require(right, fault):
        if not right:
            raise ValueError(f"config.json: {fault}")

    kind = config.get("model_type")
    accepted = {
        "model_type": tuple(FAMILIES),
        "hidden_act": ("silu", None),
        "mlp_bias": (False, None),
        "attention_bias": (False, None, kind == "llama"),
        "use_sliding_window": (False, None),
        "partial_rotary_factor": (1, None),
        "quantization_config": (None,),
    }
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5 has the former
    require(isinstance(rope, dict), f"rope scaling {rope!r} is not an object")
    for key, values in accepted.items():
        value = config.get(key)
        require(value in values, f"{key} {value!r} is not supported, only {', '.join(map(repr, values))}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type in tuple(ROPE_SCALING) and rope.get("partial_rotary_factor", 1) == 1,
            f"rope scaling {rope!r} is not supported; linear and llama3 are")

    known = {name: config[hf] for name, hf in HF_NAMES.items() if config.get(hf) is not None}
    if "rope_theta" in rope:
        known.setdefault("rope_theta", rope["rope_theta"])
    for field in dataclasses.fields(Config):
        if field.name in known:
            value = known[field.name]
            require(sensible(value, field), f"{HF_NAMES[field.name]} {value!r} is no model's")
    heads = known.get("n_heads", 1)
    absent = {  # what Hugging Face takes where a key is absent
        "rope_theta": 10000.0,
        "tie_embeddings": False,
        "norm_eps": 1e-6,
        "head_dim": 128 if kind == "qwen3" else known.get("dim", 0) // heads,
    }
    if kind == "llama":
        absent["n_kv_heads"] = heads
    known = absent | known
    missing = [hf for name, hf in HF_NAMES.items() if name not in known]
    require(not missing, f"{', '.join(missing)} missing")
    require(known["n_heads"] % known["n_kv_heads"] == 0 and known["head_dim"] % 2 == 0,
            "num_attention_heads no multiple of num_key_value_heads, or head_dim odd")

    numbers = {key: rope.get(key) for key in ROPE_SCALING[rope_type]}
    wrong = [key for key, value in numbers.items() if type(value) not in (int, float) or value <= 0]
    require(not wrong, f"{', '.join(wrong)} of the rope scaling: no number above 0")
    window = config.get("sliding_window", 4096) if kind == "mistral" else None
    require(window is None or type(window) is int and window > 0, f"sliding_window {window!r} is no model's")
    return known | {
        "model_type": kind,
        "attention_bias": bool(config.get("attention_bias")),
        "rope_scaling": {"rope_type": rope_type, **numbers} if numbers else None,
        "sliding_window": window,
    }


def sensible(value, field):
    """Whether a value from outside can be that of a field of Config."""
    if field.type is bool:
        return type(value) is bool
    if field.type is float:
        return type(value) in (int, float) and 0 < value < math.inf
    return type(value) is int and 0 < value <= LARGEST.get(field.name, 2**24)


# ------------------------------------------------------------------------------------------------------------
# Attention: who sees whom, and how it is computed


def choose_attention(config, positions, doc_ids=None):
    """How all layers attend in this forward pass: a function of q (B, H, T, D), k and v (B, K, T, D).

    positions: (1, T). With doc_ids (B, T) no token sees another document.
    """
    T, window = positions.shape[1], config.sliding_window
    if T <= SHORT and (doc_ids is not None or compiled_for_cpu(positions)):
        mask = is_seen(positions.mT, positions, window)                              # (T, T)
        if doc_ids is not None:
            mask = mask & (doc_ids[:, :, None] == doc_ids[:, None, :])               # (B, T, T)
        return partial(masked_attention, mask=mask.view(-1, 1, T, T))
    if doc_ids is not None:
        return partial(packed_attention, starts=document_starts(doc_ids), window=window)
    return partial(causal_attention, window=window)


def is_seen(query, key, window=None):
    """Whether the token at position `query` sees the one at `key`: it sees itself and those before it, or the
    last `window` of them.
    """
    seen = key <= query
    return seen & (key > query - window) if window else seen


def fused_attention(q, k, v, mask=None, causal=False):
    """Of q (B, H, T, D) over k, v (B, K, S, D), K dividing H; mask is true where a key is seen."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def causal_attention(q, k, v, window=None):
    """Each token sees itself and those before it, or the last `window` of them. Without a mask of T x T."""
    T = q.shape[2]
    if window is None or T <= window:
        return fused_attention(q, k, v, causal=True)
    # By blocks of as many queries as the window has tokens: a block sees its own keys and the block before.
    position, blocks = torch.arange(T, device=q.device), []
    for start in range(0, T, window):
        queries, keys = slice(start, start + window), slice(max(0, start - window), start + window)
        mask = is_seen(position[queries, None], position[keys], window)              # (up to W, up to 2W)
        blocks.append(fused_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask))
    return torch.cat(blocks, 2)


def document_starts(doc_ids):
    """Whether each token (B, T) is the first of its document; on the CPU, that no layer waits for a GPU."""
    return F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True).cpu()


@torch.compiler.disable  # the number of documents differs from batch to batch
def packed_attention(q, k, v, starts, window=None):
    """Causal attention within each document of packed sequences: none sees another.

    starts (B, T): see document_starts. One fused call a document: on a CPU torch 2.13 has no varlen_attn, and
    of FlexAttention only the forward pass, a third slower.
    """
    B, H, T, D = q.shape
    bounds = starts.flatten().nonzero()[1:, 0]
    in_a_row = (x.transpose(0, 1).reshape(1, -1, B * T, D) for x in (q, k, v))
    documents = zip(*(x.tensor_split(bounds, 2) for x in in_a_row))
    y = torch.cat([causal_attention(*document, window) for document in documents], 2)
    return y.view(H, B, T, D).transpose(0, 1)


def rope_frequencies(config):
    """Angles (D/2,) by which a step of one position turns each pair of coordinates, scaled as config says."""
    coordinates = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
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
    weights = weights or dict(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]  # a tied head is listed once
    tensors = {name: weights[name].detach().cpu().contiguous() for name in names}
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write(directory / "config.json", [json.dumps(model.config.to_hf(dtype), indent=1).encode()])
    shards = in_groups(names, [t.nbytes for t in tensors.values()], shard_bytes)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if len(shards) == 1:
        write_safetensors(tensors, single)
        index.unlink(missing_ok=True)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors({name: tensors[name] for name in shard}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    write(index, [json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}).encode()])
    single.unlink(missing_ok=True)


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
    config = Config.from_hf(read_json(directory / "config.json"))
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    files = [single]
    if index.exists() and not single.exists():
        try:
            files = sorted({directory / Path(file).name for file in read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: has no weight_map of tensors to files") from None
    with torch.device("meta"):
        model = Transformer(config)
    expected, tensors = dict(model.named_parameters()), {}
    for file in files:
        for name, tensor in read_safetensors(file):
            if name.endswith("rotary_emb.inv_freq"):
                continue  # of old checkpoints; follows from the config
            if name == "lm_head.weight" and config.tie_embeddings:
                name = EMBEDDING  # the same matrix again, or the only time
            if name not in expected:
                raise ValueError(f"{file}: tensor {name} is unknown to this model")
            if tensor.shape != expected[name].shape:
                shape = tuple(expected[name].shape)
                raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}")
            tensor = tensor.to(device, dtype or tensor.dtype)
            if name == EMBEDDING and name in tensors and not torch.equal(tensors[name], tensor):
                raise ValueError(f"{file}: the head differs from the embedding, but config.json ties them")
            tensors[name] = tensor
    if missing := sorted(expected.keys() - tensors.keys()):
        more = f", and {len(missing) - 1} more" * (len(missing) > 1)
        raise ValueError(f"{directory}: tensor {missing[0]} is missing{more}")
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    return model.requires_grad_()


@torch.no_grad()
def grow_vocabulary(model, size, pieces):
    """Make room for `size` tokens. The row of an added token starts as the mean of its pieces' rows, other
    rows as the mean of all.

    pieces: {id of an added token: ids of its text in the vocabulary as it was}. From the mean of all rows, a
    token would start as likely as the average one, and a short tuning would hardly ever write it.
    """
    for layer in [model.model["embed_tokens"]] + [model.lm_head] * (not model.config.tie_embeddings):
        old = layer.weight.detach()
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint directory has one") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def write_safetensors(tensors, path):
    """The safetensors format: the header's length (little-endian uint64), the header as JSON, the bytes."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        end = offset + t.nbytes
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # Mapped tensors begin at 64 bytes, as MKL wants them for equal rounding.
    text += b" " * (-(8 + len(text)) % 64)
    data = [t.view(-1).view(torch.uint8).numpy().data for t in tensors.values()]
    write(path, [len(text).to_bytes(8, "little"), text, *data])


def read_safetensors(path):
    """Yields the name and tensor of each entry of a safetensors file, mapped into memory: its bytes are read
    when first used.

    Raises ValueError if the file is not what its header says: entries must follow each other and fill it.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint directory has it") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    with file:
        total = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size)) if 8 + size <= total and size <= 10**8 else None
            header.pop("__metadata__", None)
            entries = sorted(
                (*map(int, e["data_offsets"]), name, str(e["dtype"]), [int(d) for d in e["shape"]])
                for name, e in header.items()
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise ValueError(f"{path}: not a safetensors file, or one cut off in its header") from None
        at, room = 0, total - 8 - size
        for start, end, name, kind, shape in entries:
            if kind not in SAFETENSORS_TYPES:
                known = ", ".join(SAFETENSORS_TYPES)
                raise ValueError(f"{path}: tensor {name} has dtype {kind} ({known} are read)")
            dtype, count = SAFETENSORS_TYPES[kind], math.prod(shape)
            whole = end - start == count * dtype.itemsize and min(shape, default=0) >= 0
            if start != at or end > room or not whole:
                raise ValueError(f"{path}: tensor {name} is truncated or misplaced: "
                                 f"bytes {start} to {end} of {room}, shape {shape}")
            at, tensor = end, torch.empty(0, dtype=dtype)
            if count:
                start, end = start + 8 + size, end + 8 + size
                page = start - start % mmap.ALLOCATIONGRANULARITY
                # What is written to a mapped tensor stays private.
                mapped = mmap.mmap(file.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
                tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start - page)
            yield name, tensor.view(shape)
        if at != room:
            raise ValueError(f"{path}: {room - at} bytes belong to no tensor")


# ------------------------------------------------------------------------------------------------------------
# Generation

PREFILL = 2048  # tokens of prompts that are read at a time: what they activate should fit a CPU's cache


def prefill(model, prompts):
    """Read prompts (lists of ids) as the documents of one packed sequence, without padding.

    Returns the logits (N, V) of what follows each, and for every layer the keys of each prompt, N tensors
    (K, tokens, D), and then the values.
    """
    lengths = [len(prompt) for prompt in prompts]
    keys_values = []

    def attend(q, k, v):
        keys_values.extend(x[0].split(lengths, 1) for x in (k, v))
        return packed_attention(q, k, v, starts, model.config.sliding_window)

    with model.lm_head.weight.device:
        ids = torch.tensor([[i for prompt in prompts for i in prompt]])              # (1, T)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]              # (1, T)
        last = torch.tensor(lengths).cumsum(0) - 1                                   # (N,)
    starts = (positions == 0).cpu()
    x = model.hidden(ids, positions=positions, attends=[attend] * model.config.n_layers)[0, last]
    return model.lm_head(x).float(), keys_values


def decode_one_token(model, ids, positions, cache, mask):
    """The logits (B, V) of what follows a token a row: ids and positions (B, 1).

    cache: keys and values in turn, of each layer (B, K, S, D). Those of the tokens are put at the last place
    that mask (B, 1, 1, up to S) has; it is -inf where a row has no token.
    """
    size = mask.shape[-1]

    def attend(q, k, v, keys, values):
        keys[:, :, size - 1], values[:, :, size - 1] = k[:, :, 0], v[:, :, 0]
        return fused_attention(q, keys[:, :, :size], values[:, :, :size], mask)

    layers = zip(cache[::2], cache[1::2])
    attends = [partial(attend, keys=keys, values=values) for keys, values in layers]
    x = model.hidden(ids, positions=positions, attends=attends)
    return model.lm_head(x[:, 0]).float()


class Batch:
    """Texts that are continued together, a token of each at a time, in inference mode. Others may join, and
    those that have ended leave.

    Each is continued as it would be alone. In the cache, all rows end at the same place, `size`, so that all
    put their next token at one; every row has its own positions.
    """

    def __init__(self, model):
        c, weight = model.config, model.lm_head.weight
        self.model, self.size = model, 0
        self.lengths = torch.zeros(0, dtype=torch.long, device=weight.device)  # (B,): tokens of each row
        # Keys and values in turn, of each layer (B, K, S, D).
        self.cache = [weight.new_zeros(0, c.n_kv_heads, 0, c.head_dim) for _ in range(2 * c.n_layers)]

    def resize(self, rows, size, spare, new_lengths=()):
        """Keep these rows, so that they end at place `size`, with room for `spare` tokens. Below come new
        rows of these lengths.
        """
        padding = (0, 0, size - self.size, spare, 0, 0, 0, len(new_lengths))
        for i, x in enumerate(self.cache):
            self.cache[i] = F.pad(x[rows, :, :self.size], padding)
        self.size = size
        self.lengths = torch.cat([self.lengths[rows], self.lengths.new_tensor(new_lengths)])
        first = (size - self.lengths)[:, None, None, None]                           # where each row begins
        places = torch.arange(size + spare, device=first.device)
        self.mask = torch.where(places < first, -math.inf, 0.0).to(self.cache[0].dtype)  # (B, 1, 1, S)

    def add(self, prompts, spare=64):
        """Read prompts (lists of ids), as rows below those there are. Returns the logits (N, V) after each.

        spare: tokens that will follow; more may, but then the cache has to grow.
        """
        lengths = [len(prompt) for prompt in prompts]
        row, logits = len(self.lengths), []
        self.resize(slice(None), max(self.size, *lengths), spare, lengths)
        for group in in_groups(prompts, lengths, PREFILL):
            group_logits, keys_values = prefill(self.model, group)
            logits.append(group_logits)
            for x, new in zip(self.cache, keys_values):
                for i, prompt in enumerate(new, row):                                # (K, tokens, D)
                    x[i, :, self.size - prompt.shape[1]:self.size] = prompt
            row += len(group)
        return torch.cat(logits)

    def step(self, ids):
        """Go on by a token a row. Returns the logits (B, V) of what follows."""
        if self.size == self.mask.shape[-1]:
            self.resize(slice(None), self.size, 16 + self.size // 4)
        self.size += 1
        if window := self.model.config.sliding_window:
            self.mask[..., :max(0, self.size - window)] = -math.inf
        ids = self.lengths.new_tensor(ids)[:, None]
        mask = self.mask[..., :self.size]
        logits = decode_one_token(self.model, ids, self.lengths[:, None], self.cache, mask)
        self.lengths += 1
        return logits

    def keep(self, rows):
        """Let go of all rows but these."""
        size = max(self.lengths[rows].tolist(), default=0)
        self.resize(rows, size, self.mask.shape[-1] - self.size)


def sample(logits, temperature, top_p, uniforms):
    """A token a row, a list of ids, from logits (B, V). temperature, top_p and uniforms (in [0, 1)): a list
    each, a number a row.

    Temperature 0 takes the likeliest; else one is drawn from the fewest tokens that have probability top_p
    together (arXiv 1904.09751).
    """
    likeliest = logits.argmax(-1)
    if not any(temperature):
        return likeliest.tolist()
    options = torch.tensor([temperature, top_p, uniforms], dtype=torch.float32, device=logits.device)
    temperature, top_p, uniforms = options[..., None]                                # (B, 1) each
    logits = logits - logits.amax(-1, keepdim=True)  # else a small temperature would make them infinite
    p, order = (logits / temperature.clamp(min=1e-9)).softmax(-1).sort(descending=True)
    total = p.cumsum(-1)
    kept = (total - p < top_p).sum(-1, keepdim=True).clamp(min=1)                    # (B, 1)
    place = (total <= uniforms * total.gather(1, kept - 1)).sum(-1, keepdim=True)
    drawn = order.gather(1, torch.minimum(place, kept - 1))
    return torch.where(temperature > 0, drawn, likeliest[:, None])[:, 0].tolist()


# ------------------------------------------------------------------------------------------------------------
# For tiny models only, which are trained on a CPU

# Sequences up to this are packed by a mask, longer ones document by document: on a CPU a mask lets
# torch.compile keep a layer in one piece, and from 1,024 on loses to the pieces (tests/bench.py packing).
SHORT = 768


def compiled_for_cpu(x):
    """Whether torch.compile is at work, for a CPU."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def masked_attention(q, k, v, mask):
    """Fused attention under a causal mask (B or 1, 1, T, T), or what is faster on a CPU in bfloat16."""
    if q.dtype == torch.bfloat16 and compiled_for_cpu(q):
        return compiled_attention(q, k, v, mask)
    return fused_attention(q, k, v, mask)


def compiled_attention(q, k, v, mask, block=128):
    """The same, a block of queries at a time over the keys up to its end: what torch.compile makes of this on
    a CPU takes half the time of the bfloat16 kernel that is there (tests/bench.py attention).
    """
    T, D = q.shape[2:]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))        # (B, H, T, D)
    blocks = []
    for a in range(0, T, block):
        b = min(T, a + block)
        scores = (q[:, :, a:b] @ k[:, :, :b].mT).float() * D ** -0.5                 # (B, H, b - a, b)
        weights = scores.masked_fill(~mask[:, :, a:b, :b], -math.inf).softmax(-1)
        blocks.append(weights.to(v.dtype) @ v[:, :, :b])
    return torch.cat(blocks, 2)


if __name__ == "__main__":
    vocab_size = int(sys.argv[2]) if sys.argv[1:2] == ["--vocab-size"] else 128_256
    print(f"{'preset':<8} {'layers':>6} {'dim':>6} {'heads':>6} {'kv':>4} {'parameters':>16}"
          "   (vocabulary of --vocab-size, default 128,256)")
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = Transformer(Config(vocab_size=vocab_size, **preset))
        c = model.config
        count = sum(p.numel() for p in model.parameters())
        print(f"{name:<8} {c.n_layers:>6} {c.dim:>6} {c.n_heads:>6} {c.n_kv_heads:>4} {count:>16,}")
