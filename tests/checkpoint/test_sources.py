"""Checkpoints that transformers and torch wrote are read tensor for tensor."""

import dataclasses

import numpy as np
import pytest

from l4jax.checkpoint.convert import convert
from l4jax.checkpoint.hf import open_hf
from l4jax.checkpoint.lazy import everything
from l4jax.checkpoint.meta import open_meta
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.config import preset
from tests.checkpoint import oracles

PATTERNS = ["small-scout", "small-maverick", "small-guard"]


def read_all(source) -> dict[str, np.ndarray]:
    return {path: array.read(everything(array.shape)).copy() for path, array in source.arrays.items()}


def assert_same(first, second):
    first, second = read_all(first), read_all(second)
    assert set(first) == set(second)
    for path, array in first.items():
        assert array.dtype == second[path].dtype
        assert array.tobytes() == second[path].tobytes(), path


@pytest.mark.oracle
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_meta_and_hf_files_of_a_model_are_the_same_parameters(tmp_path, name, num_ranks):
    config = oracles.wide_heads(preset(name))
    model = oracles.hf_model(config)
    hf = open_checkpoint(oracles.write_hf(model, tmp_path / "hf"))
    meta = open_meta(oracles.write_meta(model, config, tmp_path / "meta", num_ranks), config)
    assert meta.kind == "meta"
    assert len(meta.weight_files) == num_ranks
    assert set(meta.ignored) >= {"rope.freqs", "layers.0.attention.wqkv._extra_state"}
    assert_same(hf, meta)


@pytest.mark.oracle
def test_params_json_gives_the_config(tmp_path):
    config = oracles.wide_heads(preset("small-scout"))
    model = oracles.hf_model(config)
    meta = open_checkpoint(oracles.write_meta(model, config, tmp_path / "meta", 2))
    text, wanted = meta.config.text_config, config.text_config
    for name in ("intermediate_size", "moe_layers", "no_rope_layers", "head_dim", "num_local_experts"):
        assert getattr(text, name) == getattr(wanted, name)


@pytest.mark.oracle
def test_names_after_loading_are_read_too(tmp_path):
    import torch

    config = preset("small-maverick")
    model = oracles.hf_model(config)
    directory = oracles.write_meta(model, config, tmp_path / "meta", 1)
    before = read_all(open_meta(directory, config))
    path = directory / "consolidated.00.pth"
    content, text = torch.load(path, weights_only=False), config.text_config
    sizes = [text.num_attention_heads * text.head_dim] + [text.num_key_value_heads * text.head_dim] * 2
    for layer in range(text.num_hidden_layers):
        prefix = f"layers.{layer}."
        for name, part in zip("qkv", content.pop(f"{prefix}attention.wqkv.weight").split(sizes), strict=True):
            content[f"{prefix}attention.w{name}.weight"] = part
        content[f"{prefix}attention_norm.weight"] = content.pop(f"{prefix}attention.wqkv.layer_norm_weight")
        feed_forward = f"{prefix}feed_forward."
        if f"{feed_forward}router_DE" not in content:
            content[f"{prefix}ffn_norm.weight"] = content.pop(f"{feed_forward}mlp.layer_norm_weight")
            fc1 = content.pop(f"{feed_forward}mlp.fc1_weight")
            content[f"{feed_forward}w1.weight"], content[f"{feed_forward}w3.weight"] = fc1.chunk(2)
            content[f"{feed_forward}w2.weight"] = content.pop(f"{feed_forward}mlp.fc2_weight")
            continue
        content[f"{prefix}ffn_norm.weight"] = content.pop(f"{feed_forward}norm.weight")
        for old, new in (("moe_w_in_eD_F", "w1"), ("moe_w_swiglu_eD_F", "w3"), ("moe_w_out_eF_D", "w2")):
            tensor = content.pop(f"{feed_forward}experts.{old}")
            content[f"{feed_forward}experts.{new}"] = tensor.unflatten(0, (text.num_local_experts, -1))
        for old, new in (("w_in_shared_FD", "w1"), ("w_swiglu_FD", "w3"), ("w_out_shared_DF", "w2")):
            content[f"{feed_forward}shared_expert.{new}.weight"] = content.pop(f"{feed_forward}{old}.weight")
    torch.save(content, path)
    after = read_all(open_meta(directory, config))
    assert all(after[path].tobytes() == array.tobytes() for path, array in before.items())


