"""Branching: all branches of all questions and scales in one batch against one branch at a time without a cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from naive import naive_decode, naive_diversity, naive_perturb, naive_sampler
from test_coconut import PROMPTS, BusyRank, alone, build, draw, mapped, wrap
from tiny_models import IDS, POSITIONS, assert_near, near, tiny_model

from generation import branch_point, generate_from, transformer_blocks
from noise import dropout_generator, noise_generator, sampling_generator
from states import Branch, Branches
from thoughts import Intervention

QUESTIONS = [5, 900, 2, 7, 31]
NEW = 6
SETTINGS = {
    "greedy": {"noise_scale": 0.5},
    "sampled": {"noise_scale": 0.5, "temperature": 1.0, "top_p": 0.9},
    "second thought": {"noise_scale": 0.5, "noise_at_step": 2, "noise_type": "orthogonal", "temperature": 1.0},
    "linear": {"noise_scale": 0.5, "schedule": "linear", "noise_type": "uniform"},
    "adaptive": {"noise_scale": 0.5, "schedule": "adaptive", "noise_at_step": 2},
    "snr": {"noise_scale": 2.0, "schedule": "cosine", "noise_type": "snr"},
    "shared": {"noise_scale": 0.5, "shared_noise": True, "schedule": "constant", "temperature": 1.0},
    "opposite": {"noise_scale": 0.5, "noise_type": "targeted", "noise_direction": "opposite", "temperature": 1.0},
    "scales": {"noise_scale": [0.1, 0.5, 2.0], "schedule": "exponential", "temperature": 1.0, "top_p": 0.8},
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def branches(model, layout: list[str] = PROMPTS, **how) -> Branches:
    """Details of three branches of the first questions."""
    batch = draw(layout)
    how = {"num_branches": 3, "seed": 4, "question_index": QUESTIONS[: len(layout)], "max_new_tokens": NEW, **how}
    return model.generate_with_branching(batch["input_ids"], batch["attention_mask"], **how, return_details=True)


def naive_branch(base, ids, prompt, question: int, branch: int, scale: float, how: dict):
    """One branch of one question."""
    noisy_branch = 0 if how.get("shared_noise") else branch
    perturb = naive_perturb(
        lambda number: noise_generator(4, question, noisy_branch, number),
        scale,
        int((prompt == ids.latent).sum()),
        how.get("noise_type", "gaussian"),
        how.get("noise_direction"),
        how.get("noise_at_step", 1),
        how.get("schedule", "none"),
    )
    sampler = naive_sampler(how.get("temperature", 0.0), how.get("top_p", 1.0), sampling_generator(4, question, branch))
    return naive_decode(base, ids, prompt, NEW, perturb, sampler)


def model_with_early_ends(family: str):
    """A base model, and ids whose end-of-sequence token is one that some branches come to and others do not."""
    base = tiny_model(family, tie_word_embeddings=False)[0]
    endless = branches(wrap(base, IDS._replace(eos=-1)), noise_scale=2.0, temperature=1.0).tokens
    inner = endless[:, :, 1:-1].flatten().tolist()
    return base, IDS._replace(eos=max(set(inner), key=inner.count))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_matches_naive(family, name):
    base, ids = model_with_early_ends(family)
    how = SETTINGS[name]
    result, batch = branches(wrap(base, ids), **how), draw(PROMPTS)
    scales = how["noise_scale"] if isinstance(how["noise_scale"], list) else [how["noise_scale"]]
    if isinstance(how["noise_scale"], float):  # give it the dimension of the scales
        rows = [part.unsqueeze(1) for part in (result.tokens, result.lengths, result.log_probabilities, result.thoughts)]
    else:
        rows = [result.tokens, result.lengths, result.log_probabilities, result.thoughts]
    tokens, lengths, scores, thoughts = rows
    assert tokens.shape[:3] == (5, len(scales), 3)
    at = how.get("noise_at_step", 1)
    for row, (place, scale) in itertools.product(range(5), enumerate(scales)):
        prompt, paths = alone(batch, row), []
        passes = int((prompt == ids.latent).sum())
        assert result.steps[row] == passes
        for branch in range(3):
            expected = naive_branch(base, ids, prompt, QUESTIONS[row], branch, scale, how)
            new = expected.tokens[0, prompt.shape[1] :].tolist()
            assert tokens[row, place, branch, : len(new)].tolist() == new
            assert (tokens[row, place, branch, len(new) :] == ids.eos).all()
            assert lengths[row, place, branch] == len(new)
            assert_near(scores[row, place, branch, : len(new)], torch.tensor(expected.log_probabilities))
            assert scores[row, place, branch, len(new) :].abs().sum() == 0
            paths.append(expected.embeds[0, : prompt.shape[1]][prompt[0] == ids.latent])
            assert_near(thoughts[row, place, branch, :passes], paths[-1])
            assert thoughts[row, place, branch, passes:].abs().sum() == 0
        diversity = result.diversity[row] if isinstance(how["noise_scale"], float) else result.diversity[row][place]
        expected_diversity = naive_diversity(paths, at) if passes > at else 0.0
        assert diversity.diversity == pytest.approx(expected_diversity, rel=1e-3, abs=1e-4)


def test_sliding_windows_and_layers():
    """Models with other caches, and thoughts read from another layer."""
    for family, layer in [("mistral", -1), ("gpt_oss", 1)]:
        base, how = tiny_model(family, tie_word_embeddings=False)[0], SETTINGS["sampled"]
        layout = [row[2:] for row in PROMPTS[:1]]
        result = branches(mapped(base, {"name": "layer", "layer": layer}), layout, **how)
        prompt = alone(draw(layout), 0)
        if layer == -1:
            for branch in range(3):
                expected = naive_branch(base, IDS, prompt, QUESTIONS[0], branch, how["noise_scale"], how)
                new = expected.tokens[0, prompt.shape[1] :].tolist()
                assert result.tokens[0, branch, : len(new)].tolist() == new
        model = mapped(base, {"name": "layer", "layer": layer})
        same = model.generate(prompt, max_new_tokens=NEW, seed=4, question_index=QUESTIONS[0], **how)
        assert result.tokens[0, 0].tolist()[: same.shape[1] - prompt.shape[1]] == same[0, prompt.shape[1] :].tolist()


def naive_dropout(base, ids, prompt, question: int, branch: int, rate: float):
    """Handles of hooks that drop what a block adds at the prompt's latents, whatever else stands in the sequence."""

    def dropping(number: int):
        def hook(block, args, output):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            for latent_pass, column in enumerate((prompt[0] == ids.latent).nonzero().flatten().tolist(), start=1):
                if column < states.shape[1]:
                    source = dropout_generator(4, question, branch, latent_pass)
                    kept = torch.rand(len(blocks), states.shape[-1], generator=source)[number] >= rate
                    given = args[0][:, column]
                    states[:, column] = given + torch.where(kept, (states[:, column] - given) / (1 - rate), 0.0)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    blocks = transformer_blocks(wrap(base, ids))
    return [block.register_forward_hook(dropping(number)) for number, block in enumerate(blocks)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dropout_matches_naive(family):
    """Rows with and without dropout, of questions with different numbers of latents, in one batch."""
    base, ids = model_with_early_ends(family)
    batch, rates = draw(PROMPTS), [0.0, 0.1, 0.1, 0.6]
    rows = [
        Branch(row, question, branch, branch, Intervention(dropout=rate))
        for row, question in enumerate(QUESTIONS)
        for branch, rate in enumerate(rates)
    ]
    found = []
    for iterations in (None, 12):  # one after the other; together, which comes to the same
        model = wrap(base, ids, jacobi_iterations=iterations)
        point = branch_point(model, batch["input_ids"], batch["attention_mask"])
        found.append(generate_from(model, point, rows, NEW, seed=4))
    thoughts = {}
    for number, row in enumerate(rows):
        prompt = alone(batch, row.row)
        hooks = naive_dropout(base, ids, prompt, row.question, row.branch, row.intervention.dropout)
        expected = naive_decode(base, ids, prompt, NEW)
        for hook in hooks:
            hook.remove()
        new = expected.tokens[0, prompt.shape[1] :]
        latents = (prompt[0] == ids.latent).nonzero().flatten()
        thoughts[row.row, row.branch] = expected.embeds[0, latents]
        for generated in found:
            assert torch.equal(generated.tokens[number][: len(new)], new)
            assert generated.lengths[number] == len(new)
            assert_near(generated.thoughts[number][: len(latents)], thoughts[row.row, row.branch])
    assert near(thoughts[0, 1][0], thoughts[0, 2][0])  # the question has no dropout
    assert not near(thoughts[0, 1][1], thoughts[0, 2][1])
    assert not near(thoughts[0, 0][1], thoughts[0, 2][1])


@pytest.mark.parametrize("name", ["sampled", "adaptive", "scales"])
def test_generation_does_not_depend_on_the_batch(name):
    base, ids = model_with_early_ends("llama")
    model, batch = wrap(base, ids), draw(PROMPTS)
    together = branches(model, **SETTINGS[name])
    for row, question in enumerate(QUESTIONS):
        single = model.generate_with_branching(
            alone(batch, row), None, NEW, 3, **SETTINGS[name], seed=4, question_index=question, return_details=True
        )
        width = single.tokens.shape[-1]
        assert torch.equal(together.tokens[row][..., :width], single.tokens[0])
        assert (together.tokens[row][..., width:] == ids.eos).all()
        steps = single.thoughts.shape[-2]
        assert_near(together.thoughts[row][..., :steps, :], single.thoughts[0])
        assert_near(together.log_probabilities[row][..., :width], single.log_probabilities[0])


def test_scales_at_once_are_as_one_after_another():
    model = build("llama", tie_word_embeddings=False)
    scales = [0.0, 0.3, 3.0]
    together = branches(model, noise_scale=scales, temperature=1.0, schedule="linear")
    for place, scale in enumerate(scales):
        separate = branches(model, noise_scale=scale, temperature=1.0, schedule="linear")
        assert torch.equal(together.tokens[:, place, :, : separate.tokens.shape[-1]], separate.tokens)
        assert_near(together.thoughts[:, place], separate.thoughts)
        for row in range(5):
            assert together.diversity[row][place].pairwise == pytest.approx(
                separate.diversity[row].pairwise, rel=1e-3, abs=1e-4
            )
            assert [len(infos) for infos in together.noise[row][place]] == [len(infos) for infos in separate.noise[row]]
            for pair in zip(together.noise[row][place], separate.noise[row], strict=True):
                for one, other in zip(*pair, strict=True):
                    assert one["pass"] == other["pass"]
                    assert one["noise_scale"] == other["noise_scale"]
                    assert one["noise_norm"] == pytest.approx(other["noise_norm"], rel=1e-3, abs=1e-4)


def test_one_branch_is_generate_with_noise():
    model, batch = build("gpt2", tie_word_embeddings=False), draw(PROMPTS)
    arguments = batch["input_ids"], batch["attention_mask"]
    how = {"max_new_tokens": NEW, "noise_scale": 1.0, "temperature": 1.0, "seed": 4, "question_index": QUESTIONS}
    for every, schedule in [(False, "none"), (True, "constant")]:
        expected, details = model.generate(*arguments, **how, apply_noise_to_all_passes=every, return_details=True)
        result = model.generate_with_branching(*arguments, **how, num_branches=1, schedule=schedule, return_details=True)
        assert torch.equal(result.tokens[:, 0], expected[:, len(PROMPTS[0]) :])
        assert_near(result.thoughts[:, 0], details.thoughts)
        passes = [[info["pass"] for info in infos] for infos in details.noise]
        assert [[info["pass"] for info in infos] for [infos] in result.noise] == passes


def test_own_and_shared_noise():
    model = build("llama", tie_word_embeddings=False)
    own, shared = branches(model, noise_scale=2.0), branches(model, noise_scale=2.0, shared_noise=True)
    noisy = torch.tensor([0, 1, 2, 4])  # question 3 has no latent
    for i, j in itertools.combinations(range(3), 2):
        assert not torch.isclose(own.thoughts[noisy, i, 0], own.thoughts[noisy, j, 0]).all(dim=-1).any()
    assert_near(shared.thoughts, shared.thoughts[:, :1].expand_as(shared.thoughts))
    assert (shared.tokens == shared.tokens[:, :1]).all()
    assert_near(own.thoughts[:, 0], shared.thoughts[:, 0])
    assert all(found.diversity > 1 for found in (own.diversity[i] for i in (0, 1, 2, 4)))
    assert all(found.diversity < 1e-4 and found.all_steps < 1e-4 for found in shared.diversity)
    sampled = branches(model, noise_scale=2.0, shared_noise=True, temperature=1.0)
    assert (sampled.tokens != sampled.tokens[:, :1]).any(dim=2)[:, 1:].all()


@pytest.mark.parametrize("schedule", ["none", "linear"])
def test_which_thoughts_are_perturbed(schedule):
    """Those before the branch point are everybody's; rows with too few latents have no noise at all."""
    result = branches(build("llama"), noise_scale=[0.5, 2.0], noise_at_step=4, schedule=schedule)
    assert result.steps.tolist() == [row.count("L") for row in PROMPTS]
    for row, steps in enumerate(result.steps.tolist()):
        passes = [p for p in range(4, steps + 1) if p == 4 or schedule != "none"]
        for branch in itertools.product(range(2), range(3)):
            infos = result.noise[row][branch[0]][branch[1]]
            assert [info["pass"] for info in infos] == passes
            base = [0.5, 2.0][branch[0]]
            later = [base * (1 - t / (steps - 4)) for t in range(len(passes) - 1)]
            assert [info["noise_scale"] for info in infos] == pytest.approx([base, *later][: len(passes)])
        shared = result.thoughts[row, :, :, : min(steps, 3)]
        assert_near(shared, shared[:1, :1].expand_as(shared))
        first, second = result.thoughts[row, 0, 0], result.thoughts[row, 0, 1]
        assert near(first, second) == (steps < 4)


class Sizes:
    """Rows and columns of every pass of the decoder."""

    def __init__(self, model):
        self.passes: list[tuple[int, int]] = []
        model.base_causallm.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module, _args, kwargs):
        self.passes.append(tuple(kwargs["inputs_embeds"].shape[:2]))


