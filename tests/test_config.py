"""Config: every wrong key, type and value is one sentence that names the fix; a printed config reads back the same."""

import json

import pytest
import yaml

from fastdit import config
from fastdit.config import Config, InputError, TrainConfig, file_and_overrides, from_dict, from_saved, load_json, parse
from fastdit.presets import PRESETS
from fastdit.sampling import solvers


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.preset=S/3", ["S/3", "did you mean 'S/2'"]),
        ("modle.width=64", ["modle", "did you mean 'model'"]),
        ("train.batchsize=4", ["train.batchsize", "did you mean 'train.batch_size'"]),
        ("train.batch_size=four", ["train.batch_size='four'", "a whole number"]),
        ("train.batch_size=4.5", ["train.batch_size=4.5", "a whole number"]),
        ("train.batch_size=true", ["train.batch_size=True", "a whole number"]),
        ("train.batch_size=0", ["train.batch_size=0", "at least 1"]),
        ("train.lr=fast", ["train.lr='fast'", "a number"]),
        ("train.lr=.nan", ["train.lr=nan", "finite"]),
        ("flow.logit_mean=.inf", ["flow.logit_mean=inf", "finite"]),
        ("train.seed=9223372036854775808", ["train.seed=9223372036854775808", "below 2^63"]),
        ("data.flip=maybe", ["data.flip='maybe'", "true or false"]),
        ("train.ema_decay=1", ["train.ema_decay=1.0", "below 1"]),
        ("train.name=a/b", ["train.name='a/b'", "folder name"]),
        ("sample.solver=hune", ["sample.solver=hune", "did you mean 'heun'"]),
        ("sample.time_shift=0", ["sample.time_shift=0.0", "between 0.001 and 1000"]),
        ("sample.guidance_high=1.5", ["guidance_high=1.5", "low <= high <= 1"]),
        ("zero.stage=4", ["zero.stage=4", "1, 2, 3"]),
        ("model.heads=3", ["model.heads=3", "model.width=128"]),
        ("model.patch_size=5", ["model.patch_size=5", "model.input_size=32"]),
        ("model.mlp=relu", ["model.mlp=relu", "did you mean 'gelu'"]),
        ("model.norm_eps=0", ["model.norm_eps=0.0", "at least 1e-12"]),
        ("model.time_frequency=0", ["model.time_frequency=0.0", "at least 0.001"]),
        ("model.keep_tokens=0", ["model.keep_tokens=0.0", "above 0 and at most 1"]),
        ("model.path_drop=1", ["model.path_drop=1.0", "below 1"]),
        ("model.dense_blocks=2", ["model.dense_blocks='2'", "a list", "[2,2]"]),
        ("model.dense_blocks=[2]", ["model.dense_blocks=[2]", "two numbers"]),
        ("model.dense_blocks=[3,3]", ["model.dense_blocks=[3, 3]", "below model.depth=6"]),
        ("model.dense_blocks=[0,2]", ["model.dense_blocks=[0, 2]", "at least 1"]),
        ("sample.path_drop_guidance=true", ["sample.path_drop_guidance=true", "model.path_drop above 0"]),
        ("model.modulation_groups=9", ["model.modulation_groups=9", "model.depth=6"]),
        ("flow.label_dropout=2", ["flow.label_dropout=2.0", "below 1"]),
        ("width=3", ["width=3", "section.key=value"]),
        ("model.width", ["model.width", "section.key=value"]),
        ("model.width=[", ["not valid YAML"]),
        ("train.lr=1e999", ["train.lr=inf", "finite"]),
        ("train.lr=inf", ["train.lr='inf'", "a number"]),
        (f"train.lr={'9' * 390}", ["train.lr=inf", "finite"]),
        (f"train.total_steps={'9' * 5000}", ["train.total_steps='999", "a whole number"]),
        ("train.ema_more=[0.9, .nan]", ["train.ema_more=nan", "finite"]),
        ("train.ema_more=&a [*a]", ["train.ema_more=[[[[", "a number"]),
        (f"train.ema_more={'[' * 5000}", ["not valid YAML"]),
        ("train.total_steps=1:30", ["train.total_steps='1:30'", "a whole number"]),
        ("train.total_steps=1__000", ["train.total_steps='1__000'", "a whole number"]),
        ("train.total_steps=2147483648", ["train.total_steps=2147483648", "below 2^31"]),
        ("data.flip=no", ["data.flip='no'", "true or false"]),
        ("data.flip=on", ["data.flip='on'", "true or false"]),
        ("train.timeout_s=999999999", ["train.timeout_s=999999999", "at most 2592000"]),
        ("model.num_classes=2000000000", ["model.num_classes=2000000000", "at most 1000000"]),
        ("model.depth=100000", ["model.depth=100000", "at most 1000"]),
        ("model.width=10000000", ["model.width=10000000", "at most 65536"]),
        ("model.input_size=65536", ["model.input_size=65536", "at most 4096"]),
        ("data.image_size=100000", ["data.image_size=100000", "at most 16384"]),
        ("data.threads=100000", ["data.threads=100000", "at most 1024"]),
        *(
            (f"{key}=", [f"{key}=''", "is empty"])
            for key in (
                "data.source",
                "data.autoencoder",
                "train.out",
                "train.resume",
                "validate.source",
                "validate.features",
                "validate.reference",
                "train.wandb_project",
            )
        ),
        ("train.name=", ["train.name=''", "is empty"]),
        ("data.source= ", ["data.source=' '", "is empty"]),
        ("train.name=a\0b", ["train.name='a\\x00b'", "control character"]),
        ("data.source=a\nb", ["data.source='a\\nb'", "control character"]),
        (f"train.name={'é' * 120}", ["folder name of at most 200 bytes"]),
    ],
)
def test_wrong_override_is_one_sentence(override, words):
    with pytest.raises(InputError) as error:
        parse(None, [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "key", "values"),
    [
        ("model", "positions", ["absolute", "sincos", "rope_1d", "rope_2d"]),
        ("model", "mlp", ["swiglu", "gelu"]),
        ("model", "preset", list(PRESETS)),
        ("model", "qk_norm", ["head", "none", "full_width"]),
        ("model", "time_embedding", ["sinusoidal", "base"]),
        ("model", "attention", ["auto", "flash", "sdpa", "matmul"]),
        ("train", "precision", ["auto", "bf16", "fp32"]),
        ("train", "compile", ["auto", "graphs", "blocks", "model", "none"]),
        ("train", "recompute", list(config.RECOMPUTE)),
        ("train", "device", ["auto", "cpu", "cuda"]),
        ("train", "schedule", ["constant", "cosine"]),
        ("train", "wandb", ["disabled", "offline", "online"]),
        ("train", "name", ["007", "1.10", "on", "2026-11-23"]),
        ("sample", "solver", list(solvers.SOLVERS)),
    ],
)
def test_every_choice_can_be_given(tmp_path, section, key, values):
    for value in values:
        assert getattr(getattr(parse(None, [f"{section}.{key}={value}"]), section), key) == value
        (tmp_path / "c.yaml").write_text(f"{section}: {{{key}: {value}}}\n")
        assert getattr(getattr(parse(tmp_path / "c.yaml"), section), key) == value


