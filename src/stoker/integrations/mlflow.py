"""Loads a registered model for MLflow: `mlflow.pyfunc.load_model("models:/NAME@production")`.

The registered files are the run's own export, in formats that need no pickle: a Hugging Face model, a PEFT
adapter, or safetensors weights. Language models generate text, and classifiers label texts or images. Any
other model is returned as weights by name, since its code is not part of the export.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

from stoker.run import artifacts


class Generator:
    """Continues prompts with a Hugging Face model, or an adapter on its base."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: tuple[Any, Any] | None = None

    @property
    def python_model(self) -> Generator:
        """What MLflow's `unwrap_python_model` hands out."""
        return self

    @property
    def model(self) -> Any:
        """The model, loaded on first use."""
        return self._load()[0]

    @property
    def tokenizer(self) -> Any:
        return self._load()[1]

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Continue each prompt in a list of texts, or in the first column of a table.

        If the tokenizer has a chat template, prompts are texts that it wrote.

        `params` are passed to `generate`; the default is at most 128 tokens, and under MLflow, whose
        signature sets `do_sample` to false, greedy decoding.
        """
        options = {"max_new_tokens": 128, **(params or {})}
        return [self._continue(prompt, options) for prompt in _texts(model_input)]

    def _continue(self, prompt: str, options: dict[str, Any]) -> str:
        encoded = self._encoded(prompt).to(self.model.device)
        made = self.model.generate(**encoded, pad_token_id=self.tokenizer.pad_token_id, **options)
        new = made[0, encoded["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _encoded(self, prompt: str) -> Any:
        """A prompt's tokens, begun as the texts of training were; a chat template writes the beginning."""
        from stoker.language import chat_template

        bos = self.tokenizer.bos_token
        if not self.tokenizer.chat_template and chat_template.begins(self.tokenizer):
            prompt = bos + prompt.removeprefix(bos)
        return self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            if (self.folder / "adapter_config.json").is_file():
                from stoker.language import merging

                model = merging.on_its_base(self.folder)
            else:
                model = AutoModelForCausalLM.from_pretrained(str(self.folder))
            self._loaded = model.eval(), AutoTokenizer.from_pretrained(str(self.folder))
        return self._loaded


class Classifier:
    """Labels texts or images with a Hugging Face model."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self._task = folder, task

    @property
    def python_model(self) -> Classifier:
        """What MLflow's `unwrap_python_model` hands out."""
        return self

    @functools.cached_property
    def pipeline(self) -> Any:
        """The transformers pipeline, loaded on first use."""
        from transformers import pipeline

        options = {"truncation": True} if self._task == "text-classification" else {}
        return pipeline(self._task, model=str(self.folder), **options)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """The most likely label of each text or image in a list, or in the first column of a table.

        An image is a path, a URL, the content of a file (also in base64, as in JSON), a PIL image or an array
        (height, width, channels); one image need not be in a list.
        """
        if self._task == "text-classification":
            return [found["label"] for found in self.pipeline(_texts(model_input))]
        return [best["label"] for (best,) in self.pipeline(_images(model_input), top_k=1)]


def _texts(model_input: Any) -> list[str]:
    return model_input.iloc[:, 0].tolist() if hasattr(model_input, "iloc") else list(model_input)


def _images(model_input: Any) -> list[Any]:
    """Images as transformers takes them: PIL images, or texts that say where they are or what is in them."""
    if hasattr(model_input, "iloc"):
        return [_image(one) for one in model_input.iloc[:, 0]]
    is_array = hasattr(model_input, "shape")
    several = len(model_input.shape) in (1, 4) if is_array else isinstance(model_input, list | tuple)
    return [_image(one) for one in model_input] if several else [_image(model_input)]


def _image(given: Any) -> Any:
    import numpy as np
    from PIL import Image

    if isinstance(given, bytes | bytearray):
        return Image.open(io.BytesIO(given))
    if isinstance(given, Path):
        return str(given)
    return Image.fromarray(np.asarray(given)) if hasattr(given, "shape") else given


class Weights:
    """Tensors by name, for a model whose code is not in the export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def python_model(self) -> Weights:
        """What MLflow's `unwrap_python_model` hands out."""
        return self

    def tensors(self) -> dict[str, Any]:
        """All tensors of all safetensors files, for `model.load_state_dict`."""
        from safetensors.torch import load_file

        return {
            name: t
            for file in sorted(self.folder.rglob("*.safetensors"))
            for name, t in load_file(file).items()
        }

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Raises TypeError: weights alone predict nothing."""
        raise TypeError(
            "these are weights without the code of their model: build the model as the run did, then call "
            "model.load_state_dict(loaded.unwrap_python_model().tensors())"
        )


def _load_pyfunc(path: str) -> Generator | Classifier | Weights:
    """MLflow calls this function by its name."""
    folder = Path(path)
    task = artifacts.task_of(folder)
    if task == "text-generation":
        return Generator(folder)
    return Weights(folder) if task is None else Classifier(folder, task)
