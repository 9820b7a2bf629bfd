"""Training a drafter: the target answers prompts (`distill`), the drafter learns the answers (`trainer`).

Reading order: `records` (rows of any usual format), `data` (prompts, distilled text), `distill`, `anchors` (what
is learnt where), `validate` (held-out β), `settings`, `trainer`; `manifest` and `checkpoints` keep folders honest.
"""
