"""Pre-train the small base model that ships inside the package.

    python scripts/pretrain_base.py --output FOLDER [--steps N]

Everything is made here from a seed: the documents (see ``corpus/``), the tokenizer, the
weights and the card.  A run of a few steps is a smoke test; the shipped base took the
default number of steps.  There are two stages, each with its own mixture of documents and
fresh optimizers; ``--second-stage-of FOLDER`` takes up the first one's result.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from corpus.documents import FIRST, SECOND, Mixture, documents

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048
CONTEXT = 512
TOKENS_PER_STEP = 2048
# Attention is half the cost at full length, so most steps see a quarter of it.
SHORT, SHORT_SHARE = CONTEXT // 4, 0.85
TRAIN_SEED, HELD_OUT_SEED, WEIGHT_SEED, SECOND_SEED = 1, 2, 3, 4
FIRST_PEAK, SECOND_PEAK = 3e-3, 1.5e-3
SECOND_SHARE = 0.2
"""Steps of the second stage for each step of the first."""

# Lower-case words carry their leading space; capitalised words, digits and signs do not.
# So a name or a number has the same tokens after a space, a quote or a bracket, and
# copying it from one layout into another is plain copying.
PIECES = r" ?\p{Ll}+|\p{Lu}+(?!\p{Ll})|\p{Lu}\p{Ll}*|\p{N}| ?[^\s\p{L}\p{N}]|\n| +"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_tokenizer(sample: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that gives every text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


def packed_tokens(
    tokenizer: PreTrainedTokenizerFast, seed: int, count: int, mixture: Mixture = FIRST
) -> Tensor:
    """``count`` tokens of documents on end, each between its start and end token."""
    stream, ids = documents(seed, mixture), []
    end = tokenizer.eos_token_id
    while len(ids) < count:
        for encoded in tokenizer(list(islice(stream, 2000)))["input_ids"]:
            ids += [*encoded, end]
    # int16 keeps the whole corpus small; the vocabulary fits.
    return torch.tensor(ids[:count], dtype=torch.int16)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about two million parameters."""
    torch.manual_seed(WEIGHT_SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches_of(data: Tensor) -> Iterator[Tensor]:
    """Every token once, as batches of short rows first and of full-length rows at the end."""
    for step, part in enumerate(data.split(TOKENS_PER_STEP)):
        length = SHORT if step < SHORT_SHARE * len(data) / TOKENS_PER_STEP else CONTEXT
        yield part.view(-1, length).long()


def loss_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean next-token loss; matrix products in bfloat16, the softmax in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def make_optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, steps: int) -> float:
    """Warm up over 50 steps, hold, and come down to zero over the last 40 %."""
    remaining = (steps - step) / max(1.0, 0.4 * steps)
    return min((step + 1) / 50, 1.0, remaining)


def train(model: LlamaForCausalLM, data: Tensor, peak: float) -> float:
    """One pass over ``data`` at a peak learning rate; the mean loss of the last steps."""
    optimizers = make_optimizers(model, peak)
    steps = len(data) // TOKENS_PER_STEP
    recent: list[float] = []
    started = time.perf_counter()
    for step, rows in enumerate(batches_of(data)):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = peak * schedule(step, steps)
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
        if step % 100 == 0 or step + 1 == steps:
            speed = (step + 1) * TOKENS_PER_STEP / (time.perf_counter() - started)
            print(
                f"step {step} loss {sum(recent) / len(recent):.4f} {speed:.0f} tokens/s", flush=True
            )
    return sum(recent) / len(recent)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, data: Tensor) -> float:
    """The loss on documents from another seed."""
    losses = [loss_of(model, rows).item() for rows in batches_of(data)]
    return sum(losses) / len(losses)


def write_card(folder: Path, facts: dict[str, str]) -> None:
    """The model card, from the template beside this script and the facts of this run."""
    template = Path(__file__).with_name("corpus").joinpath("card.md").read_text(encoding="utf-8")
    for name, value in facts.items():
        template = template.replace("{" + name + "}", value)
    (folder / "README.md").write_text(template, encoding="utf-8")


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model and its tokenizer as any Hugging Face library expects them."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The template belongs in tokenizer_config.json, where every version looks for it.
    extra = folder / "chat_template.jinja"
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings["chat_template"] = CHAT_TEMPLATE
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    extra.unlink(missing_ok=True)


def main() -> None:
    """Read the options, train and write the folder."""
    parser = argparse.ArgumentParser(description="Pre-train the embedded base model.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000, help="training steps (few: smoke test)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--second-stage-of", type=Path, help="result of the first stage")
    parser.add_argument("--first-stage-only", action="store_true", help="stop after it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    second = 0 if options.first_stage_only else max(1, int(SECOND_SHARE * options.steps))
    if options.second_stage_of is None:
        tokenizer = build_tokenizer(islice(documents(TRAIN_SEED), 40_000))
        model = new_model(tokenizer)
        data = packed_tokens(tokenizer, TRAIN_SEED, options.steps * TOKENS_PER_STEP)
        print(f"{model.num_parameters()} parameters, {data.numel()} tokens", flush=True)
        train_loss = train(model, data, FIRST_PEAK)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.second_stage_of)
        model = LlamaForCausalLM.from_pretrained(options.second_stage_of)
    if second:
        data = packed_tokens(tokenizer, SECOND_SEED, second * TOKENS_PER_STEP, SECOND)
        train_loss = train(model, data, SECOND_PEAK)
    held_out = packed_tokens(tokenizer, HELD_OUT_SEED, 50 * TOKENS_PER_STEP)
    unseen_loss = held_out_loss(model, held_out)
    minutes = (time.perf_counter() - started) / 60
    save(options.output, model, tokenizer)
    facts = {
        "parameters": f"{model.num_parameters():,}",
        "steps": f"{options.steps:,}",
        "second": f"{second:,}",
        "tokens": f"{(options.steps + second) * TOKENS_PER_STEP / 1e6:.1f} million",
        "train_loss": f"{train_loss:.3f}",
        "held_out_loss": f"{unseen_loss:.3f}",
        "perplexity": f"{math.exp(unseen_loss):.2f}",
        "minutes": f"{minutes:.0f}",
        "threads": str(options.threads),
        "command": f"python scripts/pretrain_base.py --output FOLDER --steps {options.steps}",
    }
    write_card(options.output, facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
