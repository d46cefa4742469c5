"""A model's body, and the heads that stand outside of it (floor 3)."""

from __future__ import annotations

import inspect

from torch import nn

from sidepath.errors import UnsupportedModule
from sidepath.injection.architecture import modules_of


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits over the vocabulary, if there is one."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def body_prefix(model: nn.Module) -> str:
    """Dotted prefix of the model without its heads (`model.`); empty when it has none."""
    name = getattr(model, "base_model_prefix", "")
    body = getattr(model, name, None) if name else None
    return f"{name}." if isinstance(body, nn.Module) else ""


def body_path(model: nn.Module) -> str:
    """Dotted name of the module that turns token ids, or their embeddings, into hidden states.

    Errors: `UnsupportedModule` for a model in which no single call does that.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModule(
            "no one call of this model's body sees a row: encoder and decoder are called apart "
            "while text is generated, and both read one mask",
            found=type(model).__name__,
            hint="adapt matrices of the model instead",
        )
    path = body_prefix(model).removesuffix(".")
    if not path:
        raise UnsupportedModule(
            "the model has no head, so its body is no module of it whose call could be changed",
            found=type(model).__name__,
            hint="load it with the head of its task",
        )
    if not _reads_rows(model.get_submodule(path)):
        raise UnsupportedModule(
            "the model's body takes no embeddings of tokens", where=path, found=type(model).__name__
        )
    while inner := [
        name for name, child in model.get_submodule(path).named_children() if _reads_rows(child)
    ]:  # some models call the module inside their body (OPT), or images come in between
        path = f"{path}.{inner[0]}"
    return path


def _reads_rows(module: nn.Module) -> bool:
    """Whether a module is called with whole rows of tokens or of their embeddings."""
    return {"inputs_embeds", "attention_mask"} <= set(
        inspect.signature(type(module).forward).parameters
    )


def head_paths(model: nn.Module) -> list[str]:
    """Top-level modules with weights that stand outside the body: the task's heads."""
    prefix = body_prefix(model)
    if not prefix:
        return []
    return [
        name
        for name, child in model.named_children()
        if f"{name}." != prefix and next(child.parameters(), None) is not None
    ]


def heads_of(model: nn.Module) -> list[str]:
    """The task's heads; of a language model the layer that makes its logits."""
    last = output_embedding(model)
    return head_paths(model) or [path for path, module in modules_of(model) if module is last]
