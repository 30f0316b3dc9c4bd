"""Step 3 of 6: the model, a decoder-only transformer in the manner of Llama, from scratch.

In and out: a Hugging Face checkpoint directory (config.json, model.safetensors), which transformers and vLLM load as it is.
Run `python model.py` for a table of the presets; the other scripts import Config, Transformer, load, save and generate.

RMSNorm (arXiv 1910.07467) before each sub-layer, rotary positions (arXiv 2104.09864), grouped-query attention
(arXiv 2305.13245), SwiGLU (arXiv 2002.05202), no dropout. Parameters bear Hugging Face's names, so there is nothing to convert.

Shapes: B sequences, T tokens, C = dim, H query heads, K key-value heads, D = head_dim, V = vocab_size.
"""
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclasses.dataclass
class Config:
    vocab_size: int = 2048
    dim: int = 192
    n_layers: int = 4
    n_heads: int = 3
    n_kv_heads: int = 3
    head_dim: int = 64
    hidden_dim: int = 512           # of the feed-forward layer
    max_seq_len: int = 2048
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = True           # as in Qwen2; without it the model is a Llama
    tie_embeddings: bool = False

    def to_hf(self):
        """The config.json that Hugging Face reads."""
        kind = "qwen2" if self.qkv_bias else "llama"
        return {"architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]], "model_type": kind,
                "hidden_act": "silu", "torch_dtype": "float32", **{hf: getattr(self, name) for name, hf in HF_NAMES.items()}}

    @classmethod
    def from_hf(cls, config):
        kind = config.get("model_type")
        if kind not in ("llama", "qwen2"):
            raise ValueError(f"config.json: model_type {kind!r} is not supported (llama and qwen2 are)")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5 has the former
        unsupported = {"rope_scaling": rope.get("rope_type", "default") != "default", "hidden_act": config.get("hidden_act", "silu") != "silu",
                       "attention_bias": bool(config.get("attention_bias")), "use_sliding_window": bool(config.get("use_sliding_window"))}
        for key, found in unsupported.items():
            if found:
                raise ValueError(f"config.json: {key} {config.get(key, rope)!r} is not supported")
        known = {name: config[hf] for name, hf in HF_NAMES.items() if config.get(hf) is not None}
        absent = {"rope_theta": rope.get("rope_theta", 10000.0), "tie_embeddings": False, "n_kv_heads": known.get("n_heads"), "norm_eps": 1e-6,
                  "head_dim": known.get("dim", 0) // known.get("n_heads", 1)}  # what Hugging Face takes where a key is absent
        known = absent | known
        missing = [HF_NAMES[name] for name in HF_NAMES if name not in known]
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)} missing")
        return cls(**known, qkv_bias=kind == "qwen2")


HF_NAMES = {"vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
            "max_seq_len": "max_position_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings"}

