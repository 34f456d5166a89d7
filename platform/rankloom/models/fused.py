"""Fused norms, rotary embeddings and activations on a loaded base, where its modules compute as Llama's do.

`fuse` compares the code of a module's forward with Llama's, so that most families of transformers are covered by one
list and none by mistake: what differs keeps its own forward. A part that trains, or whose forward someone else has
replaced since, computes as before.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from rankloom.kernels.activations import silu_mul
from rankloom.kernels.norms import add_rms_norm, rms_norm
from rankloom.kernels.rotary import rotary

ROTARY = "apply_rotary_pos_emb"


def fuse(model: PreTrainedModel) -> None:
    """Replace the forwards of a model's norms, MLPs, attentions and decoder layers by fused ones, where they fit."""
    for module in model.modules():
        forward = type(module).forward
        if _is_same(forward, llama.LlamaRMSNorm.forward):
            module.forward = MethodType(_forward_norm, module)
        elif _is_same(forward, llama.LlamaMLP.forward) and isinstance(module.act_fn, (SiLUActivation, nn.SiLU)):
            module.forward = MethodType(_forward_mlp, module)
        elif _is_same(forward, llama.LlamaDecoderLayer.forward):
            module.forward = MethodType(_forward_layer, module)
        elif _rotates(forward):
            module.forward = MethodType(_fuse_rotary(forward), module)


def _forward_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    weight = _get_frozen_weight(norm)
    if weight is None:
        plain: Tensor = type(norm).forward(norm, hidden_states)
        return plain
    return rms_norm(hidden_states, weight, norm.variance_epsilon)


def _forward_mlp(mlp: Any, x: Tensor) -> Tensor:
    y: Tensor = mlp.down_proj(silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))
    return y


def _forward_layer(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    norm = layer.post_attention_layernorm
    weight = _get_frozen_weight(norm)
    if weight is None:
        total = hidden_states + attended
        normed = norm(total)
    else:
        normed, total = add_rms_norm(attended, hidden_states, weight, norm.variance_epsilon)
    result: Tensor = total + layer.mlp(normed)
    return result


def _get_frozen_weight(norm: Any) -> Tensor | None:
    """Return the weight of a norm that is fused and does not train."""
    forward = vars(norm).get("forward")
    if getattr(forward, "__func__", None) is not _forward_norm or norm.weight.requires_grad:
        return None
    weight: Tensor = norm.weight
    return weight


@cache
def _fuse_rotary(forward: FunctionType) -> FunctionType:
    """Return an attention's forward with the fused rotation in place of the one that it calls by name."""
    own = inspect.unwrap(forward)
    names = own.__globals__ | {ROTARY: rotary}
    made = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    return made


@cache
def _rotates(forward: FunctionType) -> bool:
    own = inspect.unwrap(forward)
    rotation = own.__globals__.get(ROTARY)
    return ROTARY in own.__code__.co_names and rotation is not None and _is_same(rotation, llama.apply_rotary_pos_emb)


@cache
def _is_same(function: Callable[..., Any], reference: Callable[..., Any]) -> bool:
    return function is reference or _read_code(function) == _read_code(reference)


def _read_code(function: Callable[..., Any]) -> str:
    """Return a function's body and the names of its arguments, without types and documentation."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return repr(function)
    definition = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[ast.get_docstring(definition) is not None :]
    names = [argument.arg for argument in ast.walk(definition.args) if isinstance(argument, ast.arg)]
    return "\n".join([*names, *map(ast.dump, body)])
