"""A stand-in for CUDA graphs on the CPU, which records the operators of a capture and repeats them on the same tensors."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit import graphs


class Recording(TorchDispatchMode):
    """Runs operators and records each with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out


class Graph:
    """In place of torch.cuda.CUDAGraph: `replay` repeats the recorded operators and writes to the tensors of the capture."""

    def replay(self):
        for function, args, kwargs, out in self.calls:
            for captured, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(captured, torch.Tensor) and captured.data_ptr() != new.data_ptr():  # else a view of an argument
                    captured.copy_(new)


def install(monkeypatch):
    """Replace what fastdit.graphs needs of torch.cuda. Returns a list that grows by (pool, error mode) with each capture."""
    captures = []

    @contextmanager
    def capture(graph, pool=None, stream=None, capture_error_mode="global"):
        captures.append((pool, capture_error_mode))
        with Recording() as recording:
            yield
        graph.calls = recording.calls

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    pool = object()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pool)
    monkeypatch.setattr(graphs, "_capture_stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return captures
