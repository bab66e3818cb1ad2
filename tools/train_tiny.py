"""Train the bundled model `bundled:tiny` from scratch.

In: the bundled novels (`pi_gguf/bundled/novels.tar.xz`). Out: `pi_gguf/bundled/tiny/`, a Hugging Face folder: a Llama
with a window of 2048 tokens, a byte-level BPE tokenizer with single digits as tokens, and its loss in `training.json`.
Sequences grow from 256 to 2048 tokens; while they are short, positions skip (PoSE) so that every distance inside
the window is seen from the start.

Example (70 minutes on 2 cores, then 10 for recall at the far end of the window):
    python tools/train_tiny.py --out out/tiny-1 --tokens 22000000
    python tools/train_tiny.py --out out/tiny-2 --tokens 3300000 --continue-from out/tiny-1
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pi_gguf import bundled
from pi_gguf.bundled.passkey import EVALUATION_FILLER, INTRODUCTION, QUESTION, draw_key, key_sentence
from pi_gguf.data.packing import pack, pose_positions

WINDOW = 2048
VOCAB_SIZE = 2048
PHASES = ((256, 0.20), (512, 0.20), (1024, 0.25), (2048, 0.35))  # sequence length, share of the tokens
BATCH_TOKENS = 8192
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the training novels and a little of the recall tasks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    mixture = bundled.training_mixture(seed=0, window_tokens=WINDOW)
    texts = [*bundled.novels("train").values(), *(next(mixture) for _ in range(200))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=WINDOW
    )


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def rows(tokenizer: PreTrainedTokenizerFast, seed: int, length: int, far_share: float) -> Iterator[list[int]]:
    documents = bundled.training_mixture(seed, length, far_share)
    rows = pack((np.array(tokenizer(text)["input_ids"] + [1]) for text in documents), length)
    return (np.concatenate(row).tolist() for row in rows)


def passkeys_found(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int, trials: int) -> float:
    """Quick look during training: share of evaluation keys found at random depths of `length` tokens."""
    rng = random.Random(0)
    filler_tokens = len(tokenizer(EVALUATION_FILLER)["input_ids"]) - 1
    found = 0
    for _ in range(trials):
        key = draw_key(rng, for_evaluation=True)
        lines = [EVALUATION_FILLER] * max(1, (length - 110) // filler_tokens)
        lines.insert(rng.randint(0, len(lines)), key_sentence(key))
        ids = tokenizer(INTRODUCTION + "".join(lines) + QUESTION + " " + key)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=model.device)).logits[0]
        found += logits[-6:-1].argmax(-1).tolist() == ids[-5:]
    return found / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=bundled.TINY_DIR, help="folder to write")
    parser.add_argument("--tokens", type=int, default=22_000_000, help="training budget in tokens")
    parser.add_argument("--continue-from", type=Path, help="folder of a first run: go on at the full window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()

    if args.continue_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.continue_from)
        model = LlamaForCausalLM.from_pretrained(args.continue_from, dtype=torch.float32)
        phases, far_share, peak, seed = ((WINDOW, 1.0),), 0.6, 0.4, args.seed + 1
    else:
        tokenizer, model = train_tokenizer(), make_model()
        phases, far_share, peak, seed = PHASES, 0.0, 1.0, args.seed
    tokenizer.save_pretrained(args.out)
    tokenizer.model_max_length = 10**9  # documents are cut by pack(), not by the tokenizer
    model.to(args.device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters; tokenizer {time.time() - started:.0f} s")

    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02 * peak, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3 * peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peak_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def loss_of(batch: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # An explicit mask of ones: without it transformers takes a jump in the positions for a new document.
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits = model(batch, position_ids=positions, attention_mask=torch.ones_like(batch)).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    steps = args.tokens // BATCH_TOKENS
    step, history = 0, []
    rng = np.random.default_rng(args.seed)
    for length, share in phases:
        stream = rows(tokenizer, seed * 1000 + length, length, far_share)
        for _ in range(int(steps * share)):
            batch_rows: list[list[int]] = []
            while len(batch_rows) < BATCH_TOKENS // length:
                row = next(stream)
                if len(row) == length:
                    batch_rows.append(row)
            positions = [
                pose_positions(length, WINDOW, rng) if rng.random() < 0.5 else np.arange(length) for _ in batch_rows
            ]
            rate = min(1.0, (step + 1) / 100) * max(0.05, min(1.0, 1.4 * (1 - step / steps)))
            for group, peak in zip((g for o in optimizers for g in o.param_groups), peak_rates, strict=True):
                group["lr"] = peak * rate
            batch = torch.tensor(batch_rows, device=args.device)
            loss = loss_of(batch, torch.tensor(np.array(positions), device=args.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            history.append(loss.item())
            if step % 50 == 0:
                seconds = time.time() - started
                print(
                    f"step {step}/{steps} length {length} loss {np.mean(history[-50:]):.3f} "
                    f"{step * BATCH_TOKENS / seconds:.0f} tokens/s {seconds:.0f} s",
                    flush=True,
                )
            if step % 100 == 0 or step == steps:
                found = passkeys_found(model, tokenizer, length, 10)
                print(f"step {step} passkeys found at {length} tokens: {found:.0%}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    settings_path = args.out / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    settings_path.write_text(json.dumps(settings, indent=2) + "\n")
    record = {
        "tokens": step * BATCH_TOKENS,
        "seconds": round(time.time() - started),
        "device": args.device,
        "loss_last_100_steps": round(float(np.mean(history[-100:])), 4),
        "loss_every_100_steps": [round(float(np.mean(history[i : i + 100])), 3) for i in range(0, len(history), 100)],
        "torch": torch.__version__,
        "seed": args.seed,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