PRESETS = {  # the vocabulary is the tokenizer's; sizes of 1b and 8b are those of Llama 3
    "tiny": dict(),
    "124m": dict(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, hidden_dim=2048),
    "1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, hidden_dim=8192, max_seq_len=8192, tie_embeddings=True),
    "8b": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, max_seq_len=8192,
               qkv_bias=False),
}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, rope, cache=None, mask=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)                                            # (B, K, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, cache=None, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
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
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
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
        c = self.config
        if c.qkv_bias and not c.tie_embeddings and c.n_layers > 1 and c.n_kv_heads == c.n_heads >= 3:
            self.wire_copying_heads()

    def wire_copying_heads(self):
        """Begin with five heads that together copy from the context, as minutes on a CPU would not teach a model to.

        In layer 0, three heads note at each position the token before it, the one before that, and the mean of the two dozen
        before. In layer 1, two heads look for an earlier place that came after the token we are at, and raise the likelihood
        of what stands there: after ... a b ... a they say b (induction heads, Olsson et al. 2022, arXiv 2209.11895). The one
        prefers places where the second token before agrees too, the other places in a similar context. Large models learn
        such heads by themselves; to start from them is in the spirit of mimetic initialisation (arXiv 2305.09828).
        """
        C, D, theta = self.config.dim, self.config.head_dim, self.config.rope_theta
        embedding = self.model["embed_tokens"].weight
        first, second = (self.model["layers"][i].self_attn for i in (0, 1))
        # Rotary scores turn with the distance. Fast pairs of coordinates tell one position from the next, middle ones a dozen
        # positions from another dozen, and slow ones, which hardly turn within a window, compare what stands in them.
        pair, frequency = torch.arange(D // 2), theta ** (-torch.arange(D // 2) * 2 / D)
        fast, slow = pair[frequency > 0.1], pair[frequency < 0.01]
        middle = pair[(0.03 < frequency) & (frequency < 0.1)]
        W = len(slow) // 2 * 2
        if not len(middle) or C < 4 * W:
            return  # too small a head or model
        # The residual stream's last coordinates are kept free for the notes, W for each; a note is a short code of a token.
        embedding[:, -3 * W:] = 0
        self.lm_head.weight[:, -3 * W:] = 0
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

    def forward(self, ids, targets=None, segments=None, caches=None, positions=None, mask=None):
        """Logits (B, T, V) of ids (B, T); with targets (B, T), the sum of the cross-entropies (nats) where target >= 0.

        segments (B, T) number the documents of a packed window: no token sees another document. Positions need not restart,
        since rotary attention depends on their differences alone. caches, positions (B, T) and mask (B, 1, T, S) serve
        `generate`; without any of these attention is causal.
        """
        if segments is not None:
            T = ids.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
            mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]  # (B, 1, T, T)
        if positions is None:
            rope = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]              # (T, D)
        else:
            rope = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)  # (B, 1, T, D)
        x = self.model["embed_tokens"](ids)                                      # (B, T, C)
        for i, layer in enumerate(self.model["layers"]):
            x = layer(x, rope, caches[i] if caches else None, mask)
        x = self.model["norm"](x)
        if targets is None:
            return self.lm_head(x)
        return F.cross_entropy(self.lm_head(x).float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")

    def flops_per_token(self, seq_len):
        """Of a training step: 6 per weight that multiplies, and 12·layers·heads·head_dim·T for attention (arXiv 2204.02311)."""
        c = self.config
        weights = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and "embed_tokens" not in n)
        weights += c.vocab_size * c.dim if c.tie_embeddings else 0
        return 6 * weights + 12 * c.n_layers * c.n_heads * c.head_dim * seq_len


def rope_table(config):
    """cos and sin (max_seq_len, D) of the rotary angles, in Hugging Face's layout: the two halves of D turn together."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), frequencies)  # (max_seq_len, D/2)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, H, T, D)."""
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face directory


def save(model, directory):
    """Write config.json and model.safetensors (float32). Weights appear last, whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_hf()
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {n: p.detach().float().cpu().contiguous() for n, p in model.named_parameters()}  # a tied head is listed once
    write_safetensors(tensors, directory / "model.safetensors")


def load(directory, device="cpu"):
    """The Transformer in a checkpoint directory. Raises ValueError naming the tensor or key that does not fit."""
    directory = Path(directory)
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).exists():
            raise ValueError(f"{directory / name}: no such file; a checkpoint directory has one")
    config = Config.from_hf(json.loads((directory / "config.json").read_text()))
    with torch.device("meta"):
        model = Transformer(config)
    tensors = read_safetensors(directory / "model.safetensors")
    expected = dict(model.named_parameters())
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            raise ValueError(f"{directory}: tensor {name} is {'missing' if name not in tensors else 'unknown to this model'}")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(f"{directory}: tensor {name} has shape {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
    model.load_state_dict(tensors, assign=True, strict=False)
    if config.tie_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.cos, model.sin = rope_table(config)
    return model.to(device)


SAFETENSORS_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_safetensors(tensors, path):
    """The safetensors format: the header's length as a little-endian uint64, the header as JSON, the tensors' bytes."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_safetensors(path):
    """{name: float32 tensor} of a safetensors file. Raises ValueError if the file is not what its header says."""
    data = memoryview(bytearray(Path(path).read_bytes()))
    size = int.from_bytes(data[:8], "little")
    body = data[8 + size:]
    try:
        header = json.loads(bytes(data[8:8 + size])) if 8 + size <= len(data) else None
        header.pop("__metadata__", None)
        entries = {n: (e["dtype"], [int(d) for d in e["shape"]], *map(int, e["data_offsets"])) for n, e in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a safetensors file, or one cut off in its header") from None
    tensors = {}
    for name, (kind, shape, start, end) in entries.items():
        if kind not in SAFETENSORS_TYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {kind} ({', '.join(SAFETENSORS_TYPES)} are read)")
        dtype = SAFETENSORS_TYPES[kind]
        if not 0 <= start <= end <= len(body) or min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name} is truncated: bytes {start} to {end} of {len(body)}, shape {shape}")
        flat = torch.frombuffer(body[start:end], dtype=dtype) if end > start else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(shape).float()
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# Generation


