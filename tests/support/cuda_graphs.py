"""CUDA graphs on the CPU: a stand-in that records the operators of a capture and repeats them on the same tensors."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit import graphs


class Recording(TorchDispatchMode):
    """Runs operators and keeps each with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out


class Graph:
    """torch.cuda.CUDAGraph: replay() computes the recorded operators again and writes to the tensors of the capture."""

    def replay(self):
        for function, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():  # no view of an argument
                    kept.copy_(new)


def install(monkeypatch):
    """Replace what fastdit.graphs needs of torch.cuda; returns the list that (pool, error mode) of each capture is added to."""
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
