"""Judge a published adapter from outside: transformers, peft and bitsandbytes only, none of this project's code.

Loads the base model in 4 bit and the adapter on top, measures the loss of both on the held-out questions and lets both
answer some of them. Prints one JSON object.

    verify.py --base DIR --adapter DIR --questions FILE.jsonl --ask "What does json.dumps do?" ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--ask", nargs="*", default=[])
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(options.base, quantization_config=quantization, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, options.adapter).eval()
    rows = [encode(tokenizer, json.loads(line)["messages"]) for line in options.questions.read_text().splitlines()]

    with torch.inference_mode():
        tuned_loss = mean_loss(model, rows)
        after = [answer(model, tokenizer, question) for question in options.ask]
        with model.disable_adapter():
            base_loss = mean_loss(model, rows)
            before = [answer(model, tokenizer, question) for question in options.ask]
    answers = [
        {"question": question, "before": old, "after": new}
        for question, old, new in zip(options.ask, before, after, strict=True)
    ]
    print(json.dumps({"questions": len(rows), "baseLoss": base_loss, "tunedLoss": tuned_loss, "answers": answers}))


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """Token ids of a conversation up to its end token, and where the answer begins."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    assert ids[: len(prompt)] == prompt, "the prompt is not a prefix of the conversation"
    return ids[:end], len(prompt)


def mean_loss(model: Any, rows: list[tuple[list[int], int]]) -> float:
    """Cross entropy per answer token over all rows."""
    total, tokens = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        longest = max(len(ids) for ids, _ in part)
        input_ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for index, (ids, prompt) in enumerate(part):  # padded on the right, so positions are those of training
            input_ids[index, : len(ids)] = torch.tensor(ids)
            mask[index, : len(ids)] = 1
            labels[index, prompt : len(ids)] = torch.tensor(ids[prompt:])
        logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total += float(losses)
        tokens += int((labels[:, 1:] != -100).sum())
    return total / tokens


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer to one question."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
