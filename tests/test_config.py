"""Config: every wrong key, type and value is one sentence that names the fix; a printed config reads back the same."""

import json

import pytest
import yaml

from fastdit import config
from fastdit.config import PRESETS, InputError, from_dict, from_saved, load_json, parse
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
        ("sample.time_shift=0", ["sample.time_shift=0.0", "above 0"]),
        ("sample.guidance_high=1.5", ["guidance_high=1.5", "low <= high <= 1"]),
        ("zero.stage=4", ["zero.stage=4", "1, 2, 3"]),
        ("model.heads=3", ["model.heads=3", "model.width=128"]),
        ("model.patch_size=5", ["model.patch_size=5", "model.input_size=32"]),
        ("model.mlp=relu", ["model.mlp=relu", "did you mean 'gelu'"]),
        ("model.norm_eps=0", ["model.norm_eps=0.0", "at least 1e-12"]),
        ("model.time_frequency=0", ["model.time_frequency=0.0", "at least 0.001"]),
        ("model.modulation_groups=9", ["model.modulation_groups=9", "model.depth=6"]),
        ("flow.label_dropout=2", ["flow.label_dropout=2.0", "between 0 and 1"]),
        ("width=3", ["width=3", "section.key=value"]),
        ("model.width", ["model.width", "section.key=value"]),
        ("model.width=[", ["not valid YAML"]),
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
        if key != "name":  # in a file YAML decides which values are text
            (tmp_path / "c.yaml").write_text(f"{section}: {{{key}: {value}}}\n")
            assert getattr(getattr(parse(tmp_path / "c.yaml"), section), key) == value


def test_empty_sections_are_sections(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\nmodel:\n  # depth: 3\n")
    assert parse(tmp_path / "c.yaml", ["train.clip=2"]).train.clip == 2


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
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_json(tmp_path / "c.json")


def test_published_hidden_rule():
    for name in ("S/2", "B/2", "L/2", "XL/2"):
        row = config.PRESETS[name]
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


def test_the_old_name_of_recompute():
    """It is an error that names the new one, but saved configs may have it."""
    with pytest.raises(InputError, match=r"train\.checkpoint is now called train\.recompute"):
        parse(None, ["train.checkpoint=light"])
    saved = parse(None, ["train.recompute=light"]).to_dict()
    saved["train"]["checkpoint"] = saved["train"].pop("recompute")
    assert from_saved(saved).train.recompute == "light"
