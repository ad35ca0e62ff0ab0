"""How far two alignments of the same model agree, layer by layer.

    python examples/activations/compare.py by-weights.safetensors by-activations.safetensors

Prints for each layer the share of neurons that both put in the same place, and the root mean square of the angle
between what both do to the values (degrees, over the directions of each head) and to the rotary planes of the keys.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.symmetry.element import BlockElement


def matrix(element: BlockElement, axis: str, size: int) -> Tensor:
    """What an element does to the coordinates of an axis, columns of unit length [size, size]."""
    eye = torch.eye(size, dtype=torch.float64)
    moved = element.actions[axis](eye, 0) if axis in element.actions else eye
    return moved / moved.norm(dim=0)


def angle(one: BlockElement, other: BlockElement, axis: str, size: int) -> float:
    """Root mean square angle in degrees between the images of the coordinates."""
    a, b = (matrix(element, axis, size) for element in (one, other))
    turned = 2 * torch.asin(((a - b).norm(dim=0) / 2).clamp(max=1))
    return float(torch.rad2deg(turned.square().mean().sqrt()))


def same_neurons(one: BlockElement, other: BlockElement, size: int) -> float:
    slots = torch.arange(size, dtype=torch.float64).unsqueeze(1)
    places = [e.actions["gate"](slots, 0) if "gate" in e.actions else slots for e in (one, other)]
    return float((places[0] == places[1]).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    args = parser.parse_args()
    one, other = AlignmentFile.open(args.one), AlignmentFile.open(args.other)
    sizes = one.origin.sizes
    width = sizes["kv_heads"] * sizes["head_dim"]
    print("| layer | same neurons | values, degrees | keys, degrees |\n|---:|---:|---:|---:|")
    for layer in range(sizes["layers"]):
        (mlp_a, mlp_b), (att_a, att_b) = (
            [file.element(f"layer {layer} {kind}") for file in (one, other)] for kind in ("mlp", "attention")
        )
        values, keys = (angle(att_a, att_b, axis, width) for axis in ("value", "key"))
        print(f"| {layer} | {same_neurons(mlp_a, mlp_b, sizes['neurons']):.1%} | {values:.2f} | {keys:.2f} |")


if __name__ == "__main__":
    main()