def test_empty_sections_are_sections(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\nmodel:\n  # depth: 3\n")
    assert parse(tmp_path / "c.yaml", ["train.clip=2"]).train.clip == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  lr: 1\nmodel:\ntrain:\n  seed: 4", ["'train' is given twice, in lines 1 and 4"]),
        ("train:\n  lr: 1\n  lr: 2", ["'lr' is given twice, in lines 2 and 3"]),
        ('train:\n  lr: 1\n  "lr": 2', ["'lr' is given twice, in lines 2 and 3"]),
        ("train: {lr: 1, seed: 2, lr: 2}", ["'lr' is given twice, in lines 1 and 1"]),
        ("train:\n  <<: {lr: 1}\n  <<: {seed: 2}", ["'<<' is given twice, in lines 2 and 3"]),
        ("train:\n  [1]: 2", ["the key in line 2 is not text"]),
        ("train: {name: ~}", ["train.name=None must be text"]),
        ("train: {total_steps: !!int x}", ["not valid YAML"]),
        ("train: {total_steps: 2026-11-23}", ["train.total_steps='2026-11-23' must be a whole number"]),
        ("a: &a [1]\ntrain: {lr: *a}", ["config section 'a' is unknown"]),
        ('train: {name: "a\\0b"}', ["control character"]),
        ("train: {name: a}\n---\ntrain: {name: b}", ["not valid YAML"]),
        ("0: 3", ["config section '0' is unknown"]),
    ],
)
def test_a_file_that_means_two_things_or_nothing_is_one_sentence(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        parse(tmp_path / "c.yaml")
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.seed", "010", 10),
        ("train.seed", "007", 7),
        ("train.seed", "0o17", 15),
        ("train.seed", "400_000", 400_000),
        ("train.name", "400_000", "400_000"),
        ("train.seed", "0x1f", 31),
        ("train.seed", "+5", 5),
        ("train.lr", "1e-4", 1e-4),
        ("train.lr", ".5", 0.5),
        ("train.lr", "1.", 1.0),
        ("train.lr", "1", 1.0),
        ("data.flip", "True", True),
        ("data.threads", "~", None),
        ("train.profile", "20-25", "20-25"),
        ("train.profile", "null", None),
        ("train.ema_more", "[0.5, 1e-1]", [0.5, 0.1]),
        *(
            ("train.name", text, text)
            for text in ("no", "yes", "on", "007", "010", "1:30", "0o17", "1e-4", "2026-11-23", "true", "1.10")
        ),
    ],
)
def test_scalars_are_yaml_1_2(tmp_path, key, text, value):
    """In a file and in an override alike; https://yaml.org/spec/1.2.2/#103-core-schema has the table."""
    section, name = key.split(".")
    (tmp_path / "c.yaml").write_text(f"{section}: {{{name}: {text}}}\n")
    for config_ in (parse(tmp_path / "c.yaml"), parse(None, [f"{key}={text}"])):
        read = getattr(getattr(config_, section), name)
        assert read == value and type(read) is type(value)


