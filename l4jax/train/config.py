"""What a training run is: frozen dataclasses, filled from a YAML file and `key.sub=value` words of the command line."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from l4jax.config import Llama4Config
from l4jax.data.config import DataConfig, SourceConfig
from l4jax.settings import build, read_settings


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices beside it; weight decay on matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices step along the nearest orthogonal matrix; embeddings, head, norms and biases by AdamW,
    both with Nesterov's momentum."""
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
    ema_decay: float = 0.0
    """Of a running mean of the weights, which is then what is evaluated and exported; 0: none."""

    def __post_init__(self):
        for name in ("b1", "b2", "final_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be in 0..1")
        for name in ("learning_rate", "eps", "weight_decay", "clip_norm", "warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be 0 or more, and finite")


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
    low_precision: Literal["none", "fp8", "int8"] = "none"
    """What operands of the text layers' matrix products are rounded to (`ops/low_precision.py`)."""
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
class RouterConfig:
    """What keeps the experts of a mixture evenly loaded (`balance.py`)."""

    bias_rate: float = 1e-3
    """How far the balancing bias of an expert moves in one step; 0 switches it off."""
    balance_loss: float = 0.0
    """Weight of the Switch Transformer's auxiliary loss; an alternative to the bias."""
    z_loss: float = 0.0
    """Weight of the mean square of the router's log-partition (ST-MoE): keeps its logits small."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights to start from."""

    path: str
    """A checkpoint: l4jax (also `RUN/model`), Hugging Face or Meta."""
    include: str = ""
    """Regular expression at the start of parameter paths, `vision_model`; only these are taken. Empty: all."""


@dataclass(frozen=True, kw_only=True)
class MetaPConfig:
    """Settings are those of a small model, and transfer to this one (`metap.py`)."""

    base_width: int
    """Its `hidden_size`."""
    base_depth: int
    """Its `num_hidden_layers`."""
    base_head_dim: int = 128
    """Its `head_dim`, which this model must share: attention would need another factor."""
    embedding_scale: float = 1.0
    """Of the embedding's initial values, over 1 / sqrt(base_width); found on the small model, as the next."""
    output_scale: float = 1.0
    """Of the unembedding's."""

    def __post_init__(self):
        for name in ("base_width", "base_depth", "embedding_scale", "output_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"metap.{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher whose distribution is learned beside the tokens themselves (`distill.py`)."""

    teacher: str
    """Checkpoint of the teacher, which runs beside the student."""
    weight: Literal["teacher", "gap", "constant", "linear", "cosine"] = "teacher"
    """How a token's weight w of the soft target is found; the hard one has 1 - w."""
    constant: float = 0.5
    """w of `constant`; where `linear` and `cosine` start from, on their way to 0 at the last step."""
    tau: float = 1.0
    """Of `gap`, in nats."""
    top_k: int = 0
    """Likeliest tokens of the teacher that are used, the rest as one; 0: all, which takes V numbers a token."""
    cache: str = ""
    """Directory in which the teacher's targets are kept by row, for other runs and passes; needs `top_k`. Empty: the
    teacher runs beside the student."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Pictures and their captions find each other (`contrastive.py`); the encoder's first stage."""

    width: int = 512
    """Of the common space."""
    pairs_per_row: int = 16
    """Documents of a row that take part, the first ones."""
    max_scale: float = 100.0
    """Largest factor on the cosine similarities."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation on documents that are not trained on: loss, accuracy, and documents with every token right."""

    sources: dict[str, SourceConfig]
    """Read once, in order; numbers are reported for each."""
    every: int = 0
    """Steps between two evaluations; 0: only after the last step."""
    rows: int | None = None
    """Rows of a batch; as in training by default."""
    row_tokens: int | None = None
    """Tokens of a row; as in training by default."""
    max_batches: int = 0
    """Batches to read of each source; 0: all."""
    attn_scale: float | None = None
    """Slope of the attention temperature of layers without positions, in place of the model's; 0: none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: Llama4Config
    """In the file: the content of a Hugging Face `config.json`, or the name of a preset."""
    data: DataConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    router: RouterConfig = RouterConfig()
    init: dict[str, InitConfig] = dataclasses.field(default_factory=dict)
    """Where weights come from, by any name, later ones over earlier ones; what none of them has is drawn."""
    metap: MetaPConfig | None = None
    """Scale initial values and learning rates from a small model's; off by default."""
    trainable: str = ""
    """Regular expression at the start of parameter paths; others stay as they are. Empty: all learn."""
    distill: DistillConfig | None = None
    """Learn from a teacher too."""
    contrastive: ContrastiveConfig | None = None
    """Match pictures with captions, instead of predicting tokens."""
    evaluate: dict[str, EvaluateConfig] = dataclasses.field(default_factory=dict)
    """Evaluations by name."""
    steps: int
    """Optimizer steps."""
    seed: int = 0
    """Of the weights, the scenes and their order."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is no finite number: the step is never taken, its batch is saved."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""
    save_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        head_dim = self.model.text_config.head_dim
        if self.metap and self.metap.base_head_dim != head_dim:
            raise ValueError(
                f"metap.base_head_dim={self.metap.base_head_dim} and the model's {head_dim} differ; settings transfer "
                "between models whose heads have one size: change num_attention_heads with the width"
            )
        if self.metap and self.optimizer.name != "adamw":
            raise ValueError("optimizer.name must be adamw: MetaP's learning rates are Adam's")
        if self.distill and self.distill.cache and not self.distill.top_k:
            raise ValueError("distill.cache needs distill.top_k, for example 16: all tokens would take V numbers each")
        if self.distill and self.contrastive:
            raise ValueError("distill and contrastive are two objectives; a run has one")
        if self.contrastive and self.parallel.microbatches > 1:
            raise ValueError("parallel.microbatches must be 1: contrastive pairs find their opposites in one batch")
        if self.contrastive and (self.metap or self.parallel.low_precision != "none"):
            raise ValueError("metap and parallel.low_precision are for the text decoder, which contrastive throws away")
        if self.contrastive and self.model.vision_config is None:
            raise ValueError("model.vision_config is missing; contrastive trains the vision tower")

    def evaluation_data(self, name: str) -> DataConfig:
        """Returns what an evaluation reads, as the settings of a run."""
        wanted = self.evaluate[name]
        return dataclasses.replace(
            self.data,
            sources=wanted.sources,
            rows=wanted.rows or self.data.rows,
            row_tokens=wanted.row_tokens or self.data.row_tokens,
            shuffle=False,
            num_workers=0,
        )


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
