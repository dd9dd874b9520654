"""docs/METHODS.md, made from the code: `python -m experiments.methods_page [OUT]`.

For every method one question, each stage, the exact tokens, and which of them carry loss.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from config import ALL_TOKENS, METHODS, STAGED_METHODS, RunConfig
from dataset import IGNORE_INDEX, get_cot_latent_dataset, get_dataset, marker_tokens
from systems.models import latent_ids, load_tokenizer
from utils import entry_point, load_config, write_text

ROOT = Path(__file__).parents[1]
TOKENIZER = "configs/gpt2_small"  # one token per word
RECORD = {
    "question": "Tom is a lempus. Every lempus is a yumpus. Every yumpus is a zumpus. Is Tom a zumpus or terpus?",
    "steps": ["Tom is a lempus.", "Every lempus is a yumpus.", "Every yumpus is a zumpus."],
    "answer": "Tom is a zumpus.",
}
SETTINGS = ("c_thought=2", "max_latent_stage=2", "epochs_per_stage=1", "num_epochs=5", "icot_smoothing=null")
ICOT_STAGES = (0, 1, 8, ALL_TOKENS)
WHAT = {
    "coconut": """
Chain of continuous thought (arXiv 2412.06769, section 3). Stage *s* replaces the first *s* steps by *s* × `c_thought` latents.
A latent's input embedding is the last hidden state at the position before it. Past `max_latent_stage` all steps are gone.""",
    "cot": """
Chain of thought in words: question, steps, answer.""",
    "no_thoughts": """
The paper's *without thought*: the steps go as in `coconut`, and nothing stands in their place.""",
    "no_cot": """
Question and answer alone.""",
    "no_curriculum": """
The paper's *without curriculum*: Coconut's last stage from the first epoch on.""",
    "pause": """
Pause tokens (arXiv 2310.02226): as many learned `<pause>` tokens as Coconut has latents in its last stage stand between
question and answer; no steps, no stages. All positions are one pass.""",
    "pause_as_thought": """
The paper's *pause as thought*: Coconut's stages, with a learned `<pause>` token in the place of each thought. All positions
are one pass.""",
    "icot": """
Stepwise internalisation (arXiv 2405.14838): tokens of the steps are removed from the left, `icot_tokens_per_epoch` in each
epoch, one by one. The stage is the number of removed tokens. With `icot_smoothing` λ a sample sometimes loses *o* tokens
more, with probability proportional to exp(-λ*o*) (not shown below). Once more than `icot_remove_all_beyond` are gone, all
go. The first `icot_start_epoch` epochs write everything. With `reset_optimizer: True` each removal begins with a fresh
optimizer.""",
}


def configuration(method: str) -> RunConfig:
    needed = (f"method={method}", "name=example", f"model_id={TOKENIZER}", "train_path=none", "val_path=none")
    return load_config(RunConfig, [*needed, *SETTINGS])


def stages(config: RunConfig) -> list[int]:
    """The stages that differ from one another."""
    if config.method == "icot":
        return list(ICOT_STAGES)
    return list(range(config.max_latent_stage + 2)) if config.method in STAGED_METHODS else [config.scheduled_stage(0)]


def tokenised(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "example.json"
        path.write_text(json.dumps([RECORD]), encoding="utf-8")
        return get_dataset(path, tokenizer)


def example(config: RunConfig, stage: int) -> tuple[list[str], list[str]]:
    """(tokens without loss, tokens with loss) of the example at a stage."""
    tokenizer = load_tokenizer(str(ROOT / TOKENIZER))
    ids = latent_ids(tokenizer, config.method)
    dataset = get_cot_latent_dataset(stage, tokenised(tokenizer), config, ids.start, ids.thought, ids.end)
    row = dataset[0]
    tokens = [token.replace("\n", "⏎").lstrip("▁") for token in tokenizer.convert_ids_to_tokens(row["input_ids"])]
    pairs = list(zip(tokens, row["labels"], strict=True))
    return [token for token, label in pairs if label == IGNORE_INDEX], [
        token for token, label in pairs if label != IGNORE_INDEX
    ]


def section(method: str) -> str:
    config = configuration(method)
    added = ", ".join(f"`{token}`" for token in marker_tokens(method)) or "none"
    lines = [f"## {method}", "", WHAT[method].strip(), "", f"New tokens: {added}.", ""]
    question = example(configuration("no_cot"), 0)[0]
    for stage in stages(config):
        prompt, target = example(config, stage)
        name = "all" if stage == ALL_TOKENS else stage
        title = f"Stage {name}" if len(stages(config)) > 1 else "All epochs"
        shown = ["[question]", *prompt[len(question) :]]
        lines += [f"{title}:", "", f"    without loss: {' '.join(shown)}", f"    with loss:    {' '.join(target)}", ""]
    return "\n".join(lines)


def page() -> str:
    question = " ".join(example(configuration("no_cot"), 0)[0])
    heading = f"""# Methods

Made by `python -m experiments.methods_page docs/METHODS.md`; a test compares this page with the code.

One key chooses the method: `method: NAME` (for coconut, cot, no_thoughts and no_cot also the published booleans, as in
`coconut: True`). `args/` has a file for each method and data set.

The example has three steps; `c_thought` 2, `max_latent_stage` 2, one token per word ({TOKENIZER}). Tokens are separated by
blanks, ⏎ is a newline. `[question]` stands for

    {question}

and is never trained on. Loss is the mean cross entropy over the tokens with loss. At evaluation the model gets what is
without loss and writes the rest. With `pad_latent_to_max: False` a question has no more latents (or pauses) than its steps ×
`c_thought`, at evaluation too unless `eval_latents` says otherwise. `uniform_prob` and `earlier_stage_prob` give a sample the
sequence of another stage, drawn from (seed, epoch, index); the methods with stages have them: {", ".join(STAGED_METHODS)}.

"""
    return heading + "\n".join(section(method) for method in METHODS)


@entry_point
def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.methods_page", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="the page; standard output if left out")
    out = parser.parse_args(given).out
    if out is None:
        print(page())
    else:
        write_text(out, page())


if __name__ == "__main__":
    main()
