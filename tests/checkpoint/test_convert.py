"""Conversion there and back: the same bytes, the same logits."""

import dataclasses
import json

import numpy as np
import pytest

from l4jax.checkpoint import convert, manifest, names, pieces, store, zarr
from l4jax.checkpoint.hf import open_hf
from l4jax.checkpoint.lazy import everything
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.safetensors import MappedFile, read_header
from l4jax.config import preset
from tests.checkpoint import oracles
from tests.checkpoint.conftest import random_parameters

PATTERNS = ["small-scout", "small-maverick", "small-guard"]


def tensors(directory) -> dict[str, tuple]:
    """Every tensor of a directory of safetensors: dtype, shape and bytes."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        mapped = MappedFile(path)
        for key, info in read_header(path).items():
            found[key] = (info.dtype, info.shape, mapped.array(info.dtype, info.shape, info.offset).tobytes())
    return found


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Tiny models in many pieces and shards, as large ones are."""
    monkeypatch.setattr(zarr, "PIECE_BYTES", 32768)
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(convert, "SHARD_BYTES", 200_000)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", PATTERNS)
def test_hf_to_l4jax_to_hf_returns_the_same_bytes(tmp_path, name, dtype):
    hf = oracles.write_hf(oracles.hf_model(preset(name)), tmp_path / "hf", dtype)
    convert.convert(hf, tmp_path / "l4jax")
    convert.convert(tmp_path / "l4jax", tmp_path / "again", to="hf")
    assert tensors(tmp_path / "again") == tensors(hf)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(hf))


@pytest.mark.oracle
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_meta_to_hf_equals_hf(tmp_path, name, num_ranks):
    config = oracles.wide_heads(preset(name))
    model = oracles.hf_model(config)
    hf = oracles.write_hf(model, tmp_path / "hf")
    meta = oracles.write_meta(model, config, tmp_path / "meta", num_ranks)
    convert.convert(meta, tmp_path / "l4jax")
    convert.convert(tmp_path / "l4jax", tmp_path / "exported", to="hf")
    assert tensors(tmp_path / "exported") == tensors(hf)


@pytest.mark.oracle
@pytest.mark.parametrize("name", [*PATTERNS, "text"])
def test_transformers_loads_the_export_with_the_same_logits(tmp_path, name):
    import torch

    config = preset("small-scout") if name == "text" else preset(name)
    if name == "text":
        config = dataclasses.replace(config, vision_config=None)
    model = oracles.hf_model(config)
    hf = oracles.write_hf(model, tmp_path / "hf", "float32")
    convert.convert(hf, tmp_path / "l4jax")
    exported = convert.convert(tmp_path / "l4jax", tmp_path / "exported", to="hf")
    chunk = {"attention_chunk_size": 8192} if config.text_config.attention_chunk_size is None else {}
    hf_config = type(model.config).from_pretrained(exported)
    getattr(hf_config, "text_config", hf_config).update(chunk)
    hf_config._attn_implementation = "eager"
    again = type(model).from_pretrained(exported, config=hf_config, dtype=torch.float32).eval()
    ids = torch.arange(40)[None] % 250
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_an_l4jax_checkpoint_survives_the_way_through_hf(tmp_path, nine_layers):
    params = random_parameters(nine_layers)
    first = store.save(tmp_path / "first", params, nine_layers)
    hf = convert.convert(first, tmp_path / "hf", to="hf")
    second = open_checkpoint(convert.convert(hf, tmp_path / "second"))
    assert second.config == nine_layers
    for path, array in params.items():
        np.testing.assert_array_equal(second.arrays[path].read(everything(array.shape)), array)


def test_dtype_is_changed_on_the_way(tmp_path, nine_layers):
    params = random_parameters(nine_layers)
    first = store.save(tmp_path / "first", params, nine_layers)
    hf = convert.convert(first, tmp_path / "hf", to="hf", dtype="bfloat16")
    assert {dtype.name for dtype, _, _ in tensors(hf).values()} == {"bfloat16"}
    wide = open_checkpoint(convert.convert(hf, tmp_path / "wide", dtype="float32"))
    for path, array in wide.arrays.items():
        expected = params[path].astype(convert.DTYPES["bfloat16"]).astype(np.float32)
        np.testing.assert_array_equal(array.read(everything(array.shape)), expected)


def test_tokenizer_licence_and_notice_travel(tmp_path, nine_layers):
    first = store.save(tmp_path / "first", random_parameters(nine_layers), nine_layers)
    (first / "tokenizer.model").write_bytes(b"tokens")
    (first / "generation_config.json").write_text("{}")
    (first / "LICENSE.txt").write_text("LLAMA 4 COMMUNITY LICENSE ... the Llama 4 Community License, Copyright")
    (first / "USE_POLICY.md").write_text("be good")
    hf = convert.convert(first, tmp_path / "hf", to="hf")
    travelling = {"tokenizer.model", "generation_config.json", "LICENSE.txt", "USE_POLICY.md", "NOTICE"}
    assert travelling <= {path.name for path in hf.iterdir()}
    assert (hf / "NOTICE").read_text() == store.NOTICE
    assert travelling <= set(manifest.read_manifest(hf)["files"])


