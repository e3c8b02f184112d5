"""Configs: the published numbers, every spelling of the files, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from l4jax.config import PRESETS, Llama4Config, RopeScaling, load_config, preset
from l4jax.model.params import abstract_model, flat_params


@pytest.mark.parametrize(
    ("name", "total", "vision"),
    [
        ("scout", 108_641_793_536, 871_932_416),
        ("maverick", 401_583_781_376, 871_932_416),
        ("guard-4", 12_001_097_216, 871_932_416),
    ],
)
def test_parameter_counts_are_the_published_ones(name, total, vision):
    params = flat_params(abstract_model(preset(name), scan_layers=True))
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in params.items()}
    sees = ("vision_model.", "multi_modal_projector.")
    assert sum(sizes.values()) == total
    assert sum(size for path, size in sizes.items() if path.startswith(sees)) == vision


def test_behemoth_estimates_are_near_the_published_totals():
    # Meta: nearly 2T parameters; the two estimates are 1.991T and 2.033T with the text decoder alone.
    for name, total in (("behemoth-estimate-94", 1.991e12), ("behemoth-estimate-96", 2.033e12)):
        params = flat_params(abstract_model(preset(name), scan_layers=True))
        text = sum(int(np.prod(p.shape)) for path, p in params.items() if not path.startswith(("vision", "multi")))
        assert text == pytest.approx(total, rel=1e-3)


def test_layer_patterns():
    scout, maverick, guard = (preset(name).text_config for name in ("scout", "maverick", "guard-4"))
    nope = [layer for layer in range(48) if not scout.uses_rope(layer)]
    assert nope == list(range(3, 48, 4)) == [layer for layer in range(48) if not maverick.uses_rope(layer)]
    assert scout.moe_layers == tuple(range(48))
    assert maverick.moe_layers == tuple(range(1, 48, 2))
    assert guard.moe_layers == ()
    assert all(guard.uses_rope(layer) for layer in range(48))
    assert (scout.cycle_length, maverick.cycle_length, guard.cycle_length) == (4, 4, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip(name):
    config = preset(name)
    assert Llama4Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["scout", "maverick", "small-scout", "mini-maverick"])
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name):
    from transformers import Llama4Config as HFConfig
    from transformers import Llama4TextConfig as HFTextConfig

    config = preset(name)
    hf = (HFConfig if config.vision_config else HFTextConfig)(**config.to_hf())
    assert Llama4Config.from_hf(json.loads(hf.to_json_string())) == config
    text = getattr(hf, "text_config", hf)
    assert text.moe_layers == list(config.text_config.moe_layers)
    assert text.no_rope_layers == list(config.text_config.no_rope_layers)


def released_scout() -> dict:
    """The text part of a config as it was released in April 2025: old spellings throughout."""
    fields = preset("scout").to_hf()["text_config"]
    for new in ("rope_parameters", "moe_layers", "interleave_moe_layer_step"):
        del fields[new]
    return fields | {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "no_rope_layers": [],
        "attn_temperature_tuning": 4,
        "for_llm_compressor": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "interleave_moe_layer_step": 1,
        "torch_dtype": "bfloat16",
    }


def test_old_spellings_mean_the_same():
    assert Llama4Config.from_hf(released_scout()).text_config == preset("scout").text_config


def test_interleaving_is_read_where_moe_layers_is_absent():
    fields = released_scout() | {"interleave_moe_layer_step": 2, "num_local_experts": 128}
    assert Llama4Config.from_hf(fields).text_config.moe_layers == preset("maverick").text_config.moe_layers
    dense = released_scout() | {"interleave_moe_layer_step": 0, "moe_layers": [], "num_local_experts": 0}
    assert Llama4Config.from_hf(dense).text_config.moe_layers == ()


def test_scouts_first_rope_scaling_is_obeyed_with_a_warning():
    fields = released_scout()
    fields["rope_scaling"] |= {"factor": 8.0, "high_freq_factor": 4.0}
    with pytest.warns(UserWarning, match="16"):
        text = Llama4Config.from_hf(fields).text_config
    assert text.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_expert_per_tok": 2}, "did you mean 'num_experts_per_tok'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not Llama 4"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"num_key_value_heads": 7}, "not divisible by"),
        ({"no_rope_layers": [1, 0]}, "2 entries for 48 layers"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn' is not one of"),
        ({"num_experts_per_tok": 17}, "must be in 1..16"),
    ],
)
def test_impossible_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Llama4Config.from_hf(released_scout() | change)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'maverick'"):
        preset("mavrick")


META_SCOUT = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "head_dim": 128, "vocab_size": 202048,
    "multiple_of": 2048, "ffn_dim_multiplier": 1.2, "ffn_exp": 4, "norm_eps": 1e-5, "attention_chunk_size": 8192,
    "rope_theta": 500000.0, "use_scaled_rope": True, "nope_layer_interval": 4, "use_qk_norm": True,
    "moe_args": {
        "num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1, "interleave_moe_layer_step": 1
    },
    "vision_args": {
        "image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14}, "dim": 1408,
        "n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096, "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_params_json_of_meta(nested, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps({"model": META_SCOUT} if nested else META_SCOUT))
    config, scout = load_config(tmp_path), preset("scout")
    # params.json does not say how long the context is.
    text = dataclasses.replace(config.text_config, max_position_embeddings=10485760)
    assert (text, config.vision_config) == (scout.text_config, scout.vision_config)


def test_maverick_from_params_json():
    moe = META_SCOUT["moe_args"] | {"num_experts": 128, "interleave_moe_layer_step": 2}
    params = META_SCOUT | {"use_scaled_rope": False, "use_qk_norm": False, "moe_args": moe}
    text = dataclasses.replace(Llama4Config.from_meta(params).text_config, max_position_embeddings=1048576)
    assert text == preset("maverick").text_config


@pytest.mark.parametrize("content", ["not json", "[1, 2]", "{}", '{"num_hidden_layers": 2}', "\xff\xfe"])
def test_broken_config_files_give_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="config") as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_config_without_jax():
    """`l4jax --help` reads presets: the module may not pull in jax."""
    import subprocess
    import sys

    code = "import l4jax.config, sys; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert jax  # imported here, so the check above needs a process of its own
