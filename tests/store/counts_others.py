"""The counts that other papers and PEFT's own comparison print."""

from __future__ import annotations

from tests.store.counting import (
    BITFIT,
    EXACT,
    FAIL,
    FULL,
    TRUNC,
    adapters,
    lora,
    prefix,
    prompt,
    row,
    whole,
)

L3B, L8B = "llama-3.2-3b", "llama-3.1-8b"
REGRET, PEFT = "LoRA Without Regret", "PEFT MetaMathQA"
QV, ALL, ATT, OUT = ("q_proj", "v_proj"), "all-linear", "attention", "lm_head"
DORA_T1 = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
HOULSBY_64 = adapters("houlsby", 64, "output.LayerNorm")
ROWS = [
    row(
        "VeRA T4",
        "llama-7b",
        "LoRA r=64 all 7 linears",
        "159.9 M",
        159_907_840,
        EXACT,
        lora(64, ALL),
    ),
    row(
        "VeRA T4",
        "llama-13b",
        "LoRA r=64 all 7 linears",
        "250.3 M",
        250_347_520,
        EXACT,
        lora(64, ALL),
    ),
    row("DoRA T1", "llama-7b", "LoRA r=32", "0.83 %", 832_522, EXACT, lora(32, *DORA_T1)),
    row(
        "DoRA T1", "llama-7b", "DoRA r=32", "0.84 %", 845_531, TRUNC, lora(32, *DORA_T1, dora=True)
    ),
    row(
        "DoRA T1",
        "llama-7b",
        "DoRA r=32",
        "0.84 % of all",
        838_441,
        EXACT,
        lora(32, *DORA_T1, dora=True),
    ),
    row("DoRA T1", "llama-7b", "LoRA r=32", "0.83 % of all", 825_649, EXACT, lora(32, *DORA_T1)),
    row(
        "DoRA T1",
        "llama-7b",
        "DoRA r=16",
        "0.43 % of all",
        427_434,
        EXACT,
        lora(16, *DORA_T1, dora=True),
    ),
    row(REGRET, L8B, "mlp r=256 (blocks only)", "0.49 B", 452_984_832, FAIL, lora(256, "mlp")),
    row(
        REGRET, L8B, "mlp r=256 + unembedding", "0.49 B", 486_866_944, EXACT, lora(256, "mlp", OUT)
    ),
    row(REGRET, L8B, "attn r=256 (blocks only)", "0.25 B", 218_103_808, FAIL, lora(256, ATT)),
    row(REGRET, L8B, "attn r=256 + unembedding", "0.25 B", 251_985_920, EXACT, lora(256, ATT, OUT)),
    row(REGRET, L8B, "all r=256 (blocks only)", "0.70 B", 671_088_640, FAIL, lora(256, ALL)),
    row(REGRET, L8B, "all r=256 + unembedding", "0.70 B", 704_970_752, EXACT, lora(256, ALL, OUT)),
    row(REGRET, L8B, "mlp r=128 (blocks only)", "0.24 B", 226_492_416, FAIL, lora(128, "mlp")),
    row(
        REGRET, L8B, "mlp r=128 + unembedding", "0.24 B", 243_433_472, EXACT, lora(128, "mlp", OUT)
    ),
    row(REGRET, L8B, "rank 1 all + unembedding", "3 M", 2_753_792, EXACT, lora(1, ALL, OUT)),
    row(PEFT, L3B, "base total", "3212749824", 3_212_749_824, EXACT, FULL),
    row(PEFT, L3B, "lora r32 q,v", "9175040", 9_175_040, EXACT, lora(32, *QV)),
    row(PEFT, L3B, "lora r64 q,v", "18350080", 18_350_080, EXACT, lora(64, *QV)),
    row(PEFT, L3B, "lora r10 mlp", "9461760", 9_461_760, EXACT, lora(10, "mlp")),
    row(PEFT, L3B, "dora r32 q,v", "9289728", 9_289_728, EXACT, lora(32, *QV, dora=True)),
    row(PEFT, L3B, "vera r256 q,v", "129024", 129_024, EXACT, ("vera", {"r": 256, "targets": QV})),
    row(PEFT, L3B, "ln tuning", "175104", 175_104, EXACT, whole("*norm")),
    row(PEFT, L3B, "prompt tuning 200 tokens", "614400", 614_400, EXACT, prompt(200)),
    row(PEFT, L3B, "prefix tuning 200 tokens", "11468800", 11_468_800, EXACT, prefix(200)),
    row(PEFT, L3B, "prefix tuning 50 tokens", "2867200", 2_867_200, EXACT, prefix(50)),
    row("BitFit", "bert-base", "all biases", "0.09 %", 93_999, EXACT, BITFIT),
    row("BitFit", "bert-large", "all biases", "0.08 %", 81_274, EXACT, BITFIT),
    row("Houlsby 3.4", "bert-base", "LayerNorm only", "0.04 M", 38_400, EXACT, whole("LayerNorm")),
    row("Houlsby 3.4", "bert-base", "adapters m=64", "2 M", 2_416_128, EXACT, HOULSBY_64),
    row("Houlsby T1", "bert-large", "adapters m=64", "2.1 %", 1_922_166, FAIL, HOULSBY_64),
    row(
        "Houlsby T1", "bert-large", "adapters m=64", "2.1 % of blocks", 2_130_924, EXACT, HOULSBY_64
    ),
    row(
        "Prompt tuning",
        "t5-xxl d=4096",
        "5 tokens",
        "20480",
        20_480,
        EXACT,
        prompt(5),
        base="llama-7b",
    ),
    row("Li 2018", "MNIST FC", "D", "199210", 199_210, EXACT, FULL),
    row("Li 2018", "MNIST LeNet", "D", "44426", 44_426, EXACT, FULL),
]
