"""One tiny aligned run, made once a session and shared by the tests of align, ask, serve and the LLaVA folder."""

import functools
from pathlib import Path

from sslvit.verbs.align import align

ENCODER = (
    "vit_tiny_patch16_224?pretrained=false&seed=3&img_size=32&patch_size=8&embed_dim=32&depth=2&num_heads=2"
    "&no_embed_class=true&init_values=0.1"
)
REGISTERS = f"{ENCODER}&reg_tokens=2"
SIGLIP = f"{ENCODER}&reg_tokens=0&class_token=false&global_pool=avg&fc_norm=false&act_layer=gelu_tanh"
DATA = "scenes:?n=40&size=32"
LANGUAGE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_length": 128}


def stage(steps, **rates):
    return {"steps": steps, "batch_size": 4, "num_turns": 3, **rates}


def settings(**changes):
    """Keys of a tiny align; the encoder learns a little in the last stage."""
    return {
        "encoder": REGISTERS,
        "data": DATA,
        "language": LANGUAGE,
        "text": stage(6),
        "connector": stage(4),
        "instruct": stage(6, encoder_lr=1e-4),
        "num_val_images": 6,
        "precision": "fp32",
        "device": "cpu",
        **changes,
    }


@functools.cache
def tiny_run(root: Path) -> Path:
    """A finished run with all its controls, in `root` (the session's temporary folder)."""
    return align(output_dir=root / "tiny_vlm", **settings())


def session_root(tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp()