def test_the_prompt_is_computed_once():
    """Prompt and clean passes with a row for each question, everything after with a row for each branch and scale."""
    model = build("llama")
    model.eos_token_id = -1
    sizes = Sizes(model)
    branches(model, ["..qqqqsLLLLe", "qqqqqqsLLLLe"], noise_scale=[0.1, 0.2], noise_at_step=3)
    assert sizes.passes == [(2, 7), (2, 1), (2, 1), (12, 1), (12, 2), *[(12, 1)] * (NEW - 1)]


def test_finished_branches_are_dropped():
    base, how = tiny_model("llama", tie_word_embeddings=False)[0], {"noise_scale": [2.0, 3.0], "temperature": 0.4}
    endless = branches(wrap(base, IDS._replace(eos=-1)), **how, max_new_tokens=24).tokens.flatten(0, 2)  # (30, 24)
    contained = {token: int((endless[:, :18] == token).any(dim=1).sum()) for token in range(1, IDS.start_latent)}
    common = max((token for token, rows in contained.items() if rows < 30), key=contained.__getitem__)
    assert contained[common] > 15
    model = wrap(base, IDS._replace(eos=common))
    sizes = Sizes(model)
    result = branches(model, **how, max_new_tokens=24)
    rows = [rows for rows, _ in sizes.passes][-(result.tokens.shape[-1] - 1) :]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 30
    lengths = result.lengths.flatten()
    for step, count in enumerate(rows, start=1):
        going = int((lengths > step).sum())
        assert going <= count < 2 * going or count == 30
    assert rows[-1] < 30
    for path, new, length in zip(endless, result.tokens.flatten(0, 2), lengths, strict=True):  # the others go on unmoved
        assert torch.equal(path[:length], new[:length])


