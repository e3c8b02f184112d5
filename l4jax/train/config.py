"""What a training run is: frozen dataclasses, filled from a YAML file and `key.sub=value` words of the command line."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4jax.config import Llama4Config
from l4jax.data.config import DataConfig
from l4jax.settings import build, read_settings


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
    return run_config_from_dict(read_settings(path, overrides))


def run_config_from_dict(content: Mapping[str, Any]) -> RunConfig:
    """Returns the run described by nested dicts, as `run_config_to_dict` makes them."""
    return build(RunConfig, content)


def run_config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns nested dicts of plain values that YAML and `run_config_from_dict` take."""
    plain = dataclasses.asdict(config)
    return {**plain, "model": config.model.to_hf()}
