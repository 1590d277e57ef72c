"""The DeepSpeed engine of a run, and which rank owns which fp32 master weights. No other file knows DeepSpeed.

What DeepSpeed keeps private is read through `_private`, each name with the file of DeepSpeed 0.19 that defines it.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fastdit import attention
from fastdit.config import Config, InputError
from fastdit.device import DTYPES, precision
from fastdit.distributed import World
from fastdit.graphs import record_training
from fastdit.model import DiT
from fastdit.training.muon import Matrix, Orthogonalizer, Span
from fastdit.training.optimizer import (
    STATE_NAMES,
    OneRankOptimizer,
    ShardedMuon,
    build,
    learning_rate,
    learning_rate_factor,
    matrices_of,
)

COMPILED = {"none": "eager", "graphs": "CUDA graphs", "blocks": "compiled blocks", "model": "compiled model"}
DEEPSPEED = "0.19.8"  # the first without the races of its issues 7965 and 8061, which gave NaN
DEEPSPEED_BELOW = "0.20"  # the private layout that this file reads is that of 0.19


class Fragment(NamedTuple):
    """A piece of a parameter whose fp32 master this rank owns: elements start to start + master.numel() of the flat parameter.

    master: fp32 1-D, a live view of the tensor that the optimizer steps.
    """

    name: str
    start: int
    master: Tensor


def import_deepspeed(device: torch.device):
    """Return the deepspeed module, prepared for a device. Raises InputError if it is too old or too new.

    On a CPU, DeepSpeed would compile its shared-memory collectives: that takes 70 s, and if it is killed meanwhile, its lock file
    makes later runs hang. They are switched off; gloo does the work.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    installed = Version(deepspeed.__version__)
    fix = f"pip install 'deepspeed>={DEEPSPEED},<{DEEPSPEED_BELOW}'"
    if installed < Version(DEEPSPEED):
        raise InputError(f"deepspeed {installed} is installed, whose overlapped communication races with compiled blocks: {fix}")
    if installed >= Version(DEEPSPEED_BELOW):
        raise InputError(f"deepspeed {installed} is installed, but this fastdit reads the private layout of 0.19: {fix}")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has deprecated
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        _private(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False  # ops/__init__.py; read in comm/torch.py
    return deepspeed


def _private(owner: object, *names: str):
    """Return the first attribute of `names` that a part of DeepSpeed has. Raises InputError if it has none of them."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    import deepspeed

    of = getattr(owner, "__name__", type(owner).__name__)
    raise InputError(
        f"deepspeed {deepspeed.__version__} has another layout ({of} has no {' or '.join(names)}); this fastdit knows 0.19: "
        f"pip install 'deepspeed>={DEEPSPEED},<{DEEPSPEED_BELOW}'"
    )


def resolve_precision(config: Config, device: torch.device) -> Config:
    """Return the config with train.precision=auto resolved for a device.

    Raises InputError if this torch or this device cannot run the config in that precision.
    """
    if config.train.recompute == "full" and config.train.compile == "model" and Version(torch.__version__) < Version("2.13"):
        raise InputError(
            f"train.recompute=full with train.compile=model recomputes nothing on torch {torch.__version__}: use "
            "train.compile=graphs or blocks, or torch 2.13"
        )
    train = dataclasses.replace(config.train, precision=precision(config.train.precision, device))
    attention.check(config.model, DTYPES[train.precision], device, training=True)
    return dataclasses.replace(config, train=train)


def shards(config: Config, world_size: int) -> bool:
    """Return whether ZeRO is in use.

    Stage 0 shards nothing. One rank has nothing to shard and nothing to overlap, but ZeRO 1 and 2 would copy every gradient up to
    three times: 11 to 24 % of a step of S/2 in bf16 on a Xeon with AMX. Stage 3 and offload are used on one rank too.
    """
    return (world_size > 1 and config.zero.stage > 0) or config.zero.stage == 3 or config.zero.offload


def deepspeed_config(config: Config, world_size: int) -> dict:
    """Return the DeepSpeed configuration of a run whose precision is resolved."""
    train, zero = config.train, config.zero
    sharded = shards(config, world_size)
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if zero.offload else {}
    return {
        "train_batch_size": train.batch_size * train.accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip if sharded else 0.0,  # the optimizer of one rank clips and casts
        "bf16": {"enabled": {"bf16": True, "fp32": False}[train.precision] and sharded},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": zero.stage if sharded else 0,
            "overlap_comm": True,  # off by default below stage 3
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": zero.bucket,
            "allgather_bucket_size": zero.bucket,
            **offload,
        },
        "zero_force_ds_cpu_optimizer": False,  # with offload, too, torch's AdamW runs
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device twice per micro-step
        "wall_clock_breakdown": False,
        "steps_per_print": 1 << 60,
    }


def compiles(config: Config, world: World) -> str:
    """Return how the operations of a step reach the device, a key of COMPILED. ZeRO 3 runs eagerly: its hooks break graphs."""
    if config.train.compile == "auto":
        return "graphs" if world.device.type == "cuda" and config.zero.stage < 3 else "none"
    return config.train.compile


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Make CUDA results bitwise reproducible inside the block: attention's backward would sum in any order.

    Enter it before CUDA is in use: cuBLAS and NCCL read their variables when they start.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    enabled_before = torch.are_deterministic_algorithms_enabled()
    memory = cast(Any, torch.utils.deterministic)  # fill_uninitialized_memory is a property of the module's class
    fill_before = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor once more
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled_before)
        memory.fill_uninitialized_memory = fill_before


def _compile(model: DiT, config: Config, world: World) -> None:
    """Compile or record the model or its blocks, as the config asks for."""
    how_compiled = compiles(config, world)
    if how_compiled == "blocks":
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
    elif how_compiled == "model":  # before DeepSpeed adds its hooks, which Dynamo of torch 2.11 cannot trace
        model.forward = torch.compile(model.forward, dynamic=False, fullgraph=True)
    elif how_compiled == "graphs":
        # ZeRO sends a block's gradients while the blocks before it run
        record_training(model, per_block=shards(config, world.size))


def initialize(model: DiT, config: Config, world: World):
    """Return the DeepSpeed engine of a model, with its optimizer and learning-rate schedule. All ranks must call it.

    model: fp32 weights. It is compiled or recorded first if the config asks for that.
    """
    deepspeed = import_deepspeed(world.device)
    model.set_recompute(config.train.recompute)
    _compile(model, config, world)
    sharded = shards(config, world.size)
    if not sharded:
        model.to(world.device)  # DeepSpeed would move it later, but the optimizer makes its masters from these weights
    groups, optimizer = build(config, model, sharded, world.size)
    matrices = matrices_of(config, model)
    # Without ZeRO the optimizer follows the schedule itself: DeepSpeed would advance one in engine.step, where it is not known yet
    # whether the step is applied.
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(config.train, step)) if sharded else None
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()} if sharded else {}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, world.size),
        model_parameters=cast(Any, groups), lr_scheduler=cast(Any, schedule),  # DeepSpeed's annotations of these are too narrow
    )  # fmt: skip
    if sharded:
        # DeepSpeed makes its masters from the bf16 parameters: restore what that rounding lost.
        for name, start, master in fragments(engine, world):
            master.copy_(weights[name].flatten()[start : start + master.numel()])
        if isinstance(optimizer, ShardedMuon):
            _share(engine, optimizer, matrices, config, world)
        return engine
    _private(engine, "enable_backward_allreduce")  # runtime/engine.py
    engine.enable_backward_allreduce = False  # it would copy every gradient to a buffer and back
    engine.zero_grad = lambda: None  # the optimizer frees the gradients, or still needs them
    if config.train.precision == "bf16":
        model.bfloat16()
    return engine


def _share(engine, optimizer: ShardedMuon, matrices: list[Matrix], config: Config, world: World) -> None:
    """Tell a sharded Muon which elements of which matrix each rank keeps in its partitions. All ranks must call it."""
    partitions = _private(engine.optimizer, *STEPPED)
    own = [Span(f.name, f.start, f.master.numel(), *_partition_of(f, partitions)) for f in fragments(engine, world)]
    spans: list[list[Span]] = [[] for _ in range(world.size)]
    dist.all_gather_object(spans, own, group=world.control)
    for number, partition in enumerate(partitions):  # the same parameters on every rank
        there = [[span._replace(tensor=0) for span in of_rank if span.tensor == number] for of_rank in spans]
        names = {span.name for of_rank in there for span in of_rank}
        if inside := [m for m in matrices if m.name in names]:
            dtype = DTYPES[config.train.precision]
            optimizer.share(partition, Orthogonalizer(inside, there, world.rank, dtype, partition.device))


def _partition_of(fragment: Fragment, tensors: list[Tensor]) -> tuple[int, int]:
    """Return which of the tensors that the optimizer steps holds a fragment, and the fragment's first element in it."""
    for number, tensor in enumerate(tensors):
        first = (fragment.master.data_ptr() - tensor.data_ptr()) // tensor.element_size()
        if 0 <= first < tensor.numel():
            return number, first
    raise AssertionError(f"no tensor holds {fragment.name}")


def one_rank_optimizer(engine) -> OneRankOptimizer | None:
    """Return the optimizer of a rank without ZeRO, which learns late whether a step was applied; None under ZeRO, whose engine.step
    waits."""
    return engine.optimizer if isinstance(engine.optimizer, OneRankOptimizer) else None


def finish_step(engine) -> bool:
    """Return whether the last optimizer step was applied: it is skipped if a gradient is not finite.

    On one rank this waits for the device and sets the next learning rate. Under ZeRO, call it before the next micro-step.
    """
    optimizer = one_rank_optimizer(engine)
    return optimizer.finish_step() if optimizer else engine.was_step_applied()


def add_if_applied(engine, total: Tensor, of_step: Tensor) -> None:
    """Add `of_step` to `total` on the device if the last optimizer step was applied. On one rank the host does not wait for it."""
    optimizer = one_rank_optimizer(engine)
    if optimizer:
        total += torch.where(optimizer.found_inf == 0, of_step, 0)
    elif engine.was_step_applied():
        total += of_step


def gradient_norm(engine) -> float:
    """Return the 2-norm of the last optimizer step's gradient before clipping. The step must be finished."""
    optimizer = one_rank_optimizer(engine)
    return optimizer._global_grad_norm if optimizer else float(engine.get_global_grad_norm())


def fragments(engine, world: World) -> list[Fragment]:
    """Return the fp32 masters that this rank owns, in the order of the model's parameters.

    Without ZeRO each rank owns them whole. ZeRO 1 and 2 keep an `_hp_mapping` on each parameter, None if it is not on this rank.
    ZeRO 3 cuts every parameter into equal parts, the last of which are padded.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    named = list(engine.module.named_parameters())
    if optimizer := one_rank_optimizer(engine):
        masters = dict(zip(optimizer.parameters, optimizer.masters, strict=True))
        return [Fragment(name, 0, masters[parameter].detach().view(-1)) for name, parameter in named]
    owned = []
    for name, parameter in named:
        if hasattr(parameter, "ds_numel"):  # ZeRO 3: runtime/zero/partition_parameters.py
            master = safe_get_local_fp32_param(parameter)
            start = world.rank * master.numel()
            owned.append(Fragment(name, start, master.detach()[: max(0, parameter.ds_numel - start)]))
        elif mapping := _private(parameter, "_hp_mapping"):  # ZeRO 1 and 2: utils/mixed_precision_linkage.py
            owned.append(Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach()))
    return [fragment for fragment in owned if fragment.master.numel()]


# Each rank's optimizer steps a list of fp32 tensors, kept by the engine's optimizer under one of these names:
#
#   in use                  the list holds                                   DeepSpeed file
#   one rank, no ZeRO       a whole master per parameter                     (our own OneRankOptimizer)
#   ZeRO 3                  this rank's parts of all parameters, flat, one   runtime/zero/stage3.py
#                           tensor per group and sub-group
#   ZeRO 2, ZeRO 1 in fp32  this rank's partition of all parameters, flat,   runtime/zero/stage_1_and_2.py
#                           one tensor per parameter group
#   ZeRO 1 in bf16          the same                                         runtime/bf16_optimizer.py
STEPPED = ("masters", "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def _states(engine) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return the fp32 tensors that this rank's optimizer steps, each with its state, which is made if there was no step yet."""
    tensors = _private(engine.optimizer, *STEPPED)
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state  # ZeRO's optimizers wrap torch's
    for tensor in tensors:
        if not states[tensor]:
            states[tensor]["step"] = torch.zeros((), device=tensor.device)
            states[tensor] |= {name: torch.zeros_like(tensor) for name in STATE_NAMES}
    return [(tensor, states[tensor]) for tensor in tensors]


def optimizer_state(engine, owned: list[Fragment]) -> list[tuple[str, Fragment, Tensor]]:
    """Return the optimizer's state of the fragments that this rank owns: its name, the fragment, and a live fp32 1-D view of it."""
    states = _states(engine)
    views = []
    for fragment in owned:
        number, first = _partition_of(fragment, [tensor for tensor, _ in states])
        for name, tensor in states[number][1].items():
            if name != "step":
                views.append((name, fragment, tensor.view(-1).narrow(0, first, fragment.master.numel())))
    return views


def steps_applied(engine) -> int:
    """Return the number of optimizer steps that were applied. The last step must be finished. Waits for the device."""
    return int(_states(engine)[0][1]["step"].item())


def continue_from(engine, config: Config, steps: int) -> None:
    """Set optimizer and schedule to `steps` applied steps. The optimizer's settings are those of this run since `initialize`."""
    for _, state in _states(engine):
        state["step"].fill_(steps)
    if optimizer := one_rank_optimizer(engine):
        optimizer.set_learning_rate()
        return
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = steps
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.train, steps)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    scheduler._last_lr = rates  # torch/optim/lr_scheduler.py: what get_lr returns until the next step
