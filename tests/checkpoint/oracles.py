"""Checkpoints that we did not write: transformers' own, and Meta-style files made of them with torch.

The Meta layout follows the published description of the released files, not our table.
"""

import dataclasses
import json
from pathlib import Path

from l4jax.config import Llama4Config


def hf_model(config: Llama4Config, seed: int = 0):
    """Returns a transformers model of this config with weights drawn at a scale at which every mistake shows."""
    import torch
    import transformers

    content = config.to_hf()
    if config.text_config.attention_chunk_size is None:  # transformers cannot run null
        content["text_config"]["attention_chunk_size"] = 8192
    kind = transformers.Llama4ForConditionalGeneration if config.vision_config else transformers.Llama4ForCausalLM
    hf_config = kind.config_class.from_dict(content)
    hf_config._attn_implementation = "eager"
    model = kind(hf_config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def write_hf(model, directory: Path, dtype: str = "bfloat16", shard_size: str = "100KB") -> Path:
    """Saves with transformers, in many small shards."""
    import torch

    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state, max_shard_size=shard_size)
    return directory


def write_meta(model, config: Llama4Config, directory: Path, num_ranks: int) -> Path:
    """Saves the weights of a transformers model as Meta would for `num_ranks` ranks."""
    import io

    import torch

    directory.mkdir(parents=True, exist_ok=True)
    text = config.text_config
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    prefix = "language_model." if config.vision_config else ""

    for rank in range(num_ranks):

        def share(name: str, axis: int, rank=rank):
            return state[name].chunk(num_ranks, dim=axis)[rank].clone()

        out = {
            "tok_embeddings.weight": share(f"{prefix}model.embed_tokens.weight", 0),
            "output.weight": share(f"{prefix}lm_head.weight", 0),
            "norm.weight": state[f"{prefix}model.norm.weight"].clone(),
            "rope.freqs": torch.ones(3),
        }
        for layer in range(text.num_hidden_layers):
            hf, meta = f"{prefix}model.layers.{layer}.", f"layers.{layer}."
            attention = [share(f"{hf}self_attn.{name}_proj.weight", 0) for name in "qkv"]
            out[f"{meta}attention.wqkv.weight"] = torch.cat(attention)
            out[f"{meta}attention.wqkv._extra_state"] = io.BytesIO(b"state")
            out[f"{meta}attention.wo.weight"] = share(f"{hf}self_attn.o_proj.weight", 1)
            out[f"{meta}attention.wqkv.layer_norm_weight"] = state[f"{hf}input_layernorm.weight"]
            norm = state[f"{hf}post_attention_layernorm.weight"]
            feed_forward = f"{meta}feed_forward."
            if not text.uses_experts(layer):
                halves = [share(f"{hf}feed_forward.{name}_proj.weight", 0) for name in ("gate", "up")]
                out[f"{feed_forward}mlp.layer_norm_weight"] = norm
                out[f"{feed_forward}mlp.fc1_weight"] = torch.cat(halves)
                out[f"{feed_forward}mlp.fc2_weight"] = share(f"{hf}feed_forward.down_proj.weight", 1)
                continue
            out[f"{feed_forward}norm.weight"] = norm
            out[f"{feed_forward}router_DE"] = state[f"{hf}feed_forward.router.weight"].T.contiguous()
            out[f"{feed_forward}running_gate_stats_3E"] = torch.zeros(3, text.num_local_experts)
            gate, up = state[f"{hf}feed_forward.experts.gate_up_proj"].chunk(2, dim=-1)
            for name, half in (("moe_w_in_eD_F", gate), ("moe_w_swiglu_eD_F", up)):
                out[f"{feed_forward}experts.{name}"] = half.chunk(num_ranks, dim=-1)[rank].flatten(0, 1).contiguous()
            down = state[f"{hf}feed_forward.experts.down_proj"].chunk(num_ranks, dim=1)[rank]
            out[f"{feed_forward}experts.moe_w_out_eF_D"] = down.flatten(0, 1).contiguous()
            shared = f"{hf}feed_forward.shared_expert."
            out[f"{feed_forward}w_in_shared_FD.weight"] = share(f"{shared}gate_proj.weight", 0)
            out[f"{feed_forward}w_swiglu_FD.weight"] = share(f"{shared}up_proj.weight", 0)
            out[f"{feed_forward}w_out_shared_DF.weight"] = share(f"{shared}down_proj.weight", 1)
        if config.vision_config:
            _meta_vision(out, state, share, config.vision_config.num_hidden_layers)
        torch.save(out, directory / f"consolidated.{rank:02d}.pth")
    (directory / "params.json").write_text(json.dumps(meta_params(config)))
    return directory


