"""The only file that knows DeepSpeed: distributed start, the ZeRO engine, and who owns which fp32 master weights."""

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdit import attention
from fastdit.checkpoint import MOMENTS
from fastdit.config import Config, InputError
from fastdit.device import DTYPES, precision
from fastdit.distributed import World
from fastdit.graphs import record_training
from fastdit.training.optimizer import OneRankAdamW

COMPILED = {"none": "eager", "graphs": "CUDA graphs", "blocks": "compiled blocks", "model": "compiled model"}
DEEPSPEED = "0.19.8"  # the first without the races of its issues 7965 and 8061, which gave NaN


class Fragment(NamedTuple):
    """A piece of a parameter whose fp32 master this rank owns: elements start .. start + master.numel() of the flat parameter."""

    name: str
    start: int
    master: Tensor


def import_deepspeed(device: torch.device):
    """The deepspeed module, ready for a device. Raises InputError if it is too old.

    On a CPU, DeepSpeed would compile its shared-memory collectives: 70 s, and a lock file that makes later runs hang when the build
    is killed. They are switched off; gloo does the work.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from packaging.version import Version

    if Version(deepspeed.__version__) < Version(DEEPSPEED):
        raise InputError(
            f"deepspeed {deepspeed.__version__} is installed, whose overlapped communication races with compiled blocks: "
            f"pip install 'deepspeed>={DEEPSPEED}'"
        )
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has deprecated
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def settle(config: Config, device: torch.device) -> Config:
    """The config with what is "auto" about its precision decided for a device. Raises InputError where this torch or this
    device cannot do what it asks for."""
    if config.train.recompute == "full" and config.train.compile == "model" and torch.__version__ < (2, 13):
        raise InputError(
            f"train.recompute=full with train.compile=model recomputes nothing on torch {torch.__version__}: use "
            "train.compile=graphs or blocks, or torch 2.13"
        )
    train = dataclasses.replace(config.train, precision=precision(config.train.precision, device))
    attention.check(config.model, DTYPES[train.precision], device, training=True)
    return dataclasses.replace(config, train=train)


def shards(config: Config, world_size: int) -> bool:
    """Whether ZeRO is in use. On one rank there is nothing to shard or to overlap, but ZeRO 1 and 2 copy every gradient up to three
    times: 11 to 24 % of a step of S/2 in bf16 on a Xeon with AMX. Stage 3 and offload are taken at their word."""
    return world_size > 1 or config.zero.stage == 3 or config.zero.offload


def deepspeed_config(config: Config, world_size: int) -> dict:
    """The DeepSpeed configuration of a run, whose precision is settled."""
    train, zero = config.train, config.zero
    sharded = shards(config, world_size)
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if zero.offload else {}
    return {
        "train_batch_size": train.batch_size * train.accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip if sharded else 0.0,  # OneRankAdamW clips by itself, and casts
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
        "zero_force_ds_cpu_optimizer": False,  # offload steps torch's AdamW too
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device twice a micro-step
        "wall_clock_breakdown": False,
        "steps_per_print": 1 << 60,
    }


def learning_rate_factor(config: Config, step: int) -> float:
    """Linear warm-up to 1 over warmup_steps, then constant, or half a cosine down to 0 at total_steps. `step` counts from 0."""
    train = config.train
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.total_steps - train.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def compiles(config: Config, world: World) -> str:
    """How a step reaches the device, a key of COMPILED. Not by graphs or compiled under ZeRO 3, whose hooks break both."""
    if config.train.compile == "auto":
        return "graphs" if world.device.type == "cuda" and config.zero.stage < 3 else "none"
    return config.train.compile


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Bitwise the same results again on CUDA, where otherwise attention's backward adds up in any order. Before CUDA is in use.

    cuBLAS and NCCL read their part from the environment, when they start.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for finding bugs: it writes every new tensor once more
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def initialize(model: nn.Module, config: Config, world: World):
    """The DeepSpeed engine of a model: ZeRO where there is something to shard, fused AdamW on fp32 masters, schedule.

    Compiles or records blocks or model first if asked. The model must hold fp32 weights.
    """
    deepspeed = import_deepspeed(world.device)
    train = config.train
    model.set_recompute(train.recompute)
    what = compiles(config, world)
    if what == "blocks":
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
    elif what == "model":  # without the hooks that DeepSpeed puts around it: Dynamo of torch 2.11 cannot trace them
        model.forward = torch.compile(model.forward, dynamic=False, fullgraph=True)
    elif what == "graphs":
        record_training(model, per_block=world.size > 1)  # ZeRO sends a block's gradients while the blocks before it run
    options = dict(betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay)
    sharded, bf16, schedule = shards(config, world.size), train.precision == "bf16", None
    if sharded:
        optimizer = torch.optim.AdamW(model.parameters(), train.lr, fused=True, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))
    else:
        model.to(world.device)  # DeepSpeed would, but the masters are made of its weights here
        # DeepSpeed moves a schedule on in engine.step, where nobody knows yet whether the step was taken: the optimizer has its own
        rate = lambda step: train.lr * learning_rate_factor(config, step)
        optimizer = OneRankAdamW(list(model.parameters()), train.clip, bf16, train.accumulation, rate, **options)
    weights = {} if not sharded else {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config(config, world.size)
    )
    if not sharded:
        engine.enable_backward_allreduce = False  # it would copy every gradient to a buffer and back
        engine.zero_grad = lambda: None  # the optimizer has used them up, or keeps them
        if bf16:
            model.bfloat16()
        return engine
    # DeepSpeed makes its masters from the bf16 parameters: give them back what that rounded away
    for fragment in fragments(engine, world):
        fragment.master.copy_(weights[fragment.name].flatten()[fragment.start : fragment.start + fragment.master.numel()])
    return engine


def one_rank_optimizer(engine) -> OneRankAdamW | None:
    """The optimizer where there is one rank, which knows late whether it took a step; None under ZeRO, where engine.step waits."""
    return engine.optimizer if isinstance(engine.optimizer, OneRankAdamW) else None


def settle_step(engine) -> bool:
    """Whether the last optimizer step was taken: not where a gradient was not finite. On one rank this waits for the device, and
    sets the next learning rate. Under ZeRO, to be asked before the next micro-step."""
    optimizer = one_rank_optimizer(engine)
    return optimizer.settle() if optimizer else engine.was_step_applied()


def add_if_taken(engine, total: Tensor, of_step: Tensor) -> None:
    """Add a tensor of the last optimizer step to a total on the device if the step was taken, without waiting for the answer."""
    optimizer = one_rank_optimizer(engine)
    if optimizer:
        total += torch.where(optimizer.found_inf == 0, of_step, 0)
    elif engine.was_step_applied():
        total += of_step


def gradient_norm(engine) -> float:
    """Of the last optimizer step, which must be settled: the 2-norm before clipping."""
    optimizer = one_rank_optimizer(engine)
    return optimizer._global_grad_norm if optimizer else float(engine.get_global_grad_norm())


def fragments(engine, world: World) -> list[Fragment]:
    """The fp32 masters that this rank owns, as live 1-D views, in the order of the model's parameters.

    On one rank they are whole; ZeRO 1 and 2 keep a private `_hp_mapping` on each parameter (None: not on this rank); ZeRO 3 cuts
    every parameter evenly.
    """
    from deepspeed.utils import safe_get_local_fp32_param

    found, optimizer = [], one_rank_optimizer(engine)
    if optimizer:
        names = (name for name, _ in engine.module.named_parameters())
        return [Fragment(name, 0, p.detach().view(-1)) for name, p in zip(names, optimizer.masters, strict=True)]
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_numel"):
            master = safe_get_local_fp32_param(parameter)
            start = world.rank * master.numel()
            found.append(Fragment(name, start, master.detach()[: max(0, parameter.ds_numel - start)]))
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            found.append(Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach()))
    return [fragment for fragment in found if fragment.master.numel()]


def _states(engine) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The fp32 tensors that this rank's AdamW steps, each with its state, which is made where there was no step yet."""
    zero = engine.optimizer
    # of one rank; of ZeRO 3; of ZeRO 2, and 1 in fp32; of ZeRO 1 in bf16
    names = ("masters", "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    flats = next(getattr(zero, name) for name in names if hasattr(zero, name))
    states = getattr(zero, "optimizer", zero).state
    for flat in flats:
        if not states[flat]:
            states[flat]["step"] = torch.zeros((), device=flat.device)
            states[flat] |= {key: torch.zeros_like(flat) for key in MOMENTS}
    return [(flat, states[flat]) for flat in flats]


def moments(engine, owned: list[Fragment]) -> dict[str, list[Tensor]]:
    """AdamW's exp_avg and exp_avg_sq of the fragments, as live 1-D views."""
    found: dict[str, list[Tensor]] = {key: [] for key in MOMENTS}
    for fragment in owned:
        for flat, state in _states(engine):
            first = (fragment.master.data_ptr() - flat.data_ptr()) // flat.element_size()
            if 0 <= first < flat.numel():
                for key in MOMENTS:
                    found[key].append(state[key].view(-1).narrow(0, first, fragment.master.numel()))
    return found


def steps_taken(engine) -> int:
    """Optimizer steps, those that were skipped left out; the last one must be settled. Waits for the device."""
    return int(_states(engine)[0][1]["step"].item())


def continue_from(engine, config: Config, steps: int) -> None:
    """Set optimizer and schedule to `steps` steps taken. Betas, eps and weight decay are this run's since `initialize`."""
    for _, state in _states(engine):
        state["step"].fill_(steps)
    if optimizer := one_rank_optimizer(engine):
        optimizer.set_learning_rate()
        return
    train, scheduler = config.train, engine.lr_scheduler
    scheduler.last_epoch = steps
    for group in engine.optimizer.param_groups:
        group["lr"] = train.lr * learning_rate_factor(config, steps)
    scheduler._last_lr = [group["lr"] for group in engine.optimizer.param_groups]  # what get_lr reports until the next step
