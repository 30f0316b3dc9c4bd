"""Step 3 of 6: the model, a decoder-only transformer in the manner of Llama, from scratch.

In and out: a Hugging Face checkpoint directory (config.json and safetensors, in one file or several), which transformers
loads as it is: of Llama (2 to 3.2, TinyLlama, SmolLM), Mistral, Qwen2, Qwen2.5 or Qwen3, without conversion.
Run `python model.py` for a table of the presets; the other scripts import Config, Transformer, load, save and generate.

RMSNorm (arXiv 1910.07467) before each sub-layer, rotary positions (arXiv 2104.09864), grouped-query attention
(arXiv 2305.13245), SwiGLU (arXiv 2002.05202), no dropout. Parameters bear Hugging Face's names, so there is nothing to convert.

Shapes: B sequences, T tokens, C = dim, H query heads, K key-value heads, D = head_dim, V = vocab_size.
"""
import dataclasses
import json
import math
import mmap
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("MKL_CBWR", "AUTO")  # else MKL does not promise that two runs round alike; costs nothing measurable

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclasses.dataclass
class Config:
    """A model's shape, by the field's names; Hugging Face's are in HF_NAMES. The default is the tiny preset."""
    vocab_size: int = 2048
    dim: int = 256
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 4
    head_dim: int = 64
    hidden_dim: int = 704               # of the feed-forward layer
    max_seq_len: int = 2048
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    model_type: str = "llama"           # one of FAMILIES: qwen2 has biases on q, k and v, qwen3 norms on q and k
    attention_bias: bool = True         # of llama: biases on q, k, v and o, which Meta's models have not
    rope_scaling: dict | None = None    # {"rope_type": "linear", "factor"} or Llama 3.1's, as config.json has it
    sliding_window: int | None = None   # of mistral: how many tokens one sees, itself included

    def to_hf(self, dtype="float32"):
        """The config.json that Hugging Face reads."""
        config = {"architectures": [FAMILIES[self.model_type]], "model_type": self.model_type, "hidden_act": "silu", "torch_dtype": dtype,
                  **{hf: getattr(self, name) for name, hf in HF_NAMES.items()}}
        if self.rope_scaling:
            config["rope_scaling"] = self.rope_scaling
        if self.model_type == "llama":
            config["attention_bias"] = self.attention_bias
        if self.model_type == "mistral":
            config["sliding_window"] = self.sliding_window
        return config

    @classmethod
    def from_hf(cls, config):
        """From the contents of a config.json. Raises ValueError naming the key and value that this model cannot represent."""
        kind = config.get("model_type")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5 has the former
        if not isinstance(rope, dict):
            raise ValueError(f"config.json: rope scaling {rope!r} is not an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        accepted = {"model_type": tuple(FAMILIES), "hidden_act": ("silu", None), "mlp_bias": (False, None),
                    "attention_bias": (False, None, kind == "llama"), "use_sliding_window": (False, None), "partial_rotary_factor": (1, None),
                    "quantization_config": (None,)}
        for key, values in accepted.items():
            if config.get(key) not in values:
                raise ValueError(f"config.json: {key} {config.get(key)!r} is not supported, only {', '.join(map(repr, values))}")
        if rope_type not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"config.json: rope scaling {rope!r} is not supported; linear and llama3 are")
        known = {name: config[hf] for name, hf in HF_NAMES.items() if config.get(hf) is not None}
        if "rope_theta" in rope:
            known.setdefault("rope_theta", rope["rope_theta"])
        for field in dataclasses.fields(cls):
            if field.name in known and not sensible(known[field.name], field):
                raise ValueError(f"config.json: {HF_NAMES[field.name]} {known[field.name]!r} is no model's")
        heads = known.get("n_heads", 1)
        absent = {"rope_theta": 10000.0, "tie_embeddings": False, "norm_eps": 1e-6,  # what Hugging Face takes
                  "head_dim": 128 if kind == "qwen3" else known.get("dim", 0) // heads}                     # where a key is absent
        if kind == "llama":
            absent["n_kv_heads"] = heads
        known = absent | known
        if missing := [hf for name, hf in HF_NAMES.items() if name not in known]:
            raise ValueError(f"config.json: {', '.join(missing)} missing")
        scaling = None
        if rope_type != "default":
            wanted = ("factor",) if rope_type == "linear" else ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            wrong = [key for key in wanted if type(rope.get(key)) not in (int, float) or rope[key] <= 0]
            if wrong:
                raise ValueError(f"config.json: {', '.join(wrong)} of the rope scaling: no number above 0")
            scaling = {"rope_type": rope_type, **{key: rope[key] for key in wanted}}
        if known["n_heads"] % known["n_kv_heads"] or known["head_dim"] % 2:
            raise ValueError("config.json: num_attention_heads no multiple of num_key_value_heads, or head_dim odd")
        window = config.get("sliding_window", 4096) if kind == "mistral" else None
        if window is not None and (type(window) is not int or window < 1):
            raise ValueError(f"config.json: sliding_window {window!r} is no model's")
        return cls(**known, model_type=kind, attention_bias=bool(config.get("attention_bias")), rope_scaling=scaling, sliding_window=window)


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

    def forward(self, x, rope, segments=None, cache=None, mask=None):
        B, T, _ = x.shape
        c = self.config
        q = self.q_proj(x).view(B, T, -1, c.head_dim)                            # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, c.head_dim)                            # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)            # (B, K, T, D)
        if c.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), *rope), rotate(k.transpose(1, 2), *rope)  # (B, H, T, D), (B, K, T, D)
        keys_values = cache.append(k, v) if cache else (k, v)
        if mask is not None:
            y = attend(q, *keys_values, mask)
        elif segments is not None:
            y = packed_attention(q, k, v, segments, c.sliding_window)
        else:
            y = causal_attention(q, k, v, c.sliding_window)
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
        if config.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.checkpointing = False  # recompute each layer's activations in the backward pass instead of keeping them
        self.frequencies = rope_frequencies(config)  # no buffer, which .to(bfloat16) would round
        if not self.lm_head.weight.is_meta:  # else load() puts the weights in
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal with deviation 1/sqrt(dim); what writes to the residual stream starts at zero, so every block does nothing.

        Embeddings of deviation 1 keep their differences while training moves them. An untied head begins as a faint copy.
        """
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=self.config.dim ** -0.5)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.model["embed_tokens"].weight)
            self.lm_head.weight.copy_(0.03 * self.model["embed_tokens"].weight)

    def forward(self, ids, targets=None, segments=None):
        """Logits (B, T, V) of ids (B, T); with targets (B, T), the sum of the cross-entropies (nats) where target >= 0.

        segments (B, T) number the documents of a packed window: no token sees another document. Positions need not restart,
        since rotary attention depends on their differences alone.
        """
        x = self.hidden(ids, segments)
        return self.lm_head(x) if targets is None else head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def hidden(self, ids, segments=None, caches=None, positions=None, mask=None):
        """The last layer's normed output (B, T, C). caches, positions (B, T) and mask (B, 1, T, S) serve `generate`."""
        if positions is None:
            positions = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)[None]  # (1, T)
            if ids.shape[1] <= SHORT and (segments is not None or compiled_for_cpu(ids)):
                mask = positions <= positions.mT                                 # (T, T)
                if self.config.sliding_window:
                    mask = mask & (positions > positions.mT - self.config.sliding_window)
                if segments is not None:
                    mask = mask & (segments[:, :, None] == segments[:, None, :])  # (B, T, T)
                mask = mask.view(-1, 1, *mask.shape[-2:])                        # (B or 1, 1, T, T)
        angles = (positions[..., None] * self.frequencies.to(ids.device))[:, None]  # (B, 1, T, D/2)
        rope = angles.cos(), angles.sin()
        x = self.model["embed_tokens"](ids)                                      # (B, T, C)
        for i, layer in enumerate(self.model["layers"]):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, segments, None, mask, use_reentrant=False)
            else:
                x = layer(x, rope, segments, caches[i] if caches else None, mask)
        return self.model["norm"](x)

    def flops_per_token(self, seq_len):
        """Of a training step: 6 per weight that multiplies (4 if it is frozen), and 12·layers·heads·head_dim·T for attention
        (arXiv 2204.02311)."""
        c = self.config
        flops = {n: (6 if p.requires_grad else 4) * p.numel() for n, p in self.named_parameters() if p.dim() == 2}
        head = flops.pop("model.embed_tokens.weight")
        return sum(flops.values()) + head * c.tie_embeddings + 12 * c.n_layers * c.n_heads * c.head_dim * seq_len