class KVCache:
    """Keys and values of the tokens so far, of one layer, allocated once."""

    def __init__(self, config, batch_size, length, device, dtype):
        shape = batch_size, config.n_kv_heads, length, config.head_dim
        self.k, self.v, self.size = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype), 0

    def append(self, k, v):
        end = self.size + k.shape[2]
        self.k[:, :, self.size:end], self.v[:, :, self.size:end] = k, v
        self.size = end
        return self.k[:, :, :end], self.v[:, :, :end]


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop_ids=(), temperature=0.0, seed=0, choose=None):
    """Continue each prompt (a list of ids) until a stop id, which is not returned, or max_new_tokens. Returns lists of ids.

    Prompts are aligned at their right ends, what pads them is masked. Temperature 0 takes the likeliest token.
    choose(row, new_ids, logits) may pick a row's next id itself, for decoding under constraints.
    """
    device = model.lm_head.weight.device
    B, T = len(prompts), max(map(len, prompts))
    length = min(T + max_new_tokens, model.config.max_seq_len)
    if T > length:
        raise ValueError(f"a prompt of {T} tokens does not fit the model's {length} positions")
    generator = torch.Generator(device).manual_seed(seed)
    padding = torch.tensor([T - len(p) for p in prompts], device=device)                      # (B,)
    ids = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)        # (B, T)
    caches = [KVCache(model.config, B, length, device, model.lm_head.weight.dtype) for _ in range(model.config.n_layers)]
    keys = torch.arange(length, device=device)
    output, running, start = [[] for _ in prompts], [True] * B, 0
    while start + ids.shape[1] <= length:
        queries = keys[start:start + ids.shape[1]]                                            # (T,)
        visible = (keys[:queries[-1] + 1] <= queries[:, None]) & (keys[:queries[-1] + 1] >= padding[:, None, None])  # (B, T, S)
        visible |= keys[:queries[-1] + 1] == queries[:, None]  # what pads sees itself, for a softmax over nothing is NaN
        positions = (queries - padding[:, None]).clamp(min=0)                                 # (B, T)
        logits = model(ids, caches=caches, positions=positions, mask=visible[:, None])[:, -1].float()  # (B, V)
        start += ids.shape[1]
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        else:
            chosen = logits.argmax(-1).tolist()
        for row in range(B):
            if running[row] and choose:
                chosen[row] = choose(row, output[row], logits[row])
            running[row] = running[row] and chosen[row] not in stop_ids
            if running[row]:
                output[row].append(chosen[row])
                running[row] = len(output[row]) < max_new_tokens
        if not any(running):
            break
        ids = torch.tensor(chosen, device=device)[:, None]                                    # (B, 1)
    return output


if __name__ == "__main__":
    print(f"{'preset':<8} {'layers':>6} {'dim':>6} {'heads':>6} {'kv':>4} {'parameters':>16}   (vocabulary of --vocab-size, default 128,256)")
    vocab_size = int(sys.argv[2]) if sys.argv[1:2] == ["--vocab-size"] else 128_256
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = Transformer(Config(vocab_size=vocab_size, **preset))
        c = model.config
        print(f"{name:<8} {c.n_layers:>6} {c.dim:>6} {c.n_heads:>6} {c.n_kv_heads:>4} {sum(p.numel() for p in model.parameters()):>16,}")
