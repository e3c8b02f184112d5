"""What a training run is: frozen dataclasses, filled from a YAML file and `key.sub=value` words of the command line.

The command line comes before the file, the file before the defaults here. An unknown key stops the program and names
the nearest known one.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from l4jax.config import Llama4Config


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Scenes of handwritten digits (`l4jax/data/scenes.py`) and the shape of a batch."""

    train_scenes: int
    """Scenes to build for training; they are drawn anew in every pass over them."""
    eval_scenes: int
    """Scenes to build for evaluation."""
    rows: int
    """B, rows of a batch."""
    row_tokens: int
    """T, tokens of a row; conversations are packed into rows and none is cut."""
    row_tiles: int
    """Tiles that the conversations of one row may have together."""
    warm_up_scenes: int = 0
    """Scenes seen before all others, mostly of one digit and hardly bent; they shorten the plateau before reading."""
    train_part: str = "train"
    """Digits to train on: `train`, or `fit` while settings are being chosen."""
    eval_part: str = "held_out"
    """Digits to evaluate on: `held_out`, or `choose` while settings are being chosen."""
    blank_images: bool = False
    """Show black pictures: what can be answered without looking."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay on matrices only."""

    learning_rate: float
    """The peak, reached after the warm-up."""
    warmup_steps: int
    """Steps of linear rise from 0."""
    final_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest norm of the gradient, over all parameters together."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a step is spread over devices, and what it keeps in which precision."""

    mesh: str = ""
    """Sizes of the mesh axes, `fsdp=4,expert=16`; empty: one device. Axes are in `l4jax/sharding.py`."""
    remat: str = "none"
    """What layers keep for the backward pass: none (everything), full (their inputs), attention, dots."""
    microbatches: int = 1
    """Parts of a batch whose gradients are added up before a step."""
    compute_dtype: str = "float32"
    """In which layers compute; weights are kept, and updated, in float32."""
    first_moment_dtype: str = "float32"
    """Of Adam's mean of gradients; the mean of squares is float32."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the memory of the host between steps."""

    def __post_init__(self):
        for name in ("compute_dtype", "first_moment_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"parallel.{name}={getattr(self, name)!r} must be float32 or bfloat16")
        if self.microbatches < 1:
            raise ValueError(f"parallel.microbatches={self.microbatches} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: Llama4Config
    """In the file: the content of a Hugging Face `config.json`."""
    data: DataConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    steps: int
    """Optimizer steps."""
    seed: int = 0
    """Of the weights, the scenes and their order."""
    router_bias_rate: float = 1e-3
    """How far the balancing bias of an expert moves in one step; 0 switches balancing off."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""
    save_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the run that a YAML file describes, with `key.sub=value` overrides put over it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, a key is unknown or missing, or a value has the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}; the ones that come with l4jax are in configs/")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; expected lines such as `steps: 100`")
    for override in overrides:
        _override(content, override)
    return run_config_from_dict(content)


def run_config_from_dict(content: Mapping[str, Any]) -> RunConfig:
    """Returns the run described by nested dicts, as `run_config_to_dict` makes them."""
    return _build(RunConfig, content, where="")


def run_config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns nested dicts of plain values that YAML and `run_config_from_dict` take."""
    plain = dataclasses.asdict(config)
    return {**plain, "model": config.model.to_hf()}


def _override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is no setting; write key=value, for example optimizer.learning_rate=1e-3")
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ValueError(f"{key}: {parent} is a single value and has nothing inside")
    content[last] = yaml.safe_load(value)


def _build(cls, content: Any, where: str):
    if cls is Llama4Config:
        return _build_model(content, where)
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected settings inside, got {content!r}")
    prefix = f"{where}." if where else ""
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            raise ValueError(f"unknown key {prefix}{key}; {_nearest(f'{prefix}{key}')}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in content]
    if missing:
        raise ValueError(f"missing key {', '.join(prefix + name for name in missing)}; {cls.__doc__.splitlines()[0]}")
    return cls(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in content.items()})


def _build_model(content: Any, where: str) -> Llama4Config:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected the content of a config.json, got {content!r}")
    return Llama4Config.from_hf(content)


def _value(hint, value: Any, where: str):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML reads 1e-3, without a point, as a word.
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise ValueError(f"{where}={value!r} is a {type(value).__name__}, expected {hint.__name__}")
    return value


def _known_keys(cls, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint) and hint is not Llama4Config:
            keys += _known_keys(hint, f"{prefix}{name}.")
    return keys


def _nearest(key: str) -> str:
    known = _known_keys(RunConfig)
    last_names = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [last_names[n] for n in difflib.get_close_matches(key.rpartition(".")[2], last_names, n=1)]
    return f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