def head_loss(x, weight, targets):
    """Sum of the cross-entropies of x (N, C) times weight (V, C) against targets (N,), -100 where nothing is learned.

    The logits are made for a few tokens at a time, CHUNK numbers at most, and again in the backward pass, so that never all
    of them are held. (F.linear_cross_entropy does this too, but not under torch.compile.)
    """
    def loss(x, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-100, reduction="sum")

    size = max(1, CHUNK // len(weight))
    if len(x) <= size:
        return loss(x, targets)
    return sum(checkpoint(loss, a, b, use_reentrant=False) for a, b in zip(x.split(size), targets.split(size)))


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop=(), temperature=0.0, top_p=1.0, seed=0, choose=None):
    """Continue each prompt (a list of ids) by max_new_tokens, as far as the model's positions go, or until a stop: an id or a list of ids.
    Returns lists of ids, without the stop.

    temperature and top_p: see sample. choose(row, new_ids, logits) may pick a row's next id itself, for decoding under constraints.
    """
    longest, window = max(map(len, prompts)), model.config.max_seq_len
    if longest > window or not min(map(len, prompts)):
        raise ValueError(f"a prompt of {longest} tokens does not fit the model's {window} positions" if longest > window else "a prompt is empty")
    stops = [list(s) if isinstance(s, (list, tuple)) else [s] for s in stop]
    limits = [min(max_new_tokens, window - len(p) + 1) for p in prompts]  # the last token needs no position
    chances = torch.rand(len(prompts), max(limits), generator=torch.Generator().manual_seed(seed)).tolist() if temperature else None
    batch, output, running = Batch(model), [[] for _ in prompts], [limit > 0 for limit in limits]
    rows, logits = list(range(len(prompts))), batch.add(prompts, max(limits))  # rows: which prompts those of the batch are
    for at in range(max(limits)):
        chosen = sample(logits, [temperature] * len(rows), [top_p] * len(rows), [chances[row][at] for row in rows] if chances else None)
        for i, row in enumerate(rows):
            if running[row]:
                if choose:
                    chosen[i] = choose(row, output[row], logits[i])
                output[row].append(chosen[i])
                ended = next((s for s in stops if output[row][-len(s):] == s), [])
                running[row] = not ended and len(output[row]) < limits[row]
                del output[row][len(output[row]) - len(ended):]
        if not any(running):
            break
        left = [i for i, row in enumerate(rows) if running[row]]
        if len(left) <= 0.75 * len(rows):  # else it is not worth the copying
            batch.keep(left)
            rows, chosen = [rows[i] for i in left], [chosen[i] for i in left]
        logits = batch.step(chosen)
    return output


