"""The benchmarks' eager reference computes the same function as fastdit's model."""

import pytest
import torch

from benchmarks.eager_reference import EagerDiT, comparable, eager_model, euler, fastdit_model
from fastdit.sampling import solvers


@pytest.mark.parametrize("class_width", [48, None])
def test_same_function_and_samples(class_width):
    """Forward, the gradient at the input, and 3 guided steps, within rounding of fp32 sums of 128 terms in another order."""
    torch.manual_seed(0)
    eager = EagerDiT(comparable(64, 2, 2, 128, class_width))
    model = fastdit_model(eager)
    assert model.num_parameters == sum(p.numel() for p in eager.parameters())
    x, t, labels = torch.randn(2, 4, 32, 32, requires_grad=True), torch.rand(2), torch.tensor([3, 1000])
    ours, theirs = model(x, t, labels), eager(x, t, labels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    weight = torch.randn_like(x)
    gradients = [torch.autograd.grad((v * weight).sum(), x)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * gradients[0].abs().max().item())
    labels = labels.clamp(max=999)
    velocity = solvers.guided(model, labels, null=1000, guidance=3.0)
    with torch.no_grad():
        *_, latent = solvers.euler(velocity, x, 3)
    torch.testing.assert_close(latent, euler(eager, x.detach(), labels, 3, 3.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("class_width", [48, None])
def test_weights_go_there_and_back(class_width):
    """depth 6 has two groups of packed modulation."""
    torch.manual_seed(0)
    eager = EagerDiT(comparable(32, 6, 2, 64, class_width))
    for p in eager.parameters():  # norm weights of ones would hide their order
        torch.nn.init.normal_(p)
    again = eager_model(fastdit_model(eager))
    for (name, p), q in zip(eager.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