@pytest.mark.parametrize("how", [{}, {"temperature": 2.0, "seed": 3}], ids=["greedy", "sampled"])
def test_finished_rows_of_generate_are_dropped(how):
    base, prompt = tiny_model("llama", tie_word_embeddings=False)[0], torch.randint(1, 40, (8, 5), generator=seeded(0))
    endless = wrap(base, IDS._replace(eos=-1)).generate(prompt, max_new_tokens=24, **how)[:, 5:]
    ends = {token: int((endless[:, :12] == token).any(dim=1).sum()) for token in range(1, IDS.start_latent)}
    common = max((token for token, rows in ends.items() if rows < 8), key=ends.__getitem__)
    assert ends[common] > 3
    model = wrap(base, IDS._replace(eos=common))
    sizes = Sizes(model)
    tokens = model.generate(prompt, max_new_tokens=24, **how)[:, 5:]
    assert sizes.passes[-1][0] < 8
    for expected, found in zip(endless.tolist(), tokens.tolist(), strict=True):  # the others go on unmoved
        length = [*expected, common].index(common)
        assert found == expected[:length] + [common] * (24 - length)


def test_no_row_is_dropped_where_all_are_drawn_from_one_generator():
    base, prompt = tiny_model("llama", tie_word_embeddings=False)[0], torch.randint(1, 40, (8, 5), generator=seeded(0))
    answers = []
    for eos in (-1, 0):
        model = wrap(base, IDS._replace(eos=eos))
        sizes = Sizes(model)
        answers.append(model.generate(prompt, max_new_tokens=60, temperature=2.0, generator=seeded(1))[:, 5:].tolist())
        assert {rows for rows, _ in sizes.passes} == {8}
    endless, ended = answers
    assert sum(0 in row for row in endless) > 3
    for expected, found in zip(endless, ended, strict=True):
        length = [*expected, 0].index(0)
        assert found[:length] == expected[:length]