def _meta_vision(out: dict, state: dict, share, num_layers: int) -> None:
    encoder = "vision_embeddings.vision_encoder."
    out["vision_projection.weight"] = share("multi_modal_projector.linear_1.weight", 0)
    out[f"{encoder}conv1._linear.weight"] = share("vision_model.patch_embedding.linear.weight", 0)
    for name in ("class_embedding", "positional_embedding_vlm"):
        out[encoder + name] = state[f"vision_model.{name}"]
    for end in ("weight", "bias"):
        for name in ("pre", "post"):
            out[f"{encoder}ln_{name}.{end}"] = state[f"vision_model.layernorm_{name}.{end}"]
    adapter = "vision_embeddings.vision_adapter.mlp."
    out[f"{adapter}c_fc.weight"] = share("vision_model.vision_adapter.mlp.fc1.weight", 0)
    out[f"{adapter}c_proj.weight"] = share("vision_model.vision_adapter.mlp.fc2.weight", 1)
    for layer in range(num_layers):
        hf, meta = f"vision_model.model.layers.{layer}.", f"{encoder}transformer.resblocks.{layer}."
        for name in "qkv":
            for end in ("weight", "bias"):
                out[f"{meta}attn.w{name}.{end}"] = share(f"{hf}self_attn.{name}_proj.{end}", 0)
        out[f"{meta}attn.wo.weight"] = share(f"{hf}self_attn.o_proj.weight", 1)
        out[f"{meta}attn.wo.bias"] = state[f"{hf}self_attn.o_proj.bias"]
        for end in ("weight", "bias"):
            out[f"{meta}mlp.c_fc.{end}"] = share(f"{hf}mlp.fc1.{end}", 0)
            out[f"{meta}ln_1.{end}"] = state[f"{hf}input_layernorm.{end}"]
            out[f"{meta}ln_2.{end}"] = state[f"{hf}post_attention_layernorm.{end}"]
        out[f"{meta}mlp.c_proj.weight"] = share(f"{hf}mlp.fc2.weight", 1)
        out[f"{meta}mlp.c_proj.bias"] = state[f"{hf}mlp.fc2.bias"]


def meta_params(config: Llama4Config) -> dict:
    """Returns a `params.json` whose width formulas give this config."""
    text, vision = config.text_config, config.vision_config
    width = text.intermediate_size_mlp if not text.moe_layers else 2 * text.intermediate_size
    params = {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "multiple_of": 1,
        "ffn_exp": 4,
        "ffn_dim_multiplier": (width + 0.5) / int(2 * 4 * text.hidden_size / 3),
        "norm_eps": text.rms_norm_eps,
        "attention_chunk_size": text.attention_chunk_size,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": text.rope_scaling is not None,
        "nope_layer_interval": 4 if 0 in text.no_rope_layers else None,
        "use_qk_norm": text.use_qk_norm,
        "floor_scale": text.floor_scale,
        "attn_scale": text.attn_scale,
    }
    if text.moe_layers:
        step = text.moe_layers[0] + 1
        params["moe_args"] = {"num_experts": text.num_local_experts, "top_k": 1, "interleave_moe_layer_step": step}
    if vision:
        size = {"height": vision.image_size, "width": vision.image_size}
        patch = {"height": vision.patch_size, "width": vision.patch_size}
        params["vision_args"] = {
            "image_size": size,
            "patch_size": patch,
            "dim": vision.hidden_size,
            "n_layers": vision.num_hidden_layers,
            "n_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "output_dim": vision.vision_output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        }
    return params


def wide_heads(config: Llama4Config) -> Llama4Config:
    """Returns the config with eight query and eight key heads, which eight ranks can share."""
    text = dataclasses.replace(config.text_config, num_attention_heads=8, num_key_value_heads=8)
    vision = config.vision_config and dataclasses.replace(config.vision_config, hidden_size=64, num_attention_heads=8)
    vision = vision and dataclasses.replace(vision, intermediate_size=256)
    return dataclasses.replace(config, text_config=text, vision_config=vision)
