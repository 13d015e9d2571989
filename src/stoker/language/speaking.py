"""A model that answers prompts, loaded with transformers and peft alone, as users load an export."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from stoker import exports
from stoker.data.documents import Message
from stoker.engine import quiet
from stoker.errors import BadInput
from stoker.language import building, conversation, hub, merging
from stoker.language.conversation import NO_VALUES, Chat
from stoker.run import artifacts
from stoker.words import first_line


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, on a GPU if there is one."""

    model: Any
    tokenizer: Any
    stops: list[int]
    """The tokens at which its answers end."""

    @property
    def chats(self) -> bool:
        """Whether its tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def ask(self, messages: Sequence[Mapping[str, str]], values: Mapping[str, Any] = NO_VALUES) -> str:
        """The text that prompts a chat model to answer a conversation.

        Args:
            messages: each with its `role` and `content`.
            values: values for the template.

        Raises:
            BadInput: its chat template refuses them.
        """
        said = tuple(Message(message["role"], message["content"]) for message in messages)
        chat = Chat(said, values=conversation.as_text(values))
        return conversation.render(self.tokenizer, chat, to_be_answered=True, today=True)

    @torch.no_grad()
    def answer(
        self,
        text: str,
        *,
        rendered: bool = False,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        seed: int = 0,
        show: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """The continuation of a text: `text`, the number of `tokens`, and `tokens_per_second`.

        Args:
            rendered: whether a chat template wrote the text, including the beginning.
            temperature: 0 always takes the most likely token.
            top_k: 0 samples from all tokens.
            repetition_penalty: see transformers' `GenerationConfig`; None: as in the model's own config.
            show: called with the text as it is generated.

        Raises:
            BadInput: the text is empty, or leaves no room among the model's positions.
        """
        encoded = self.tokenizer(text, return_tensors="pt", add_special_tokens=not rendered)
        ended = bool(text) and not rendered and self._ends(text, encoded["input_ids"][0].tolist())
        kept = slice(None, -1 if ended else None)
        encoded = {
            name: encoded[name][:, kept].to(self.model.device) for name in ("input_ids", "attention_mask")
        }
        begun = encoded["input_ids"].shape[1]
        if begun == 0:
            raise BadInput("the prompt is empty: give --prompt some text")
        room = building.room(self.model.config, begun)
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        if repetition_penalty is not None:
            how["repetition_penalty"] = repetition_penalty
        torch.manual_seed(seed)
        started = time.perf_counter()
        made = self.model.generate(
            **encoded, **how, max_new_tokens=min(max_tokens, room),
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.stops,
            streamer=_streamer(self.tokenizer, show),
        )[0, begun:]  # fmt: skip
        seconds = time.perf_counter() - started
        said = self.tokenizer.decode(made, skip_special_tokens=True)
        return {"text": said, "tokens": len(made), "tokens_per_second": len(made) / seconds}

    def _ends(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the tokenizer added the end of a text, which is to be continued (`add_eos_token`)."""
        end = self.tokenizer.eos_token
        return ids[-1:] == [self.tokenizer.eos_token_id] and not text.endswith(end)


def load(folder: Path, base: str | None = None) -> Speaker:
    """Load a language model. Raises BadInput if it is not one, or the base of an adapter does not exist.

    Args:
        folder: contains a model or an adapter, with its tokenizer; an adapter without one uses its base's.
        base: where an adapter's model is, if it has moved.
    """
    adapter = exports.is_adapter(folder)
    if base is not None and not adapter:
        raise BadInput("--base is for adapters, but this is a whole model: omit it")
    if not adapter and (folder / "config.json").is_file():
        building.load_config(folder)
    if artifacts.task_of(folder) != "text-generation":
        raise BadInput(f"{folder} contains no language model, so it cannot generate text")
    model = merging.on_its_base(folder, base) if adapter else _whole(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = not adapter or hub.has_tokenizer(folder)
    tokenizer = building.load_tokenizer(str(folder) if own else base or merging.base_of(folder))
    stops = building.stop_tokens(tokenizer, model.generation_config)
    return Speaker(model.eval().to(device), tokenizer, stops)


def _whole(folder: Path) -> Any:
    """A full model. Raises BadInput if its files do not exist, or are damaged."""
    quiet.before_deepspeed()
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"model {folder} cannot be loaded: {first_line(error)}") from error


def _streamer(tokenizer: Any, show: Callable[[str], None] | None) -> Any:
    """The object that `generate` passes tokens to."""
    if show is None:
        return None
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: show(text)
    return streamer
