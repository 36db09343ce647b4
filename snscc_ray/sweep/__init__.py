"""`snscc sweep`: run the trials of a search space on Ray Tune; make tables, figures and verdicts.

`plan` lists the distinct stages of all trials, `session` trains them (`hooks` is what Tune calls
then), `search` picks the points, `results`, `figures` and `verdicts` evaluate the trials, `run`
combines these steps.

The search spaces (ε, γ, σ, K and others) are in `tune_spaces/`, outside of this package.

Imports: config, core, data, training, runs, cluster. Must not define how a stage trains.
"""
