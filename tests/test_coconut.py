"""Coconut against recorded values and against a naive reference, for every model family.

Batches are drawn as text, one row a string: q question, s and e markers, L latent, a labelled token, . padding.
"""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import ThoughtOf, last_state, naive_decode, naive_forward, naive_generate, naive_map
from safetensors.torch import load_file
from scipy.stats import chisquare
from tiny_models import FAMILIES, IDS, POSITIONS, VOCABULARY, WINDOW, assert_near, near, tiny_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import Coconut
from generation import MAX_N_LATENT, count_positions, nucleus, sample
from systems import activation_checkpointing
from systems.models import _check_usable, verify_projection
from thoughts import make_thought_map

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = {
    "single row": ["qqqqqqsLLLeaaaaaa"],
    # As the collator makes them: every first latent in one column.
    "aligned": ["..qqqsLLLeaaaaa..", "qqqqqsLeaa.......", "....qsLLLLLLeaaaa", "qqqqqqqqqqaaaa..."],
    "ragged": ["..qqqsLLLeaaaaa..", "qqqqqqqqqqsLLeaaa", ".qsLLLLLLLLeaa...", "......qqqqqaaaaaa"],
    # Labels between latents too; the last two rows share no latent column.
    "scattered": ["qqLqqLLaaLaaLLaaa", ".qqLLqqqLaaaaa...", "qLqLqLqLqLqLqaaaa"],
    # 20 latents in a row. One row is still all padding when the first passes run.
    "many": ["qqqs" + 20 * "L" + "eaaaa", 18 * "." + "qqsLLeaaa" + 2 * ".", 4 * "." + "qsLe" + 14 * "a" + 7 * "."],
    "no latents": ["...qqqqqqaaaaaaaa", "qqqqqqqqqqqaaa..."],
    # Latents and answer without markers, at the very end.
    "last column": ["qqqqqqqqqqqqqqaLL", "....qqqqqqaaaaaaL"],
}
PROMPTS = [
    "......qqqqqqsLLLLe",  # left padding, 4 latents
    "qqqqqqqqqqqqqsLLLe",  # the longest prompt
    "....qqqsLqLqqLLeqq",  # latents apart from each other
    "..........qqqqqqqq",  # none
    "...qqsLLLLLLLLLLLe",  # more than MAX_N_LATENT
]


def draw(layout: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """The batch a layout describes: input_ids, attention_mask, labels, position_ids, each (B, T) int64."""
    generator = torch.Generator().manual_seed(seed)
    text = [list(row) for row in layout]
    ordinary = torch.randint(1, IDS.start_latent, (len(text), len(text[0])), generator=generator)
    special = {"s": IDS.start_latent, "e": IDS.end_latent, "L": IDS.latent, ".": IDS.eos}
    ids = [
        [special.get(c, int(t)) for c, t in zip(row, tokens, strict=True)] for row, tokens in zip(text, ordinary, strict=True)
    ]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor([[int(c != ".") for c in row] for row in text]),
        "labels": torch.tensor(
            [[t if c == "a" else -100 for c, t in zip(*pair, strict=True)] for pair in zip(text, ids, strict=True)]
        ),
        "position_ids": torch.tensor(
            [[max(len(row[: i + 1]) - row[: i + 1].count(".") - 1, 0) for i in range(len(row))] for row in text]
        ),
    }


def wrap(base, ids=IDS, **settings) -> Coconut:
    return Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos, **settings)


def mapped(base, setting: str | dict) -> Coconut:
    return wrap(base, thought_map=make_thought_map(setting, base).to(base.dtype))


def build(family: str, **overrides) -> Coconut:
    return wrap(tiny_model(family, **overrides)[0])


