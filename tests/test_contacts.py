"""ESM predicts contacts of residues from the attention of every head, so heads may not change places."""

from __future__ import annotations

import torch
from more_models import more_model

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.trial.checks import EXACT
from mergekit_symalign.trial.models import EverythingInFloat64, relative_deviation, with_weights


@torch.no_grad()
def test_contacts_stay_the_same() -> None:
    model = more_model("esm2")
    layout = resolve(model.config, model="m")
    twin = with_weights(model, transform(model.state_dict(), layout, random_elements(layout, 1)))
    tokens = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    for one in (model, twin):
        one.set_attn_implementation("eager")  # the only one that gives attentions
    with EverythingInFloat64():
        before, after = (one.predict_contacts(tokens, torch.ones(2, 12)) for one in (model, twin))
    assert before.std() > 1e-3
    assert relative_deviation(before, after) < EXACT
