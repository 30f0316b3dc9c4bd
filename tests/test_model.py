import json
import math
import struct

import pytest
import torch

import model as transformer
from model import Config, Transformer, generate, load, read_safetensors, save, write_safetensors

TINY = dict(tie_embeddings=True, vocab_size=97, dim=32, n_layers=2, n_heads=4, head_dim=8, hidden_dim=48, max_seq_len=64)


def tiny(**options):
    torch.manual_seed(0)
    model = Transformer(Config(**{**TINY, "n_kv_heads": 2, **options}))
    for p in model.parameters():  # larger than at initialisation, so that differences show
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def reference(directory):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32, rope_theta=10000.0)
MODELS = {  # name: (configuration class, its options)
    "llama": ("LlamaConfig", dict()),
    "llama, every head its own keys, tied": ("LlamaConfig", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama, with biases": ("LlamaConfig", dict(attention_bias=True)),
    "llama 3.1": ("LlamaConfig", dict(rope_parameters=LLAMA3)),
    "llama 3.2, tied": ("LlamaConfig", dict(rope_parameters=LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0}, tie_word_embeddings=True, head_dim=16)),
    "llama, linear scaling": ("LlamaConfig", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "mistral 0.1": ("MistralConfig", dict(sliding_window=11)),
    "mistral 0.3": ("MistralConfig", dict(sliding_window=None, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=1)),
    "qwen2.5, tied": ("Qwen2Config", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3, tied": ("Qwen3Config", dict(head_dim=16, tie_word_embeddings=True)),
}


@pytest.fixture(params=MODELS)
def theirs(request):
    """A tiny random model of transformers, every parameter of which matters."""
    import transformers
    name, options = MODELS[request.param]
    config = getattr(transformers, name)(**{**dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                   num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False), **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return model


def test_logits_gradients_and_text_are_those_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = torch.randint(97, (3, 90))  # past the window and the context before scaling
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    targets = ids.roll(-1, 1)
    model(ids, targets).backward()
    torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    expected = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item(), msg=name)
    prompts = [ids[0, :5].tolist(), ids[1, :40].tolist()]
    texts = [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(p):].tolist() for p in prompts]
    assert generate(model, prompts, 64) == texts


def test_what_we_save_transformers_loads(theirs, tmp_path, caplog):
    import warnings
    from transformers.utils import logging
    logging.enable_propagation()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "ours", shard_bytes=20_000)  # in several files
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = reference(tmp_path / "ours")
    assert not caplog.records, caplog.text
    assert type(again) is type(theirs)
    ids = torch.randint(97, (2, 60))
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits)
    again.save_pretrained(tmp_path / "again")
    for (name, p), (_, q) in zip(ours.named_parameters(), load(tmp_path / "again").named_parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept_or_converted(dtype, tmp_path):
    model = tiny().to(dtype)
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    kept, converted = load(tmp_path, dtype=None), load(tmp_path)
    for p, q, r in zip(model.parameters(), kept.parameters(), converted.parameters()):
        assert torch.equal(p, q) and r.dtype == torch.float32 and torch.equal(p.float(), r) and r.requires_grad


def test_half_precision_leaves_positions_exact(tmp_path):
    model = tiny(max_seq_len=4096)
    save(model, tmp_path)
    ids = torch.randint(97, (1, 3000))
    assert torch.equal(model.bfloat16()(ids), load(tmp_path, dtype=torch.bfloat16)(ids))
    assert model.frequencies.dtype == torch.float32


def test_a_loaded_model_trains_and_its_file_stays(tmp_path):
    save(tiny(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(tmp_path)
    model(torch.arange(9)[None], torch.arange(9)[None]).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not torch.equal(model.model["norm"].weight, load(tmp_path).model["norm"].weight)


@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load_are_bit_identical(tie, tmp_path):
    model = tiny(tie_embeddings=tie)
    save(model, tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert torch.equal(model(torch.arange(9)[None]), again(torch.arange(9)[None]))
    assert (again.lm_head.weight is again.model["embed_tokens"].weight) == tie


def test_safetensors_both_ways(tmp_path):
    from safetensors.torch import load_file, save_file
    tensors = {"a": torch.randn(3, 4), "b": torch.zeros(0), "c": torch.randn(5).bfloat16(), "d": torch.randn(2, 2, 2).half()}
    write_safetensors(tensors, tmp_path / "ours")
    assert all(torch.equal(t, load_file(tmp_path / "ours")[n]) for n, t in tensors.items())
    save_file(tensors, tmp_path / "theirs")
    read = dict(read_safetensors(tmp_path / "theirs"))
    assert all(torch.equal(t, read[n]) and t.dtype == read[n].dtype for n, t in tensors.items())


def test_a_flipped_bit_is_found(tmp_path):
    """Anywhere among the weights, by the checksum in the header. A file that has none loads, and others pass over it."""
    from safetensors.torch import load_file, save_file
    save(tiny(), tmp_path, shard_bytes=20_000)
    for file in sorted(tmp_path.glob("*.safetensors")):
        whole = file.read_bytes()
        begin = 8 + int.from_bytes(whole[:8], "little")
        for at in (begin, (begin + len(whole)) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{file.name}.*checksum"):
                load(tmp_path)
        file.write_bytes(whole)
        tensors = load_file(file)
        assert all(torch.equal(t, tensors[name]) for name, t in read_safetensors(file))
        save_file(tensors, file)
    assert load(tmp_path).config.dim == 32


def broken(tmp_path, change):
    save(tiny(), tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    return str(caught.value)


def test_what_does_not_fit_is_named(tmp_path):
    def drop(path, names=("model.norm.weight",), add=None):
        tensors = dict(read_safetensors(path / "model.safetensors"))
        write_safetensors({n: t for n, t in tensors.items() if n not in names} | (add or {}), path / "model.safetensors")
    assert "model.norm.weight is missing" in broken(tmp_path, drop)
    assert "extra is unknown" in broken(tmp_path, lambda p: drop(p, (), {"extra": torch.zeros(2)}))
    assert "model.norm.weight has shape (3,)" in broken(tmp_path, lambda p: drop(p, (), {"model.norm.weight": torch.zeros(3)}))
    assert "truncated" in broken(tmp_path, lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-8]))
    assert "no such file" in broken(tmp_path, lambda p: (p / "config.json").unlink())


def test_shards_that_do_not_fit_are_named(tmp_path):
    save(tiny(), tmp_path, shard_bytes=10_000)
    index = tmp_path / "model.safetensors.index.json"
    files = sorted(tmp_path.glob("model-*.safetensors"))
    whole = index.read_text()
    assert len(files) > 2
    files[1].rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=files[1].name):
        load(tmp_path)
    (tmp_path / "elsewhere").rename(files[1])
    for text in ("{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json"):
            load(tmp_path)
    index.write_text(whole.replace(files[1].name, files[0].name))
    with pytest.raises(ValueError, match="is missing"):
        load(tmp_path)
    index.write_text(whole)
    save(tiny(), tmp_path)  # in one file again
    assert not index.exists() and load(tmp_path).config.dim == 32


def test_a_tied_head_in_the_file(tmp_path):
    """The same again does no harm, alone it is the embedding, and one that differs is refused."""
    save(tiny(tie_embeddings=True), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(file)}
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding, embedding + 1):
        write_safetensors(tensors | {"lm_head.weight": head}, file)
        if head is embedding:
            assert torch.equal(load(tmp_path).lm_head.weight, embedding)
    with pytest.raises(ValueError, match="head differs"):
        load(tmp_path)
    del tensors["model.embed_tokens.weight"]
    write_safetensors(tensors | {"lm_head.weight": embedding}, file)
    model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, embedding)
    assert model.lm_head.weight is model.model["embed_tokens"].weight


def test_hostile_headers(tmp_path):
    def refused(text, size=None, body=8):
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + b"\0" * body)
        with pytest.raises(ValueError, match="x: "):
            list(read_safetensors(tmp_path / "x"))

    def entry(*offsets, dtype="F32", shape=(2,)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    for text in (b"{", b"\xff\xfe", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}', b"[" * 10**5):
        refused(text)
    refused(b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}')
    refused(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 1e999]}}')
    for offsets in ([0, 16], [-4, 4], [4, 0], [0, 2**63], [8, 16]):
        refused(json.dumps({"a": entry(*offsets)}).encode())
    refused(json.dumps({"a": entry(0, 8, dtype="F64", shape=[1])}).encode())
    refused(json.dumps({"a": entry(0, 8, shape=[-1, -2])}).encode())
    refused(json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode(), body=12)  # overlapping
    refused(json.dumps({"a": entry(0, 8)}).encode(), body=9)  # bytes of no tensor
    refused(b"{}", size=2**60)
    refused(b"{}", size=2**64 - 1)
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(ValueError):
        list(read_safetensors(tmp_path / "x"))


