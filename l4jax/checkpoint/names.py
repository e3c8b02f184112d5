"""The one table of names: tensors of Hugging Face and Meta checkpoints <-> parameters of l4jax, read both ways.

A row says: the tensor `key` holds these parameters, each laid out by a pattern "source axes -> parameter axes", where
axes in parentheses are flattened into one: "(N H) D -> D N H" is a Linear weight whose rows are heads.
Sizes follow from the letters and the config, so the table is also the list of all shapes.

Letters, in the decoder: D width, V vocabulary, N query heads, K key/value heads, H head width, E experts,
F expert width, I dense width; O features of the vision adapter. In the vision tower: D, N, H, F are its own,
X patches and the class token, Y values of a patch (all colours), S shuffled features, Q and O adapter widths.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from l4jax.config import Llama4Config, TextConfig, VisionConfig


@dataclass(frozen=True)
class Part:
    """One parameter inside a tensor of a checkpoint."""

    path: str
    """Path with layer numbers, `layers.7.self_attn.q_proj.kernel`; `locate` finds the place in the stacked arrays."""
    pattern: str
    split: str = ""
    """Letter of the axis that Meta's model-parallel ranks share out; empty: every rank holds a copy."""
    expert: int | None = None
    """The tensor holds this expert alone."""


@dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint and the parameters in it, one after the other along source axis `join`."""

    key: str
    parts: tuple[Part, ...]
    join: int = 0


# --- The table ----------------------------------------------------------------------------------------------------

_NORMS = ("input_layernorm", "post_attention_layernorm")

_HF_ATTENTION = (
    ("self_attn.q_proj.weight", "self_attn.q_proj.kernel", "(N H) D -> D N H"),
    ("self_attn.k_proj.weight", "self_attn.k_proj.kernel", "(K H) D -> D K H"),
    ("self_attn.v_proj.weight", "self_attn.v_proj.kernel", "(K H) D -> D K H"),
    ("self_attn.o_proj.weight", "self_attn.o_proj.kernel", "D (N H) -> N H D"),
    *((f"{norm}.weight", f"{norm}.scale", "D -> D") for norm in _NORMS),
)
_HF_EXPERTS = (
    ("feed_forward.router.weight", "feed_forward.router.kernel", "E D -> D E"),
    ("feed_forward.experts.down_proj", "feed_forward.experts.down_proj", "E F D -> E F D"),
    ("feed_forward.shared_expert.gate_proj.weight", "feed_forward.shared_expert.gate_proj.kernel", "F D -> D F"),
    ("feed_forward.shared_expert.up_proj.weight", "feed_forward.shared_expert.up_proj.kernel", "F D -> D F"),
    ("feed_forward.shared_expert.down_proj.weight", "feed_forward.shared_expert.down_proj.kernel", "D F -> F D"),
)
_HF_EXPERT = (("gate_proj", "F D -> D F"), ("up_proj", "F D -> D F"), ("down_proj", "D F -> F D"))
_HF_DENSE = (
    ("feed_forward.gate_proj.weight", "feed_forward.gate_proj.kernel", "I D -> D I"),
    ("feed_forward.up_proj.weight", "feed_forward.up_proj.kernel", "I D -> D I"),
    ("feed_forward.down_proj.weight", "feed_forward.down_proj.kernel", "D I -> I D"),
)
_HF_VISION_TOP = (
    ("patch_embedding.linear.weight", "patch_embedding.kernel", "D Y -> Y D"),
    ("class_embedding", "class_embedding", "D -> D"),
    ("positional_embedding_vlm", "positional_embedding_vlm", "X D -> X D"),
    *((f"{norm}.weight", f"{norm}.scale", "D -> D") for norm in ("layernorm_pre", "layernorm_post")),
    *((f"{norm}.bias", f"{norm}.bias", "D -> D") for norm in ("layernorm_pre", "layernorm_post")),
    ("vision_adapter.mlp.fc1.weight", "vision_adapter.mlp.fc1.kernel", "Q S -> S Q"),
    ("vision_adapter.mlp.fc2.weight", "vision_adapter.mlp.fc2.kernel", "O Q -> Q O"),
)
_HF_VISION_BLOCK = (
    *((f"self_attn.{n}_proj.weight", f"self_attn.{n}_proj.kernel", "(N H) D -> D N H") for n in "qkv"),
    *((f"self_attn.{n}_proj.bias", f"self_attn.{n}_proj.bias", "(N H) -> N H") for n in "qkv"),
    ("self_attn.o_proj.weight", "self_attn.o_proj.kernel", "D (N H) -> N H D"),
    ("self_attn.o_proj.bias", "self_attn.o_proj.bias", "D -> D"),
    ("mlp.fc1.weight", "mlp.fc1.kernel", "F D -> D F"),
    ("mlp.fc1.bias", "mlp.fc1.bias", "F -> F"),
    ("mlp.fc2.weight", "mlp.fc2.kernel", "D F -> F D"),
    ("mlp.fc2.bias", "mlp.fc2.bias", "D -> D"),
    *((f"{norm}.weight", f"{norm}.scale", "D -> D") for norm in _NORMS),
    *((f"{norm}.bias", f"{norm}.bias", "D -> D") for norm in _NORMS),
)


def hf_rows(config: Llama4Config, *, text_prefix: str = "language_model.", expert_form: str = "fused") -> list[Row]:
    """Returns every tensor of a Hugging Face checkpoint of this model.

    Args:
        text_prefix: "language_model." in `Llama4ForConditionalGeneration`, "" in `Llama4ForCausalLM`.
        expert_form: "fused" (gate_up_proj of all experts), or "single" (one Linear for each projection of each expert).
    """
    text, rows = config.text_config, []

    def add(prefix: str, path_prefix: str, table) -> None:
        rows.extend(Row(prefix + key, (Part(path_prefix + path, pattern),)) for key, path, pattern in table)

    add(f"{text_prefix}model.", "", [("embed_tokens.weight", "embed_tokens.embedding", "V D -> V D")])
    for layer in range(text.num_hidden_layers):
        prefix, path = f"{text_prefix}model.layers.{layer}.", f"layers.{layer}."
        add(prefix, path, _HF_ATTENTION)
        if not text.uses_experts(layer):
            add(prefix, path, _HF_DENSE)
            continue
        experts = "feed_forward.experts."
        if expert_form == "fused":
            add(prefix, path, _HF_EXPERTS)
            halves = tuple(Part(f"{path}{experts}{half}_proj", "E D F -> E D F") for half in ("gate", "up"))
            rows.append(Row(f"{prefix}{experts}gate_up_proj", halves, join=2))
        else:
            add(prefix, path, [row for row in _HF_EXPERTS if row[0] != f"{experts}down_proj"])
            rows.extend(
                Row(f"{prefix}{experts}{e}.{name}.weight", (Part(f"{path}{experts}{name}", pattern, expert=e),))
                for e in range(text.num_local_experts)
                for name, pattern in (
                    ("gate_proj", "F D -> D F"),
                    ("up_proj", "F D -> D F"),
                    ("down_proj", "D F -> F D"),
                )
            )
    add(f"{text_prefix}model.", "", [("norm.weight", "norm.scale", "D -> D")])
    add(text_prefix, "", [("lm_head.weight", "lm_head.kernel", "V D -> D V")])
    if config.vision_config is not None:
        add("vision_model.", "vision_model.", _HF_VISION_TOP)
        for layer in range(config.vision_config.num_hidden_layers):
            add(f"vision_model.model.layers.{layer}.", f"vision_model.layers.{layer}.", _HF_VISION_BLOCK)
        projector = ("linear_1.weight", "linear_1.kernel", "D O -> O D")
        add("multi_modal_projector.", "multi_modal_projector.", [projector])
    return rows


_META_EXPERTS = (
    ("router_DE", "router.kernel", "D E -> D E", ""),
    ("experts.moe_w_in_eD_F", "experts.gate_proj", "(E D) F -> E D F", "F"),
    ("experts.moe_w_swiglu_eD_F", "experts.up_proj", "(E D) F -> E D F", "F"),
    ("experts.moe_w_out_eF_D", "experts.down_proj", "(E F) D -> E F D", "F"),
    ("w_in_shared_FD.weight", "shared_expert.gate_proj.kernel", "F D -> D F", "F"),
    ("w_swiglu_FD.weight", "shared_expert.up_proj.kernel", "F D -> D F", "F"),
    ("w_out_shared_DF.weight", "shared_expert.down_proj.kernel", "D F -> F D", "F"),
    # The names after loading, for files that were saved again.
    ("experts.w1", "experts.gate_proj", "E D F -> E D F", "F"),
    ("experts.w3", "experts.up_proj", "E D F -> E D F", "F"),
    ("experts.w2", "experts.down_proj", "E F D -> E F D", "F"),
    ("shared_expert.w1.weight", "shared_expert.gate_proj.kernel", "F D -> D F", "F"),
    ("shared_expert.w3.weight", "shared_expert.up_proj.kernel", "F D -> D F", "F"),
    ("shared_expert.w2.weight", "shared_expert.down_proj.kernel", "D F -> F D", "F"),
)
_META_VISION_TOP = (
    ("conv1._linear.weight", "patch_embedding.kernel", "D Y -> Y D", "D"),
    ("class_embedding", "class_embedding", "D -> D", ""),
    ("positional_embedding_vlm", "positional_embedding_vlm", "X D -> X D", ""),
    *((f"ln_{x}.weight", f"layernorm_{x}.scale", "D -> D", "") for x in ("pre", "post")),
    *((f"ln_{x}.bias", f"layernorm_{x}.bias", "D -> D", "") for x in ("pre", "post")),
)
_META_VISION_BLOCK = (
    *((f"attn.w{n}.weight", f"self_attn.{n}_proj.kernel", "(N H) D -> D N H", "N") for n in "qkv"),
    *((f"attn.w{n}.bias", f"self_attn.{n}_proj.bias", "(N H) -> N H", "N") for n in "qkv"),
    ("attn.wo.weight", "self_attn.o_proj.kernel", "D (N H) -> N H D", "N"),
    ("attn.wo.bias", "self_attn.o_proj.bias", "D -> D", ""),
    ("mlp.c_fc.weight", "mlp.fc1.kernel", "F D -> D F", "F"),
    ("mlp.c_fc.bias", "mlp.fc1.bias", "F -> F", "F"),
    ("mlp.c_proj.weight", "mlp.fc2.kernel", "D F -> F D", "F"),
    ("mlp.c_proj.bias", "mlp.fc2.bias", "D -> D", ""),
    ("ln_1.weight", "input_layernorm.scale", "D -> D", ""),
    ("ln_1.bias", "input_layernorm.bias", "D -> D", ""),
    ("ln_2.weight", "post_attention_layernorm.scale", "D -> D", ""),
    ("ln_2.bias", "post_attention_layernorm.bias", "D -> D", ""),
)
_META_VISION_ADAPTER = (
    ("c_fc.weight", "fc1.kernel", "Q S -> S Q", "Q"),
    ("c_proj.weight", "fc2.kernel", "O Q -> Q O", "Q"),
)


def meta_rows(config: Llama4Config) -> list[Row]:
    """Returns every tensor that Meta's checkpoints of this model may hold; of two names the released one first.

    Ranks hold a share of the axis `Part.split` each; a joined tensor (wqkv, fc1_weight) holds the shares of its parts.
    """
    text, rows = config.text_config, []

    def add(prefix: str, path_prefix: str, table) -> None:
        rows.extend(
            Row(prefix + key, (Part(path_prefix + path, pattern, split),)) for key, path, pattern, split in table
        )

    add("", "", [("tok_embeddings.weight", "embed_tokens.embedding", "V D -> V D", "V")])
    for layer in range(text.num_hidden_layers):
        meta, path = f"layers.{layer}.", f"layers.{layer}."
        attention, experts = f"{meta}attention.", text.uses_experts(layer)
        qkv = tuple(
            Part(f"{path}self_attn.{n}_proj.kernel", f"({heads} H) D -> D {heads} H", heads)
            for n, heads in (("q", "N"), ("k", "K"), ("v", "K"))
        )
        rows.append(Row(f"{attention}wqkv.weight", qkv))
        rows.extend(Row(f"{attention}w{n}.weight", (one,)) for n, one in zip("qkv", qkv, strict=True))
        add(attention, f"{path}self_attn.", [("wo.weight", "o_proj.kernel", "D (N H) -> N H D", "N")])
        for key in ("attention.wqkv.layer_norm_weight", "attention_norm.weight"):
            add(meta, path, [(key, "input_layernorm.scale", "D -> D", "")])
        released = "feed_forward.norm.weight" if experts else "feed_forward.mlp.layer_norm_weight"
        for key in (released, "ffn_norm.weight"):
            add(meta, path, [(key, "post_attention_layernorm.scale", "D -> D", "")])
        if experts:
            add(f"{meta}feed_forward.", f"{path}feed_forward.", _META_EXPERTS)
            continue
        gate, up = (Part(f"{path}feed_forward.{half}_proj.kernel", "I D -> D I", "I") for half in ("gate", "up"))
        down = Part(f"{path}feed_forward.down_proj.kernel", "D I -> I D", "I")
        feed_forward = f"{meta}feed_forward."
        rows.append(Row(f"{feed_forward}mlp.fc1_weight", (gate, up)))
        rows.extend(Row(f"{feed_forward}{key}", (one,)) for key, one in (("mlp.fc2_weight", down), ("w1.weight", gate)))
        rows.extend(Row(f"{feed_forward}{key}", (one,)) for key, one in (("w3.weight", up), ("w2.weight", down)))
    add("", "", [("norm.weight", "norm.scale", "D -> D", ""), ("output.weight", "lm_head.kernel", "V D -> D V", "V")])
    if config.vision_config is not None:
        encoder = "vision_embeddings.vision_encoder."
        add(encoder, "vision_model.", _META_VISION_TOP)
        for layer in range(config.vision_config.num_hidden_layers):
            add(f"{encoder}transformer.resblocks.{layer}.", f"vision_model.layers.{layer}.", _META_VISION_BLOCK)
        add("vision_embeddings.vision_adapter.mlp.", "vision_model.vision_adapter.mlp.", _META_VISION_ADAPTER)
        add("", "", [("vision_projection.weight", "multi_modal_projector.linear_1.kernel", "D O -> O D", "D")])
    return rows


# --- Sizes and places ---------------------------------------------------------------------------------------------


def _text_sizes(text: TextConfig, vision: VisionConfig | None) -> dict[str, int]:
    sizes = {
        "D": text.hidden_size,
        "V": text.vocab_size,
        "N": text.num_attention_heads,
        "K": text.num_key_value_heads,
        "H": text.head_dim,
        "E": text.num_local_experts,
        "F": text.intermediate_size,
        "I": text.intermediate_size_mlp,
    }
    return sizes if vision is None else sizes | {"O": vision.vision_output_dim}


def _vision_sizes(vision: VisionConfig) -> dict[str, int]:
    return {
        "D": vision.hidden_size,
        "N": vision.num_attention_heads,
        "H": vision.head_dim,
        "F": vision.intermediate_size,
        "X": vision.patches_per_side**2 + 1,
        "Y": 3 * vision.patch_size**2,
        # HF builds the adapter with intermediate_size inputs; it equals hidden_size * pixels_shuffled**2.
        "S": vision.hidden_size * vision.pixels_shuffled**2,
        "Q": vision.projector_input_dim,
        "O": vision.projector_output_dim,
    }


def part_shape(config: Llama4Config, part: Part) -> tuple[int, ...]:
    """Returns the shape of the parameter that `part` names, without the layer axis (and for one expert, without E)."""
    sizes = part_sizes(config, part.path)
    return tuple(sizes[letter] for letter in part.pattern.split(" -> ")[1].split())


def part_sizes(config: Llama4Config, path: str) -> dict[str, int]:
    """Returns the size of every letter in the patterns of parameter `path`."""
    if path.startswith("vision_model."):
        return _vision_sizes(config.vision_config)
    return _text_sizes(config.text_config, config.vision_config)


def locate(config: Llama4Config, path: str) -> tuple[str, int | None]:
    """Returns where the parameter of one layer lives: path of the stacked array and position in its leading axis.

    Layer l of a stack with period P is entry l // P of slot l % P; layers past the last full cycle have arrays of
    their own (position None), and so have parameters outside of the stacks.
    """
    for stack, num_layers, period in _stacks(config):
        if path.startswith(stack):
            number, rest = path.removeprefix(stack).split(".", 1)
            layer, num_cycles = int(number), num_layers // period
            if layer < num_cycles * period:
                return f"{stack}cycle.{layer % period}.{rest}", layer // period
            return f"{stack}tail.{layer - num_cycles * period}.{rest}", None
    return path, None


def layer_path(config: Llama4Config, path: str, position: int | None = None) -> str:
    """The inverse of `locate`: `layers.cycle.3.x`, 1 -> `layers.7.x`."""
    for stack, num_layers, period in _stacks(config):
        if path.startswith(stack):
            kind, number, rest = path.removeprefix(stack).split(".", 2)
            first = 0 if kind == "cycle" else num_layers // period * period
            return f"{stack}{first + (position or 0) * period + int(number)}.{rest}"
    return path


def unrolled_path(path: str) -> str:
    """`layers.7.x` -> `layers.tail.7.x`: the place in a model that scans nothing, where every layer is in the tail."""
    for stack in ("vision_model.layers.", "layers."):
        if path.startswith(stack):
            return f"{stack}tail.{path.removeprefix(stack)}"
    return path


def places(config: Llama4Config, paths: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Returns for each path of a model, stacked or unrolled, the stacked path and the position in its leading axis.

    A stack whose `cycle` appears among the paths is taken as stacked, otherwise its `tail` holds every layer.

    Raises:
        KeyError: a path is no parameter of this model.
    """
    paths = list(paths)
    found = {unrolled_path(path): locate(config, path) for path in layer_shapes(config)}
    for stack, _, _ in _stacks(config):
        if any(path.startswith(f"{stack}cycle.") for path in paths):
            found = {path: place for path, place in found.items() if not path.startswith(f"{stack}tail.")}
    found |= {path: (path, None) for path in parameter_shapes(config) if path not in found}
    if unknown := [path for path in paths if path not in found]:
        raise KeyError(f"the model has no parameter {', '.join(unknown[:8])} ({len(unknown)} in all)")
    return {path: found[path] for path in paths}


