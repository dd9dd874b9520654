"""docs/METHODS.md, made from the code: `python -m experiments.methods_page [OUT]`.

For every method one question, each stage, the exact tokens, and which of them carry loss.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from config import RunConfig
from dataset import IGNORE_INDEX, get_cot_latent_dataset
from methods import ALL_TOKENS, MAIN, METHODS, TokenRemoval, scheduled_stage, sequence_name
from systems.arguments import Parser
from systems.models import latent_ids, load_tokenizer
from systems.tokens import get_dataset
from systems.writing import write_text
from utils import entry_point, load_config

ROOT = Path(__file__).parents[1]
TOKENIZER = "configs/gpt2_small"  # one token per word
RECORD = {
    "question": "Tom is a lempus. Every lempus is a yumpus. Every yumpus is a zumpus. Is Tom a zumpus or terpus?",
    "steps": ["Tom is a lempus.", "Every lempus is a yumpus.", "Every yumpus is a zumpus."],
    "answer": "Tom is a zumpus.",
}
SETTINGS = ("c_thought=2", "max_latent_stage=2", "epochs_per_stage=1", "num_epochs=5")
REMOVED = (0, 1, 8, ALL_TOKENS)


def configuration(method: str) -> RunConfig:
    needed = (f"method={method}", "name=example", f"model_id={TOKENIZER}", "train_path=none", "val_path=none")
    plain = ["icot_smoothing=null"] if isinstance(METHODS[method].schedule, TokenRemoval) else []
    return load_config(RunConfig, [*needed, *SETTINGS, *plain])


def stages(config: RunConfig) -> list[int]:
    """The stages that differ from one another."""
    schedule = METHODS[str(config.method)].schedule
    if isinstance(schedule, TokenRemoval):
        return list(REMOVED)
    return list(range(scheduled_stage(config.curriculum, 0), schedule.last(config.curriculum) + 1))


def example(config: RunConfig, stage: int) -> dict[str, tuple[str, str]]:
    """(tokens without loss, tokens with loss) of each sequence of the example at a stage, the main one first."""
    tokenizer = load_tokenizer(str(ROOT / TOKENIZER))
    ids = latent_ids(tokenizer, config.method)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "example.json"
        path.write_text(json.dumps([RECORD]), encoding="utf-8")
        dataset = get_dataset(path, tokenizer)
    row = get_cot_latent_dataset(stage, dataset, config.curriculum, ids.start, ids.thought, ids.end)[0]
    sequences = {}
    for key in row:
        if key.endswith("input_ids") and row[key]:
            labels = row[key.replace("input_ids", "labels")]
            tokens = [token.replace("\n", "⏎").lstrip("▁") for token in tokenizer.convert_ids_to_tokens(row[key])]
            without = [token for token, label in zip(tokens, labels, strict=True) if label == IGNORE_INDEX]
            sequences[sequence_name(key)] = (" ".join(without), " ".join(tokens[len(without) :]))
    return sequences


def section(method: str) -> str:
    config = configuration(method)
    added = ", ".join(f"`{token}`" for token in METHODS[method].markers) or "none"
    lines = [f"## {method}", "", METHODS[method].about.strip(), "", f"New tokens: {added}.", ""]
    question = example(configuration("no_cot"), 0)[MAIN][0]
    for stage in stages(config):
        shown = [(prompt.replace(question, "[question]"), target) for prompt, target in example(config, stage).values()]
        (prompt, target), *further = shown
        name = "all" if stage == ALL_TOKENS else stage
        title = f"Stage {name}" if len(stages(config)) > 1 else "All epochs"
        lines += [f"{title}:", "", f"    without loss: {prompt}", f"    with loss:    {target}"]
        lines += [f"    and:          {prompt} | {target}" for prompt, target in further]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    question = example(configuration("no_cot"), 0)[MAIN][0]
    staged = [name for name, method in METHODS.items() if method.has_stages]
    heading = f"""# Methods

Made by `python -m experiments.methods_page docs/METHODS.md`; a test compares this page with the code.

One key chooses the method: `method: NAME` (for coconut, cot, no_thoughts and no_cot also the published booleans, as in
`coconut: True`). `args/` has a file for each method and data set.

The example has three steps; `c_thought` 2, `max_latent_stage` 2, one token per word ({TOKENIZER}). Tokens are separated by
blanks, ⏎ is a newline. `[question]` stands for

    {question}

and is never trained on. Loss is the mean cross entropy over the tokens with loss. At evaluation the model gets what is
without loss and writes the rest. Where an example has further sequences, a teacher's or those of a second model, they follow:
what is without loss, a bar, what is with it. With `pad_latent_to_max: False` a question has no more latents (or pauses) than
its steps × `c_thought`, at evaluation too unless `eval_latents` says otherwise. `uniform_prob` and `earlier_stage_prob` give a
sample the sequence of another stage, drawn from (seed, epoch, index); the methods with stages have them: {", ".join(staged)}.

"""
    return heading + "\n".join(section(method) for method in METHODS)


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.methods_page", __doc__)
    parser.add_argument("out", type=Path, nargs="?", help="the page; standard output if left out")
    out = parser.parse_args(given).out
    if out is None:
        print(page())
    else:
        write_text(out, page())


if __name__ == "__main__":
    main()