@pytest.mark.parametrize("at", [1, 4, 50])
def test_generation_beside_a_rank_with_more_latents(at):
    """As many passes as there, with the same result."""
    base = tiny_model("llama", tie_word_embeddings=False)[0]
    expected = branches(wrap(base, IDS._replace(eos=-1)), noise_scale=1.0, noise_at_step=at)
    never = next(token for token in range(IDS.start_latent) if not (expected.tokens == token).any())
    model = wrap(base, IDS._replace(eos=never))
    sizes = Sizes(model)
    model.max_over_ranks = BusyRank(3, tokens=NEW)
    result = branches(model, noise_scale=1.0, noise_at_step=at, synced_gpus=True)
    columns = sum("L" in column for column in zip(*PROMPTS, strict=True))
    assert len(sizes.passes) == 1 + columns + 3 + NEW - 1
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.thoughts, expected.thoughts)


def test_without_any_latent():
    model = build("llama", tie_word_embeddings=False)
    result = branches(model, ["..qqqq", "qqqqqq"], temperature=1.0)
    assert result.thoughts.shape == (2, 3, 0, 32)
    assert result.noise == [[[], [], []]] * 2
    assert [found.diversity for found in result.diversity] == [0, 0]
    assert len({tuple(path) for path in result.tokens[0].tolist()}) == 3


