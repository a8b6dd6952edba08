"""SmolLM2-135M and WikiText-2: what the numbers of the pages stand on."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from prunetool import corpus
from prunetool.model import open_model
from prunetool.steps.evaluate import mean_loss
from prunetool.text import Column, read_text
from tests.llama.test_forward import logits


def ids_of(path, model):
    return np.concatenate(list(corpus.tokenize(read_text([path], Column()), model)))


@pytest.fixture(scope="module")
def tokens(smollm2, wikitext):
    ids = ids_of(wikitext / "wiki.test.raw", smollm2)
    assert len(ids) == 303_415
    return ids[:1024].reshape(2, 512)


@pytest.fixture(scope="module")
def judge(smollm2):
    return LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def test_the_validation_split_has_as_many_tokens_as_the_original_tokenizer_gives(smollm2, wikitext):
    assert len(ids_of(wikitext / "wiki.valid.raw", smollm2)) == 266_981


def test_logits_are_within_1e_3_of_transformers(smollm2, tokens, judge):
    with torch.no_grad():
        expected = judge(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    error = np.abs(logits(open_model(str(smollm2)), tokens) - expected).max()
    print(f"largest difference of {expected.size:,} logits: {error:.2e}")
    assert error < 1e-3


def test_perplexity_is_that_of_transformers(smollm2, tokens, judge):
    ids = torch.tensor(tokens.astype(np.int64))
    with torch.no_grad():
        expected = judge(ids, labels=ids).loss.item()
    ours = mean_loss(open_model(str(smollm2)), tokens, "float32")
    assert math.exp(ours) == pytest.approx(math.exp(expected), rel=1e-4)
