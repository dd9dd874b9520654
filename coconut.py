"""Chain of Continuous Thought (Coconut, arXiv 2412.06769, section 3): a causal language model that reasons by feeding its
last hidden state back as its next input embedding.

Shapes: B rows of the batch, T positions, D width of the model, V vocabulary, N labelled positions, K branches, S scales.

A *latent* is a position that holds `latent_token_id`; its input embedding is not looked up but is the *thought*: the
hidden state at the position before it. All columns up to the first latent are one pass of the base model, then every
column that holds a latent in some row begins the next pass, and keys and values are cached between passes.

Noise goes into a thought right before it is fed back; the hidden states and the cache it came from stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from generation import (
    Sampling,
    all_branches,
    branch_point,
    check_generate,
    count_positions,
    decode,
    dropout,
    gather_branches,
    generate_from,
    idle_passes,
    jacobi_passes,
    missing_passes,
    pass_bounds,
    question_indices,
    with_latents,
)
from noise import Scales, sampling_generator
from states import Branches, Details, Outputs, Pass, Prompt, Thinking
from systems.activation_checkpointing import summed_cross_entropy
from systems.cache import GrowingCache
from systems.last_layer import LastLayer
from thoughts import Noise, ThoughtInterventions, ThoughtMap, gather_thoughts, published_noise

IGNORE_INDEX = -100  # label of positions that carry no loss, as in torch.nn.functional.cross_entropy


class Coconut(nn.Module):
    """Wraps any causal language model of transformers.

    Args:
        base_causallm: an `AutoModelForCausalLM`.
        latent_token_id, start_latent_id, end_latent_id: ids of `<|latent|>`, `<|start-latent|>`, `<|end-latent|>`.
        eos_token_id: the token that ends a generation; finished rows are filled up with it.
        thought_map: what is fed back; None is the last hidden state as it is.
        jacobi_iterations: thoughts are computed together, so many times (`jacobi_passes`); None is one after the other.
        attend_padding: all passes but the first also attend to padding, as in the released CODI, which gives its latents and
            answers no attention mask.

    Attributes:
        max_over_ranks: maximum of an int over all processes. Whoever shards the model sets it, so that all processes take
            equally many passes; by itself this module knows nothing of process groups.
        before_last_backward: called in the backward pass when only the gradients of the first pass are still to come; all
            later passes depend on it.
        last_layer: leaves out what `forward` with `labelled_only` and generation do not read (`systems.last_layer`).
        step_decoder: the second model of SIM-CoT (`methods.step_supervision`), in training alone.
        trained: what `from_pretrained` knows of the training (`systems.pretrained.Trained`).
    """

    def __init__(
        self,
        base_causallm: PreTrainedModel,
        latent_token_id: int,
        start_latent_id: int,
        end_latent_id: int,
        eos_token_id: int,
        thought_map: ThoughtMap | None = None,
        jacobi_iterations: int | None = None,
        attend_padding: bool = False,
    ) -> None:
        super().__init__()
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.thought_map = ThoughtMap() if thought_map is None else thought_map
        self.jacobi_iterations = jacobi_iterations
        self.attend_padding = attend_padding
        self.max_over_ranks: Callable[[int], int] = int
        self.before_last_backward: Callable[[], None] | None = None
        self.last_layer: LastLayer | None = None
        self.step_decoder: nn.Module | None = None
        self.trained: Any = None

    @classmethod
    def from_pretrained(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> Coconut:
        """A checkpoint, a run's directory (its newest one) or RUN@best, with thought map and tokenizer, to be evaluated.

        It is on the CPU. Raises UserError if there is none, or it is not what was saved.
        """
        from systems.pretrained import load

        return load(str(source), dtype)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a checkpoint directory that is not there yet; the inverse of `from_pretrained`."""
        from systems.pretrained import save

        save(self, Path(directory))

    def answer(
        self, question: str, max_new_tokens: int = 128, latents: int | Literal["max"] = "max", return_thoughts: bool = False
    ) -> str | tuple[str, Tensor]:
        """The greedy answer of a model from `from_pretrained`, with its steps if its stage writes any.

        latents: how many to think with; "max" is as many as the stage has. return_thoughts: also return the thoughts (N, D).
        """
        from systems.pretrained import answer

        text, thoughts = answer(self, question, max_new_tokens, latents)
        return (text, thoughts) if return_thoughts else text

    @property
    def embedding(self) -> nn.Embedding:
        return cast("nn.Embedding", self.base_causallm.get_input_embeddings())

    @property
    def decoder(self) -> nn.Module:
        """The base model without its language-model head."""
        inner = self.base_causallm.base_model
        return inner if inner is not self.base_causallm else self.base_causallm.model  # Llama 4 and others name no prefix

    @property
    def max_positions(self) -> int | None:
        """Positions that the base model was made for; None where its configuration sets no limit."""
        return getattr(self.base_causallm.config, "max_position_embeddings", None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        labelled_only: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        noise: Noise | None = None,
        noise_scale: Scales | None = None,
        noise_type: str = "gaussian",
        noise_direction: str | None = None,
        apply_noise_to_all_passes: bool = False,
        seed: int | None = None,
        question_index: int | Sequence[int] | None = None,
        return_details: bool = False,
        all_layers: bool = False,
    ) -> Outputs | tuple[Outputs, Details]:
        """Latent passes, then next-token logits and their mean cross entropy over the labelled positions.

        Args:
            input_ids: (B, T) int64. attention_mask: (B, T), 0 on padding; all ones if None.
            labels: (B, T) int64, `IGNORE_INDEX` where no loss is taken; shifted here.
            position_ids: (B, T) int64; counted from the attention mask if None.
            labelled_only: the loss alone; only the N positions that predict a label are projected onto the vocabulary.
            num_items_in_batch: divide the summed cross entropy by this instead of by N, for means over several batches.
            noise, noise_scale, noise_type, noise_direction, apply_noise_to_all_passes, seed, question_index: as in `generate`.
            return_details: also return the thoughts and their noise. all_layers: and every layer's states in the last pass.

        Raises:
            ValueError: a latent with no real token before it; `labelled_only` without labels; noise that there is not.
        """
        if labelled_only and labels is None:
            raise ValueError("labelled_only needs labels")
        if noise is None:
            noise = published_noise(noise_scale, noise_type, noise_direction, apply_noise_to_all_passes)
        changes = self._with_noise(input_ids, noise, seed, question_index)
        with self.reading(labels) if labelled_only and not return_details else nullcontext():
            thinking = self.think(input_ids, attention_mask, position_ids, interventions=changes, all_layers=all_layers)
        outputs = self._outputs(thinking, labels, labelled_only, num_items_in_batch)
        return (outputs, self._details(input_ids, thinking, changes)) if return_details else outputs

    def _outputs(
        self, thinking: Thinking, labels: Tensor | None, labelled_only: bool, num_items_in_batch: Tensor | int | None
    ) -> Outputs:
        """Logits, and with labels the loss."""
        if labels is None:
            return Outputs(None, thinking.inputs_embeds, self.project(thinking.hidden))
        predicts = labels[:, 1:] != IGNORE_INDEX  # (B, T-1): position t predicts the label at t + 1
        targets = labels[:, 1:][predicts]  # (N,)
        items = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        if labelled_only:
            vocabulary = self.base_causallm.config.get_text_config().vocab_size
            total = summed_cross_entropy(self.project, thinking.hidden[:, :-1][predicts], targets, vocabulary)
            return Outputs(total / items, thinking.inputs_embeds, None)
        logits = self.project(thinking.hidden)  # (B, T, V)
        total = F.cross_entropy(logits[:, :-1][predicts].float(), targets, reduction="sum")
        return Outputs(total / items, thinking.inputs_embeds, logits)

    def think(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep_cache: bool = False,
        interventions: ThoughtInterventions | None = None,
        all_layers: bool = False,
    ) -> Thinking:
        """All latent passes of (B, T) tokens, without the language-model head."""
        prompt = self.prompt(input_ids, attention_mask, position_ids)
        bounds = pass_bounds(prompt.latent, prompt.mask)
        idle = missing_passes(self, bounds)  # agreed on before the first pass gathers anything
        cache = GrowingCache() if keep_cache or len(bounds) > 1 else None
        embeds = self.embedding(input_ids)
        thinking = self.passes(embeds, prompt, bounds, cache, interventions=interventions, all_layers=all_layers)
        nothing = idle_passes(self, idle, with_map=torch.is_grad_enabled())
        return thinking if nothing is None else thinking._replace(hidden=thinking.hidden + nothing)

    def prompt(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None) -> Prompt:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = count_positions(mask) if position_ids is None else position_ids
        return Prompt(input_ids == self.latent_token_id, mask, positions)

    def passes(
        self,
        embeds: Tensor,
        prompt: Prompt,
        bounds: list[tuple[int, int]],
        cache: DynamicCache | None,
        before: Sequence[Tensor] | None = None,
        interventions: ThoughtInterventions | None = None,
        all_layers: bool = False,
    ) -> Thinking:
        """One pass for each of the bounds.

        embeds: (B, T, D) of their columns alone. before: what the map reads, each (B, 1, D), at the column before them.
        """
        if self.jacobi_iterations is not None and (before is not None or len(bounds) > 1):  # there are latents
            return jacobi_passes(self, embeds, prompt, bounds, cache, before, interventions, all_layers)
        hidden, filled, layers = [], [], cast("Sequence[Tensor]", ())
        for (start, end), segment in zip(bounds, embeds.split([end - start for start, end in bounds], dim=1), strict=True):
            if before is not None:
                thought = self.thought_map(before)  # (B, 1, D)
                if interventions is not None:
                    thought = interventions.apply(thought, start)
                first = torch.where(prompt.latent[:, start, None, None], thought.to(segment.dtype), segment[:, :1])  # (B, 1, D)
                segment = torch.cat([first, segment[:, 1:]], dim=1)
            place = (prompt.mask[:, :end], prompt.positions[:, start:end])
            with dropout(self, interventions, start, end):
                states, given, layers = self.base_pass(segment, *place, cache, all_layers and end == bounds[-1][1])
            before = [states[:, -1:] for states in given]
            if start == 0 and self.before_last_backward is not None and states.requires_grad:
                states.register_hook(self.announce_last_backward)
            hidden.append(states)
            filled.append(segment)
        return Thinking(torch.cat(hidden, dim=1), torch.cat(filled, dim=1), cache, cast("Sequence[Tensor]", before), layers)

    def base_pass(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: DynamicCache | None,
        all_layers: bool = False,
    ) -> Pass:
        """One pass of the decoder."""
        layers = self.thought_map.layers
        if self.attend_padding and cache is not None and cache.get_seq_length():
            attention_mask = torch.ones_like(attention_mask)
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=all_layers or any(layer != -1 for layer in layers),
        )
        # Gradient checkpointing makes transformers drop the cache with no more than a warning: wrong thoughts.
        if cache is not None and cache.get_seq_length() != attention_mask.shape[1]:
            raise ValueError("the base model keeps no key-value cache, or gradient checkpointing has turned it off")
        device = inputs_embeds.device  # the last layers of a model that is spread over devices are on another one
        last = outputs.last_hidden_state.to(device)
        before = [last if layer == -1 else outputs.hidden_states[layer].to(device) for layer in layers]
        return Pass(last, before, outputs.hidden_states if all_layers else ())

    def reading(self, labels: Tensor | None = None) -> AbstractContextManager[None]:
        """In it nobody reads last hidden states but those before the labels (B, T), if given, and the last one of each pass."""
        read = None if labels is None else labels[:, 1:] != IGNORE_INDEX
        return nullcontext() if self.last_layer is None else self.last_layer.reading(read)

    def gathered(self, compute: Callable[[], Any]) -> Any:
        """What a function computes with embeddings, thought map and head; sharded parameters are whole in it."""
        return compute()

    def announce_last_backward(self, grad: Tensor) -> None:
        if self.before_last_backward is not None:
            self.before_last_backward()

    def _with_noise(
        self, input_ids: Tensor, noise: Noise | None, seed: int | None, question_index: int | Sequence[int] | None
    ) -> ThoughtInterventions | None:
        if noise is None:
            return None
        questions = question_indices(question_index, len(input_ids))
        return ThoughtInterventions.of_noise(noise, input_ids == self.latent_token_id, seed or 0, questions)

    def _details(self, input_ids: Tensor, thinking: Thinking, changes: ThoughtInterventions | None) -> Details:
        latent = input_ids == self.latent_token_id
        infos = [[] for _ in latent] if changes is None else changes.infos
        thoughts = gather_thoughts(thinking.inputs_embeds, latent)
        return Details(thoughts, latent.sum(dim=1), infos, thinking.hidden, thinking.layers, thinking.cache)

    def project(self, hidden: Tensor) -> Tensor:
        """Language-model head on hidden states (..., D) -> logits (..., V), with the scalings some families apply after it."""
        logits = self.base_causallm.get_output_embeddings()(hidden).to(hidden.device)
        config = self.base_causallm.config
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        output_embedding: bool = False,
        synced_gpus: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Noise | None = None,
        noise_scale: Scales | None = None,
        noise_type: str = "gaussian",
        noise_direction: str | None = None,
        apply_noise_to_all_passes: bool = False,
        seed: int | None = None,
        question_index: int | Sequence[int] | None = None,
        inserted_latents: int | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor | Details, ...]:
        """Think, then decode up to the end-of-sequence token, for all rows at once and with a key-value cache.

        Args:
            input_ids: (B, T) int64, padded on the left. attention_mask: (B, T), 0 on padding; all ones if None.
            max_new_tokens: at most this many tokens are added; a row ends at `eos_token_id`, also when it comes first.
            output_embedding: also return the input embeddings, (B, T + new, D), with those of inserted latents.
            synced_gpus: decode as long as the slowest process does (needed when parameters are sharded).
            temperature: 0 is greedy. top_p: smallest set of tokens with this probability mass (arXiv 1904.09751).
            generator: for sampling; one per row makes a row's sample independent of the rest of the batch.
            noise: what is added to the thoughts. The published code says it in four arguments, which count without `noise`:
            noise_scale: perturb the first thought of each row, at one scale or one for each row; None is no noise.
            noise_type, noise_direction: see `noise.apply_noise_to_hidden_states`.
            apply_noise_to_all_passes: perturb every thought instead of the first.
            seed: of the noise, 0 if None; and, where given without generators, of the samples of each row.
            question_index: of each row in its data set, by default its place in the batch. A row's noise, and its samples
                from the seed, depend on the seed and this alone.
            inserted_latents: so many latents go between the two markers in rows where they stand side by side
                (`insert_latents`), for models that were not trained with them.
            return_details: also return the thoughts and their noise.

        Returns:
            (B, T + new) int64: prompt as given and new tokens; rows that ended early are filled up with `eos_token_id`.
            With `output_embedding`, `return_details` or both a tuple of it, the embeddings and `Details`.

        Raises:
            ValueError: padding on the right, more positions than the model has, a setting out of range.
        """
        ids, mask = with_latents(self, input_ids, attention_mask, inserted_latents)
        sampling = Sampling(temperature, top_p, generator)
        check_generate(self, mask, max_new_tokens, temperature, top_p)
        if noise is None:
            noise = published_noise(noise_scale, noise_type, noise_direction, apply_noise_to_all_passes)
        changes = self._with_noise(ids, noise, seed, question_index)
        if seed is not None and generator is None:
            generators = [sampling_generator(seed, index, 0) for index in question_indices(question_index, len(ids))]
            sampling = sampling._replace(generator=generators)
        with nullcontext() if return_details else self.reading():
            thinking = self.think(ids, mask, keep_cache=True, interventions=changes)
        new = decode(self, thinking.hidden[:, -1], thinking.cache, mask, max_new_tokens, sampling, synced_gpus).tokens
        tokens = torch.cat([input_ids, new], dim=1)
        returned: list[Tensor | Details] = [tokens]
        if output_embedding:
            returned.append(torch.cat([thinking.inputs_embeds, self.embedding(new)], dim=1))
        if return_details:
            returned.append(self._details(ids, thinking._replace(cache=None), changes))
        return tuple(returned) if len(returned) > 1 else tokens

    @torch.no_grad()
    def generate_with_branching(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        num_branches: int = 5,
        temperature: float = 0.0,
        top_p: float = 1.0,
        noise_scale: Scales = 0.1,
        noise_type: str = "gaussian",
        noise_direction: str | None = None,
        noise_at_step: int = 1,
        schedule: str = "none",
        shared_noise: bool = False,
        seed: int = 0,
        question_index: int | Sequence[int] | None = None,
        inserted_latents: int | None = None,
        synced_gpus: bool = False,
        return_details: bool = False,
    ) -> Tensor | Branches:
        """Think up to a thought once, perturb it in K ways, and think and decode on from each (NoisyCoconut, arXiv 2605.08221).

        The prompt and the passes that all branches share are computed once for each question; then its cache is copied, and
        all branches of all questions and scales go on as rows of one batch. A row with fewer latents than `noise_at_step`
        gets no noise; its branches differ by sampling alone.

        Args:
            input_ids, attention_mask, max_new_tokens, temperature, top_p, inserted_latents, synced_gpus: as in `generate`.
            num_branches: K.
            noise_scale: one scale, or S of them to be tried at the same time, on the same draws.
            noise_type, noise_direction: see `noise.apply_noise_to_hidden_states`.
            noise_at_step: the thought that is perturbed, counted from 1.
            schedule: the noise in the thoughts after that one, see `noise.schedule_factor`.
            shared_noise: one noise vector for all branches, which then differ by sampling alone.
            seed, question_index: the noise of a branch depends on these, the branch and the pass alone, its samples on
                these and the branch. question_index is that of each row in its data set, by default its place in the batch.

        Returns:
            (B, K, new) int64: the new tokens of each branch, filled up with `eos_token_id`; (B, S, K, new) for S scales.
            With `return_details` `Branches`, of which they are the first.

        Raises:
            ValueError: padding on the right, more positions than the model has, a setting out of range.
        """
        scale = torch.as_tensor(noise_scale, dtype=torch.float64)
        shape = torch.Size([len(input_ids), *scale.shape, num_branches])  # (B, K) or (B, S, K)
        noise = Noise(scale.flatten(), noise_type, noise_direction, noise_at_step, schedule)
        rows = all_branches(question_indices(question_index, len(input_ids)), noise, num_branches, shared_noise, temperature)
        point = branch_point(self, input_ids, attention_mask, noise_at_step, inserted_latents)
        generated = generate_from(self, point, rows, max_new_tokens, top_p, seed, synced_gpus, return_details)
        if not return_details:
            return generated.tokens.unflatten(0, shape)
        return gather_branches(generated, point.prompt.latent.sum(dim=1), noise_at_step, shape)
