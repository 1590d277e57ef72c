"""Muon's update of hidden matrices: their momentum made orthogonal, each matrix by one rank.

Muon (K. Jordan and others, https://kellerjordan.github.io/posts/muon/) steps a matrix along U·Vᵀ of its Nesterov momentum
U·S·Vᵀ, which Newton-Schulz iterations approximate. The step is scaled as in arXiv:2502.16982, section 2.2, so that its elements are
as large as AdamW's, and one learning rate and weight decay serve both.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit.config import ModelConfig

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of X, (XXᵀ)X and (XXᵀ)²X: singular values end between 0.7 and 1.2
UPDATE_RMS = 0.2  # of AdamW's steps, over the learning rate: arXiv:2502.16982
BATCH = 1 << 24  # elements of the matrices that one batched matmul multiplies
NEWTON_SCHULZ_COPIES = 4  # tensors of a batch's size that exist at once: the iterate, the next one, and two of Gram matrices


class Matrix(NamedTuple):
    """A matrix in a parameter: rows·cols elements from `start` of the flat parameter."""

    name: str
    start: int
    rows: int
    cols: int

    @property
    def scale(self) -> float:
        """Factor of the learning rate: an orthogonal matrix has elements of 1/√max(rows, cols), root mean square."""
        return UPDATE_RMS * math.sqrt(max(self.rows, self.cols))

    @property
    def flops(self) -> int:
        """FLOPs of its Newton-Schulz iterations."""
        short, long = sorted((self.rows, self.cols))
        return ITERATIONS * (4 * short * short * long + 2 * short**3)


class Span(NamedTuple):
    """Elements start to start + count of a flat parameter, which a rank keeps from `offset` of its tensor number `tensor`."""

    name: str
    start: int
    count: int
    tensor: int
    offset: int


class Piece(NamedTuple):
    """Elements of a matrix that a rank keeps: `count` from `first` of the matrix, from `offset` of its tensor number `tensor`."""

    matrix: int
    first: int
    count: int
    tensor: int
    offset: int


def hidden_matrices(model: nn.Module, config: ModelConfig) -> list[Matrix]:
    """Return the matrices of the blocks' Linears. Packed ones, qkv and SwiGLU's (value | gate), hold several along their rows."""
    packed = {"attention.qkv": 3, "attention.out": 1, "mlp.up": 1 if config.mlp == "gelu" else 2, "mlp.down": 1}
    matrices = []
    for name, p in model.named_parameters():
        room, _, within = name.partition(".")
        count = packed.get(within.partition(".")[2].removesuffix(".weight")) if room == "blocks" and p.ndim == 2 else None
        if count:
            rows, cols = p.shape[0] // count, p.shape[1]
            matrices += [Matrix(name, i * rows * cols, rows, cols) for i in range(count)]
    return matrices


def newton_schulz(x: Tensor) -> Tensor:
    """Return matrices x [n,rows,cols] with their singular values moved close to 1, in the dtype of x."""
    a, b, c = COEFFICIENTS
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def owners(matrices: Sequence[Matrix], ranks: int) -> list[int]:
    """Return the rank that makes each matrix orthogonal: the largest first, each to the rank with the least FLOPs so far."""
    loads, owner = [0] * ranks, [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].flops):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += matrices[i].flops
    return owner


class Orthogonalizer:
    """Makes matrices orthogonal of which every rank keeps some elements.

    Each matrix is sent to its owner and comes back: two all-to-alls in the dtype of the iterations. The result does not depend on
    how ranks share the elements, but for the rounding of another batch of matmuls.
    """

    def __init__(
        self, matrices: list[Matrix], spans: Sequence[Sequence[Span]], rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """spans: what each rank keeps; spans of other parameters are left out. rank: this one. dtype: of the iterations."""
        self.matrices = sorted(matrices, key=lambda m: (m.rows, m.cols))  # equal shapes are neighbours
        self.dtype = dtype
        self.device = device
        self.distributed = len(spans) > 1
        owner, ranks = owners(self.matrices, len(spans)), range(len(spans))
        pieces = lambda source, to: [p for p in _pieces(self.matrices, spans[source]) if owner[p.matrix] == to]
        to_owners, from_ranks = [pieces(rank, to) for to in ranks], [pieces(source, rank) for source in ranks]
        self.pieces = [p for of_rank in to_owners for p in of_rank]  # in the order of the results
        self.received = [p for of_rank in from_ranks for p in of_rank]
        self.sent_counts, self.received_counts = ([sum(p.count for p in of) for of in each] for each in (to_owners, from_ranks))
        self.owned = [i for i in range(len(self.matrices)) if owner[i] == rank]
        self.of_tensor: dict[int, list[int]] = {}  # indices of pieces
        for i, piece in enumerate(self.pieces):
            self.of_tensor.setdefault(piece.tensor, []).append(i)

    def step(self, tensors: list[Tensor], updates: Iterable[Tensor], lr: float, applied: Tensor | None = None) -> None:
        """Subtract the orthogonal updates of all matrices from the elements of them that this rank keeps. All ranks must call it.

        tensors: flat fp32 masters. updates: their flat fp32 updates in the same order, each read before the next is asked for.
        applied: a boolean scalar; nothing is subtracted unless it is true.
        """
        sent = torch.empty(sum(self.sent_counts), dtype=self.dtype, device=self.device)
        parts = sent.split([p.count for p in self.pieces])
        for number, update in enumerate(updates):
            for i in self.of_tensor.get(number, ()):
                parts[i].copy_(update.narrow(0, self.pieces[i].offset, self.pieces[i].count))
        self._orthogonalize(sent)
        if applied is not None:
            sent.mul_(applied)
        for piece, part in zip(self.pieces, parts, strict=True):
            rate = lr * self.matrices[piece.matrix].scale
            tensors[piece.tensor].narrow(0, piece.offset, piece.count).sub_(part, alpha=rate)

    def _orthogonalize(self, sent: Tensor) -> None:
        """Replace the pieces of matrices, one after the other in `sent`, by those of the orthogonal matrices."""
        if not self.distributed:  # one rank keeps and sends whole matrices, in their order
            self._iterate(sent)
            return
        received = sent.new_empty(sum(self.received_counts))
        dist.all_to_all_single(received, sent, self.received_counts, self.sent_counts)
        whole = torch.empty_like(received)
        position, start = {}, 0
        for i in self.owned:
            position[i] = start
            start += self.matrices[i].rows * self.matrices[i].cols
        places = [whole.narrow(0, position[p.matrix] + p.first, p.count) for p in self.received]
        parts = received.split([p.count for p in self.received])
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)
        self._iterate(whole)
        for place, part in zip(places, parts, strict=True):
            part.copy_(place)
        dist.all_to_all_single(sent, received, self.sent_counts, self.received_counts)

    def _iterate(self, flat: Tensor) -> None:
        """Make the owned matrices, one after the other in `flat`, orthogonal in place."""
        start = 0
        shapes = [(self.matrices[i].rows, self.matrices[i].cols) for i in self.owned]
        for rows, cols in dict.fromkeys(shapes):
            count = shapes.count((rows, cols))
            stack = flat.narrow(0, start, count * rows * cols).view(count, rows, cols)
            start += stack.numel()
            for batch in stack.split(max(1, BATCH // (rows * cols))):
                batch.copy_(newton_schulz(batch))


def _pieces(matrices: Sequence[Matrix], spans: Sequence[Span]) -> list[Piece]:
    """Return which elements of matrices lie in spans, matrix by matrix."""
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    pieces = []
    for i, m in enumerate(matrices):
        for span in by_name.get(m.name, ()):
            first, end = max(m.start, span.start), min(m.start + m.rows * m.cols, span.start + span.count)
            if first < end:
                pieces.append(Piece(i, first - m.start, end - first, span.tensor, span.offset + first - span.start))
    return pieces
