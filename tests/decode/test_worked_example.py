"""The example that `docs/design.md` takes through the seven files of a step."""

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from ctc_drafter.ctc.search import prefix_search
from ctc_drafter.decode.tree import build_tree
from ctc_drafter.decode.verify import follow
from ctc_drafter.target.cache import compact

PAGE = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
# The page's frames: P(a), P(b), P(c) and P(blank); its text, by which the target goes on.
FRAMES = torch.tensor([[[0.5, 0.2, 0.0, 0.3], [0.1, 0.6, 0.0, 0.3]]]).log()
ROOT, WRITTEN = 2, [0, 1, 2]


def test_the_numbers_are_those_of_the_code():
    frames = FRAMES.nan_to_num(neginf=-50.0)
    root = torch.tensor([ROOT])
    found = prefix_search(frames[..., :3], frames[..., 3], root, None, width=4, depth=2)
    prefixes = list(zip(*(x[0].tolist() for x in (found.tokens, found.parents, found.depths)), strict=True))
    shown = re.findall(r"^\| [ab ]+ \| (\d) \| (-?\d) \| (\d) \| [^|]*= (\.\d+) \|$", PAGE, re.MULTILINE)
    assert len(shown) == 4
    scores = found.scores[0].exp()
    for token, parent, depth, probability in shown:
        # The code's parents count all prefixes of a level, c with probability 0 among them.
        place = prefixes.index((int(token), int(parent), int(depth)))
        assert scores[place].item() == pytest.approx(float(probability), abs=1e-6)

    tree = build_tree(root, found, 3, 0.05)
    assert f"tokens  {tree.tokens[0].tolist()}" in PAGE
    assert f"parents {tree.parents[0].tolist()}   depths {tree.depths[0].tolist()}" in PAGE
    assert f"= {tree.scores[0, 1:].exp().sum():.2f} accepted tokens" in PAGE

    # After a node on the text's way the target writes on; node 2 is off it.
    chosen = torch.tensor([[WRITTEN[0], WRITTEN[1], 0, WRITTEN[2]]])
    acceptance = follow(tree, chosen)
    assert acceptance.path[0, : acceptance.counts + 1].tolist() == [0, 1, 3]
    assert acceptance.tokens[0, : acceptance.counts + 1].tolist() == WRITTEN
    assert acceptance.bonus.tolist() == [ROOT]

    cache = DynamicCache()
    slots = torch.arange(9.0).view(1, 1, 9, 1)
    cache.update(slots.clone(), slots.clone(), 0)
    compact(cache, torch.tensor([5]), 5, acceptance.path, acceptance.counts)
    assert cache.layers[0].keys.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
