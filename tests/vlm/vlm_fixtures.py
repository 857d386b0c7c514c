"""A tiny language model, tokenizer and network for the tests of this room."""

from functools import cache

import torch

from sslvit.vlm.config import LanguageConfig
from sslvit.vlm.connectors import MlpConnector
from sslvit.vlm.language import bundled_language, train_tokenizer
from sslvit.vlm.model import VisionLanguage

TEXTS = [
    "How many red circles are there? two",
    "What colour is the large star? blue",
    "Describe the image. a small red circle and a large blue star",
] * 3


@cache
def small_tokenizer():
    return train_tokenizer(TEXTS, 500)


def small_language(seed=0):
    config = LanguageConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_length=128)
    return bundled_language(small_tokenizer(), config, seed)


def small_model(vision_dim=12, seed=0, before=()):
    language = small_language(seed)
    language.lm.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in language.lm.parameters():  # larger weights than at the start, so that differences show
            torch.nn.init.normal_(parameter, std=0.2)
    return VisionLanguage(None, MlpConnector(vision_dim, 32, seed), language.lm, list(before)).eval()