def _stacks(config: Llama4Config) -> Iterator[tuple[str, int, int]]:
    yield "layers.", config.text_config.num_hidden_layers, config.text_config.cycle_length
    if config.vision_config is not None:
        yield "vision_model.layers.", config.vision_config.num_hidden_layers, 1


def layer_shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter with layer numbers in the paths: `layers.7.self_attn.q_proj.kernel`."""
    return {part.path: part_shape(config, part) for row in hf_rows(config) for part in row.parts}


def parameter_shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of every parameter in the stacked form, which is the form on disk."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in layer_shapes(config).items():
        place, position = locate(config, path)
        if position is None:
            shapes[place] = shape
        else:
            shapes[place] = (max(position + 1, shapes.get(place, (0,))[0]), *shape)
    return shapes


def quantized_end(path: str) -> str:
    """Returns the end of the path of one of the two arrays of a quantised parameter; nothing for any other path."""
    return next((end for end in (".values", ".scales") if path.endswith(end)), "")


# --- Patterns -----------------------------------------------------------------------------------------------------


def _letters(side: str) -> list[list[str]]:
    """ "(N H) D" -> [["N", "H"], ["D"]]."""
    groups, current = [], None
    for token in side.replace("(", "( ").replace(")", " )").split():
        if token == "(":
            current = []
        elif token == ")":
            groups.append(current)
            current = None
        elif current is None:
            groups.append([token])
        else:
            current.append(token)
    return groups


def source_shape(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of the tensor in the checkpoint."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in _letters(pattern.split(" -> ")[0]))


def to_parameter(tensor: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns the parameter in `tensor`, as a view: nothing is read or copied."""
    source, target = (_letters(side) for side in pattern.split(" -> "))
    order, wanted = [x for group in source for x in group], [x for group in target for x in group]
    spread = np.reshape(tensor, [sizes[letter] for letter in order], copy=False)
    return spread if order == wanted else spread.transpose(_permutation(order, wanted))


