"""compile: True gives the losses and gradients of the plain model, and a bounded number of graphs."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch._dynamo.utils import counters

from coconut import IGNORE_INDEX, Coconut
from systems.distributed import Parallelism, unwrap, wrap

TRAINING_GRAPHS = 4  # the columns before the first latent, one position after them, the rest, and a batch without latents
EVALUATION_GRAPHS = 4  # the same without gradients, where the rest is a pass like the first, and decoding one like a latent's


def compiled(
    family: str, backend: str, monkeypatch: pytest.MonkeyPatch, recompute: bool = False, **overrides: int
) -> tuple[Coconut, Coconut]:
    """A plain model and the same one compiled by `wrap`. recompute: with activation_checkpointing."""
    torch._dynamo.reset()
    counters.clear()
    plain_compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: plain_compile(self, **options | {"backend": backend})
    )
    pair = []
    for compile_it in (False, True):
        base, ids = tiny_model(family, **overrides)
        model = Coconut(base, ids.latent, ids.start_latent, ids.end_latent, ids.eos)
        part = Parallelism("coconut", "ddp", "pass", False, recompute and compile_it, compile_it)
        pair.append(unwrap(wrap(model, part, torch.device("cpu"))))
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0], pair[1]


def batch(model: Coconut, rows: int, columns: int, latents: int) -> dict[str, torch.Tensor]:
    """Rows of which the first is padded on the left; loss on the last five positions."""
    ids = torch.randint(2, 40, (rows, columns))
    first = columns - 6 - latents
    ids[:, first - 1], ids[:, first : first + latents], ids[:, first + latents] = (
        model.start_latent_id,
        model.latent_token_id,
        model.end_latent_id,
    )
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    labels = ids.clone()
    labels[:, : columns - 5] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses_agree(plain: Coconut, fast: Coconut, inputs: dict[str, torch.Tensor]) -> None:
    for model in (plain, fast):
        model.zero_grad()
        model(**inputs, labelled_only=True).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name
    first, second = (model(**inputs, labelled_only=True).loss.item() for model in (plain, fast))
    assert first == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_and_answers_take_a_handful_of_graphs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = compiled(family, "eager", monkeypatch)
    for rows, columns, latents in ((5, 24, 3), (5, 27, 3), (3, 22, 2), (2, 30, 6), (5, 24, 0), (6, 33, 4)):
        losses_agree(plain, fast, batch(fast, rows, columns, latents))
    assert counters["stats"]["unique_graphs"] <= TRAINING_GRAPHS
    for rows, columns, latents in ((5, 24, 3), (3, 21, 2)):
        prompt = {key: value[:, :-5] for key, value in batch(fast, rows, columns, latents).items() if key != "labels"}
        answers = [model.eval().generate(**prompt, max_new_tokens=4) for model in (plain, fast)]
        assert torch.equal(*answers)
    assert counters["stats"]["unique_graphs"] <= TRAINING_GRAPHS + EVALUATION_GRAPHS
    assert not counters["graph_break"]


def test_sizes_that_are_equal_make_more_graphs_and_all_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as heads, and as many rows as columns: more than the eight graphs at which the compiler stops by itself."""
    plain, fast = compiled("gpt2", "eager", monkeypatch, n_layer=1)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    try:
        heads = plain.base_causallm.config.n_head
        for rows in (5, heads, 22):
            losses_agree(plain, fast, batch(fast, rows, 22, 3))
            prompt = {key: value[:, :-5] for key, value in batch(fast, rows, 22, 3).items() if key != "labels"}
            assert torch.equal(*(model.eval().generate(**prompt, max_new_tokens=4) for model in (plain, fast)))
            plain.train(), fast.train()
    finally:
        torch._dynamo.config.fail_on_recompile_limit_hit = False
    assert counters["stats"]["unique_graphs"] > TRAINING_GRAPHS + EVALUATION_GRAPHS


def kept_for_backward(model: Coconut, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward pass keeps, parameters aside."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs, labelled_only=True).loss.backward()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in kept.items() if place not in parameters)


def test_with_activation_checkpointing_little_is_kept_and_losses_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third at the most of what the same graphs keep without it; they are cut in two as the real compiler does."""
    kept = []
    for recompute in (False, True):
        plain, fast = compiled("gpt2", "aot_eager_decomp_partition", monkeypatch, recompute, n_layer=1)
        inputs = batch(fast, 4, 24, 3)
        losses_agree(plain, fast, inputs)
        kept.append(kept_for_backward(fast, inputs))
    assert kept[1] < kept[0] / 3


@pytest.mark.timeout(900)  # on a busy machine the C++ compiler alone may take some minutes
@pytest.mark.parametrize("family", ["llama"])  # the compiler takes a minute; the graphs of both are compared above
def test_generated_code_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = compiled(family, "inductor", monkeypatch, num_hidden_layers=1)
    losses_agree(plain, fast, batch(fast, 3, 20, 2))