def gradients(base, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of the loss for every parameter."""
    base.zero_grad(set_to_none=True)
    loss.backward()
    missing = [name for name, parameter in base.named_parameters() if parameter.grad is None]
    assert not missing
    return {name: parameter.grad.clone() for name, parameter in base.named_parameters()}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in expected:
        assert_near(actual[name], expected[name], what=name)


def assert_matches_naive(model: Coconut, batch: dict[str, torch.Tensor], thought_of: ThoughtOf = last_state) -> None:
    """Loss, logits and embeddings where a token stands, and every gradient."""
    real = batch["attention_mask"].bool()
    loss, embeds, logits = naive_forward(model.base_causallm, IDS, **batch, thought_of=thought_of)
    outputs = model(**batch)
    assert_near(outputs.loss, loss)
    assert_near(outputs.logits[real], logits[real])
    assert_near(outputs.inputs_embeds[real], embeds[real])
    expected = gradients(model, loss)
    assert_same_gradients(gradients(model, outputs.loss), expected)


def new_tokens(row: torch.Tensor, prompt_length: int, eos: int) -> list[int]:
    """The generated tokens up to the first end-of-sequence token, exclusive."""
    tokens = row[prompt_length:].tolist()
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def alone(batch: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """One row without its padding, (1, T)."""
    return batch["input_ids"][row][batch["attention_mask"][row].bool()][None]


class PassCounter:
    """Records the length of every pass of the decoder and the shape of every input of the language-model head."""

    def __init__(self, model: Coconut):
        self.lengths: list[int] = []
        self.projected: list[tuple[int, ...]] = []
        model.base_causallm.base_model.register_forward_pre_hook(self._decoder, with_kwargs=True)
        model.base_causallm.get_output_embeddings().register_forward_pre_hook(self._head)

    def _decoder(self, _module, _args, kwargs):
        self.lengths.append(kwargs["inputs_embeds"].shape[1])

    def _head(self, _module, args):
        self.projected.append(tuple(args[0].shape))


# --- recorded values ---


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def golden(request):
    """Model, tensors and descriptions of one recorded model."""
    recorded = json.loads((GOLDEN / "models.json").read_text())
    entry, ids = recorded[request.param], recorded["token_ids"]
    unknown_today = {"_attn_implementation_autoset", "transformers_version"}
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{key: value for key, value in entry["config"].items() if key not in unknown_today})
    )
    tensors = load_file(GOLDEN / f"{request.param}.safetensors")
    weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    missing, unexpected = base.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}  # tied in GPT-2
    assert not unexpected
    base.tie_weights()
    return Coconut(base, ids["latent"], ids["start_latent"], ids["end_latent"], ids["eos"]), tensors, entry


@pytest.mark.parametrize("name", ["stage0", "stage2_c1", "stage3_c2", "ragged"])
def test_golden_forward(golden, name):
    model, tensors, _ = golden
    batch = {key: tensors[f"{name}.{key}"] for key in ("input_ids", "attention_mask", "labels", "position_ids")}
    real = batch["attention_mask"].bool()
    outputs = model(**batch)
    assert_close(outputs.loss, tensors[f"{name}.loss"][0], rtol=0, atol=1e-5)
    assert_close(outputs.logits[real], tensors[f"{name}.logits"][real], rtol=0, atol=1e-4)
    assert_close(outputs.inputs_embeds[real], tensors[f"{name}.inputs_embeds"][real], rtol=0, atol=1e-4)
    for parameter, gradient in gradients(model.base_causallm, outputs.loss).items():
        assert_close(gradient, tensors[f"{name}.grad.{parameter}"], rtol=0, atol=1e-4)


def test_golden_generate(golden):
    model, _, entry = golden
    for recorded in entry["generate"]:
        prompt, limit = torch.tensor([recorded["input_ids"]]), recorded["max_new_tokens"]
        generated = model.generate(prompt, max_new_tokens=limit)[0]
        expected = torch.tensor(recorded["output_ids"])
        assert new_tokens(generated, prompt.shape[1], model.eos_token_id) == new_tokens(
            expected, prompt.shape[1], model.eos_token_id
        )


def test_golden_generate_in_one_batch(golden):
    model, _, entry = golden
    longest = max(len(recorded["input_ids"]) for recorded in entry["generate"])
    padding = [longest - len(recorded["input_ids"]) for recorded in entry["generate"]]
    ids = torch.tensor([[0] * p + r["input_ids"] for p, r in zip(padding, entry["generate"], strict=True)])
    mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding])
    generated = model.generate(ids, mask, max_new_tokens=entry["generate"][0]["max_new_tokens"])
    for row, recorded in zip(generated, entry["generate"], strict=True):
        expected = torch.tensor(recorded["output_ids"])
        assert new_tokens(row, longest, 0) == new_tokens(expected, len(recorded["input_ids"]), 0)


# --- forward against the naive reference ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_matches_naive(family, layout):
    assert_matches_naive(build(family), draw(LAYOUTS[layout]))


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "gemma2"])
def test_sliding_window_is_at_work(family):
    """Else the comparison above would say nothing of sliding windows."""
    batch = draw(LAYOUTS["aligned"])
    base = tiny_model(family)[0]
    assert base.config.sliding_window == WINDOW
    wide = tiny_model(family, sliding_window=POSITIONS)[0]
    assert not near(wrap(base)(**batch).logits, wrap(wide)(**batch).logits)


ROW = st.tuples(st.integers(0, 4), st.text("qLa", min_size=1, max_size=10))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=1, max_size=4), family=st.sampled_from(["gpt2", "llama"]))
def test_any_layout_matches_naive(rows, family):
    texts = ["." * left + "q" + text + "a" for left, text in rows]
    width = max(map(len, texts))
    assert_matches_naive(build(family), draw([text.ljust(width, ".") for text in texts]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "setting",
    [*({"name": "layer", "layer": layer} for layer in (-1, 0, 1, 2)), "norm", "projection", {"name": "projection", "width": 5}],
    ids=str,
)
def test_thought_maps_match_naive(family, setting):
    base = tiny_model(family)[0]
    model, batch = mapped(base, setting), draw(LAYOUTS["ragged"])
    name = setting if isinstance(setting, str) else setting["name"]
    layer = -1 if isinstance(setting, str) else setting.get("layer", -1)
    thought_of = naive_map(base, name, layer, dict(model.thought_map.named_parameters()))
    assert_matches_naive(model, batch, thought_of)
    if layer not in (-1, 2) or name != "layer":  # the last of two layers is the default
        assert not near(model(**batch).loss, build(family)(**batch).loss)
    prompt = draw(PROMPTS[:1])["input_ids"][:, 6:]
    expected = naive_decode(base, IDS, prompt, 8, thought_of=thought_of)
    assert torch.equal(model.generate(prompt, max_new_tokens=8), expected.tokens)
    for tokens in model.generate_with_branching(prompt, None, 8, 2, noise_scale=0.0)[0]:
        assert torch.equal(tokens, expected.tokens[0, prompt.shape[1] :])


def test_states_are_asked_for_only_where_a_map_reads_them():
    for setting, wanted in [("identity", False), ("projection", False), ({"name": "layer", "layer": 1}, True)]:
        model, asked = mapped(tiny_model("gpt2")[0], setting), []
        model.decoder.register_forward_pre_hook(
            lambda _module, _args, given, asked=asked: asked.append(given["output_hidden_states"]), with_kwargs=True
        )
        model(**draw(LAYOUTS["single row"]))
        assert set(asked) == {wanted}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_given_position_ids_are_used(family):
    batch = draw(LAYOUTS["ragged"])
    batch["position_ids"] = 2 * batch["position_ids"] + torch.tensor([[0], [3], [5], [7]])
    assert_matches_naive(build(family), batch)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_defaults(family):
    """Without mask nothing is padding, without positions the real tokens are counted, without labels there is no loss."""
    model, batch = build(family), draw(LAYOUTS["ragged"])
    full = model(**batch)
    outputs = model(batch["input_ids"], batch["attention_mask"])
    assert outputs.loss is None
    assert torch.equal(outputs.logits, full.logits)
    assert torch.equal(outputs.inputs_embeds, full.inputs_embeds)
    unpadded = draw(LAYOUTS["single row"])
    assert torch.equal(model(unpadded["input_ids"]).logits, model(**unpadded).logits)


def test_count_positions():
    batch = draw(LAYOUTS["ragged"])
    real = batch["attention_mask"].bool()
    assert torch.equal(count_positions(batch["attention_mask"])[real], batch["position_ids"][real])


@pytest.mark.parametrize(
    ("family", "layout"), [*product(FAMILIES, ["ragged"]), *product(["gpt2"], sorted(LAYOUTS.keys() - {"ragged"}))]
)
def test_labelled_only(family, layout):
    """The same loss and gradients; the head sees exactly the positions that predict a label."""
    model, batch = build(family), draw(LAYOUTS[layout])
    full = model(**batch)
    expected = gradients(model.base_causallm, full.loss)
    counter = PassCounter(model)
    outputs = model(**batch, labelled_only=True)
    assert outputs.logits is None
    assert counter.projected == [(int((batch["labels"] != -100).sum()), outputs.inputs_embeds.shape[-1])]
    assert_near(outputs.loss, full.loss)
    assert_same_gradients(gradients(model.base_causallm, outputs.loss), expected)


def test_many_logits_are_taken_in_pieces(monkeypatch):
    """The same loss and gradients from three positions at a time, whose logits are not kept for the backward pass."""
    model, batch = build("llama"), draw(LAYOUTS["ragged"])
    whole = model(**batch, labelled_only=True)
    expected = gradients(model.base_causallm, whole.loss)
    monkeypatch.setattr(activation_checkpointing, "MOST_LOGITS", 3 * VOCABULARY + 1)
    counter, kept = PassCounter(model), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        loss = model(**batch, labelled_only=True).loss
    count = int((batch["labels"] != -100).sum())
    assert [rows for rows, _ in counter.projected] == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
    assert not [shape for shape in kept if len(shape) == 2 and shape[0] <= count and shape[1] == VOCABULARY]
    assert_near(loss, whole.loss)
    assert_same_gradients(gradients(model.base_causallm, loss), expected)


@pytest.mark.parametrize("labelled_only", [False, True])
def test_num_items_in_batch(labelled_only):
    """Halves of a batch, divided by the number of labels of the whole, add up to the whole: loss and gradients."""
    model, batch = build("llama"), draw(LAYOUTS["ragged"])
    whole = model(**batch)
    expected = gradients(model.base_causallm, whole.loss)
    items = (batch["labels"] != -100).sum()
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    loss = sum(model(**half, labelled_only=labelled_only, num_items_in_batch=items).loss for half in halves)
    assert_near(loss, whole.loss)
    assert_same_gradients(gradients(model.base_causallm, loss), expected)


def test_no_labels_in_batch():
    """A mean over nothing is 0, not NaN, and has a gradient of 0 that a sharded model can reduce."""
    model, batch = build("llama"), draw(LAYOUTS["ragged"])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, labelled_only=True).loss
    assert loss.item() == 0
    loss.backward()
    assert model.embedding.weight.grad.abs().max() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes(layout):
    """One pass up to the first latent of any row, then one for every column with a latent; no position is computed twice."""
    model, batch = build("gpt2"), draw(LAYOUTS[layout])
    counter = PassCounter(model)
    model(**batch)
    columns = [t for t, column in enumerate(zip(*LAYOUTS[layout], strict=True)) if "L" in column]
    edges = [0, *columns, len(LAYOUTS[layout][0])]
    assert counter.lengths == [end - start for start, end in pairwise(edges)]


def test_embeddings_are_not_written_in_place():
    model, batch = build("llama"), draw(LAYOUTS["scattered"])
    looked_up = []
    model.embedding.register_forward_hook(lambda _module, _args, output: looked_up.append(output))
    version, weight = model.embedding.weight._version, model.embedding.weight.detach().clone()
    outputs = model(**batch)
    before = [embeds.detach().clone() for embeds in looked_up]
    outputs.loss.backward()
    assert looked_up
    assert all(embeds._version == 0 for embeds in looked_up)
    assert model.embedding.weight._version == version
    assert torch.equal(model.embedding.weight, weight)
    latent = batch["input_ids"] == IDS.latent
    assert torch.equal(outputs.inputs_embeds[~latent], torch.cat(before, dim=1)[~latent])
    assert not torch.allclose(outputs.inputs_embeds[latent], torch.cat(before, dim=1)[latent])
    assert model.embedding.weight.grad[IDS.latent].abs().max() == 0  # a latent's own embedding is never read


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_is_an_error(family):
    """It drops the cache without which later passes see nothing of the earlier ones."""
    model, batch = build(family), draw(LAYOUTS["ragged"])
    model.base_causallm.gradient_checkpointing_enable()
    expected = model.eval()(**batch).loss  # it acts in training mode only
    assert_close(expected, build(family)(**batch).loss)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(**batch)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.generate(draw(PROMPTS)["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_works_without_latents(family):
    model, batch = build(family), draw(LAYOUTS["no latents"])
    expected = gradients(model.base_causallm, model(**batch).loss)
    model.base_causallm.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model.base_causallm, model.train()(**batch).loss), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
@pytest.mark.parametrize("pure", [False, True])
def test_bfloat16(family, pure):
    """Float32 weights under autocast, and bfloat16 weights: the loss is float32 and near that of float32."""
    batch = draw(LAYOUTS["ragged"])
    expected = build(family)(**batch).loss.float()
    model = build(family, dtype=torch.bfloat16 if pure else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
        loss = model(**batch, labelled_only=True).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.05, atol=0.0)
    gradients(model.base_causallm, loss)


@pytest.mark.parametrize(
    ("row", "column"),
    [("Lqqqqa", 0), ("LLqqqa", 0), ("..Lqqa", 2)],
    ids=["first column", "two in the first columns", "after padding"],
)
def test_latent_without_a_token_before_it(row, column):
    model, batch = build("gpt2"), draw(["qqqqLa", row])
    with pytest.raises(ValueError, match=f"latent in column {column} has no token before it"):
        model(**batch)
    with pytest.raises(ValueError, match=f"latent in column {column} has no token before it"):
        model.generate(batch["input_ids"], batch["attention_mask"])


def test_labelled_only_needs_labels():
    with pytest.raises(ValueError, match="labelled_only needs labels"):
        build("gpt2")(draw(LAYOUTS["ragged"])["input_ids"], labelled_only=True)


# --- generation ---


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_matches_naive(family):
    """Batched and cached gives, token for token, what one prompt at a time without a cache gives."""
    base = tiny_model(family, tie_word_embeddings=False)[0]  # tied, random models repeat one token
    batch = draw(PROMPTS)
    width, limit = len(PROMPTS[0]), 8
    endless = naive_generate(base, IDS._replace(eos=-1), alone(batch, 0), limit)[0]
    ids = IDS._replace(eos=int(endless[-limit + 4]))  # so that a row ends early
    model = wrap(base, ids)
    generated = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=limit)
    assert torch.equal(generated[:, :width], batch["input_ids"])
    lengths = []
    for row in range(len(PROMPTS)):
        prompt = alone(batch, row)
        expected = naive_generate(base, ids, prompt, limit)[0, prompt.shape[1] :]
        lengths.append(len(expected))
        assert generated[row, width : width + len(expected)].tolist() == expected.tolist()
        assert (generated[row, width + len(expected) :] == ids.eos).all()
    assert len(set(lengths)) > 1
    assert generated.shape[1] == width + max(lengths)


def test_generate_one_row():
    base, ids = tiny_model("mistral")
    prompt = alone(draw(PROMPTS), 0)
    assert torch.equal(wrap(base).generate(prompt, max_new_tokens=10), naive_generate(base, ids, prompt, 10))


def test_more_latents_than_the_default():
    assert PROMPTS[-1].count("L") > MAX_N_LATENT


def test_generate_projects_only_sampled_positions():
    model, batch = build("llama"), draw(PROMPTS)
    model.eos_token_id = -1
    counter = PassCounter(model)
    model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6)
    columns = sum("L" in column for column in zip(*PROMPTS, strict=True))
    assert counter.projected == 6 * [(len(PROMPTS), 32)]
    assert len(counter.lengths) == 1 + columns + 5  # the last token is not read again
    assert sum(counter.lengths) == len(PROMPTS[0]) + 5


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss", "gemma2"])
def test_output_embedding(family, monkeypatch):
    """Fed to the base model in one pass, the returned embeddings give the logits every new token was taken from."""
    model, batch = build(family, tie_word_embeddings=False), draw(PROMPTS)
    model.eos_token_id = -1
    width, limit = len(PROMPTS[0]), 8
    sampled_from = []
    project = model.project
    monkeypatch.setattr(model, "project", lambda hidden: sampled_from.append(project(hidden)) or sampled_from[-1])
    ids, embeds = model.generate(batch["input_ids"], batch["attention_mask"], limit, output_embedding=True)
    monkeypatch.undo()
    assert torch.equal(ids, model.generate(batch["input_ids"], batch["attention_mask"], limit))
    assert ids.shape == (len(PROMPTS), width + limit)
    assert embeds.shape == (*ids.shape, model.embedding.weight.shape[1])
    assert_close(embeds[:, width:], model.embedding(ids[:, width:]))
    assert_near(embeds[:, :width], model(batch["input_ids"], batch["attention_mask"]).inputs_embeds)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, width:])], dim=1)
    logits = model.base_causallm(inputs_embeds=embeds, attention_mask=mask, position_ids=count_positions(mask)).logits
    assert_near(torch.stack(sampled_from, dim=1), logits[:, width - 1 : -1])


def test_end_of_sequence_comes_first():
    base, ids = tiny_model("llama")
    prompt = draw(PROMPTS[1:2])["input_ids"]
    first = int(naive_generate(base, ids, prompt, 1)[0, -1])
    generated = wrap(base, ids._replace(eos=first)).generate(prompt, max_new_tokens=12)
    assert generated[0].tolist() == [*prompt[0].tolist(), first]


def test_one_new_token():
    base, ids = tiny_model("llama")
    prompt = draw(PROMPTS[1:2])["input_ids"]
    assert torch.equal(wrap(base).generate(prompt, max_new_tokens=1), naive_generate(base, ids, prompt, 1))


class BusyRank:
    """`max_over_ranks` as seen beside a rank that needs more latent passes and decodes longer."""

    def __init__(self, extra_passes: int, tokens: int):
        self.extra_passes, self.tokens, self.calls = extra_passes, tokens, 0

    def __call__(self, value: int) -> int:
        self.calls += 1
        if self.calls == 1:
            return value + self.extra_passes
        return max(value, int(self.calls - 1 < self.tokens))


@pytest.mark.parametrize("extra", [0, 3])
def test_synced_gpus(extra):
    """A rank beside a busier one takes as many passes, and gives the same tokens."""
    base, ids = tiny_model("llama")
    batch = draw(PROMPTS)
    prompts = batch["input_ids"][:2], batch["attention_mask"][:2]
    free = wrap(base, ids._replace(eos=-1)).generate(*prompts, max_new_tokens=3)
    model = wrap(base, ids._replace(eos=int(free[0, -1])))
    own = model.generate(*prompts, max_new_tokens=10)
    counter = PassCounter(model)
    model.max_over_ranks = BusyRank(extra, tokens=10)
    synced = model.generate(*prompts, max_new_tokens=10, synced_gpus=True)
    columns = sum("L" in column for column in zip(*PROMPTS[:2], strict=True))
    assert len(counter.lengths) == 1 + columns + extra + 9
    assert synced.shape[1] == len(PROMPTS[0]) + 10
    assert torch.equal(synced[:, : own.shape[1]], own)
    for row in synced:
        kept = len(PROMPTS[0]) + len(new_tokens(row, len(PROMPTS[0]), model.eos_token_id))
        assert (row[kept:] == model.eos_token_id).all()


def test_synced_gpus_alone():
    """In one process it changes nothing; without it, decoding waits for no other rank."""
    model, batch = build("gpt2"), draw(PROMPTS)
    arguments = batch["input_ids"], batch["attention_mask"], 8
    expected = model.generate(*arguments)
    assert torch.equal(model.generate(*arguments, synced_gpus=True), expected)
    model.max_over_ranks = BusyRank(2, tokens=8)
    assert torch.equal(model.generate(*arguments), expected)
    assert model.max_over_ranks.calls <= 1


@pytest.mark.parametrize("layout", ["ragged", "no latents"])
def test_training_beside_a_rank_with_more_latents(layout):
    """As many passes forward and backward as there, and the same loss, logits and gradients as alone."""
    model, batch = build("llama"), draw(LAYOUTS[layout])
    alone = model(**batch, labelled_only=True)
    expected = gradients(model.base_causallm, alone.loss)
    model.max_over_ranks = BusyRank(3, tokens=0)
    counter, backwards = PassCounter(model), []
    model.base_causallm.base_model.register_forward_hook(
        lambda _module, _args, outputs: outputs.last_hidden_state.register_hook(backwards.append) and None
    )
    outputs = model(**batch, labelled_only=True)
    assert torch.equal(outputs.loss, alone.loss)
    assert_same_gradients(gradients(model.base_causallm, outputs.loss), expected)
    assert counter.lengths[-3:] == [1, 1, 1]
    assert len(backwards) == len(counter.lengths)


# --- sampling ---


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_sample_does_not_depend_on_the_batch(family):
    base = tiny_model(family, tie_word_embeddings=False)[0]
    model, batch = wrap(base, IDS._replace(eos=-1)), draw(PROMPTS)
    how = {"max_new_tokens": 10, "temperature": 1.0, "top_p": 0.9}
    together = model.generate(batch["input_ids"], batch["attention_mask"], **how, generator=seeded(0, 1, 2, 3, 4))
    for row in range(len(PROMPTS)):
        single = model.generate(alone(batch, row), **how, generator=seeded(row))
        assert together[row, -10:].tolist() == single[0, -10:].tolist()
    other = model.generate(batch["input_ids"], batch["attention_mask"], **how, generator=seeded(5, 6, 7, 8, 9))
    assert not (together == other).all(dim=1).any()


def test_sample_repeats_with_its_generator():
    model, batch = build("llama"), draw(PROMPTS)
    how = {"max_new_tokens": 10, "temperature": 1.0}
    first, second, third = (
        model.generate(batch["input_ids"], batch["attention_mask"], **how, generator=seeded(seed)[0]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first[:, :22], third[:, :22])


@pytest.mark.parametrize("how", [{"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}], ids=str)
def test_sharp_sampling_is_greedy(how):
    model, batch = build("llama", tie_word_embeddings=False), draw(PROMPTS)
    arguments = batch["input_ids"], batch["attention_mask"], 10
    assert torch.equal(model.generate(*arguments, **how), model.generate(*arguments))


DRAWS = 20_000


def frequencies(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    tokens = sample(logits.expand(DRAWS, -1), temperature, top_p, torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies(temperature):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    expected = (logits.double() / temperature).softmax(dim=0) * DRAWS
    assert chisquare(frequencies(logits, temperature, 1.0), expected).pvalue > 0.01


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_nucleus_frequencies(top_p):
    """The smallest set of tokens whose mass reaches top_p, with its probabilities scaled up to 1."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    probabilities = logits.double().softmax(dim=0)
    nucleus: list[int] = []
    for token in probabilities.argsort(descending=True).tolist():
        if sum(probabilities[nucleus]) < top_p:
            nucleus.append(token)
    counts = frequencies(logits, 1.0, top_p)
    assert counts[nucleus].sum() == DRAWS
    expected = probabilities[nucleus] / probabilities[nucleus].sum() * DRAWS
    if len(nucleus) > 1:
        assert chisquare(counts[nucleus], expected).pvalue > 0.01


def test_nucleus_holds_at_the_upper_end(monkeypatch):
    """A draw that rounds up to the whole mass still gives the last token of the nucleus."""
    monkeypatch.setattr("generation.uniform", lambda rows, _generator, _device: torch.ones(rows))
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert sample(logits, 1.0, 0.6, None).tolist() == [2]
    assert sample(logits, 1.0, 1.0, None).tolist() == [3]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
def test_nucleus_of_the_likely_tokens_is_the_nucleus(top_p):
    """Whether the first few tokens are enough for all rows, for some or for none."""
    probabilities = (torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7)[:, None]).softmax(
        dim=-1
    )
    assert torch.equal(nucleus(probabilities, top_p, likely=4), nucleus(probabilities, top_p, likely=40))
    masses = nucleus(probabilities, top_p).sum(dim=-1)
    assert (masses >= top_p - 1e-6).all()
    for row, mass in zip(nucleus(probabilities, top_p), masses, strict=True):
        assert mass - row[row > 0].min() < top_p


