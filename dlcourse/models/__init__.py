"""Networks by name. Each is a Flax module whose call returns (logits, taps) and whose pixels come in [0, 1].

A network owns its normalisation: all of them but `plain`, which has none, subtract 0.5 and divide by 0.25 first,
constants that no data set sets, so that distances, figures and attributions stay in pixel space.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from dlcourse.contracts import InputError
from dlcourse.models.convnet import ConvNet
from dlcourse.models.linear import MLP, Linear
from dlcourse.models.plain import PlainConvNet
from dlcourse.models.resnet import ResNet
from dlcourse.models.vit import ViT
from dlcourse.models.wide_resnet import WideResNet

MODELS: dict[str, partial[nn.Module]] = {
    "linear": partial(Linear),
    "mlp": partial(MLP),
    "convnet": partial(ConvNet),
    "plain": partial(PlainConvNet),
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "wide_resnet": partial(WideResNet),
    "vit_ti": partial(ViT, width=192, depth=12, heads=3),
    "vit_s": partial(ViT, width=384, depth=12, heads=6),
    "vit_b": partial(ViT, width=768, depth=12, heads=12),
}
"""What a name builds. The fields of its class that are not fixed here are its options."""


def names() -> list[str]:
    """Every network that `create` knows."""
    return list(MODELS)


def create(spec: str, num_classes: int, image_shape: tuple[int, int, int], dtype: str = "float32") -> nn.Module:
    """The network that a flag such as "convnet,width=64,first_kernel=11" asks for.

    Args:
      spec: a name, then comma-separated option=value.
      num_classes: K, at least 1.
      image_shape: (H, W, C); options left out may depend on it, as the stem of a ResNet does.
      dtype: "float32" or "bfloat16", of the computation; parameters and logits are float32.

    Returns:
      A module with `init(key, images, train=False)` and `apply(variables, images, train=False,
      edit=None) -> (logits (B,K) float32, taps)`.

    Raises:
      InputError: unknown name, option or value, or a network that these images do not fit.
    """
    name, *pairs = (part.strip() for part in spec.split(","))
    build = MODELS[_known(name, MODELS, "model")]
    kinds = _options(build)
    given = dict(_parse(name, pair, kinds) for pair in pairs)
    if len(given) < len(pairs):
        raise InputError(f"model {spec!r} sets an option twice: keep one")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r} is not known: use float32 or bfloat16")
    defaults = build.func.defaults(image_shape) if hasattr(build.func, "defaults") else {}
    model = build(num_classes=num_classes, dtype=jnp.dtype(dtype), **{**defaults, **given})
    if hasattr(model, "check"):
        model.check(image_shape)
    return model


def _options(build: partial[nn.Module]) -> dict[str, type]:
    hints = typing.get_type_hints(build.func)
    fixed = {"num_classes", "dtype", "parent", "name", *build.keywords}
    return {field.name: hints[field.name] for field in dataclasses.fields(build.func) if field.name not in fixed}


def _parse(model: str, pair: str, kinds: dict[str, type]) -> tuple[str, typing.Any]:
    option, equals, text = (part.strip() for part in pair.partition("="))
    if not equals:
        raise InputError(f"model {model}: {pair!r} is not of the form option=value")
    kind = kinds[_known(option, kinds, f"option of model {model}")]
    if choices := typing.get_args(kind):
        return option, _known(text, choices, f"value of {model}'s {option}")
    try:
        value = kind(text)
    except ValueError:
        value = None
    # Counts and sizes are at least one; the only fractions in a network are shares, as of dropout.
    if value is None or not (value >= 1 if kind is int else 0 <= value < 1):
        allowed = "a whole number, at least 1" if kind is int else "a number in [0, 1)"
        raise InputError(f"model {model}: {option}={text} must be {allowed}")
    return option, value


def _known(name: str, known: typing.Iterable[str], what: str) -> str:
    known = list(known)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"unknown {what} {name!r}: {hint}there is {', '.join(known) or 'none'}")