@pytest.mark.oracle
def test_experts_one_by_one_equal_fused_ones(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model = oracles.hf_model(preset("small-maverick"))
    fused = oracles.write_hf(model, tmp_path / "fused", shard_size="1GB")
    single = tmp_path / "single"
    single.mkdir()
    state = load_file(fused / "model.safetensors")
    for key in [key for key in state if "experts.gate_up_proj" in key or "experts.down_proj" in key]:
        prefix, _, name = key.rpartition(".")
        for e, weight in enumerate(state.pop(key)):
            halves = weight.chunk(2, dim=-1) if name == "gate_up_proj" else (weight,)
            wanted = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
            for one, half in zip(wanted, halves, strict=True):
                state[f"{prefix}.{e}.{one}.weight"] = half.T.contiguous()
    save_file(state, single / "model.safetensors")
    (single / "config.json").write_bytes((fused / "config.json").read_bytes())
    assert torch.bfloat16 in {tensor.dtype for tensor in state.values()}
    assert_same(open_checkpoint(fused), open_checkpoint(single))


@pytest.mark.oracle
def test_text_model_has_no_prefix(tmp_path):
    config = dataclasses.replace(preset("small-scout"), vision_config=None)
    model = oracles.hf_model(config)
    source = open_checkpoint(oracles.write_hf(model, tmp_path, "float32"))
    kernel = source.arrays["lm_head.kernel"]
    expected = model.lm_head.weight.detach().numpy().T
    np.testing.assert_array_equal(kernel.read(everything(kernel.shape)), expected)


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", ["compressed-tensors", "fbgemm"])
def test_fp8_experts_are_dequantised_with_their_own_scales_or_kept(tmp_path, scheme):
    import torch
    from safetensors.torch import load_file, save_file

    config = preset("small-maverick")
    model = oracles.hf_model(config)
    directory = oracles.write_hf(model, tmp_path / "hf", shard_size="1GB")
    file = directory / "model.safetensors"
    state, bits, expected = load_file(file), {}, {}
    for key in [key for key in state if "experts.gate_up_proj" in key or "experts.down_proj" in key]:
        weight = state.pop(key).float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 300  # for each expert and output channel; not ours, amax / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        bits[key] = (values.view(torch.uint8), scale)
        expected[key] = (values.float() * scale).to(torch.bfloat16)
        prefix, _, name = key.rpartition(".")
        if scheme == "fbgemm":
            state[key] = values
            state[f"{key}_scale"] = scale if name == "gate_up_proj" else scale.transpose(1, 2).contiguous()
            continue
        halves = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
        for e in range(config.text_config.num_local_experts):
            for one, value, s in zip(
                halves, values[e].chunk(len(halves), -1), scale[e].chunk(len(halves), -1), strict=True
            ):
                state[f"{prefix}.{e}.{one}.weight"] = value.T.contiguous()
                state[f"{prefix}.{e}.{one}.weight_scale"] = s.T.contiguous()
    save_file(state, file)
    source = open_hf(directory)
    assert not source.ignored
    kept = open_checkpoint(convert(directory, tmp_path / "kept", quantize="fp8"))
    for place, layer in (("layers.cycle.1", 1), ("layers.cycle.3", 3)):
        key = f"language_model.model.layers.{layer}.feed_forward.experts."
        gate, up = expected[f"{key}gate_up_proj"].chunk(2, dim=-1)
        for name, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", expected[f"{key}down_proj"])):
            array = source.arrays[f"{place}.feed_forward.experts.{name}"]
            got = array.read(everything(array.shape))[0]
            np.testing.assert_array_equal(got.astype(np.float32), tensor.float().numpy())
            halves = {"gate_proj": 0, "up_proj": 1}
            fused = f"{key}gate_up_proj" if name in halves else f"{key}down_proj"
            for ending, stored in zip(("values", "scales"), bits[fused], strict=True):
                array = kept.arrays[f"{place}.feed_forward.experts.{name}.{ending}"]
                wanted = (stored.chunk(2, dim=-1)[halves[name]] if name in halves else stored).numpy()
                np.testing.assert_array_equal(array.read(everything(array.shape))[0].view(wanted.dtype), wanted)


@pytest.mark.oracle
def test_metas_fp8_experts_are_dequantised_rank_by_rank(tmp_path):
    import torch

    config = oracles.wide_heads(preset("small-maverick"))
    directory = oracles.write_meta(oracles.hf_model(config), config, tmp_path / "meta", 2)
    experts, expected, bits = config.text_config.num_local_experts, {}, {}
    for rank in range(2):
        path, scales = directory / f"consolidated.{rank:02d}.pth", {}
        content = torch.load(path, weights_only=False)
        for layer in (1, 3, 5):  # the last layer stays as it was, as in the released files
            prefix = f"layers.{layer}.feed_forward.experts."
            for name, alias in (("moe_w_in_eD_F", "w1"), ("moe_w_swiglu_eD_F", "w3"), ("moe_w_out_eF_D", "w2")):
                weight = content[prefix + name].float().unflatten(0, (experts, -1))
                scale = weight.abs().amax(dim=1) / 448
                values = (weight / scale[:, None]).to(torch.float8_e4m3fn)
                content[prefix + name], scales[prefix + alias] = values.flatten(0, 1), scale
                product = (values.float() * scale[:, None]).to(torch.bfloat16).float().numpy()
                expected.setdefault((layer, alias), []).append(product)
                bits.setdefault((layer, alias), []).append(values.view(torch.uint8).numpy())
        torch.save(content, path)
        torch.save(scales, directory / f"fp8_scales_{rank}.pt")
    source = open_meta(directory, config)
    for layer in (1, 3, 5):
        for name, alias, axis in (("gate_proj", "w1", 2), ("up_proj", "w3", 2), ("down_proj", "w2", 1)):
            array = source.arrays[f"layers.cycle.{layer % 4}.feed_forward.experts.{name}"]
            got = array.read(everything(array.shape))[layer // 4].astype(np.float32)
            np.testing.assert_array_equal(got, np.concatenate(expected[layer, alias], axis))
    kept = open_checkpoint(convert(directory, tmp_path / "kept", quantize="fp8"))
    for layer in (1, 5):
        for name, alias in (("gate_proj", "w1"), ("up_proj", "w3")):  # w2 has one scale a rank along its inputs
            array = kept.arrays[f"layers.cycle.1.feed_forward.experts.{name}.values"]
            got = array.read(everything(array.shape))[layer // 4].view(np.uint8)
            np.testing.assert_array_equal(got, np.concatenate(bits[layer, alias], 2))
    (directory / "fp8_scales_1.pt").unlink()
    with pytest.raises(FileNotFoundError, match="fp8_scales"):
        open_meta(directory, config)
