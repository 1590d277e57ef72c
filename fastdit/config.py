"""Every setting of a run: frozen dataclasses, the preset table, YAML files and `section.key=value` overrides.

A value comes from the defaults below, the preset, the YAML file or the overrides on the command line; the last of them wins. A
run that is resumed keeps the values that are not given again (fastdit/training/command.py).
Unknown keys, values of the wrong type and values out of range raise InputError, with one sentence that names the nearest valid
choice.

The defaults together are a run on the built-in digits; launch/configs/quickstart.yaml is a better one for them. Other data need
their own train section: the learning rate above all.
"""

import argparse
import dataclasses
import json
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

from fastdit.checks import InputError, at_least, at_most, convert, nearest, one_of, shown, usable
from fastdit.presets import PRESETS
from fastdit.sampling.solvers import SOLVERS  # which imports neither torch nor anything of fastdit

RENAMED = {"train.checkpoint": "train.recompute"}  # old key: new key; saved configs may have either
RECOMPUTE = ("none", "light", "full")  # values of train.recompute
ZERO_STAGES = (0, 1, 2, 3)  # values of zero.stage
MAX_STEPS = 10_000  # of sample.steps
MAX_GUIDANCE = 100  # of sample.guidance; papers use up to 20
MAX_SHIFT = 1000  # of sample.time_shift and its inverse: beyond, timesteps are rounded to 0 or 1
# Keys of `train` that a resumed run does not keep: which run it is, and what a single start may do.
OF_ONE_START = ("name", "out", "resume", "init", "init_weights", "allow_batch_change")

# keys of `sample` that only matter to guided samples
UNGUIDED = {"guidance": 0.0, "guidance_low": 0.0, "guidance_high": 1.0, "path_drop_guidance": False}


class Stopped(Exception):
    """A run was told to stop: it saved a checkpoint and ended before its last step."""


