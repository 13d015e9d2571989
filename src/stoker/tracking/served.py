"""How MLflow loads a registered model: `mlflow.pyfunc.load_model("models:/NAME@production")`.

What was registered is the run's own export, in formats that need no pickle: a Hugging Face
model, a PEFT adapter, or safetensors weights. Language models generate text, text classifiers
label it; all others are handed out as weights by name, since how to call them is code.
"""

from __future__ import annotations

import functools
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
        """The model, loaded when it is first asked for."""
        return self._load()[0]

    @property
    def tokenizer(self) -> Any:
        return self._load()[1]

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """A continuation of every prompt: a list of texts, or a table whose first column is prompts.

        `params` are `generate`'s; by default greedy, 128 tokens at most.
        """
        options = {"max_new_tokens": 128, **(params or {})}
        return [self._continue(prompt, options) for prompt in _texts(model_input)]

    def _continue(self, prompt: str, options: dict[str, Any]) -> str:
        encoded = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(self.model.device)
        made = self.model.generate(**encoded, pad_token_id=self.tokenizer.pad_token_id, **options)
        new = made[0, encoded["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer

            if (self.folder / "adapter_config.json").is_file():
                from peft import AutoPeftModelForCausalLM as Loader
            else:
                from transformers import AutoModelForCausalLM as Loader
            model = Loader.from_pretrained(str(self.folder)).eval()
            self._loaded = model, AutoTokenizer.from_pretrained(str(self.folder))
        return self._loaded


class Classifier:
    """Labels texts with a Hugging Face model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def python_model(self) -> Classifier:
        """What MLflow's `unwrap_python_model` hands out."""
        return self

    @functools.cached_property
    def pipeline(self) -> Any:
        """That of transformers, loaded when it is first asked for."""
        from transformers import pipeline

        return pipeline("text-classification", model=str(self.folder), truncation=True)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """The likeliest label of every text: of a list, or of a table whose first column is texts."""
        return [found["label"] for found in self.pipeline(_texts(model_input))]


def _texts(model_input: Any) -> list[str]:
    return model_input.iloc[:, 0].tolist() if hasattr(model_input, "iloc") else list(model_input)


class Weights:
    """Tensors by name, of a model whose code is the run's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def python_model(self) -> Weights:
        """What MLflow's `unwrap_python_model` hands out."""
        return self

    def tensors(self) -> dict[str, Any]:
        """Every tensor of every safetensors file, for `model.load_state_dict`."""
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
    """What MLflow calls, by this name."""
    folder = Path(path)
    task = artifacts.task_of(folder)
    if task == "text-generation":
        return Generator(folder)
    return Classifier(folder) if task == "text-classification" else Weights(folder)