# ============================================================================================================
# Below: checks of a Config; the ways to attend; rotary positions; checkpoints; generation.

# ------------------------------------------------------------------------------------------------------------
# Configurations and attention


def sensible(value, field):
    """Whether a value from outside can be that of a field of Config."""
    if field.type is bool:
        return type(value) is bool
    if field.type is float:
        return type(value) in (int, float) and 0 < value < math.inf
    return type(value) is int and 0 < value <= LARGEST.get(field.name, 2**24)


LARGEST = {"n_layers": 2**12, "head_dim": 2**12}  # beyond any model

HF_NAMES = {"vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
            "max_seq_len": "max_position_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings"}

SHORT = 768  # windows up to this are packed by a mask, longer ones document by document: on a CPU a mask lets torch.compile keep a
             # layer in one piece, and from 1,024 on loses to the pieces (tests/bench.py packing)

PRESETS = {  # the vocabulary is the tokenizer's; sizes of 1b and 8b are those of Llama 3
    "tiny": dict(),
    "124m": dict(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, hidden_dim=2048),
    "1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, hidden_dim=8192, max_seq_len=8192, tie_embeddings=True,
               attention_bias=False),
    "8b": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, max_seq_len=8192, attention_bias=False),
}


def attend(q, k, v, mask=None, causal=False):
    """Fused attention of q (B, H, T, D) over k, v (B, K, S, D), K dividing H; mask is true where a key is seen."""
    if mask is not None and q.shape[2] == k.shape[2] and q.dtype == torch.bfloat16 and compiled_for_cpu(q):
        return compiled_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def compiled_for_cpu(x):
    """Whether torch.compile is at work, for a CPU."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def compiled_attention(q, k, v, mask, block=128):
    """The same for a causal mask (B or 1, 1, T, T), a block of queries at a time over the keys up to its end: what torch.compile makes of
    this on a CPU takes half the time of the bfloat16 kernel that is there (tests/bench.py attention)."""
    T, D = q.shape[2:]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))    # (B, H, T, D)
    blocks = []
    for a in range(0, T, block):
        b = min(T, a + block)
        scores = (q[:, :, a:b] @ k[:, :, :b].mT).float() * D ** -0.5             # (B, H, b - a, b)
        weights = scores.masked_fill(~mask[:, :, a:b, :b], -math.inf).softmax(-1)
        blocks.append(weights.to(v.dtype) @ v[:, :, :b])
    return torch.cat(blocks, 2)


def causal_attention(q, k, v, window=None):
    """Each token sees itself and those before it, or the last `window` of them. Without a mask of T x T in either case."""
    T = q.shape[2]
    if window is None or T <= window:
        return attend(q, k, v, causal=True)
    # By blocks of as many queries as the window has tokens: a block sees its own keys and those of the block before it.
    query, key = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device) - window
    seen = (key <= query) & (key > query - window)                               # (W, 2W)
    blocks = []
    for start in range(0, T, window):
        first, end = max(0, start - window), min(T, start + window)
        mask = seen[:end - start, first - start + window:end - start + window]
        blocks.append(attend(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], mask))
    return torch.cat(blocks, 2)


@torch.compiler.disable  # the number of documents differs from batch to batch
def packed_attention(q, k, v, segments, window=None):
    """Causal attention within each document of packed windows: none sees another. segments (B, T) number a row's documents.

    One fused call a document: on a CPU torch 2.13 has no varlen_attn, and of FlexAttention only the forward pass, a third slower.
    """
    B, H, T, D = q.shape
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True).flatten()
    bounds = [*first.nonzero()[:, 0].tolist(), B * T]
    q, k, v = (x.transpose(0, 1).reshape(1, -1, B * T, D) for x in (q, k, v))    # the rows one after another
    y = torch.cat([causal_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], window) for a, b in zip(bounds, bounds[1:])], 2)
    return y.view(H, B, T, D).transpose(0, 1)


CHUNK = 2**25  # logits that are held at a time


def rope_frequencies(config):
    """Angles (D/2,) by which a step of one position turns each pair of coordinates, scaled as the config says."""
    f = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim)
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
    """Rotary position embedding of x (B, H, T, D), in Hugging Face's layout: coordinate i turns with coordinate i + D/2."""
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face directory