def test_tokens_alone():
    model, batch = build("llama", tie_word_embeddings=False), draw(PROMPTS)
    how = {"max_new_tokens": NEW, "num_branches": 3, "seed": 4, "question_index": QUESTIONS, "temperature": 1.0}
    tokens = model.generate_with_branching(batch["input_ids"], batch["attention_mask"], **how)
    assert torch.equal(tokens, branches(model, noise_scale=0.1, temperature=1.0).tokens)
    other = model.generate_with_branching(batch["input_ids"], batch["attention_mask"], **{**how, "seed": 5})
    assert not torch.equal(tokens, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_branches": 0}, r"questions, scales and branches are \[5, 1, 0\]"),
        ({"noise_scale": []}, r"questions, scales and branches are \[5, 0, 3\]"),
        ({"noise_at_step": 0}, "the first noisy pass is 0; passes are counted from 1"),
        ({"noise_scale": [0.1, -1.0]}, "noise_scale is -1"),
        ({"noise_type": "pink"}, "noise_type is 'pink'; it must be one of gaussian"),
        ({"noise_type": "targeted"}, "noise_direction is None"),
        ({"schedule": "square"}, "schedule is 'square'; it must be one of none, constant"),
        ({"question_index": [1]}, "1 question indices for 5 rows"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"max_new_tokens": POSITIONS}, f"the model has {POSITIONS}"),
    ],
    ids=str,
)
def test_generation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        branches(build("gpt2"), **arguments)
