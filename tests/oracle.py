"""Small Llama 4 models of transformers with weights at full scale, and the same models in l4jax.

transformers initialises with standard deviation 0.02 and norms at 1, which hides errors: here every weight is redrawn.
Imports torch and transformers when called, so that the rest of a test file works without them.
"""

import dataclasses

import numpy as np

from l4jax.config import Llama4Config, preset


def import_torchvision():
    """Returns torchvision, which transformers imports, also where its compiled operators do not fit this torch."""
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision

        torchvision.operator_names = library  # the names live as long as this object
    return torchvision


def small_config(name: str, **text_fields) -> Llama4Config:
    """A preset with some fields of its text config replaced."""
    config = preset(name)
    return dataclasses.replace(config, text_config=dataclasses.replace(config.text_config, **text_fields))


def hf_config(config: Llama4Config):
    from transformers import Llama4Config as HFConfig
    from transformers import Llama4TextConfig as HFTextConfig

    fields = config.to_hf()
    text = fields.get("text_config", fields)
    if (
        text["attention_chunk_size"] is None
    ):  # transformers cannot say "no chunks": one longer than the text is the same
        text["attention_chunk_size"] = 8192
    hf = (HFTextConfig if config.vision_config is None else HFConfig)(**fields)
    hf._attn_implementation = "eager"
    return hf


def hf_model(config: Llama4Config, seed: int = 0):
    """Returns the transformers model in float32: matrices of variance 1 / fan-in, norms around 1, biases around 0."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

    kind = Llama4ForCausalLM if config.vision_config is None else Llama4ForConditionalGeneration
    model = kind(hf_config(config)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                fan_in = weight.shape[-2] if ".experts." in name else weight.shape[-1]
                weight.copy_(noise * fan_in**-0.5)
    if config.vision_config is not None:
        # `.float()` drops the imaginary part of this complex table.
        embedding = model.vision_model.rotary_embedding
        embedding.freqs_ci = type(embedding)(model.config.vision_config).freqs_ci
    return model


def save_hf(model, directory):
    """Saves a transformers model as a directory that transformers and l4jax load."""
    model.save_pretrained(directory, safe_serialization=True)
    return directory


def load_l4jax(directory, config: Llama4Config, *, dtype="float32", scan_layers: bool | None = None):
    """Returns the l4jax model with the weights of an HF directory."""
    import jax.numpy as jnp

    from l4jax.checkpoint.load import load
    from l4jax.model.params import abstract_model, flat_params, with_params

    model = abstract_model(config, dtype=jnp.dtype(dtype), scan_layers=scan_layers)
    return with_params(model, load(directory, flat_params(model)))


def hf_logits(model, ids: np.ndarray, tiles: np.ndarray | None = None) -> np.ndarray:
    """Returns float32 logits [B, T, V] of one forward pass."""
    import torch

    inputs = {"input_ids": torch.tensor(ids)}
    if tiles is not None:
        inputs["pixel_values"] = torch.tensor(tiles)
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits.float().numpy()
