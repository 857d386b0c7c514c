"""Open a vision-language folder with transformers alone and run it: the other side of `folder.py`'s comparison.

`python -m sslvit.vlm.reopen JOB.json` knows nothing of what should come out. No code of ours takes part in opening or
running, so that what it computes is what any user of the folder gets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor


def main(job_file: Path) -> None:
    """What the model sees and says of the job's questions to OUTPUT.safetensors, facts to OUTPUT.json."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    job = json.loads(job_file.read_text(encoding="utf-8"))
    pictures = load_file(job["pictures"])
    processor = transformers.AutoProcessor.from_pretrained(job["folder"])
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        job["folder"], dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    images = [picture_of(pictures[str(i)]) for i in range(len(job["questions"]))]
    prompts = {form: [prompt_of(processor, question, form) for question in job["questions"]] for form in FORMS}
    with torch.no_grad():
        alone = [inputs_of(processor, [image], [text]) for image, text in zip(images, prompts["list"], strict=True)]
        said: dict[str, Tensor] = {}
        for i, (inputs, answer) in enumerate(zip(alone, job["answers"], strict=True)):
            pixels = inputs["pixel_values"]
            said[f"{i}.pixels"] = pixels[0].contiguous()
            seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
            said[f"{i}.tokens"] = seen[0].contiguous()
            said[f"{i}.answer"] = _log_probabilities(model, inputs, answer)
        batch = model(**inputs_of(processor, images, prompts["list"])).logits[:, -1].float().log_softmax(-1)
        single = torch.stack([model(**inputs).logits[0, -1].float().log_softmax(-1) for inputs in alone])
    save_file(said, job["output"] + ".safetensors")
    wrong = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    facts = {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "wrong_keys": sorted(map(str, wrong)),
        "same_prompts": prompts["string"] == prompts["list"],
        "padded_batch": float((batch - single).abs().max()),
    }
    Path(job["output"] + ".json").write_text(json.dumps(facts), encoding="utf-8")


FORMS = ("string", "list")  # how a message's content may be written


def prompt_of(processor: Any, question: str, form: str) -> str:
    """A question about one image through the chat template, its content a plain string or a list of parts."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    content = f"<image>\n{question}" if form == "string" else parts
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def picture_of(pixels: Tensor) -> Image.Image:
    """uint8 (H, W, C) as an image."""
    return Image.fromarray(pixels.squeeze(-1).numpy())


def inputs_of(processor: Any, images: list[Image.Image], prompts: list[str]) -> dict[str, Tensor]:
    """Model inputs, padded as the tokenizer's own config says; the images have their size already."""
    as_they_are = {"do_resize": False, "do_center_crop": False}
    return dict(processor(images=images, text=prompts, return_tensors="pt", padding=True, **as_they_are))


def _log_probabilities(model: Any, inputs: dict[str, Tensor], answer: list[int]) -> Tensor:
    """(S + 1, V): of each token of the answer, S long, and of what follows it."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.int64)], dim=1)
    out = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return out.logits[0, -len(answer) - 1 :].float().log_softmax(-1).contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
