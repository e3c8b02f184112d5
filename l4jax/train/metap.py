"""MetaP: settings found on a small model hold for a large one. The only place with the numbers.

Meta says of MetaP that it sets per-layer learning rates and initial scales which transfer across batch size, width,
depth and tokens, and published no formula. These are ours, after muP (arXiv 2203.03466) and CompleteP (arXiv
2505.01618, alpha = 1). With m_d = width / base width and m_L = depth / base depth,

| parameters                            | standard deviation | learning rate | factor on the output |
| embedding                             | as in the base     | 1             | 1                    |
| norms, biases                         | -                  | 1             | 1                    |
| hidden matrices, experts, router      | 1 / sqrt(fan-in)   | 1 / m_d       | 1                    |
| those that end a residual branch      | 1 / sqrt(fan-in)   | 1 / m_d       | 1 / m_L              |
| unembedding                           | as in the base     | 1             | 1 / m_d              |

The model has no such factors: it stays Llama 4, and exports as it is. A factor a on the output of a matrix W is folded
into it, W' = a W, which is the same function, and trains the same way. Adam divides the gradient by its own size, and
the gradient of W is a times that of W', so that

    W:  dW  = -lr g / (|g| + eps), with g = a g'     W': dW' = a dW = -(a lr) g' / (|g'| + eps / a)

So the initial scale and the learning rate are multiplied by a. Epsilon follows the size of the gradients of what is in
the model: g / m_d everywhere but at the unembedding and the router, and within a branch g / m_L besides. Weight decay
takes the same share of every matrix in a step, the product of the base's learning rate and decay.

Head size, the number of experts, and the vision tower do not change with the width; queries and keys need no factor.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import optax

from l4jax.config import Llama4Config
from l4jax.train.config import MetaPConfig
from l4jax.train.state import path_name

ENDS_BRANCH = re.compile(r"layers\..*\b(o_proj|down_proj)\b")
HIDDEN = re.compile(r"layers\..*\b(q_proj|k_proj|v_proj|gate_proj|up_proj)\b")


@dataclass(frozen=True)
class Scale:
    """What a parameter's settings are multiplied by."""

    init: float = 1.0
    """Of what is drawn, with standard deviation 1 / sqrt(fan-in)."""
    learning_rate: float = 1.0
    eps: float = 1.0


def scale_of(path: str, metap: MetaPConfig, config: Llama4Config) -> Scale:
    """Returns the scale of the parameter at a dotted path (`layers.tail.0.self_attn.q_proj.kernel`)."""
    text = config.text_config
    width, depth = text.hidden_size / metap.base_width, text.num_hidden_layers / metap.base_depth
    if path.startswith("embed_tokens"):  # drawn with 1 / sqrt(width)
        return Scale(metap.embedding_scale * math.sqrt(width), 1.0, 1 / width)
    if path.startswith("lm_head"):
        return Scale(metap.output_scale / math.sqrt(width), 1 / width, 1.0)
    if path.startswith("vision_model"):
        return Scale()
    if ENDS_BRANCH.match(path):
        return Scale(1 / depth, 1 / (width * depth), 1 / width)
    if ".router." in path:  # its gradient is a sum over the width
        return Scale(1.0, 1 / width, 1 / depth)
    if HIDDEN.match(path):
        return Scale(1.0, 1 / width, 1 / (width * depth))
    in_branch = path.startswith("layers.")
    return Scale(1.0, 1.0, 1 / (width * depth) if in_branch else 1 / width)


def scaled(params: Any, metap: MetaPConfig, config: Llama4Config) -> Any:
    """Returns drawn parameters at the scale where training starts."""
    return jax.tree.map_with_path(lambda path, p: p * scale_of(path_name(path), metap, config).init, params)


def scale_by(metap: MetaPConfig, config: Llama4Config, field: str, power: int = 1) -> optax.GradientTransformation:
    """Returns a transformation that multiplies every update by a field of its parameter's scale.

    Before Adam, the inverse of `eps` makes the gradient as large as the base's: Adam(g / c, eps) = Adam(g, c eps).
    """

    def update(updates, state, params=None):
        del params

        def of(path, u):
            return u * getattr(scale_of(path_name(path), metap, config), field) ** power

        return jax.tree.map_with_path(of, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def resized(config: Llama4Config, width: int, depth: int) -> Llama4Config:
    """Returns the same architecture at another width and depth: heads and hidden widths in proportion, the pattern of
    layers continued, everything else as it is.

    Raises:
        ValueError: it has no such width.
    """
    text = config.text_config
    ratio, period = width / text.hidden_size, text.cycle_length

    def times(name: str) -> int:
        value = getattr(text, name) * ratio
        if value != int(value) or not value:
            raise ValueError(f"width {width}: {name} would be {value:g}; choose a multiple of the widths' ratio")
        return int(value)

    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "intermediate_size_mlp")
    changes = {name: times(name) for name in names} | {"hidden_size": width, "num_hidden_layers": depth}
    changes["no_rope_layers"] = tuple(text.no_rope_layers[layer % period] for layer in range(depth))
    changes["moe_layers"] = tuple(layer for layer in range(depth) if layer % period in text.moe_layers)
    return dataclasses.replace(config, text_config=dataclasses.replace(text, **changes))


def transferred(metap: MetaPConfig, config: Llama4Config, learning_rate: float, eps: float) -> list[tuple[str, ...]]:
    """Returns, as rows of a table, what settings of the base mean for the parameters of a model."""
    layer = "layers.cycle.0"
    examples = {
        "embedding": "embed_tokens.embedding",
        "norms": f"{layer}.input_layernorm.scale",
        "queries, keys, values": f"{layer}.self_attn.q_proj.kernel",
        "attention output": f"{layer}.self_attn.o_proj.kernel",
        "router": f"{layer}.feed_forward.router.kernel",
        "experts, in": f"{layer}.feed_forward.experts.gate_proj",
        "experts, out": f"{layer}.feed_forward.experts.down_proj",
        "unembedding": "lm_head.kernel",
    }
    rows = []
    for name, path in examples.items():
        scale = scale_of(path, metap, config)
        rows.append((name, f"{scale.init:.4g}", f"{learning_rate * scale.learning_rate:.3g}", f"{eps * scale.eps:.3g}"))
    return rows