def save(model, directory, weights=None, shard_bytes=5 * 10**9):
    """Write config.json and the weights, in the type they have: model.safetensors, or several such files and their index.

    weights: by name, where the model itself holds only a part of each. The file that makes the directory valid appears last, whole or
    not at all.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = weights or dict(model.named_parameters())
    tensors = {n: weights[n].detach().cpu().contiguous() for n, _ in model.named_parameters()}  # a tied head is listed once
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write(directory / "config.json", [json.dumps(model.config.to_hf(dtype), indent=1).encode()])
    shards, size = [{}], 0
    for name, t in tensors.items():
        if size and size + t.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if len(shards) == 1:
        write_safetensors(tensors, single)
        index.unlink(missing_ok=True)
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        write_safetensors(shard, directory / file)
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
    write(index, [json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}).encode()])
    single.unlink(missing_ok=True)


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
                raise ValueError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
            tensor = tensor.to(device, dtype or tensor.dtype)
            if name == EMBEDDING and name in tensors and not torch.equal(tensors[name], tensor):
                raise ValueError(f"{file}: the head differs from the embedding, but config.json ties them")
            tensors[name] = tensor
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{directory}: tensor {missing[0]} is missing" + f", and {len(missing) - 1} more" * (len(missing) > 1))
    model.load_state_dict(tensors, assign=True, strict=False)
    if config.tie_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    return model.requires_grad_()


@torch.no_grad()
def grow_vocabulary(model, size, pieces):
    """Make room for `size` tokens. The row of an added token starts as the mean of its pieces' rows, other rows as the mean of all.

    pieces: {id of an added token: ids of its text in the vocabulary as it was}. From the mean of all rows, a token would
    start as likely as the average one, and a short tuning would hardly ever write it.
    """
    layers = [model.model["embed_tokens"]] + [model.lm_head] * (not model.config.tie_embeddings)
    for layer in layers:
        old = layer.weight.detach()
        new = []
        for i in range(len(old), size):
            known = [piece for piece in pieces.get(i, []) if piece < len(old)]
            new.append(old[known or slice(None)].mean(0))
        layer.weight = nn.Parameter(torch.cat([old, torch.stack(new)]))
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.config.vocab_size = size


EMBEDDING = "model.embed_tokens.weight"
SAFETENSORS_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(path, pieces):
    """Write pieces of bytes to a file, which appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
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
    """The safetensors format: the header's length as a little-endian uint64, the header as JSON, the tensors' bytes."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # mapped tensors begin at 64 bytes, as MKL wants them for equal rounding
    write(path, [len(text).to_bytes(8, "little"), text, *(t.view(-1).view(torch.uint8).numpy().data for t in tensors.values())])


def read_safetensors(path):
    """Yields the name and tensor of each entry of a safetensors file, mapped into memory: its bytes are read when first used.

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
        at = 0
        for start, end, name, kind, shape in entries:
            if kind not in SAFETENSORS_TYPES:
                raise ValueError(f"{path}: tensor {name} has dtype {kind} ({', '.join(SAFETENSORS_TYPES)} are read)")
            dtype = SAFETENSORS_TYPES[kind]
            if start != at or end > total - 8 - size or min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path}: tensor {name} is truncated or misplaced: bytes {start} to {end} of {total - 8 - size}, shape {shape}")
            at = end
        if at != total - 8 - size:
            raise ValueError(f"{path}: {total - 8 - size - at} bytes belong to no tensor")
        for start, end, name, kind, shape in entries:
            if start == end:
                yield name, torch.empty(shape, dtype=SAFETENSORS_TYPES[kind])
                continue
            start, end = start + 8 + size, end + 8 + size
            page = start - start % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(file.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)  # what is written to stays private
            yield name, torch.frombuffer(mapped, dtype=SAFETENSORS_TYPES[kind], count=math.prod(shape), offset=start - page).view(shape)


