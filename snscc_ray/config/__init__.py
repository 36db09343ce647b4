"""Settings: what a run is told, and how a mistake in it is reported.

`settings` holds the typed recipe, `recipes` the ones that come with the package, `overrides`
applies `--set FIELD=VALUE`, `errors` the two kinds of errors, `paths` local paths and URLs.

Imports: no other package of snscc_ray. Must not import torch or Ray: the command line starts with
it.
"""
