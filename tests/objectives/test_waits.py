"""What a step asks of the device on the host's behalf: nothing but whether it was finite. Waiting would idle a GPU."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslvit.config import PretrainConfig
from sslvit.data.loader import Views
from sslvit.data.photometry import IDENTITY
from sslvit.distributed import copied_to
from sslvit.encoder.config import Preprocessing
from sslvit.objectives.config import DinoConfig, IbotConfig, KoleoConfig, MaeConfig
from sslvit.objectives.passes import Masking
from sslvit.objectives.pretraining import Pretraining
from sslvit.objectives.recipe import DataFacts, resolve
from sslvit.optim import adamw, clip_grad_norm_, param_groups, step_unless

HEAD = {"num_prototypes": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
aten = torch.ops.aten
ANSWERS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class Asked(TorchDispatchMode):
    """Notes operations whose result, or its shape, the host must read before it can go on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves(args)
        by_mask = "index" in func.name() and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in flat)
        if func in ANSWERS or by_mask:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def module_and_views(centering, batch=6):
    torch.manual_seed(0)
    sections = {"dino": DinoConfig(**HEAD, centering=centering), "ibot": IbotConfig(**HEAD, centering=centering)}
    sections |= {"koleo": KoleoConfig(), "mae": MaeConfig(decoder_dim=16, decoder_depth=1, decoder_num_heads=1)}
    config = PretrainConfig(data="x", steps=20, batch_size=batch, precision="fp32", compile=False, **sections)
    config.encoder = dataclasses.replace(config.encoder, name="vit_tiny_patch16_224", image_size=32, patch_size=8)
    config.encoder.embed_dim, config.encoder.depth, config.encoder.num_heads = 16, 1, 2
    config.crops.num_local, config.crops.local_size = 2, 16
    config = resolve(config, DataFacts(1000, 32, 3, "cpu"))[0]
    crops = [torch.randint(0, 256, (2, batch, 3, side, side), dtype=torch.uint8) for side in (32, 16)]
    rows = [torch.tensor(IDENTITY).expand(2, batch, -1).clone() for _ in crops]
    return Pretraining(config, Preprocessing(32)).train(), Views(*crops, *rows, torch.arange(batch), torch.zeros(batch))


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_objectives_ask_for_nothing(centering):
    """Colours and masks are drawn on the CPU and may; from there on to the gradients nothing does."""
    module, views = module_and_views(centering)
    coloured, wanted = module._colour(views), module._wanted(views, 3, torch.device("cpu"))
    module._colour, module._wanted = lambda views: coloured, lambda *words: wanted
    with Asked() as asked:
        loss, _ = module(views, 3)
        loss.backward()
        module.before_update(3)
        module.after_step(3)
    assert asked.found == []
    with Asked() as asked:
        coloured["global"][coloured["global"] > 0].sum().item()
    assert len(asked.found) >= 2, "the watch itself sees both kinds"


def test_places_are_those_of_the_mask():
    mask = torch.rand(5, 7) < 0.4
    made = Masking.replacing("block", mask)
    values, weights = torch.randn(5, 7, 3), torch.randn(int(mask.sum()), 3)
    assert torch.equal(values[made.places], values[mask]) and torch.equal(made.mask, mask)
    gradients = []
    for index in (made.places, mask):
        leaf = values.clone().requires_grad_()
        (leaf[index] * weights).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients), "to the bit"
    nothing = Masking.replacing("block", torch.zeros(5, 7, dtype=torch.bool))
    assert values[nothing.places].shape == (0, 3)


def test_copies_to_a_gpu_come_from_pinned_memory():
    told = []

    class Small:
        is_cuda = False

        def pin_memory(self):
            told.append("pinned")
            return self

        def to(self, *words, **keys):
            told.append((*words, keys))
            return self

    copied_to(Small(), "cpu")
    copied_to(Small(), torch.device("cuda", 1))
    assert told == [("cpu", {}), "pinned", (torch.device("cuda", 1), {"non_blocking": True})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_whole_step_never_waits_for_a_gpu(centering):
    """Up to the one look at whether it was finite, which `train` takes."""
    module, views = module_and_views(centering)
    module.to("cuda")
    views = dataclasses.replace(
        views, global_crops=views.global_crops.pin_memory(), local_crops=views.local_crops.pin_memory()
    )
    optimizer = adamw(param_groups(module, 0.04, encoder_prefix="student."), lr=1e-4)

    def step(number):
        optimizer.zero_grad(set_to_none=True)
        loss, _ = module(views.to("cuda"), number)
        loss.backward()
        module.before_update(number)
        norm = clip_grad_norm_(module.parameters(), 3.0)
        step_unless(optimizer, (~torch.isfinite(norm)).float())
        module.after_step(number)

    step(0)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
