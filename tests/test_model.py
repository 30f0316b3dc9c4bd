import json
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


@pytest.mark.parametrize("options", [dict(qkv_bias=False), dict(qkv_bias=True), dict(n_kv_heads=4), dict(n_kv_heads=1, tie_embeddings=False),
                                     dict(qkv_bias=False, rope_theta=500000.0, tie_embeddings=False)], ids=str)
def test_transformers_gives_the_same_logits_gradients_and_text(options, tmp_path):
    model = tiny(**options)
    save(model, tmp_path)
    theirs = reference(tmp_path)
    ids = torch.randint(97, (3, 20))
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    targets = ids.roll(-1, 1)
    model(ids, targets).backward()
    torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    expected = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item(), msg=name)
    prompt = ids[:1, :5]
    text = theirs.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:].tolist()
    assert generate(model, [prompt[0].tolist()], 32) == [text]


def test_saved_by_transformers_loads_here(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, max_position_embeddings=64)).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(97, (2, 9))
    torch.testing.assert_close(load(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


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
    assert all(torch.equal(t.float(), read_safetensors(tmp_path / "theirs")[n]) for n, t in tensors.items())


def broken(tmp_path, change):
    save(tiny(), tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    return str(caught.value)


def test_what_does_not_fit_is_named(tmp_path):
    def drop(path, names=("model.norm.weight",), add=None):
        tensors = read_safetensors(path / "model.safetensors")
        write_safetensors({n: t for n, t in tensors.items() if n not in names} | (add or {}), path / "model.safetensors")
    assert "model.norm.weight is missing" in broken(tmp_path, drop)
    assert "extra is unknown" in broken(tmp_path, lambda p: drop(p, (), {"extra": torch.zeros(2)}))
    assert "model.norm.weight has shape (3,)" in broken(tmp_path, lambda p: drop(p, (), {"model.norm.weight": torch.zeros(3)}))
    assert "truncated" in broken(tmp_path, lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-8]))
    assert "no such file" in broken(tmp_path, lambda p: (p / "config.json").unlink())


def test_hostile_headers(tmp_path):
    def header(text):
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
        with pytest.raises(ValueError):
            read_safetensors(tmp_path / "x")
    header(b"{")
    header(b"\xff\xfe")
    for offsets in ([0, 16], [-4, 4], [4, 0], [0, 2**63]):
        header(json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode())
    header(json.dumps({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode())
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("change", [{"model_type": "mamba"}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"hidden_act": "gelu"}])
def test_what_it_cannot_represent_is_refused(change, tmp_path):
    save(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        load(tmp_path)


def test_packed_documents_do_not_see_each_other():
    model = tiny()
    ids, segments = torch.randint(97, (1, 20)), torch.tensor([[0] * 8 + [1] * 12])
    changed = ids.clone()
    changed[0, :8] = torch.randint(97, (8,))
    assert torch.equal(model(ids, segments=segments)[0, 8:], model(changed, segments=segments)[0, 8:])
    assert not torch.equal(model(ids)[0, 8:], model(changed)[0, 8:])  # without segments they do
    torch.testing.assert_close(model(ids, segments=segments)[0, 8:], model(ids[:, 8:])[0], atol=1e-5, rtol=1e-5)
    targets = ids.roll(-1, 1)
    apart = model(ids[:, :8], targets[:, :8]) + model(ids[:, 8:], targets[:, 8:])
    torch.testing.assert_close(model(ids, targets, segments), apart)


def test_a_batch_gives_what_each_prompt_gives_alone():
    model = tiny()
    prompts = [torch.randint(97, (n,)).tolist() for n in (3, 17, 1, 9)]
    alone = [generate(model, [p], 24)[0] for p in prompts]
    assert generate(model, prompts, 24) == alone
    stop = alone[1][5]
    assert generate(model, prompts, 24, [stop])[1] == alone[1][:alone[1].index(stop)]


def test_sampling_is_seeded_and_bounded():
    model = tiny()
    one, two, three = (generate(model, [[1, 2, 3]], 20, temperature=5.0, seed=s) for s in (1, 1, 2))
    assert one == two != three
    assert len(generate(model, [[1] * 60], 20)[0]) == 5  # 64 positions: four more tokens fit, and the one after them needs none
    with pytest.raises(ValueError, match="positions"):
        generate(model, [[1] * 65], 1)


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
    model = tiny(tie_embeddings=False, qkv_bias=False)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 97 * 32
    assert model.flops_per_token(10) == 6 * weights + 12 * 2 * 4 * 8 * 10


def test_an_untrained_model_copies():
    """The wired copying heads: on random tokens that repeat at random distances it is right most of the time, and not without."""
    def right(bias):
        torch.manual_seed(0)
        model = Transformer(Config(qkv_bias=bias))
        rows = [torch.randint(2048, (int(n),)).repeat(49)[:385] for n in torch.randint(8, 192, (16,))]
        ids = torch.stack(rows)
        return (model(ids[:, :-1]).argmax(-1) == ids[:, 1:])[:, 192:].float().mean().item()
    assert right(True) > 0.9 and right(False) < 0.05
