"""Training a drafter: the target answers prompts (`distill`), the drafter learns the answers (`trainer`).

Reading order: `prompts`, `distill`, `data`, `objective` (what is learnt where), `validate` (held-out β),
`settings`, `trainer`; `checkpoints` and `provenance` keep folders honest.
"""