# ----------------------------------------------------------------------------------------------------------------------
# Generation

PREFILL = 2048  # tokens of prompts that are read at a time: what they activate should fit a CPU's cache


class KVCache:
    """Keys and values (B, K, S, D) of one layer. Rows end at the same place, `size`, so that all put their next token at one."""

    def __init__(self, config, device, dtype):
        self.k, self.v = (torch.zeros(0, config.n_kv_heads, 0, config.head_dim, device=device, dtype=dtype) for _ in range(2))
        self.size = 0

    def arrange(self, rows, before, spare, below=0):
        """Keep these rows, with `before` more places in front (fewer, if negative), room for `spare` tokens, and `below` more rows."""
        self.k, self.v = (F.pad(x[rows, :, :self.size], (0, 0, before, spare, 0, 0, 0, below)) for x in (self.k, self.v))
        self.size += before

    def append(self, k, v):
        """A token a row (B, K, 1, D). Returns what is there so far."""
        if self.size == self.k.shape[2]:
            self.arrange(slice(None), 0, 16 + self.size // 4)
        self.k[:, :, self.size], self.v[:, :, self.size] = k[:, :, 0], v[:, :, 0]
        self.size += 1
        return self.k[:, :, :self.size], self.v[:, :, :self.size]


class Prompts:
    """Stands for a layer's cache while prompts are read, one after another (1, K, N, D): each sees itself alone."""

    def append(self, k, v):
        self.kept = k, v
        return k, v


class Batch:
    """Texts that are continued together, a token of each at a time, in inference mode. Others may join, and those that have ended leave.

    Each is continued as it would be alone: prompts are read as packed windows, without padding, and every row has its own positions.
    """

    def __init__(self, model):
        self.model, self.device = model, model.lm_head.weight.device
        self.caches = [KVCache(model.config, self.device, model.lm_head.weight.dtype) for _ in range(model.config.n_layers)]
        self.lengths = torch.zeros(0, dtype=torch.long, device=self.device)                   # (B,): tokens of each row
        self.mask = None                                                                      # (B, 1, 1, S): -inf where nothing is seen

    def add(self, prompts, spare=64):
        """Read prompts (lists of ids), as rows beneath those there are. Returns the logits (N, V) of what follows each.

        spare: tokens that will follow; more may, but then the caches have to grow.
        """
        first, size, groups, self.mask = len(self.lengths), self.caches[0].size, [[]], None
        end = max(size, *map(len, prompts))
        self.lengths = torch.cat([self.lengths, torch.tensor([len(p) for p in prompts], device=self.device)])
        for cache in self.caches:
            cache.arrange(slice(None), end - size, spare, below=len(prompts))
        for row, prompt in enumerate(prompts, first):
            if groups[-1] and sum(len(p) for _, p in groups[-1]) + len(prompt) > PREFILL:
                groups.append([])
            groups[-1].append((row, prompt))
        return torch.cat([self.read(*zip(*group), end) for group in groups])

    def read(self, rows, prompts, end):
        """Read some prompts into their rows, so that they end at the place `end`."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        segments = torch.arange(len(rows), device=self.device).repeat_interleave(lengths)     # (N,): whose token it is
        positions = torch.arange(len(segments), device=self.device) - (lengths.cumsum(0) - lengths)[segments]
        rows, places = torch.tensor(rows, device=self.device)[segments], positions + (end - lengths)[segments]
        read = [Prompts() for _ in self.caches]
        ids = torch.tensor([[i for p in prompts for i in p]], device=self.device)             # (1, N)
        x = self.model.hidden(ids, segments[None], read, positions[None])[0, lengths.cumsum(0) - 1]  # (B, C)
        for cache, (k, v) in zip(self.caches, (r.kept for r in read)):
            cache.k[rows, :, places], cache.v[rows, :, places] = k[0].transpose(0, 1), v[0].transpose(0, 1)
        return self.model.lm_head(x).float()

    def step(self, ids):
        """Go on by a token a row. Returns the logits (B, V) of what follows."""
        size, window = self.caches[0].size + 1, self.model.config.sliding_window
        if self.mask is None or self.mask.shape[-1] < size or window:
            first = (size - 1 - self.lengths).clamp(min=size - (window or size))              # (B,): the first place that each row sees
            unseen = torch.arange(size + 64, device=self.device) < first[:, None]
            self.mask = torch.zeros(unseen.shape, dtype=self.caches[0].k.dtype, device=self.device).masked_fill_(unseen, -math.inf)[:, None, None]
        ids = torch.tensor(ids, device=self.device)[:, None]
        x = self.model.hidden(ids, None, self.caches, self.lengths[:, None], self.mask[..., :size])[:, 0]
        self.lengths += 1
        return self.model.lm_head(x).float()

    def keep(self, rows):
        """Let go of all rows but these."""
        rows = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.lengths, self.mask = self.lengths[rows], None
        before = int(self.lengths.max()) - self.caches[0].size if len(rows) else -self.caches[0].size
        for cache in self.caches:
            cache.arrange(rows, before, cache.k.shape[2] - cache.size)


def sample(logits, temperature, top_p, chances):
    """A token a row, a list of ids, from logits (B, V). temperature, top_p and chances (in [0, 1)): a list each, a number a row.

    Temperature 0 takes the likeliest; else one is drawn from the fewest tokens that have probability top_p together (arXiv 1904.09751).
    """
    likeliest = logits.argmax(-1)
    if not any(temperature):
        return likeliest.tolist()
    temperature, top_p, chances = torch.tensor([temperature, top_p, chances], dtype=torch.float32, device=logits.device)[..., None]  # (B, 1) each
    logits = logits - logits.amax(-1, keepdim=True)  # else a small temperature would make them infinite
    p, order = (logits / temperature.clamp(min=1e-9)).softmax(-1).sort(descending=True)
    total = p.cumsum(-1)
    kept = (total - p < top_p).sum(-1, keepdim=True).clamp(min=1)                             # (B, 1)
    place = (total <= chances * total.gather(1, kept - 1)).sum(-1, keepdim=True)
    drawn = order.gather(1, torch.minimum(place, kept - 1))
    return torch.where(temperature > 0, drawn, likeliest[:, None])[:, 0].tolist()


if __name__ == "__main__":
    print(f"{'preset':<8} {'layers':>6} {'dim':>6} {'heads':>6} {'kv':>4} {'parameters':>16}   (vocabulary of --vocab-size, default 128,256)")
    vocab_size = int(sys.argv[2]) if sys.argv[1:2] == ["--vocab-size"] else 128_256
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = Transformer(Config(vocab_size=vocab_size, **preset))
        c = model.config
        print(f"{name:<8} {c.n_layers:>6} {c.dim:>6} {c.n_heads:>6} {c.n_kv_heads:>4} {sum(p.numel() for p in model.parameters()):>16,}")
