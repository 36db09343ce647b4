"""Settings of a run, and the errors that report mistakes in them.

`settings` defines the typed recipe and `recipes` the built-in ones. `overrides` applies
`--set FIELD=VALUE`, `errors` defines the two kinds of errors, `paths` handles local paths and URLs.

Imports: no other package of snscc_ray. Must not import torch or Ray: the command line starts with
it.
"""