def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path, nine_layers, monkeypatch):
    first = store.save(tmp_path / "first", random_parameters(nine_layers), nine_layers)
    hf = convert.convert(first, tmp_path / "hf", to="hf")
    whole = manifest.read_manifest(convert.convert(hf, tmp_path / "whole"))
    written, real = [], zarr.write_box

    def failing(target, box, values):
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(box)
        real(target, box, values)

    monkeypatch.setattr(zarr, "write_box", failing)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(hf, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(zarr, "write_box", lambda *args: (written.append(args[1]), real(*args))[1])
    again = manifest.read_manifest(convert.convert(hf, tmp_path / "again"))
    assert again["files"] == whole["files"]
    total = sum(name.count("/c/") for name in whole["files"])
    assert total <= len(written) <= total + pieces.WORKERS


def test_the_rest_of_another_conversion_is_not_continued(tmp_path, nine_layers):
    first = store.save(tmp_path / "first", random_parameters(nine_layers), nine_layers)
    with pieces.Journal(tmp_path / "out.partial", {"source": "something else"}):
        pass
    with pytest.raises(FileExistsError, match="another conversion"):
        convert.convert(first, tmp_path / "out", to="hf")


def test_a_destination_that_exists_is_refused(tmp_path, nine_layers):
    first = store.save(tmp_path / "first", random_parameters(nine_layers), nine_layers)
    with pytest.raises(FileExistsError, match="there already"):
        convert.convert(first, tmp_path)


@pytest.mark.parametrize("name", ["scout", "maverick", "guard-4"])
def test_published_tensors_are_the_rows_of_the_table(name):
    """Names and shapes of the released files, from their published description; nothing is allocated."""
    config = preset(name)
    text, rows = config.text_config, {}
    for row in names.hf_rows(config):
        rows[row.key] = names.row_shape(row, [names.part_sizes(config, part.path) for part in row.parts])
    expected = {
        "language_model.model.embed_tokens.weight": (202048, 5120),
        "language_model.lm_head.weight": (202048, 5120),
        "language_model.model.norm.weight": (5120,),
        "vision_model.class_embedding": (1408,),
        "vision_model.positional_embedding_vlm": (577, 1408),
        "vision_model.patch_embedding.linear.weight": (1408, 588),
        "vision_model.vision_adapter.mlp.fc1.weight": (4096, 5632),
        "vision_model.vision_adapter.mlp.fc2.weight": (4096, 4096),
        "multi_modal_projector.linear_1.weight": (5120, 4096),
    }
    for end in ("weight", "bias"):
        expected |= {f"vision_model.layernorm_{x}.{end}": (1408,) for x in ("pre", "post")}
    for layer in range(34):
        prefix = f"vision_model.model.layers.{layer}."
        for n in "qkvo":
            expected |= {
                f"{prefix}self_attn.{n}_proj.weight": (1408, 1408),
                f"{prefix}self_attn.{n}_proj.bias": (1408,),
            }
        expected |= {f"{prefix}mlp.fc1.weight": (5632, 1408), f"{prefix}mlp.fc1.bias": (5632,)}
        expected |= {f"{prefix}mlp.fc2.weight": (1408, 5632), f"{prefix}mlp.fc2.bias": (1408,)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected |= {f"{prefix}{norm}.weight": (1408,), f"{prefix}{norm}.bias": (1408,)}
    experts, dense = {"scout": (16, 0), "maverick": (128, 16384), "guard-4": (0, 8192)}[name]
    for layer in range(48):
        prefix = f"language_model.model.layers.{layer}."
        for n, size in (("q", 5120), ("k", 1024), ("v", 1024)):
            expected[f"{prefix}self_attn.{n}_proj.weight"] = (size, 5120)
        expected[f"{prefix}self_attn.o_proj.weight"] = (5120, 5120)
        expected[f"{prefix}input_layernorm.weight"] = expected[f"{prefix}post_attention_layernorm.weight"] = (5120,)
        mlp = f"{prefix}feed_forward."
        if name == "scout" or (name == "maverick" and layer % 2):
            expected[f"{mlp}router.weight"] = (experts, 5120)
            expected[f"{mlp}experts.gate_up_proj"] = (experts, 5120, 16384)
            expected[f"{mlp}experts.down_proj"] = (experts, 8192, 5120)
            mlp, width = f"{mlp}shared_expert.", 8192
        else:
            width = dense
        expected[f"{mlp}gate_proj.weight"] = expected[f"{mlp}up_proj.weight"] = (width, 5120)
        expected[f"{mlp}down_proj.weight"] = (5120, width)
    assert text.num_hidden_layers == 48
    assert rows == expected


@pytest.mark.oracle
def test_missing_and_unexpected_tensors_are_all_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    directory = oracles.write_hf(oracles.hf_model(preset("small-guard")), tmp_path, "float32", "1GB")
    state = load_file(directory / "model.safetensors")
    state["language_model.model.layers.0.self_attn.q_proj.lora_A"] = np.zeros(3, np.float32)
    for key in ("language_model.lm_head.weight", "vision_model.class_embedding"):
        del state[key]
    save_file(state, directory / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"1 unexpected: .*lora_A; 2 missing: .*lm_head\.weight, vision_model"
    ) as error:
        open_hf(directory)
    assert "\n" not in str(error.value)
