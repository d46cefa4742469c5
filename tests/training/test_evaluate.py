from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from sidepath.data.dataset import load_data
from sidepath.errors import DataError
from sidepath.training.evaluate import evaluate, generate, generated
from sidepath.training.loss import batch_loss
from tests.training.kit import batch_of, bert, llama, with_lora


def slow_greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """One prompt, one token at a time, no cache, no padding."""
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True))


def test_generation_is_greedy_decoding(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert tokenizer.pad_token_id is None
    model = with_lora(llama())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.generation_config.temperature = 0.7
    prompts = ["ab", "a much longer prompt than that", "x", "ab"]
    with caplog.at_level(logging.WARNING):
        outputs = generate(model.train(), tokenizer, prompts, max_new_tokens=9, batch_size=3)
    assert model.training
    assert not caplog.records
    assert model.generation_config.temperature == 0.7
    model.eval()
    assert outputs == [slow_greedy(model, tokenizer, prompt, 9) for prompt in prompts]
    assert len(set(outputs)) == 3
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert generate(model, tokenizer, ids, max_new_tokens=9) == outputs


def test_the_end_token_stops_a_row(tokenizer: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
    # All logits equal: the first id wins, which is the begin token; it is not shown.
    assert generate(model, tokenizer, ["ab"], max_new_tokens=3) == [""]


def test_sampling_repeats_with_its_seed_and_leaves_the_callers_state(tokenizer: Any) -> None:
    model = llama()
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}
    one = generate(model, tokenizer, ["ab"], seed=1, **options)
    assert torch.equal(torch.rand(2), expected)
    assert one == generate(model, tokenizer, ["ab"], seed=1, **options)
    assert one != generate(model, tokenizer, ["ab"], seed=2, **options)


def test_prompts_that_do_not_fit_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="1 prompts, the first is number 2"):
        generate(llama(context=16), tokenizer, ["a", "a" * 12], max_new_tokens=8)
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="no tokens"):
        generate(llama(), tokenizer, [""])


def test_loss_is_a_mean_over_targets_whatever_the_batches(tokenizer: Any, pairs: Any) -> None:
    model = llama()
    data = load_data(pairs, tokenizer)
    batch = batch_of(data, range(len(data)))
    expected = batch_loss(model, batch).item() / batch.weight
    for batch_size in (1, 5, 24):
        result = evaluate(model, data, metrics=("loss", "perplexity"), batch_size=batch_size)
        assert list(result) == ["loss", "perplexity"]
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_rows_of_one_prompt_are_references_of_one_output(tokenizer: Any) -> None:
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in (("a", "one"), ("b", "two"), ("a", "three"))
    ]
    data = load_data(rows, tokenizer)
    outputs, references = generated(llama(), data, max_new_tokens=4)
    assert references == [["one", "three"], ["two"]]
    assert len(outputs) == 2
    result = evaluate(llama(), data, max_new_tokens=4)
    assert list(result) == ["loss", "perplexity", "exact_match", "bleu", "rouge_l"]
    assert 0 <= result["exact_match"] <= 1


def test_classification_metrics(tokenizer: Any) -> None:
    model = bert(labels=2)
    rows = [{"text": chr(97 + at) * (at + 1), "label": at % 2} for at in range(9)]
    data = load_data(rows, tokenizer)
    result = evaluate(model, data, batch_size=2)
    hits = 0
    for example in data.examples:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.ids_T)[None]).logits
        hits += int(logits.argmax()) == example.label
    assert list(result) == ["loss", "accuracy", "matthews"]
    assert result["accuracy"] == pytest.approx(hits / 9)


def test_metrics_the_data_do_not_have(tokenizer: Any) -> None:
    data = load_data([{"text": "abc"}], tokenizer)
    assert list(evaluate(llama(), data)) == ["loss", "perplexity"]
    with pytest.raises(DataError, match="no such metric"):
        evaluate(llama(), data, metrics=("bleu",))
    with pytest.raises(DataError, match='did you mean "perplexity"'):
        evaluate(llama(), data, metrics=("perplexty",))


@pytest.mark.shared
def test_stories_writes_its_known_text(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    expected = slow_greedy(model, tokenizer, "Once upon a time", 20)
    outputs = generate(model, tokenizer, ["Once upon a time", "Tom"], max_new_tokens=20)
    assert outputs[0] == expected
    assert "little" in expected
