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
from l4jax.model.params import abstract_model, flat_params, param_shardings
from l4jax.train import metap
from l4jax.train.config import InitConfig, RunConfig
from l4jax.train.contrastive import Contrastive, ContrastiveModel
from l4jax.train.distill import Distill
from l4jax.train.objective import NextToken, Objective
from l4jax.train.state import Make, path_name


@dataclass(frozen=True)
class Stage:
    """A kind of training, ready for `make_train_step`."""

    make: Make
    """Makes the module that trains."""
    objective: Objective
    fixed: Any
    """What the objective is handed besides; no step changes it."""
    scale_by: Callable[[str, int], optax.GradientTransformation] | None = None
    """MetaP's, for the optimizer."""
    prefix: str = ""
    """Of the paths of the model inside that module."""

    def llama_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the model among those of the module that trains."""
        return params[self.prefix.removesuffix(".")] if self.prefix else params

    def llama(self, module: nnx.Module) -> Llama4:
        """Returns the model in the module that trained."""
        return getattr(module, self.prefix.removesuffix(".")) if self.prefix else module


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

        objective = Contrastive(_graphdef(make), config.parallel, num_sources)
        return Stage(make, objective, None, prefix="llama.")

    graphdef = _graphdef(make_llama)
    if config.distill:
        source = open_checkpoint(config.distill.teacher)
        words, own = source.config.text_config.vocab_size, config.model.text_config.vocab_size
        if words != own:
            raise ValueError(f"the teacher in {config.distill.teacher} knows {words:,} tokens, the student {own:,}")
        teacher = abstract_model(source.config, dtype=jnp.dtype(config.parallel.compute_dtype))
        fixed = nnx.to_pure_dict(_nested(teacher, load(source, _placed(flat_params(teacher), teacher, mesh))))
        objective = Distill(
            graphdef,
            config.parallel,
            config.router,
            num_sources,
            settings=config.distill,
            teacher=nnx.graphdef(teacher),
            steps=config.steps,
        )
        return Stage(make_llama, objective, fixed, scale_by)
    return Stage(make_llama, NextToken(graphdef, config.parallel, config.router, num_sources), None, scale_by)


def _graphdef(make: Make) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def _placed(flat: Mapping[str, Any], model: nnx.Module, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    places = param_shardings(model, mesh)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in flat.items()}


def _nested(model: nnx.Module, params: Mapping[str, jax.Array]) -> nnx.State:
    flat = [(path, variable.replace(params[".".join(map(str, path))])) for path, variable in _variables(model)]
    return nnx.from_flat_state(flat)


def _variables(model: nnx.Module):
    return nnx.to_flat_state(nnx.state(model))


def start_from(params: dict[str, Any], init: Mapping[str, InitConfig], prefix: str = "") -> dict[str, Any]:
    """Returns parameters with those of checkpoints in place of what was drawn; each lands where the drawn one lay.

    Args:
        params: nested, float32.
        init: by name, later ones over earlier ones.
        prefix: of the paths of the model inside the module that trains, `llama.`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: nothing in it matches, or shapes differ.
    """
    for name, wanted in init.items():
        source = open_checkpoint(wanted.path)
        abstract = {
            path_name(path)[len(prefix) :]: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for path, leaf in jax.tree.leaves_with_path(params)
            if path_name(path).startswith(prefix) and re.match(wanted.include, path_name(path)[len(prefix) :])
        }
        if not abstract:
            raise ValueError(f"init.{name}.include={wanted.include!r} matches no parameter")
        loaded = load(source, abstract)
        params = jax.tree.map_with_path(
            lambda path, leaf, loaded=loaded: loaded.get(path_name(path)[len(prefix) :], leaf), params
        )
    return params
