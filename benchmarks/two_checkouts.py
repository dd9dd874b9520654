"""A training step and an answer of two checkouts, in turns: `python benchmarks/two_checkouts.py OTHER_DIRECTORY`.

Each round runs each checkout once in a process of its own. The ratio of the round's two times, this checkout's by the other's,
is what counts; its median over the rounds is printed.

    git worktree add ../before COMMIT
    python benchmarks/two_checkouts.py ../before --rounds 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"llama_quick": (64, 60), "gpt2_small": (2, 160)}  # configuration: rows, tokens of a question
LATENTS, ANSWER = 6, 20


def worker(model: str, repeats: int) -> dict[str, float]:
    """Seconds: of each measurement the lower quartile of its repeats. The checkout is the working directory."""
    sys.path.insert(0, str(Path.cwd()))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from coconut import Coconut

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"configs/{model}"))
    latent, start, end = (base.config.vocab_size - place for place in (1, 2, 3))
    coconut = Coconut(base, latent, start, end, 1)
    rows, length = MODELS[model]
    prompt = length + LATENTS + 2
    ids = torch.randint(4, end, (rows, prompt + ANSWER))
    ids[:, length], ids[:, length + 1 : prompt - 1], ids[:, prompt - 1] = start, latent, end
    labels = ids.clone()
    labels[:, :prompt] = -100
    optimizer = torch.optim.AdamW(coconut.parameters(), fused=True)

    def step() -> None:
        coconut(ids, torch.ones_like(ids), labels, labelled_only=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    measured = {
        "training step": step,
        "answer": lambda: coconut.generate(ids[:, :prompt], max_new_tokens=16),
        "branches": lambda: coconut.generate_with_branching(ids[:4, :prompt], max_new_tokens=8, temperature=0.7),
    }
    return {name: _quartile(action, repeats) for name, action in measured.items()}


def _quartile(action, repeats: int) -> float:
    action()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 4]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.repeats)))
        return
    for model in MODELS:
        rounds = []
        for _ in range(arguments.rounds):
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                ".",
                "--worker",
                model,
                "--repeats",
                str(arguments.repeats),
            ]
            both = [
                json.loads(subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.PIPE).stdout)
                for checkout in (ROOT, arguments.other)
            ]
            rounds.append({name: (both[0][name], both[0][name] / both[1][name]) for name in both[0]})
        for name in rounds[0]:
            seconds, ratios = zip(*(one[name] for one in rounds), strict=True)
            spread = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"{model}, {name}: {median(seconds):.4f} s, by the other {median(ratios):.3f} ({spread})")


if __name__ == "__main__":
    main()
