"""What rounding a weight costs: its parts of the model, its inputs, and the losses measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_twins import UNTIED, VOCABULARY, TwinStore, torch_logits

from edgedisp.quantize.onnx_weights import find_uses, read_fp32_graph
from edgedisp.quantize.sensitivity import Reference, find_weights, importances, loss, replaced

# Without the padding token, whose row of a twin's embedding is zero: a norm of nothing.
PIECES = list(torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("form", ["llama", "gemma3_text", "gpt2", UNTIED])
def test_weights_of_the_graph_are_parts_of_the_model(form: str, twins: TwinStore) -> None:
    model, bundle = twins.model(form), twins.fp32(form)
    weights = find_weights(bundle, model)
    assert {weight.name for weight in weights} == set(find_uses(read_fp32_graph(bundle).graph))
    assert sum(weight.outer for weight in weights) == (2 if form == UNTIED else 1)
    assert sum(weight.module is None for weight in weights) == (form == UNTIED)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = next(weight for weight in weights if not weight.outer)
    with torch.no_grad(), replaced(model, [weight], lambda weight, values: values + 1):
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == set(weight.origin.parameters)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_importance_of_a_column_is_its_mean_square_over_the_text(twins: TwinStore) -> None:
    model = twins.model("llama")
    values = importances(model, find_weights(twins.fp32("llama"), model), PIECES)
    with torch.no_grad():
        last = [model(piece[None], output_hidden_states=True).hidden_states[-1][0] for piece in PIECES]
    expected = torch.cat(last).square().mean(0)  # what the head reads
    torch.testing.assert_close(values["model.embed_tokens.weight"], expected, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_divergence_and_the_loss_are_those_of_the_formulas(twins: TwinStore) -> None:
    model, other = twins.model("llama"), twins.model("llama, llama3 rope")
    p, q = (
        np.stack([torch_logits(each, piece.tolist()) for piece in PIECES]).astype(np.float64)
        for each in (model, other)
    )
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    reference = Reference(model, PIECES)
    assert reference.kl(other) == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert reference.kl(model) == pytest.approx(0, abs=1e-6)
    nll = -np.mean([p[i, t, PIECES[i][t + 1]] for i in range(3) for t in range(23)])
    assert loss(model, PIECES) == pytest.approx(nll, rel=1e-5)
