"""The editing model as a pipeline of diffusers: words and reference pictures in, pictures out, in pixels."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux2.pipeline_output import Flux2PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedTokenizerBase

from lissom.diffusion.demo.words import MAX_WORDS, WordTable
from lissom.diffusion.pictures import to_pixels
from lissom.diffusion.references import prepare, read, reference_numbers
from lissom.errors import UserError

REFERENCES = ("joint", "set", "each")
MAX_REFERENCES = 8


class PixelEditPipeline(DiffusionPipeline):
    """Draws pictures from words and up to eight reference pictures, by flow matching on patches of pixels.

    Tokens, positions and calls of the transformer are those of diffusers' `Flux2KleinPipeline`: text counts along the
    fourth axis of positions, pixels along the second and third, and references are told apart by the first.

    Args:
        size: pixels of a side, where a call does not say.
        patch: pixels of a side of a token.
        references: what references saw when the model was trained: `joint`, everything; `set`, each other alone, which
            is what `KleinKV` needs; `each`, nothing but themselves, so that any that were read before can be combined.
    """

    model_cpu_offload_seq = "text_encoder->transformer"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: WordTable,
        tokenizer: PreTrainedTokenizerBase,
        size: int = 48,
        patch: int = 4,
        references: str = "joint",
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(size=size, patch=patch, references=references)
        if references not in REFERENCES:
            raise UserError(f"references={references!r}: expected one of {', '.join(REFERENCES)}.")
        prepare(transformer)
        self.image_processor = VaeImageProcessor(vae_scale_factor=patch, do_resize=False)

    def encode_prompt(self, prompt: Sequence[str], num_images_per_prompt: int = 1) -> torch.Tensor:
        """`[prompts * num_images_per_prompt, words, width]`."""
        found = self.tokenizer(
            list(prompt), padding="max_length", truncation=True, max_length=MAX_WORDS, return_tensors="pt"
        )
        unknown = [
            word
            for text, ids in zip(prompt, found["input_ids"], strict=True)
            for word in text.split()
            if self.tokenizer.unk_token_id in ids and word.lower() not in self.tokenizer.get_vocab()
        ]
        if unknown:
            warnings.warn(f"The model has never seen the words {', '.join(unknown)}.", stacklevel=2)
        vectors = self.text_encoder(found["input_ids"].to(self.text_encoder.device))
        return vectors.repeat_interleave(num_images_per_prompt, 0)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image] | None = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Flux2PipelineOutput | tuple[Any]:
        """Draw a picture for each prompt.

        Args:
            image: references, the same for all prompts; each may have a size of its own, and those of more pixels than
                the pipeline's size has are made smaller, as diffusers does for FLUX.2: larger ones were never seen.
            prompt: words that the model was trained with; none is an empty one.
            height, width: pixels, multiples of the patch; default: the size of the pipeline.
            sigmas: noise levels of the steps, falling from 1; default: evenly spaced.
            guidance_scale: above 1 the difference to `negative_prompt` is enlarged as many times.
            latents: noise to begin with, `[pictures, tokens, 3 * patch * patch]`.
            prompt_embeds: in the place of `prompt`, as `encode_prompt` gives them.
            output_type: `pil`, `np` (0 to 1), `pt` (0 to 1) or `latent` (tokens).
            callback_on_step_end: called with (pipeline, step, timestep, tensors); tensors that it gives back are taken.

        Raises:
            UserError: a size does not divide, there are more than eight references, or something is no picture.
        """
        prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("There is no prompt: expected at least one, which may be empty.")
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps={num_inference_steps}: expected at least 1.")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt={num_images_per_prompt}: expected at least 1.")
        device = self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompts, num_images_per_prompt)
        else:
            prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
        count = prompt_embeds.shape[0]
        asked = count // num_images_per_prompt
        guided = guidance_scale > 1
        if guided:
            others = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(others) not in (1, asked):
                raise UserError(f"{len(others)} negative prompts for {asked}: expected one, or one for each.")
            negative_embeds = self.encode_prompt(others, count // len(others))
        rows, columns = (self._patches(self.config.size if side is None else side) for side in (height, width))
        shown = None if image is None else self.encode_images(image, count)
        if latents is None:
            shape = (count, rows * columns, self.transformer.config.in_channels)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=prompt_embeds.dtype)
        latents = latents.to(device)
        image_ids = positions(rows, columns).to(device)
        text_ids = text_positions(prompt_embeds.shape[1]).to(device)
        self._set_steps(num_inference_steps, sigmas)
        takes = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            inputs: dict[str, Any] = {
                "hidden_states": latents.to(self.transformer.dtype),
                "timestep": t.expand(count).to(latents.dtype) / self.scheduler.config.num_train_timesteps,
                "img_ids": image_ids,
                "txt_ids": text_ids,
                "return_dict": False,
            }
            if shown is not None:
                inputs |= self.referring(inputs, *shown)
            with self.transformer.cache_context("cond"):
                velocity = self.transformer(encoder_hidden_states=prompt_embeds, **inputs)[0][:, -rows * columns :]
            if guided:
                with self.transformer.cache_context("uncond"):
                    other = self.transformer(encoder_hidden_states=negative_embeds, **inputs)[0][:, -rows * columns :]
                velocity = other + guidance_scale * (velocity - other)
            velocity = velocity.to(latents.dtype)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False, **takes)[0].to(latents.dtype)
            if callback_on_step_end is not None:
                given = {"latents": latents, "prompt_embeds": prompt_embeds}
                wanted = {name: given[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, step, t, wanted)
                latents, prompt_embeds = (changed.get(name, given[name]) for name in given)
        pictures = latents
        if output_type != "latent":
            pixels = from_tokens(latents.float(), rows, columns, self.config.patch)
            pictures = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return Flux2PipelineOutput(images=pictures) if return_dict else (pictures,)

    def encode_images(
        self, image: Image.Image | Sequence[Image.Image], count: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """References as the transformer sees them.

        Returns:
            Tokens `[count, tokens of all, 3 * patch * patch]`, positions `[tokens of all, 4]`, and the tokens of each.

        Raises:
            UserError: there are none or too many, or one is no picture.
        """
        images = list(image) if isinstance(image, Sequence) else [image]
        if not 1 <= len(images) <= MAX_REFERENCES:
            raise UserError(f"{len(images)} references: expected 1 to {MAX_REFERENCES}.")
        pixels = [_cut(_fitted(to_pixels(picture), self.config.size), self.config.patch)[None] for picture in images]
        tokens, places, lengths = reference_tokens(pixels, self.config.patch)
        device, dtype = self._execution_device, self.transformer.dtype
        return tokens.to(device, dtype).expand(count, -1, -1), places.to(device), lengths

    def referring(
        self, inputs: dict[str, Any], tokens: torch.Tensor, ids: torch.Tensor, lengths: list[int]
    ) -> dict[str, Any]:
        """What changes of the transformer's inputs when there are references, which are read again in every step."""
        if self.config.references == "each":
            return {"kv_cache": read(self.transformer, tokens, ids, lengths), "kv_cache_mode": "cached"}
        changed: dict[str, Any] = {"kv_cache_mode": "extract", "num_ref_tokens": tokens.shape[1]}
        return {
            "hidden_states": torch.cat([tokens, inputs["hidden_states"]], 1),
            "img_ids": torch.cat([ids, inputs["img_ids"]]),
            **(changed if self.config.references == "set" else {}),
        }

    def _set_steps(self, steps: int, sigmas: Sequence[float] | None) -> None:
        """Give the scheduler its steps."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if not name.startswith("FlowMatch") and scheduler.config.get("prediction_type") != "flow_prediction":
            raise UserError(
                f"{name} does not sample flows, which this model was trained for: take one of diffusers' FlowMatch "
                "schedulers, or one with prediction_type='flow_prediction' and use_flow_sigmas=True."
            )
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if sigmas is not None and not takes_sigmas:
            raise UserError(f"{name} has noise levels of its own: leave out `sigmas`.")
        if takes_sigmas:
            even = np.linspace(1.0, 1 / steps, steps)
            levels = np.asarray(even if sigmas is None else sigmas, np.float32)
            scheduler.set_timesteps(len(levels), sigmas=levels, device=self._execution_device)
        else:
            scheduler.set_timesteps(steps, device=self._execution_device)
        scheduler.set_begin_index(0)

    def _patches(self, side: int) -> int:
        if side < 1 or side % self.config.patch:
            raise UserError(f"A side of {side} pixels is no multiple of {self.config.patch}, which is a token's.")
        return side // self.config.patch


diffusers.PixelEditPipeline = PixelEditPipeline  # where DiffusionPipeline.from_pretrained looks for the class


def _fitted(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Made smaller where there are more than `size` squared."""
    height, width = pixels.shape[1:]
    scale = size / (height * width) ** 0.5
    if scale >= 1:
        return pixels
    sides = [max(1, round(side * scale)) for side in (height, width)]
    return torch.nn.functional.interpolate(pixels[None], sides, mode="bicubic", antialias=True)[0].clamp(-1, 1)


