"""Measured rates: what they count, and that attention is measured as training runs it."""

import torch

from fastdit.config import parse
from fastdit.planning import machine_rates

CPU = torch.device("cpu")


def test_rates_count_what_they_say(monkeypatch):
    """Each call takes a second."""
    monkeypatch.setattr(machine_rates, "seconds", lambda call, device, calls: call() is None or 1.0)
    assert machine_rates.matmul_rate((8, 4, 2), torch.float32, CPU) == 2 * 8 * 4 * 2
    assert machine_rates.copy_rate(CPU) == 2 * machine_rates.COPY
    monkeypatch.setattr(machine_rates, "seconds", lambda call, device, calls: call() is None or float(calls))
    # on a GPU one copy takes 0.2 ms, and waiting some 0.01
    assert machine_rates.copy_rate(torch.device("meta")) == 2 * machine_rates.COPY / 50
    monkeypatch.setattr(machine_rates.dist, "all_reduce", lambda tensor: None)
    assert machine_rates.link_rate(4, CPU) == 1.5 * machine_rates.LINK["cpu"] and machine_rates.link_rate(1, CPU) is None


def test_attention_is_measured_as_training_runs_it(monkeypatch):
    """On token-major q, k and v, with a gradient that has its own memory."""
    seen, gradients = [], []
    attend = machine_rates.attention.attention

    def watched(q, k, v, kind):
        out = attend(q, k, v, kind)
        out.register_hook(gradients.append)
        seen.append([tensor.stride() for tensor in (q, k, v)])
        return out

    monkeypatch.setattr(machine_rates.attention, "attention", watched)
    model = parse(None, ["model.preset=test/4"]).model
    H, D, T = model.width, model.width // model.heads, (model.input_size // model.patch_size) ** 2
    machine_rates.attention_rate(model, 2, torch.float32, CPU)
    assert all(strides == [(T * H, D, H, 1), (T * H, D, H, 1), (3 * T * H, D, 3 * H, 1)] for strides in seen)
    assert gradients and all(gradient.is_contiguous() and gradient.shape == (2, T, H) for gradient in gradients)
