"""A tiny server whose answers are given texts: the target's logits are asked, and the script decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import tiny_models
from ctc_drafter.decode.sampling import walk
from ctc_drafter.serve.server import make_engine
from ctc_drafter.serve.service import Service
from ctc_drafter.target.model import Target
from serve_helpers import NAME


@dataclass(frozen=True)
class Script:
    """A sampler that writes these tokens, and the last one ever after."""

    tokens: tuple[int, ...]

    def validate(self, row, logits):
        return

    def sample(self, logits, rows):
        return torch.tensor([self.tokens[min(len(row.tokens), len(self.tokens) - 1)] for row in rows])

    def sample_tree(self, tree, logits, rows):
        return walk(tree, logits, rows, self.sample)


class ScriptedService(Service):
    """text: of every answer, an end token behind it. Set it before a request."""

    text = ""

    def completions(self, *arguments, **options):
        completions = super().completions(*arguments, **options)
        script = Script((*self.tokenizer(type(self).text, add_special_tokens=False).input_ids, 1))
        for completion in completions:
            completion.sampler = script
        return completions


def scripted_service(template: str, **tokenizer_settings) -> ScriptedService:
    model = tiny_models.tiny_llama(context=2048)
    tokenizer = tiny_models.tiny_tokenizer(template)
    for name, value in tokenizer_settings.items():
        setattr(tokenizer, name, value)
    engine = make_engine(Target.wrap(model), tiny_models.tiny_drafter(model), 3, 16, nodes=8, min_probability=0.0)
    return ScriptedService(engine, Target.wrap(model), tokenizer, NAME)