def test_anchors_and_merge_keys_work(tmp_path):
    (tmp_path / "c.yaml").write_text("train: &t\n  lr: 1e-3\n  seed: 3\nvalidate: {steps: &n 5}\nsample: {steps: *n}\n")
    assert (parse(tmp_path / "c.yaml").sample.steps, parse(tmp_path / "c.yaml").train.seed) == (5, 3)
    (tmp_path / "c.yaml").write_text("train: {<<: {lr: 2, seed: 3}, lr: 1}\n")
    assert (parse(tmp_path / "c.yaml").train.lr, parse(tmp_path / "c.yaml").train.seed) == (1.0, 3)


def test_values_of_the_python_api_are_checked_too():
    with pytest.raises(InputError, match=r"train\.lr=inf must be finite"):
        Config(train=TrainConfig(lr=float("inf")))


def test_a_home_folder_is_expanded(monkeypatch):
    """A shell leaves the ~ of train.out=~/runs alone."""
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(None, ["train.out=~/runs", "data.source=~x"]).train.out == "/home/me/runs"


def test_a_path_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir=x").mkdir()
    (tmp_path / "dir=x/c.yaml").write_text("")
    (tmp_path / "train.lr=1").write_text("")
    assert file_and_overrides(["dir=x/c.yaml", "train.lr=1"]) == ("dir=x/c.yaml", ["train.lr=1"])
    assert file_and_overrides(["./train.lr=1"]) == ("./train.lr=1", [])
    assert file_and_overrides(["train.lr=2"]) == (None, ["train.lr=2"])
    with pytest.raises(InputError, match=r"'train\.lr=1' is a setting and a file: write \./train\.lr=1"):
        file_and_overrides(["train.lr=1"])
    with pytest.raises(InputError, match=r"'dir=y/c\.yaml' must have the form .* must exist"):
        parse(*file_and_overrides(["dir=y/c.yaml"]))
    assert parse(None, ["data.source=/a=b: c #d"]).data.source == "/a=b: c #d"


@pytest.mark.parametrize("saved", [[], "text", {"train": [1]}, {"train": {"checkpoint": 3}}, {"model": None, "zero": "x"}])
def test_a_saved_config_of_another_shape_is_one_sentence(tmp_path, saved):
    (tmp_path / "c.json").write_text(json.dumps(saved))
    with pytest.raises(InputError) as error:
        load_json(tmp_path / "c.json")
    assert "\n" not in str(error.value) and str(tmp_path / "c.json") in str(error.value)


@pytest.mark.parametrize("steps", ["20", "5-3", "0-2", "a-b", "-3"])
def test_profile_names_steps(steps):
    with pytest.raises(InputError, match=r"train\.profile=.* must name steps such as 20-25"):
        parse(None, [f"train.profile={steps}"])


@pytest.mark.parametrize("value", ["graphs", "blocks", "model"])
def test_compiling_and_zero_3_exclude_each_other(value):
    with pytest.raises(InputError, match=r"zero\.stage=3"):
        parse(None, [f"train.compile={value}", "zero.stage=3"])


@pytest.mark.parametrize("text", ["- a\n- b", "model: 3", "model: {width: 64", "train: {lr: [1]}"])
def test_wrong_file(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse(file)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml cannot be read: No such file"):
        parse(tmp_path / "none.yaml")


def test_later_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {preset: S/2, depth: 3}\ntrain: {lr: 1e-3}\n")
    c = parse(file, ["model.depth=5", "train.clip=2"])
    assert (c.model.width, c.model.depth, c.train.lr, c.train.clip) == (384, 5, 1e-3, 2.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_printed_config_reads_back(tmp_path, preset):
    c = parse(None, [f"model.preset={preset}", "model.in_channels=4", "data.flip=true"])
    assert from_dict(yaml.safe_load(c.to_yaml())) == c
    (tmp_path / "c.json").write_text(c.to_json())
    assert load_json(tmp_path / "c.json") == c


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        from_dict({}).train.lr = 3


def test_load_json_of_garbage(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"model": {"wdith": 3}}))
    with pytest.raises(InputError, match=r"model\.width"):
        load_json(tmp_path / "c.json")
    for data in (b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "c.json").write_bytes(data)
        with pytest.raises(InputError, match="cannot be read"):
            load_json(tmp_path / "c.json")


