"""`snscc sweep`: the trials of a space on Ray Tune, and their tables, figures and verdicts.

`plan` lists the distinct stages of all trials, `session` trains them, `search` picks the points,
`results`, `figures` and `verdicts` say what was found, `run` ties them.

Imports: config, core, data, training, runs, cluster. Must not define how a stage trains.
"""
