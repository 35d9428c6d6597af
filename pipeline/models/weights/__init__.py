"""Exchange of weights with the world: `foreign` reads others' files, `fit` makes them fit a model, and one module a
layout writes ours as theirs. `files` opens them without running anything that is in them.
"""
