"""Makes the conformance set with transformers: `python -m tests.conformance.make` (needs the oracle extra).

Everything is derived from a seed; running it again gives the same files, up to round-off of another torch.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from l4jax.config import Llama4Config, RopeScaling, layer_pattern, preset
from tests.oracle import hf_config, hf_logits, hf_model, import_torchvision

HERE = Path(__file__).parent
CHUNK, FLOOR = 8, 12
LENGTHS = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 3 * FLOOR + 4)
PROMPT, ROW, SECOND = 11, 40, 19  # decoding starts after PROMPT tokens; padded and packed rows hold documents of these

_TEXT = dataclasses.replace(
    preset("small-scout").text_config,
    vocab_size=96,
    hidden_size=32,
    intermediate_size=24,
    intermediate_size_mlp=40,
    num_hidden_layers=5,
    head_dim=8,
    attention_chunk_size=CHUNK,
    floor_scale=FLOOR,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 64),
    bos_token_id=1,
    eos_token_id=(2,),
    pad_token_id=0,
    **layer_pattern(5),
)
MODELS = {
    "scout": _TEXT,
    "maverick": dataclasses.replace(_TEXT, use_qk_norm=False, rope_scaling=None, **layer_pattern(5, moe_step=2)),
}


# A model that sees, of one cycle: tiles of 56 pixels make four tokens each.
PATCH = 90
PICTURES = Llama4Config(
    text_config=dataclasses.replace(_TEXT, num_hidden_layers=4, **layer_pattern(4)),
    vision_config=dataclasses.replace(
        preset("small-scout").vision_config,
        hidden_size=16,
        intermediate_size=64,
        projector_input_dim=24,
        projector_output_dim=24,
        vision_output_dim=24,
    ),
    image_token_index=PATCH,
    boi_token_index=91,
    eoi_token_index=92,
)


def visible(text, layer: int, length: int) -> list[list[int]]:
    """For each position the positions that this layer may see, from transformers' own masks."""
    import torch
    from transformers import Llama4TextConfig
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    config = Llama4TextConfig(**Llama4Config(text_config=text).to_hf())
    config._attn_implementation = "eager"
    make = create_chunked_causal_mask if config.layer_types[layer] == "chunked_attention" else create_causal_mask
    mask = make(
        config=config,
        inputs_embeds=torch.zeros(1, length, text.hidden_size),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(length)[None],
    )
    return [torch.nonzero(row == 0).flatten().tolist() for row in mask[0, 0]]


def decoded_logits(model, ids: np.ndarray) -> np.ndarray:
    """Prefills PROMPT tokens and feeds the rest one by one; logits of every position."""
    import torch
    from transformers import DynamicCache

    cache, parts = DynamicCache(config=model.config), []
    pieces = [ids[:, :PROMPT], *(ids[:, t : t + 1] for t in range(PROMPT, ids.shape[1]))]
    with torch.inference_mode():
        for piece in pieces:
            out = model(input_ids=torch.tensor(piece), past_key_values=cache, use_cache=True)
            parts.append(out.logits.numpy())
    return np.concatenate(parts, axis=1)


def make_pictures() -> None:
    """Two pictures in one prompt: one of a single tile, one of three."""
    model = hf_model(PICTURES, seed=7)
    model.save_pretrained(HERE / "pictures", safe_serialization=True)
    (HERE / "pictures" / "generation_config.json").unlink(missing_ok=True)
    rng = np.random.default_rng(7)
    ids = rng.integers(3, PATCH, (1, 30))
    for start in (2, 9, 14, 19):
        ids[:, start : start + 4] = PATCH
    pixels = rng.integers(0, 256, (4, 3, 56, 56), dtype=np.uint8)
    logits = hf_logits(model, ids, (pixels / 127.5 - 1).astype(np.float32))
    np.savez_compressed(HERE / "pictures" / "expected.npz", ids=ids, pixels=pixels, logits=logits)


def main() -> None:
    import_torchvision()
    make_pictures()
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

    for seed, (name, text) in enumerate(MODELS.items()):
        config = Llama4Config(text_config=text)
        model = hf_model(config, seed)
        model.save_pretrained(HERE / name, safe_serialization=True)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        rng = np.random.default_rng(seed)
        arrays = {}
        for length in LENGTHS:
            ids = rng.integers(3, text.vocab_size, (1, length))
            arrays[f"prefill_{length}.ids"], arrays[f"prefill_{length}.logits"] = ids, hf_logits(model, ids)
        arrays["decode.ids"] = rng.integers(3, text.vocab_size, (1, ROW))
        arrays["decode.logits"] = decoded_logits(model, arrays["decode.ids"])
        # Two documents, each as transformers computes it alone; padding and packing may change nothing.
        for i, length in enumerate((PROMPT, SECOND)):
            ids = rng.integers(3, text.vocab_size, (1, length))
            arrays[f"document_{i}.ids"], arrays[f"document_{i}.logits"] = ids, hf_logits(model, ids)
        np.savez_compressed(HERE / name / "expected.npz", **{k: np.asarray(v) for k, v in arrays.items()})
        seen = {f"layer_{layer}": visible(text, layer, 2 * CHUNK + 2) for layer in range(text.num_hidden_layers)}
        (HERE / name / "visible.json").write_text(json.dumps(seen) + "\n")

    frequencies = {
        name: Llama4TextRotaryEmbedding(hf_config(preset(name)).text_config).inv_freq.tolist()
        for name in ("scout", "maverick")
    }
    (HERE / "frequencies.json").write_text(json.dumps(frequencies, indent=1) + "\n")


if __name__ == "__main__":
    main()