class Interrupted(Stopped):
    """The same, by Ctrl-C."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the DiT."""

    preset: str = "nano/4"  # row of PRESETS; other keys that are given replace its values
    width: int = 128  # features per token
    depth: int = 6  # transformer blocks
    heads: int = 2  # attention heads
    hidden: int = 384  # inner width of the MLP
    patch_size: int = 4  # height and width of a token, in pixels or latents
    in_channels: int = 1  # input channels: pixels 1 or 3, SD-VAE latents 4
    input_size: int = 32  # input height and width: 256-pixel images are 32 in SD-VAE latents
    num_classes: int = 10  # classes of the data, without the null class
    class_width: int | None = None  # width of the class embedding before it is mapped to `width`; none: `width`, not mapped
    positions: str = "rope_2d"  # absolute (learned) | sincos (DiT's table, which is not trained) | rope_1d | rope_2d
    qk_norm: str = "head"  # head | none | full_width (only to load old checkpoints)
    time_embedding: str = "sinusoidal"  # sinusoidal | base (the published base model's)
    zero_init_gates: bool = True  # adaLN-Zero: every block starts as the identity
    attention: str = "auto"  # auto | flash (the flash-attn package) | sdpa | matmul
    modulation_groups: int | None = None  # Linears that compute the modulation of all blocks; none: one per 4 blocks
    mlp: str = "swiglu"  # swiglu | gelu (its tanh form): what is between the two Linears of the MLP
    linear_bias: bool = False  # biases of the two Linears of the attention
    norm_eps: float = 1e-5  # epsilon of the LayerNorms
    # Largest frequency of the timestep's sinusoids, in radians per unit of t; not of time_embedding=base. DiT's 1000 makes
    # neighbouring timesteps look unrelated: on the built-in digits 600 steps gave 51 % recognised digits with it and 99.5 % with 30
    # (guidance 4, all else equal). SiT's is 1.
    time_frequency: float = 30.0
    class_std: float = 0.02  # standard deviation of the initial class embeddings, if zero_init_gates; else it is 1
    # blocks at the start and at the end that see all tokens, such as [2,2]; a Linear joins the first ones' output with that of the
    # blocks between (SPRINT, arXiv:2510.21986); none: no such Linear; default with keep_tokens < 1 or path_drop > 0: [2,2]
    dense_blocks: tuple[int, int] | None = None
    keep_tokens: float = 1.0  # share of the tokens, chosen at random per image, that the blocks between see in training
    path_drop: float = 0.0  # probability per image that training leaves out the blocks between, for sample.path_drop_guidance

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "hidden", "patch_size", "in_channels", "input_size", "num_classes"):
            at_least("model", self, key, 1)
        for key, limit in (("width", 65_536), ("depth", 1_000), ("hidden", 262_144), ("in_channels", 4_096),
                           ("input_size", 4_096), ("num_classes", 1_000_000)):  # fmt: skip
            at_most("model", self, key, limit)
        one_of("model", self, "preset", tuple(PRESETS))
        one_of("model", self, "positions", ("absolute", "sincos", "rope_1d", "rope_2d"))
        one_of("model", self, "mlp", ("swiglu", "gelu"))
        at_least("model", self, "norm_eps", 1e-12)
        at_least("model", self, "time_frequency", 1e-3)
        at_least("model", self, "class_std", 0)
        one_of("model", self, "attention", ("auto", "flash", "sdpa", "matmul"))
        one_of("model", self, "qk_norm", ("head", "none", "full_width"))
        one_of("model", self, "time_embedding", ("sinusoidal", "base"))
        if self.class_width is not None:
            at_least("model", self, "class_width", 1)
            at_most("model", self, "class_width", 65_536)
        if self.modulation_groups is not None and not 1 <= self.modulation_groups <= self.depth:
            raise InputError(f"model.modulation_groups={self.modulation_groups} must be between 1 and model.depth={self.depth}")
        if self.width % self.heads or (self.width // self.heads) % 2 or self.width // self.heads > 256:
            raise InputError(f"model.heads={self.heads} must divide model.width={self.width} into an even head dim of at most 256")
        if self.positions == "rope_2d" and (self.width // self.heads) % 4:
            raise InputError(
                f"model.positions=rope_2d needs a head dim divisible by 4, but {self.width}/{self.heads} = "
                f"{self.width // self.heads}: change model.heads or use rope_1d"
            )
        if self.positions in ("absolute", "sincos") and self.width % 4:
            raise InputError(f"model.positions={self.positions} needs a width divisible by 4, but model.width={self.width}")
        if self.input_size % self.patch_size:
            raise InputError(f"model.patch_size={self.patch_size} must divide model.input_size={self.input_size}")
        self._check_sparse()

    def _check_sparse(self) -> None:
        dense = self.dense_blocks
        if not 0 < self.keep_tokens <= 1:
            raise InputError(f"model.keep_tokens={self.keep_tokens} must be above 0 and at most 1")
        if not 0 <= self.path_drop < 1:
            raise InputError(f"model.path_drop={self.path_drop} must be at least 0 and below 1")
        if dense is None and (self.keep_tokens < 1 or self.path_drop):
            key = "keep_tokens" if self.keep_tokens < 1 else "path_drop"
            raise InputError(f"model.{key}={getattr(self, key)} needs model.dense_blocks, such as [2,2]")
        if dense is not None and (len(dense) != 2 or min(dense) < 1 or sum(dense) >= self.depth):
            raise InputError(
                f"model.dense_blocks={list(dense)} must be two numbers of at least 1 whose sum is below model.depth={self.depth}"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def kept_tokens(self) -> int:
        """Number of tokens of an image that the blocks between the dense ones see in training."""
        return max(1, round(self.keep_tokens * self.tokens))

    @property
    def block_tokens(self) -> int:
        """Sum over the blocks of the tokens of an image that they see in training."""
        dense = sum(self.dense_blocks or (self.depth,))
        return dense * self.tokens + (self.depth - dense) * self.kept_tokens

    @property
    def group_sizes(self) -> list[int]:
        """Numbers of blocks that the modulation Linears serve, in order."""
        groups = self.modulation_groups or -(-self.depth // 4)
        return [self.depth // groups + (i < self.depth % groups) for i in range(groups)]


@dataclass(frozen=True)
class DataConfig:
    """Data set, autoencoder and augmentation."""

    source: str = "mnist5k"  # the built-in digits | an index | latents | an archive or folder, which gets an index first
    image_size: int = 32  # height and width of the images in pixels
    autoencoder: str = "pixels"  # pixels (none) | a diffusers autoencoder's folder, or its Hub id OWNER/NAME[/SUBFOLDER][@REVISION]
    flip: bool = False  # mirror each image with probability 1/2 (never for digits)
    crop: str = "center"  # center: resize the short side, cut out the middle | random: torchvision's RandomResizedCrop
    grey: bool = False  # read the images of an index as grey, one channel
    exif: str = "auto"  # EXIF orientation of images: auto, applied, but not to ImageNet's own | ignore
    threads: int | None = None  # DALI threads per rank; none: the node's cores divided by its ranks
    max_bad_files: int = 10  # undecodable files that each rank replaces; one more ends the run
    resident: str = "auto"  # latents in device memory: true | false | auto, if they take less than a tenth of what is free

    def __post_init__(self) -> None:
        for key, limit in (("image_size", 1), ("max_bad_files", 0)):
            at_least("data", self, key, limit)
        at_most("data", self, "image_size", 16_384)
        if self.threads is not None:
            at_least("data", self, "threads", 1)
            at_most("data", self, "threads", 1_024)
        one_of("data", self, "crop", ("center", "random"))
        one_of("data", self, "exif", ("auto", "ignore"))
        one_of("data", self, "resident", ("auto", "true", "false"))


@dataclass(frozen=True)
class FlowConfig:
    """What the model predicts, the distribution of training timesteps, and label dropout."""

    prediction: str = "v"  # what the network's output is: v, the velocity | x, the data: arXiv:2511.13720
    logit_mean: float = 0.0  # mean of the logit-normal timesteps, t = sigmoid(normal(mean, std)): arXiv:2403.03206, equation 19
    logit_std: float = 1.0  # their standard deviation, before the sigmoid
    time_shift: float = 1.0  # shift s of the timesteps, as logit_mean + ln s: above 1 for larger latents, sqrt of elements' ratio
    label_dropout: float = 0.1  # probability of the null class, for classifier-free guidance (default with one class: 0)

    def __post_init__(self) -> None:
        one_of("flow", self, "prediction", ("v", "x"))
        at_least("flow", self, "logit_std", 0)
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"flow.label_dropout={self.label_dropout} must be at least 0 and below 1: at 1 no class is trained")
        if not 0 < self.time_shift < math.inf:
            raise InputError(f"flow.time_shift={self.time_shift} must be above 0 and finite")


@dataclass(frozen=True)
class TrainConfig:
    """The run: its folder, length, batches, precision, optimizer, EMA, and what it writes when."""

    name: str = "digits"  # name of the run, whose folder is <out>/<name>
    out: str = "runs"  # folder of all runs
    resume: str = "auto"  # auto: this run's newest checkpoint, if there is one | never | the folder of a checkpoint
    # weights to begin from: a run, a checkpoint, an exported file, a base model's .pkl, a Hub id owner/name[@revision]; none: new
    init: str | None = None
    init_weights: str = "ema"  # weights of train.init: ema | raw | a further average such as ema_0.9999
    seed: int = 0  # seed of weights, order, augmentation, timesteps, noise and label dropout
    total_steps: int = 1400  # optimizer steps of the whole run
    batch_size: int = 32  # images per device and micro-step
    accumulation: int = 1  # micro-steps per optimizer step
    allow_batch_change: bool = False  # resume with another number of images per step than the checkpoint's
    precision: str = "auto"  # auto: bf16 if the device has fast matmuls in it, else fp32 | bf16 (with fp32 masters) | fp32
    device: str = "auto"  # auto: CUDA if there is a GPU | cpu | cuda
    # auto: graphs on CUDA below ZeRO 3, else none | graphs: CUDA graphs, of the model on one rank, of each block on several |
    # blocks: torch.compile on each block | model: torch.compile on the model | none
    compile: str = "auto"
    recompute: str = "none"  # what the backward computes again to save memory: none | light: MLP activations | full: blocks
    optimizer: str = "adamw"  # adamw | muon: Muon for the blocks' matrices, AdamW for the other parameters
    lr: float = 4e-3  # learning rate: this one is for the small model on digits; DiT and the base script use 1e-4 on ImageNet
    beta1: float = 0.9  # AdamW's decay of the first moment
    beta2: float = 0.95  # AdamW's decay of the second moment
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.01  # AdamW's decoupled weight decay
    schedule: str = "constant"  # learning rate after the warm-up: constant, for the EMA to average | cosine, to 0 at total_steps
    dense_steps: int = 0  # last steps in which all blocks see all tokens, with model.keep_tokens below 1
    decay_steps: int = 0  # with schedule=constant, last steps in which the learning rate falls to 0, as 1-sqrt: arXiv:2405.18392
    warmup_steps: int = 50  # steps of linear warm-up of the learning rate
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema_decay: float = 0.99  # decay of the EMA per update
    ema_more: list[float] = field(default_factory=list)  # decays of further averages, such as [0.999,0.9999]
    ema_every: int = 1  # steps between EMA updates
    log_steps: int = 25  # steps per log line; its loss is the mean over them
    save_steps: int = 350  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # number of newest checkpoints that stay
    keep_every: int = 0  # checkpoints whose step is a multiple of this stay too; 0: none
    deterministic: bool = False  # bitwise resume on CUDA, with a slower attention backward; on a CPU it is always bitwise
    timeout_s: int = 600  # seconds after which a step, such as one that waits for a lost rank, prints its stack and ends the run
    profile: str | None = None  # steps to trace on rank 0, such as 20-25, into <run>/profile/ for Perfetto or chrome://tracing
    max_skipped_steps: int = 5  # steps in a row with a loss or gradient that is not finite; one more ends the run
    sample_steps: int = 700  # steps between grids of EMA samples; 0: none
    wandb: str = "disabled"  # Weights & Biases: disabled | offline | online
    wandb_project: str = "fastdit"  # project of Weights & Biases
    tensorboard: bool = False  # write scalars and sample grids to <run>/tensorboard/ too

    def __post_init__(self) -> None:
        for key in (
            "total_steps", "batch_size", "accumulation", "ema_every", "log_steps", "save_steps", "keep_checkpoints", "timeout_s",
        ):  # fmt: skip
            at_least("train", self, key, 1)
        for key in (
            "seed", "lr", "eps", "weight_decay", "dense_steps", "decay_steps", "warmup_steps", "clip", "sample_steps", "keep_every",
            "max_skipped_steps",
        ):  # fmt: skip
            at_least("train", self, key, 0)
        at_most("train", self, "timeout_s", 30 * 86_400)  # 30 days: faulthandler takes no more than some centuries
        if self.init and self.resume not in ("auto", "never"):
            raise InputError(f"train.init={self.init} and train.resume={self.resume} both name a start: leave one of them out")
        one_of("train", self, "precision", ("auto", "bf16", "fp32"))
        one_of("train", self, "compile", ("auto", "graphs", "blocks", "model", "none"))
        one_of("train", self, "recompute", RECOMPUTE)
        one_of("train", self, "device", ("auto", "cpu", "cuda"))
        one_of("train", self, "optimizer", ("adamw", "muon"))
        one_of("train", self, "schedule", ("constant", "cosine"))
        one_of("train", self, "wandb", ("disabled", "offline", "online"))
        if self.decay_steps and self.schedule != "constant":
            raise InputError(f"train.decay_steps={self.decay_steps} needs train.schedule=constant: {self.schedule} falls by itself")
        if self.decay_steps and self.warmup_steps + self.decay_steps > self.total_steps:
            raise InputError(
                f"train.decay_steps={self.decay_steps} and train.warmup_steps={self.warmup_steps} must fit into "
                f"train.total_steps={self.total_steps}"
            )
        shares = {"beta1": self.beta1, "beta2": self.beta2, "ema_decay": self.ema_decay}
        for key, value in [*shares.items(), *(("ema_more", decay) for decay in self.ema_more)]:
            if not 0 <= value < 1:
                raise InputError(f"train.{key}={value} must be at least 0 and below 1")
        if self.profile is not None:
            first, dash, last = self.profile.partition("-")
            if not (dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
                raise InputError(f"train.profile={self.profile} must name steps such as 20-25")
        if self.seed >= 2**63:
            raise InputError(f"train.seed={self.seed} must be below 2^63")
        if not self.name or "/" in self.name or self.name.startswith(".") or len(os.fsencode(self.name)) > 200:
            raise InputError(f"train.name={self.name!r} must be a folder name of at most 200 bytes without '/' or a leading '.'")


@dataclass(frozen=True)
class SampleConfig:
    """Sampler of the grids during training, and default of the sample, evaluate and sweep commands."""

    steps: int = 15  # solver steps
    solver: str = "heun"  # a name of SOLVERS in sampling/solvers.py
    # w of (1+w)·v(class) − w·v(null); the scale s in papers is 1+w. Default with one class or without label dropout: 0
    guidance: float = 2.0
    guidance_low: float = 0.0  # least timestep with guidance (t = 1 is noise)
    guidance_high: float = 1.0  # greatest timestep with guidance
    path_drop_guidance: bool = False  # v(null) by the dense blocks alone, at about half of guidance's cost; needs model.path_drop
    time_shift: float = 1.0  # shift of the timesteps: above 1, more steps near noise

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise InputError(f"sample.steps={self.steps} must be between 1 and {MAX_STEPS:,}")
        if not 0 <= self.guidance <= MAX_GUIDANCE:  # NaN fails too
            raise InputError(
                f"sample.guidance={self.guidance} must be between 0 and {MAX_GUIDANCE}: images are saturated far below"
            )
        one_of("sample", self, "solver", tuple(SOLVERS))
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise InputError(
                f"sample.guidance_low={self.guidance_low} and guidance_high={self.guidance_high} must be 0 <= low <= high <= 1"
            )
        if not 1 / MAX_SHIFT <= self.time_shift <= MAX_SHIFT:
            raise InputError(f"sample.time_shift={self.time_shift} must be between {1 / MAX_SHIFT} and {MAX_SHIFT}")

    def check_path_drop(self, model: ModelConfig) -> None:
        """Raise InputError if path-drop guidance is asked of a model that was not trained for it."""
        if self.path_drop_guidance and not model.path_drop:
            raise InputError(
                "sample.path_drop_guidance=true needs a model trained with model.path_drop above 0: leave it out, or train with "
                "model.path_drop=0.1"
            )

    def asks_for_guidance(self) -> str | None:
        """Return the first setting that only guided samples have, such as "guidance=2.0", or None."""
        asked = (f"{key}={getattr(self, key)}" for key, value in UNGUIDED.items() if getattr(self, key) != value)
        return next(asked, None)


@dataclass(frozen=True)
class ValidateConfig:
    """Validation of the EMA weights during training."""

    steps: int = 0  # training steps between validations; 0: none
    images: int = 256  # held-out images for the loss, evenly spread
    source: str = "auto"  # held-out data: auto: the val split of data.source | latents of `fastdit encode --split val`
    features: str = "none"  # feature network for FID: none | digits | a TorchScript file
    reference: str | None = None  # reference for FID, as in `fastdit evaluate`; none: mnist5k with digits
    samples: int = 1000  # samples for FID, a multiple of the number of classes

    def __post_init__(self) -> None:
        for key, limit in (("steps", 0), ("images", 1), ("samples", 2)):
            at_least("validate", self, key, limit)


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed's ZeRO."""

    # what is sharded. 0: nothing, for models so small that ZeRO's hooks cost more | 1: optimizer states | 2: gradients too |
    # 3: weights too
    stage: int = 2
    bucket: int = 50_000_000  # elements per reduce or gather bucket
    offload: bool = False  # keep fp32 masters and AdamW's moments in host memory, and step them there

    def __post_init__(self) -> None:
        one_of("zero", self, "stage", ZERO_STAGES)
        at_least("zero", self, "bucket", 1)
        if self.offload and self.stage < 2:
            raise InputError("zero.offload=true needs zero.stage=2 or 3")


@dataclass(frozen=True)
class Config:
    """All settings of a run. Sections: model, data, flow, train, sample, validate, zero."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            for key, value in vars(getattr(self, section.name)).items():
                usable(f"{section.name}.{key}", value)
        if self.flow.label_dropout == 0 and (asked := self.sample.asks_for_guidance()):
            default = " (its default with model.num_classes=1)" * (self.model.num_classes == 1)
            raise InputError(
                f"sample.{asked} needs the null class, which flow.label_dropout=0{default} does not train: leave it out, or set "
                "flow.label_dropout=0.1"
            )
        if self.zero.offload and self.train.optimizer == "muon":
            raise InputError(
                "zero.offload=true does not work with train.optimizer=muon, whose matrices would be multiplied on the host: leave "
                "one of them out"
            )
        self.sample.check_path_drop(self.model)
        if self.zero.stage == 3 and self.train.compile in ("graphs", "blocks", "model"):
            raise InputError(
                f"train.compile={self.train.compile} does not work with zero.stage=3, whose hooks break graphs: use auto or none"
            )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def to_json(self, init: dict | None = None) -> str:
        """Return the settings as JSON. init: RunState.init, which stands beside them for readers."""
        return json.dumps(self.to_dict() | ({"init": init} if init else {}), indent=1)

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, which `parse` reads back to the same config."""
        import yaml  # here and in `parse`: a config made in Python needs no package

        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def checked(values: dict) -> dict[str, dict]:
    """Return nested dicts of settings whose sections, keys and values are known, of their types and usable. Raises InputError."""
    sections = typing.get_type_hints(Config)
    given: dict[str, dict] = {}
    for section, entries in values.items():
        if section not in sections:
            raise InputError(f"config section {section!r} is unknown: {nearest(str(section), list(sections))}")
        entries = {} if entries is None else entries  # all keys of the section are commented out
        if not isinstance(entries, dict):
            raise InputError(f"config section {section!r} holds {shown(entries)}, but it must hold keys with values")
        hints = typing.get_type_hints(sections[section])
        for key, value in entries.items():
            if f"{section}.{key}" in RENAMED:
                raise InputError(f"config key {section}.{key} is now called {RENAMED[f'{section}.{key}']}: use that name")
            if key not in hints:
                names = [f"{section}.{name}" for name in hints]
                raise InputError(f"config key {section}.{key} is unknown: {nearest(f'{section}.{key}', names)}")
            converted = convert(f"{section}.{key}", value, hints[key])
            usable(f"{section}.{key}", converted)
            given.setdefault(section, {})[str(key)] = converted
    preset = given.get("model", {}).get("preset", ModelConfig.preset)
    if preset not in PRESETS:
        raise InputError(f"model.preset={preset} is unknown: {nearest(preset, list(PRESETS))}")
    return given


def from_dict(values: dict) -> Config:
    """Return the Config of nested dicts, with every key and value checked. Raises InputError."""
    sections = typing.get_type_hints(Config)
    given = checked(values)
    model = given.setdefault("model", {})
    given["model"] = {**PRESETS[model.get("preset", ModelConfig.preset)], **model}
    if model.get("keep_tokens", 1.0) < 1 or model.get("path_drop"):
        given["model"].setdefault("dense_blocks", (2, 2))
    _without_null_class(given)
    return Config(**{section: sections[section](**entries) for section, entries in given.items()})


def _without_null_class(given: dict[str, dict]) -> None:
    """Set the defaults of label dropout and guidance that follow from other settings. given: values by section, changed in place.

    One class needs no guidance, so that its labels are not dropped; without dropped labels the null class is not trained.
    """
    one_class = given["model"].get("num_classes") == 1
    if one_class:
        given.setdefault("flow", {}).setdefault("label_dropout", 0.0)
    if one_class or given.get("flow", {}).get("label_dropout") == 0:
        given.setdefault("sample", {}).setdefault("guidance", 0.0)


def _is_text(section: str, key: str, value: str) -> bool:
    """Return whether an override is the text of its value, which is not read as YAML: a path may hold ': '."""
    sections = typing.get_type_hints(Config)
    hint = typing.get_type_hints(sections[section]).get(key) if section in sections else None
    return hint is str or (hint == (str | None) and value != "null")


def _without_record(values: dict) -> dict:
    """Return the sections of a saved config without RunState.init, which `Config.to_json` puts beside them."""
    is_record = isinstance(values.get("init"), dict) and "sha256" in values["init"]
    return {section: entries for section, entries in values.items() if section != "init" or not is_record}


def read_settings(path: str | Path | None = None, overrides: list[str] | None = None) -> dict:
    """Return the settings that a YAML file and `section.key=value` overrides give, as nested dicts. Raises InputError."""
    import yaml  # here and in `to_yaml`: a config made in Python needs no package

    from fastdit import yaml12

    values = {}
    if path is not None:
        try:
            loaded = yaml12.load(Path(path).read_text(encoding="utf-8"))
            values = {} if loaded is None else loaded
        except OSError as error:
            raise InputError(f"config file {path or repr('')} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
            raise InputError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise InputError(f"config file {path} must hold sections ({', '.join(Config.__dataclass_fields__)})")
    values = _without_record(values)
    for override in overrides or []:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not equals or not dot:
            raise InputError(
                f"override {override!r} must have the form section.key=value; a config file comes first and must exist"
            )
        if values.get(section) is None:
            values[section] = {}
        if not isinstance(values[section], dict):
            raise InputError(f"config section {section!r} holds {shown(values[section])}, but it must hold keys with values")
        try:
            values[section][key] = text if _is_text(section, key, text) else yaml12.load(text)
        except yaml.YAMLError as error:
            raise InputError(f"the value of override {override!r} is not valid YAML") from error
    return values


def parse(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Return the config of a YAML file, or the defaults, with `section.key=value` overrides. Raises InputError."""
    return from_dict(read_settings(path, overrides))


def from_saved(values: object) -> Config:
    """Return the Config of what a run, a checkpoint or an export saved, also under old names of keys. Raises InputError."""
    if not isinstance(values, dict):
        raise InputError(f"a saved config must hold sections ({', '.join(Config.__dataclass_fields__)}), not {shown(values)}")
    sections = {section: dict(entries) if isinstance(entries, dict) else entries for section, entries in values.items()}
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(entries := sections.get(section), dict) and key in entries:
            entries[new.partition(".")[2]] = entries.pop(key)
    if isinstance(entries := sections.get("validate"), dict) and entries.get("reference") == "":
        entries["reference"] = None  # as it was saved before
    if isinstance(entries := sections.get("flow"), dict) and entries.get("label_dropout") == 0:
        sections["sample"] = {**(sections.get("sample") or {}), **UNGUIDED}  # an untrained null class guided runs of before
    return from_dict(_without_record(sections))


def load_json(path: str | Path) -> Config:
    """Return the config in the JSON file that a run or a checkpoint saved. Raises InputError."""
    try:
        return from_saved(json.loads(Path(path).read_bytes()))
    except (OSError, ValueError, RecursionError, InputError) as error:
        raise InputError(f"saved config {path} cannot be read: {error}") from error


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments of a command that takes a config: a file and overrides, as `arguments.settings`."""
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml | section.key=value",
        help="YAML file with settings (optional, comes first), and settings that override it.",
    )  # fmt: skip


def file_and_overrides(settings: list[str]) -> tuple[str | None, list[str]]:
    """Split the `settings` of a command line into the config file, if one is given, and the overrides, for `parse`.

    The first word is the file if it holds no '=' or if there is such a file. Raises InputError if it could be both.
    """
    if not settings:
        return None, []
    first, *others = settings
    if "=" in first:
        section, _, key = first.partition("=")[0].partition(".")
        is_override = key in typing.get_type_hints(typing.get_type_hints(Config).get(section, object))
        if not os.path.isfile(first):
            return None, list(settings)
        if is_override:
            raise InputError(f"{first!r} is a setting and a file: write ./{first} for the file, or rename it")
    return first, others
