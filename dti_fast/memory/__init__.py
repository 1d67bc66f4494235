"""How much memory a training run takes, and the plan that fits a card: counted on the model's configuration.

`live_bytes` counts a computation that is never carried out, `count` a training step by its segments, `plan` chooses,
`estimator` asks for the counts of a model, and `budget` keeps a run to the plan.
"""
