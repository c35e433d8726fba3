"""What the shapes of a network's tensors say of its configuration. Imports no torch.

Shapes by our names go in, values for the network's configuration come out. What shapes cannot say (groups of
the norms, channels of a head) is left to the configuration's defaults, which are the released values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from maisi.conditions import MASK_BITS

Shapes = Mapping[str, tuple[int, ...]]


INPAINTING_CHANNELS = 2
"""What a ControlNet that inpaints is told beside the bits of label ids: the known image with where it is known."""


def infer_config(network: str, shapes: Shapes) -> dict[str, Any]:
    """Return configuration values for one of "autoencoder", "unet", "controlnet".

    Raises:
        KeyError: a tensor that every such network has is missing.
    """
    readers: dict[str, Callable[[Shapes], dict[str, Any]]] = {
        "autoencoder": _autoencoder,
        "unet": lambda s: _trunk(s) | _unet(s),
        "controlnet": lambda s: _trunk(s) | _controlnet(s),
    }
    return readers[network](shapes)


def _autoencoder(shapes: Shapes) -> dict[str, Any]:
    widths: list[list[int]] = [[]]
    for kind, name in _encoder_blocks(shapes):
        if kind == "residual":
            widths[-1].append(shapes[name][0])
        else:
            widths.append([])
    kinds = ("decoder.blocks.{}.weight", "decoder.blocks.{}.conv.weight", "decoder.blocks.{}.conv1.weight")
    decoder_blocks = _count(shapes, *kinds)
    in_channels = shapes["encoder.blocks.0.weight"][1]
    out_channels = shapes[f"decoder.blocks.{decoder_blocks - 1}.weight"][0]
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "channels": tuple(level[-1] if level else 0 for level in widths),
        "num_res_blocks": tuple(len(level) for level in widths),
        # A transposed convolution has the shape of a plain one; of the released two only the mask's has them,
        # and only that one gives out other channels than it takes in.
        "upsampling": "trilinear" if in_channels == out_channels else "transposed",
    }


def _encoder_blocks(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Kind and main weight of the encoder's blocks between its first convolution and its norm."""
    index = 1
    while True:
        stem = f"encoder.blocks.{index}"
        if f"{stem}.conv1.weight" in shapes:
            yield "residual", f"{stem}.conv1.weight"
        elif f"{stem}.conv.weight" in shapes:
            yield "downsampling", f"{stem}.conv.weight"
        else:
            return
        index += 1


def _trunk(shapes: Shapes) -> dict[str, Any]:
    levels = range(_count(shapes, "down_blocks.{}.resnets.0.conv1.weight"))
    projections = (
        "middle_block.attention.attn.out_proj.weight",
        "middle_block.attention.transformer_blocks.0.attn1.out_proj.weight",
    )
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "channels": tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels),
        "num_res_blocks": tuple(_count(shapes, f"down_blocks.{i}.resnets.{{}}.conv1.weight") for i in levels),
        "attention_levels": tuple(f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in levels),
        "residual_resampling": "down_blocks.0.downsampler.norm1.weight" in shapes,
        "attention_out_projection": any(name in shapes for name in projections),
        "num_modalities": shapes.get("modality_embedding.weight", (None,))[0],
    }


def _unet(shapes: Shapes) -> dict[str, Any]:
    block = "middle_block.attention.transformer_blocks.{}.attn2.to_k.weight"
    return {
        "out_channels": shapes["out.2.weight"][0],
        "region_input": "top_region_embed.0.weight" in shapes,
        "spacing_input": "spacing_embed.0.weight" in shapes,
        "context_channels": shapes.get(block.format(0), (None, None))[1],
        "transformer_blocks": max(1, _count(shapes, block)),
    }


def _controlnet(shapes: Shapes) -> dict[str, Any]:
    first = shapes["mask_encoder.conv_in.weight"]
    count = _count(shapes, "mask_encoder.blocks.{}.weight")
    wider = [shapes[f"mask_encoder.blocks.{i}.weight"][0] for i in range(1, count, 2)]
    image = INPAINTING_CHANNELS if first[1] == MASK_BITS + INPAINTING_CHANNELS else 0
    return {
        "mask_channels": first[1] - image,
        "image_channels": image,
        "mask_encoder_channels": (first[0], *wider),
    }


def _count(shapes: Shapes, *names: str) -> int:
    """Count indices from 0 on for which one of `names`, filled with the index, is there."""
    index = 0
    while any(name.format(index) in shapes for name in names):
        index += 1
    return index