def to_tensor(parameter: np.ndarray, pattern: str) -> np.ndarray:
    """The inverse of `to_parameter`, for a whole parameter or a box of it."""
    source, target = (_letters(side) for side in pattern.split(" -> "))
    order, wanted = [x for group in source for x in group], [x for group in target for x in group]
    spread = parameter if order == wanted else parameter.transpose(_permutation(wanted, order))
    sizes = iter(spread.shape)
    return spread.reshape([math.prod(next(sizes) for _ in group) for group in source])


def split_row(tensor: np.ndarray, row: Row, sizes: Sequence[Mapping[str, int]]) -> list[tuple[Part, np.ndarray]]:
    """Returns each parameter of a row as a view of the tensor; `sizes` has the letters of each part."""
    found, start = [], 0
    for part, letters in zip(row.parts, sizes, strict=True):
        stop = start + source_shape(part.pattern, letters)[row.join]
        box = (slice(None),) * row.join + (slice(start, stop),)
        found.append((part, to_parameter(tensor[box], part.pattern, letters)))
        start = stop
    return found


def row_shape(row: Row, sizes: Sequence[Mapping[str, int]]) -> tuple[int, ...]:
    """Returns the shape of the tensor of a row: its parts one after the other."""
    shapes = [source_shape(part.pattern, letters) for part, letters in zip(row.parts, sizes, strict=True)]
    shape = list(shapes[0])
    shape[row.join] = sum(other[row.join] for other in shapes)
    return tuple(shape)


def source_letters(pattern: str) -> list[str]:
    """Letters of the source axes, flattened, slowest first."""
    return [letter for group in _letters(pattern.split(" -> ")[0]) for letter in group]


def target_letters(pattern: str) -> list[str]:
    """Letters of the parameter axes."""
    return pattern.split(" -> ")[1].split()


def _permutation(order: list[str], wanted: list[str]) -> list[int]:
    return [order.index(letter) for letter in wanted]
