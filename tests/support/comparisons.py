"""Plain versions of what `refkl compare` computes."""

from __future__ import annotations

import torch
from support.models import VOCABULARY
from torch import Tensor, nn

from refkl.compare import Text


def frozen(model: nn.Module) -> nn.Module:
    """As load_checkpoint gives it."""
    return model.requires_grad_(False)


def random_texts(sizes: list[tuple[int, int]], seed: int = 0, prompts: list[str] | None = None) -> list[Text]:
    """Of (prompt, completion) lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    names = prompts or [f"prompt {number}" for number in range(len(sizes))]
    return [Text(at, name, draw(a), draw(b)) for at, (name, (a, b)) in enumerate(zip(names, sizes, strict=True))]


SIZES = [(3, 5), (1, 9), (6, 1), (2, 7), (4, 4)]


@torch.no_grad()
def dense(model: nn.Module, text: Text, temperature: float = 1.0) -> Tensor:
    """[n, V] fp64 logits that predict the completion, from a forward of this one sequence."""
    ids = torch.tensor([text.prompt_ids + text.completion_ids])
    return model(input_ids=ids).logits[0, len(text.prompt_ids) - 1 : -1].double() / temperature
