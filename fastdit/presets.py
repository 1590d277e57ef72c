"""The presets of `model.preset`: rows of values for ModelConfig. Imports nothing, so that anything may read it."""

SIT: dict = dict(  # what the published SiT models (arXiv:2401.08740) have in common
    positions="sincos", qk_norm="none", mlp="gelu", linear_bias=True, norm_eps=1e-6, time_frequency=1.0
)

# hidden = 8/3·width rounded to a multiple of 128, so that parameters and FLOPs match DiT's published 33/130/458/675 M. base/2 is
# the published base model, sit-* are the published SiT models, nano/4 is for the built-in digits, test/4 for tests.
PRESETS: dict[str, dict] = {
    #           width  depth  heads  hidden  patch
    "XL/2": dict(width=1152, depth=28, heads=18, hidden=3072, patch_size=2),
    "L/2":  dict(width=1024, depth=24, heads=16, hidden=2688, patch_size=2),
    "B/2":  dict(width=768,  depth=12, heads=12, hidden=2048, patch_size=2),
    "S/2":  dict(width=384,  depth=12, heads=6,  hidden=1024, patch_size=2),
    "nano/4": dict(width=128, depth=6, heads=2,  hidden=384,  patch_size=4, positions="absolute"),
    "test/4": dict(width=64,  depth=2, heads=2,  hidden=128,  patch_size=4, positions="absolute"),
    "base/2": dict(width=1088, depth=17, heads=17, hidden=4352, patch_size=2, class_width=2048, positions="rope_1d",
                   time_embedding="base", zero_init_gates=False),
    "sit-XL/2": dict(width=1152, depth=28, heads=16, hidden=4608, patch_size=2, **SIT),
    "sit-L/2":  dict(width=1024, depth=24, heads=16, hidden=4096, patch_size=2, **SIT),
    "sit-B/2":  dict(width=768,  depth=12, heads=12, hidden=3072, patch_size=2, **SIT),
    "sit-S/2":  dict(width=384,  depth=12, heads=6,  hidden=1536, patch_size=2, **SIT),
}  # fmt: skip