def test_published_hidden_rule():
    for name in ("S/2", "B/2", "L/2", "XL/2"):
        row = PRESETS[name]
        assert row["hidden"] == max(128, round(row["width"] * 8 / 3 / 128) * 128)
        assert row["width"] == 64 * row["heads"]


def test_the_published_sit_models():
    """arXiv:2401.08740, table 1: DiT's widths, depths and heads, and an MLP of four times the width."""
    for name in ("S/2", "B/2", "L/2", "XL/2"):
        sit, ours = (from_dict({"model": {"preset": preset}}).model for preset in (f"sit-{name}", name))
        assert (sit.width, sit.depth, sit.patch_size, sit.hidden) == (ours.width, ours.depth, 2, 4 * ours.width)
        assert sit.heads == {"S/2": 6, "B/2": 12, "L/2": 16, "XL/2": 16}[name]
        assert (sit.mlp, sit.linear_bias, sit.norm_eps, sit.time_frequency) == ("gelu", True, 1e-6, 1.0)
        assert (ours.mlp, ours.linear_bias, ours.norm_eps, ours.time_frequency) == ("swiglu", False, 1e-5, 30.0)


def test_saved_configs_from_before_the_switches_of_sit():
    saved = parse(None, ["model.preset=S/2"]).to_dict()
    for key in ("mlp", "linear_bias", "norm_eps", "time_frequency"):
        del saved["model"][key]
    assert from_saved(saved) == parse(None, ["model.preset=S/2"])


def test_dense_blocks_have_a_default_if_something_needs_them():
    assert parse().model.dense_blocks is None
    for override in ("model.keep_tokens=0.25", "model.path_drop=0.1"):
        assert parse(None, [override]).model.dense_blocks == (2, 2)
    given = parse(None, ["model.keep_tokens=0.3", "model.dense_blocks=[1,3]"])
    assert given.model.dense_blocks == (1, 3) and (given.model.tokens, given.model.kept_tokens) == (64, 19)
    assert given.model.block_tokens == 4 * 64 + 2 * 19 and parse().model.block_tokens == 6 * 64
    assert from_saved(json.loads(given.to_json())) == given == from_dict(yaml.safe_load(given.to_yaml()))
    assert hash(given.model) != hash(parse().model)
    with pytest.raises(InputError, match=r"keep_tokens=0\.5 needs model\.dense_blocks"):
        config.ModelConfig(keep_tokens=0.5)


def test_the_old_name_of_recompute():
    """It is an error that names the new one, but saved configs may have it."""
    with pytest.raises(InputError, match=r"train\.checkpoint is now called train\.recompute"):
        parse(None, ["train.checkpoint=light"])
    saved = parse(None, ["train.recompute=light"]).to_dict()
    saved["train"]["checkpoint"] = saved["train"].pop("recompute")
    saved["validate"]["reference"] = ""
    assert from_saved(saved).train.recompute == "light" and from_saved(saved).validate.reference is None


def test_guidance_needs_label_dropout():
    """Without it, and with one class, guidance is off unless it is given, and then it is refused; saved runs still open."""
    for overrides in (["flow.label_dropout=0"], ["model.num_classes=1"], ["model.num_classes=1", "flow.label_dropout=0.1"]):
        assert parse(None, overrides).sample.guidance == 0
    assert parse(None, ["model.num_classes=1"]).flow.label_dropout == 0
    guided = parse(None, ["model.num_classes=1", "flow.label_dropout=0.2", "sample.guidance=1"])
    assert (guided.flow.label_dropout, guided.sample.guidance) == (0.2, 1)
    assert parse(None, []).sample.guidance == 2
    for off in ("flow.label_dropout=0", "model.num_classes=1"):
        for asked in ("sample.guidance=2.0", "sample.guidance_low=0.3", "sample.guidance_high=0.7"):
            with pytest.raises(InputError, match=f"{asked} needs the null class, which flow.label_dropout=0"):
                parse(None, [off, asked])
    saved = parse(None, []).to_dict()
    saved["flow"]["label_dropout"] = 0.0
    saved["sample"]["guidance_low"] = 0.3
    assert config.from_saved(saved).sample.asks_for_guidance() is None
    written = parse(None, ["model.num_classes=1"])
    assert config.from_dict(written.to_dict()) == written


@pytest.mark.parametrize("override", ["sample.guidance=1e30", "sample.guidance=101", "sample.steps=10001", "sample.time_shift=1e9"])
def test_sampler_settings_have_sane_limits(override):
    with pytest.raises(InputError, match="must be between"):
        parse(None, [override])