def _cut(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """At the rim to multiples of `patch`."""
    height, width = pixels.shape[1:]
    rows, columns = height // patch * patch, width // patch * patch
    if not rows or not columns:
        raise UserError(f"A picture of {width} by {height} pixels is smaller than a token.")
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[:, top : top + rows, left : left + columns]


def to_tokens(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """`[batch, 3, height, width]` to `[batch, patches, 3 * patch * patch]`, row by row."""
    return torch.nn.functional.pixel_unshuffle(pixels, patch).flatten(2).transpose(1, 2)


def from_tokens(tokens: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """Back from `to_tokens`."""
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), patch)


def reference_tokens(pictures: Sequence[torch.Tensor], patch: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """References, each `[batch, 3, height, width]`, as one sequence.

    Returns:
        Tokens `[batch, tokens of all, 3 * patch * patch]`, positions `[tokens of all, 4]`, and the tokens of each.
    """
    places = [
        positions(own.shape[2] // patch, own.shape[3] // patch, number)
        for number, own in zip(reference_numbers(len(pictures)), pictures, strict=True)
    ]
    tokens = torch.cat([to_tokens(own, patch) for own in pictures], 1)
    return tokens, torch.cat(places), [len(part) for part in places]


def positions(rows: int, columns: int, picture: int = 0) -> torch.Tensor:
    """`[rows * columns, 4]`: (picture, row, column, 0)."""
    return torch.cartesian_prod(
        torch.tensor([picture]), torch.arange(rows), torch.arange(columns), torch.zeros(1, dtype=torch.long)
    )


def text_positions(words: int) -> torch.Tensor:
    """`[words, 4]`: (0, 0, 0, word)."""
    return torch.nn.functional.pad(torch.arange(words)[:, None], (3, 0))
