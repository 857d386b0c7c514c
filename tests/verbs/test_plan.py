"""The plan of a job: what it says, what it assumes, and what it refuses with the remedy."""

import pytest

from sslvit.commands import parse
from sslvit.errors import InputError
from sslvit.verbs.plan import GIB, GPUS, Hardware, describe_plan, estimate, gpu_named, refuse_what_cannot_fit
from sslvit.verbs.submit import LaunchConfig, hardware_of, submit

BASE = ["encoder.name=vit_base_patch16_224", "encoder.image_size=224", "encoder.patch_size=16", "steps=1000"]
SEEN = "data=scenes:?n=64&size=32"


def plan(*keys, tasks=8, gpu="h100", mem_gb=None):
    hardware = Hardware(tasks, min(tasks, 8), gpu, gpu is not None, 0.3, mem_gb)
    return estimate(parse(["pretrain", SEEN, *BASE, *keys]).arguments, hardware)


def test_hours_follow_from_flops():
    found = plan("batch_size=1024")
    assert found.micro == 128
    assert found.hours * 3600 * 8 * 989e12 * 0.3 == pytest.approx(found.flops)
    assert found.flops == pytest.approx(found.cost.flops_per_image * 1024 * 1000)
    assert plan("batch_size=1024", tasks=16).hours == pytest.approx(found.hours / 2)
    assert plan("batch_size=1024", gpu=None).hours is None


def test_the_words_hold_the_numbers():
    text = describe_plan(plan("batch_size=1024"))
    assert "85.8 M encoder" in text and "64 images, about 32 px" in text and "30% of the peak" in text
    assert "assumed" not in text
    unseen = Hardware(8, 8, "a100", False, 0.3, None)
    text = describe_plan(estimate(parse(["pretrain", "data=/no/where", *BASE]).arguments, unseen))
    assert "data not seen from here" in text and "assumed: say gpu:" in text


def test_what_cannot_fit_is_refused_with_a_remedy_that_fits():
    with pytest.raises(InputError, match=r"add accumulate=\d+") as caught:
        refuse_what_cannot_fit(plan("batch_size=8192"))
    remedy = str(caught.value).split("add ")[1].split(",")[0]
    refuse_what_cannot_fit(plan("batch_size=8192", remedy))
    refuse_what_cannot_fit(plan("batch_size=256"))
    with pytest.raises(InputError, match="without a single image"):
        refuse_what_cannot_fit(plan("encoder.embed_dim=4096", "encoder.num_heads=64", "encoder.depth=80", gpu="t4"))
    with pytest.raises(InputError, match="set mem_gb: "):
        refuse_what_cannot_fit(plan("batch_size=256", mem_gb=16))
    with pytest.raises(InputError, match=r"not divisible by 8 processes.*take batch_size=16"):
        plan("batch_size=9")


def test_state_is_sixteen_bytes_a_parameter_and_four_of_the_teacher():
    found = plan("batch_size=8", "precision=fp32")
    assert found.state_gib * GIB == 16 * found.cost.student + 4 * found.cost.teacher
    assert found.cost.state_bytes(bf16=True, shards=8) < found.cost.state_bytes(bf16=True) / 2


def test_a_distilled_teacher_is_in_memory_and_in_the_arithmetic():
    alone, found = plan("batch_size=64"), plan("batch_size=64", "teacher=vit_large_patch16_224")
    assert found.state_gib * GIB > alone.state_gib * GIB + 4 * found.cost.frozen > 1.2e9
    assert found.flops > 1.5 * alone.flops
    assert ", 303.3 M distilled" in describe_plan(found) and "distilled" not in describe_plan(alone)
    assert plan("batch_size=64", "teacher=/no/such/encoder") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "h100"),
        ("gpu_a100_40gb", "a100-40gb"),
        ("a100", "a100"),
        ("[h200&ib]", "h200"),
        ("zen4", None),
        (None, None),
        ("l40s", "l40s"),
        ("ml4", None),
    ],
)
def test_constraints_name_gpus(text, name):
    assert gpu_named(text) == name
    settings = LaunchConfig(cluster="slurm", gpus_per_node=2, constraint=text)
    assert hardware_of(settings).gpu == (name or "a100") and hardware_of(settings).gpu_known == (name is not None)


def test_submit_refuses_before_anything_is_queued(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.yaml").write_text("cluster: slurm\ngpus_per_node: 8\ngpu: a10\n")
    words = ["pretrain", SEEN, *BASE, "batch_size=8192"]
    for dry_run in (True, False):
        with pytest.raises(InputError, match="a10"):
            submit(words, launch="l.yaml", dry_run=dry_run)
    assert "# plan: vit_base_patch16_224" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    (tmp_path / "l.yaml").write_text("cluster: slurm\ngpu: abacus\n")
    with pytest.raises(InputError, match=r"abacus.*h100"):
        submit(words, launch="l.yaml", dry_run=True)


def test_every_gpu_is_found_by_its_name():
    assert all(gpu_named(name) == name for name in GPUS)
