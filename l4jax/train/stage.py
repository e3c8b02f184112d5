"""What differs from stage to stage: the module that trains, what it minimises, and where its weights come from."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from l4jax.checkpoint.load import load
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.model.llama4 import Llama4
from l4jax.model.params import abstract_model, placed_params, with_params
from l4jax.sharding import batch_part
from l4jax.train import metap
from l4jax.train.config import InitConfig, RunConfig
from l4jax.train.contrastive import Contrastive, ContrastiveModel
from l4jax.train.distill import Distill
from l4jax.train.objective import NextToken, Objective
from l4jax.train.soft_targets import CachedTargets
from l4jax.train.state import Make, abstract_module, path_name
from l4jax.train.step import Batch, count_targets


@dataclass(frozen=True)
class Stage:
    """A kind of training, ready for `make_train_step`."""

    make: Make
    """Makes the module that trains."""
    objective: Objective
    fixed: Any
    """What the objective is handed besides; no step changes it."""
    complete: Callable[[dict[str, Any], Batch], Batch] = lambda batch, placed: placed
    """Adds to placed rows what the objective wants besides; its other argument is the batch on the host."""
    scale_by: Callable[[str, int], optax.GradientTransformation] | None = None
    """MetaP's, for the optimizer."""
    inside: str | None = None
    """Name of the model within that module; None: it is the module."""

    def llama_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the model among those of the module that trains."""
        return params[self.inside] if self.inside else params

    def with_llama(self, params: dict[str, Any], of_llama: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the module that trains, with others for the model."""
        return params | {self.inside: of_llama} if self.inside else of_llama

    def llama(self, module: nnx.Module) -> Llama4:
        """Returns the model in the module that trained."""
        return getattr(module, self.inside) if self.inside else module


def make_stage(config: RunConfig, mesh: Mesh) -> Stage:
    """Returns the stage that a run asks for; `fixed` lies on the mesh.

    Raises:
        FileNotFoundError: the teacher is not there.
        ValueError: the teacher has another vocabulary.
    """
    num_sources = len(config.data.sources)

    def make_llama(rngs: nnx.Rngs) -> Llama4:
        model = Llama4(config.model, rngs=rngs)
        if config.metap is not None:
            graphdef, params = nnx.split(model)
            model = nnx.merge(graphdef, metap.scaled(nnx.to_pure_dict(params), config.metap, config.model))
        return model

    scale_by = None if config.metap is None else functools.partial(metap.scale_by, config.metap, config.model)

    if config.contrastive:

        def make(rngs: nnx.Rngs) -> ContrastiveModel:
            return ContrastiveModel(config.model, config.contrastive, rngs=rngs)

        objective = Contrastive(nnx.graphdef(abstract_module(make)), config.parallel, num_sources)
        return Stage(make, objective, None, inside="llama")

    graphdef = nnx.graphdef(abstract_module(make_llama))
    if config.distill:
        settings = config.distill
        source = open_checkpoint(settings.teacher)
        words, own = source.config.text_config.vocab_size, config.model.text_config.vocab_size
        if words != own:
            raise ValueError(f"the teacher in {settings.teacher} knows {words:,} tokens, the student {own:,}")
        teacher = abstract_model(source.config, dtype=jnp.dtype(config.parallel.compute_dtype))
        objective = Distill(
            graphdef,
            config.parallel,
            config.router,
            num_sources,
            settings=settings,
            teacher=nnx.graphdef(teacher),
            steps=config.steps,
        )

        def load_teacher() -> dict[str, Any]:
            return nnx.to_pure_dict(nnx.state(with_params(teacher, load(source, placed_params(teacher, mesh)))))

        if not settings.cache:
            return Stage(make_llama, objective, load_teacher(), scale_by=scale_by)
        cached = CachedTargets(
            settings.cache,
            source,
            top_k=settings.top_k,
            precision=config.parallel.compute_dtype,
            load=load_teacher,
            speak=lambda weights, batch: objective.soft_targets(weights, count_targets(batch)[0]),
            mesh=mesh,
            parts=batch_part(mesh, config.data.rows)[1],
        )
        return Stage(make_llama, objective, None, cached, scale_by)
    objective = NextToken(graphdef, config.parallel, config.router, num_sources)
    return Stage(make_llama, objective, None, scale_by=scale_by)


def start_from(params: dict[str, Any], init: Mapping[str, InitConfig]) -> dict[str, Any]:
    """Returns a model's parameters with those of checkpoints in place of what was drawn; each lands where that lay.

    Args:
        params: nested, float32.
        init: by name, later ones over earlier ones.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: nothing in it matches, or shapes differ.
    """
    for name, wanted in init.items():
        abstract = {
            path_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for path, leaf in jax.tree.leaves_with_path(params)
            if re.match(wanted.include, path_name(path))
        }
        if not abstract:
            raise ValueError(f"init.{name}.include={wanted.include!r} matches no parameter")
        loaded = load(wanted.path, abstract)
        params = jax.tree.map_with_path(lambda path, leaf, loaded=loaded: loaded.get(path_name(path), leaf), params)
    return params