@pytest.mark.parametrize("change", [
    {"model_type": "mamba"}, {"rope scaling": 0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"hidden_act": "gelu"}, {"attention_bias": True, "model_type": "qwen3"},
    {"num_hidden_layers": 2.0}, {"num_hidden_layers": "2"}, {"num_hidden_layers": 10**9}, {"head_dim": -64},
    {"vocab_size": 0}, {"hidden_size": 10**30}, {"num_attention_heads": 0}, {"rope_theta": "x"},
    {"rms_norm_eps": float("inf")}, {"tie_word_embeddings": "no"}, {"rope scaling": 0, "rope_scaling": "x"},
    {"factor": 0, "rope_scaling": {"rope_type": "linear", "factor": "x"}}, {"num_key_value_heads": 3},
    {"head_dim": 63}, {"sliding_window": "x", "model_type": "mistral", "attention_bias": False},
    {"use_sliding_window": True}, {"partial_rotary_factor": 0.5}, {"quantization_config": {"bits": 4}}, {"mlp_bias": True},
    {"is_causal": False}, {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
    {"layer_types": ["full_attention"] * 2, "model_type": "mistral", "sliding_window": 5, "attention_bias": False},
    {"full_attention": None, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    {"rope scaling": 0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {"low_freq_factor": 0, "rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, {"num_key_value_heads": None, "model_type": "qwen3", "attention_bias": False}], ids=str)
def test_what_it_cannot_represent_is_refused(change, tmp_path):
    save(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        load(tmp_path)


@pytest.mark.parametrize("change", [
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 100.0},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8}, {"layer_types": ["full_attention"] * 2, "sliding_window": 5}], ids=str)
def test_where_a_config_says_two_things(change, tmp_path):
    save(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    ids = torch.randint(97, (2, 60))
    torch.testing.assert_close(load(tmp_path)(ids), reference(tmp_path)(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("short", [0, 512])
@pytest.mark.parametrize("options", [{}, {"model_type": "mistral", "sliding_window": 5}, {"model_type": "qwen3", "n_kv_heads": 4}], ids=str)
def test_packed_documents_do_not_see_each_other(options, short, monkeypatch):
    monkeypatch.setattr(transformer, "SHORT", short)
    model = tiny(**options)
    ids, segments = torch.randint(97, (2, 20)), torch.tensor([[0] * 8 + [1] * 12, [0] * 3 + [1] * 10 + [-1] * 7])
    changed = ids.clone()
    changed[0, :8] = torch.randint(97, (8,))
    before, after = model(ids, doc_ids=segments), model(changed, doc_ids=segments)
    assert torch.equal(before[0, 8:], after[0, 8:]) and torch.equal(before[1], after[1])
    assert not torch.equal(model(ids)[0, 8:13], model(changed)[0, 8:13])  # without segments they do
    torch.testing.assert_close(before[0, 8:], model(ids[:1, 8:])[0], atol=1e-5, rtol=1e-5)
    targets = ids.roll(-1, 1)
    assert model(ids, targets) != model(ids, targets, segments)
    apart = [model(ids[row:row + 1, a:b], targets[row:row + 1, a:b]) for row, a, b in ((0, 0, 8), (0, 8, 20), (1, 0, 3), (1, 3, 13), (1, 13, 20))]
    torch.testing.assert_close(model(ids, targets, segments), sum(apart))


def varlen_by_hand(q, k, v, bounds_q, bounds_k, max_q, max_k, *, window_size, enable_gqa):
    """What torch's documentation says of varlen_attn, a sequence at a time: it runs on a GPU alone."""
    assert torch.equal(bounds_q, bounds_k) and bounds_q.dtype == torch.int32 and enable_gqa and bounds_q[-1] == len(q)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    done = []
    for a, b in zip(bounds_q.tolist(), bounds_q.tolist()[1:]):
        assert b - a <= min(max_q, max_k)
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)
        left, right = window_size
        seen = (j <= i + right) & ((j >= i - left) | (left < 0))
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * q.shape[2] ** -0.5
        done.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v[a:b]))
    return torch.cat(done)


@pytest.mark.parametrize("window", [None, 3])
def test_one_call_for_all_documents_is_a_call_for_each(monkeypatch, window):
    monkeypatch.setattr(transformer, "varlen_attn", varlen_by_hand)
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    starts = transformer.document_starts(torch.tensor([[0] * 5 + [1] * 7, [3] * 1 + [4] * 11]))
    in_a_row = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    together = transformer.varlen_attention(*in_a_row, starts.flatten().nonzero()[:, 0], window).view(2, 12, 4, 8).transpose(1, 2)
    torch.testing.assert_close(together, transformer.packed_attention(q, k, v, starts, window))


def test_attention_in_blocks_equals_a_banded_mask():
    q, k, v = (torch.randn(2, heads, 37, 8) for heads in (4, 2, 2))
    position = torch.arange(37)
    for window in (1, 5, 8, 36, 37, 50):
        band = (position[None] <= position[:, None]) & (position[None] > position[:, None] - window)
        torch.testing.assert_close(transformer.fused_attention(q, k, v, window=window), transformer.fused_attention(q, k, v, band))


@pytest.mark.parametrize("T, heads", [(300, 2), (128, 4), (50, 4)])
def test_compiled_attention(T, heads):
    """What is compiled on a CPU gives what the fused kernel gives, under a mask of documents, with grouped heads, whatever the blocks."""
    q, k, v = (torch.randn(2, h, T, 16, requires_grad=True) for h in (4, heads, heads))
    segments = (torch.rand(2, T) < 0.02).cumsum(1)
    mask = (torch.ones(T, T, dtype=torch.bool).tril() & (segments[:, :, None] == segments[:, None]))[:, None]
    ours, kernel = transformer.compiled_attention(q, k, v, mask), transformer.fused_attention(q, k, v, mask)
    torch.testing.assert_close(ours, kernel)
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(kernel, (q, k, v), g)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [97 * 8, 97 * 7, 50])
def test_loss_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr(transformer, "CHUNK", chunk)
    x, weight, targets = torch.randn(24, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True), torch.randint(97, (24,))
    targets[::3] = -100
    whole = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="sum"), (x, weight))
    parts = torch.autograd.grad(transformer.head_loss(x, weight, targets), (x, weight))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


def test_checkpointing_changes_nothing_but_memory():
    model, ids = tiny(), torch.randint(97, (2, 20))
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(ids, ids).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("tie", [True, False])
def test_grown_vocabulary(tie, tmp_path):
    model, ids = tiny(tie_embeddings=tie), torch.randint(97, (1, 9))
    before = model(ids)
    transformer.grow_vocabulary(model, 100, {97: [5, 7], 98: [99]})
    save(model, tmp_path)
    logits = load(tmp_path)(ids)
    assert logits.shape == (1, 9, 100) and json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 100
    torch.testing.assert_close(logits[..., :97], before)
    torch.testing.assert_close(logits[..., 97], before[..., [5, 7]].mean(-1))
    torch.testing.assert_close(logits[..., 98:], before.mean(-1, keepdim=True).expand(1, 9, 2))


def test_a_batch_gives_what_each_prompt_gives_alone():
    model = tiny()
    prompts = [torch.randint(97, (n,)).tolist() for n in (3, 17, 1, 9)]
    alone = [generate(model, [p], 24)[0] for p in prompts]
    assert generate(model, prompts, 24) == alone
    stop = alone[1][5]
    assert generate(model, prompts, 24, [stop])[1] == alone[1][:alone[1].index(stop)]


@pytest.mark.parametrize("options", [{}, {"model_type": "mistral", "sliding_window": 5}], ids=str)
def test_rows_that_have_ended_leave_the_batch(options, monkeypatch):
    """One long answer must not cost a whole batch until its end, and who stays must not notice who left."""
    monkeypatch.setattr(transformer, "PREFILL", 20)
    steps, step = [], transformer.Batch.step
    monkeypatch.setattr(transformer.Batch, "step", lambda self, ids: (steps.append(len(ids)), step(self, ids))[1])
    model = tiny(**options)
    prompts, lengths = [torch.randint(97, (n,)).tolist() for n in (20, 3, 17, 1, 9, 12, 5, 8)], [2, 30, 3, 25, 1, 7, 4, 4]
    stop_at = lambda lengths: lambda row, new, logits: 96 if len(new) == lengths[row] else int(logits[:96].argmax())
    alone = [generate(model, [p], 40, [96], choose=stop_at([n]))[0] for p, n in zip(prompts, lengths)]
    steps.clear()
    assert generate(model, prompts, 40, [96], choose=stop_at(lengths)) == alone and list(map(len, alone)) == lengths
    assert sum(steps) < 1.5 * sum(lengths) and max(steps) == 8


@pytest.mark.parametrize("options", [{}, {"model_type": "mistral", "sliding_window": 5}], ids=str)
@torch.inference_mode()
def test_rows_join_and_leave(options):
    """Longer and shorter prompts than what is there, at any time: the logits are those of the whole text."""
    model, batch, texts = tiny(**options), transformer.Batch(tiny(**options)), []
    for when in range(40):
        if when in (0, 3, 4, 21):
            new = [torch.randint(97, (n,)).tolist() for n in ((4, 9), (25,), (2, 6), (1,))[(0, 3, 4, 21).index(when)]]
            logits = batch.add(new, spare=2)
            torch.testing.assert_close(logits, torch.stack([model(torch.tensor([t]))[0, -1] for t in new]), atol=1e-4, rtol=1e-4)
            texts += new
        if when in (10, 20, 30):
            left = [i for i in range(len(texts)) if (i + when) % 3]
            batch.keep(left)
            texts = [texts[i] for i in left]
        ids = torch.randint(97, (len(texts),)).tolist()
        texts = [[*t, i] for t, i in zip(texts, ids)]
        torch.testing.assert_close(batch.step(ids), torch.stack([model(torch.tensor([t]))[0, -1] for t in texts]), atol=1e-4, rtol=1e-4)


def test_every_prompt_has_the_whole_window():
    """A long prompt must not shorten its neighbours' answers."""
    model = tiny()
    assert [len(t) for t in generate(model, [[1] * 60, [1] * 3, [2]], 61)] == [5, 61, 61] and generate(model, [[1], [2]], 0) == [[], []]


def test_rows_are_sampled_each_by_its_own_options():
    logits = torch.randn(4, 97).repeat(1000, 1)
    drawn = torch.tensor(transformer.sample(logits, [0, 1, 3, 1e-12] * 1000, [1, 1e-9, 1, 0] * 1000, torch.rand(4000).tolist())).view(1000, 4)
    assert (drawn[:, [0, 1, 3]] == logits[:4].argmax(-1)[[0, 1, 3]]).all() and len(drawn[:, 2].unique()) > 50


def test_sampling_is_seeded_and_bounded():
    model = tiny()
    one, two, three = (generate(model, [[1, 2, 3]], 20, temperature=5.0, seed=s) for s in (1, 1, 2))
    assert one == two != three
    assert generate(model, [[1, 2, 3]], 20, temperature=5.0, top_p=1e-6) == generate(model, [[1, 2, 3]], 20)
    assert len(generate(model, [[1] * 60], 20)[0]) == 5  # 64 positions: four more tokens fit, and the one after them needs none
    with pytest.raises(ValueError, match="positions"):
        generate(model, [[1] * 65], 1)


def test_samples_follow_the_nucleus():
    model = tiny()
    p, order = (model(torch.tensor([[1, 2, 3]]))[0, -1] / 4).softmax(-1).sort(descending=True)
    kept = int((p.cumsum(-1) < 0.6).sum()) + 1
    drawn = torch.tensor(generate(model, [[1, 2, 3]] * 4000, 1, temperature=4.0, top_p=0.6))[:, 0]
    share = torch.bincount(drawn, minlength=97)[order] / 4000
    assert 3 <= kept < 60 and share[kept:].sum() == 0
    torch.testing.assert_close(share[:kept], p[:kept] / p[:kept].sum(), atol=0.035, rtol=0)


def test_stop_sequences():
    model = tiny()
    text = generate(model, [[1, 2, 3]], 24)[0]
    stop = text[7:9]
    first = next(i for i in range(23) if text[i:i + 2] == stop)
    assert generate(model, [[1, 2, 3]], 24, [stop, 999]) == [text[:first]]
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[1], []], 2)


def test_choose_may_pick():
    assert generate(tiny(), [[1, 2]], 4, choose=lambda row, new, logits: len(new)) == [[0, 1, 2, 3]]


def test_presets_have_the_sizes_of_their_names():
    sizes = {}
    for name, preset in transformer.PRESETS.items():
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in Transformer(Config(**{"vocab_size": 128_256, **preset})).parameters())
    assert sizes["8b"] == 8_030_261_248  # Llama 3 8B
    assert abs(sizes["1b"] / 1.236e9 - 1) < 0.001


def test_flops_count_the_weights():
    model = tiny(tie_embeddings=False, model_type="llama")
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 97 * 32
    assert model.flops_per_token(10) == 6 * weights + 12 * 2 * 4 * 8 * 10