def test_impossible_tokens_are_never_sampled():
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[[3, 5]] = 0.0
    assert frequencies(logits, 1.0, 1.0).nonzero().flatten().tolist() == [3, 5]


# --- errors of generation ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.5}, r"temperature is -0\.5; it must not be negative"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1\.5; it must be in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": POSITIONS}, f"the model has {POSITIONS}"),
        ({"temperature": 1.0, "generator": seeded(0, 1)}, "2 generators for 5 rows"),
    ],
    ids=lambda value: str(value).split(" object at")[0],  # an address differs in each worker
)
def test_generate_refuses(arguments, message):
    batch = draw(PROMPTS)
    with pytest.raises(ValueError, match=message):
        build("gpt2").generate(batch["input_ids"], batch["attention_mask"], **arguments)


def test_generate_up_to_the_last_position():
    model, batch = build("gpt2"), draw(PROMPTS)
    model.eos_token_id = -1
    limit = POSITIONS - len(PROMPTS[1])
    generated = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=limit)
    assert generated.shape[1] == POSITIONS


def test_generate_refuses_right_padding():
    batch = draw(["qqqsLLe", "qqsLe.."])
    with pytest.raises(ValueError, match="padded on the left"):
        build("gpt2").generate(batch["input_ids"], batch["attention_mask"])


# --- the head ---


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_projection(family):
    verify_projection(build(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_projection_finds_unknown_scalings(family, monkeypatch):
    model = build(family)
    forward = model.base_causallm.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs

    monkeypatch.setattr(model.base_causallm, "forward", scaled)
    with pytest.raises(ValueError, match=model.base_causallm.config.model_type):
        verify_projection(model)


@pytest.mark.parametrize(
    ("family", "setting"),
    [("cohere", "logit_scale"), ("granite", "logits_scaling"), ("gemma2", "final_logit_softcapping")],
)
def test_scalings_are_at_work(family, setting):
    """Else the families above would say nothing of them."""
    other = build(family, **{setting: 7.0})
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).to(other.embedding.weight.dtype)
    assert not near(build(family).project(hidden), other.project(hidden))


def test_verify_projection_of_a_model_with_dropout():
    """A model made from a configuration is in training mode; dropout must not look like an unknown scaling."""
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    _check_usable(model, "gpt2")
    assert model.base_causallm.training
