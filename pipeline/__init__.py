"""From a shard to a trained, compared model.

The floors of the building; imports go down only:

    jobs                                    what a person types
    pipeline.search                         which learning rate such a run takes: Ray Tune
    pipeline.large                          a fine-tuning that is a run of its own
    pipeline.launch                         Ray Train
    pipeline.train, transfer, insight       a run, its fine-tunings, the comparison of runs
    pipeline.data, models, objectives,      neighbours that do not know each other
             optim, track
    pipeline.config, seed, world, cli,      what a run is, chance, who one is among many, command lines,
             code, experiments              the version of the code, runs worth repeating
    pipeline.architectures                  what models there are
    shards                                  makes and reads shard sets; knows nothing of models

Each heavy dependency has its doors: deepspeed `train/engine.py`, ray `launch.py`, `search.py`,
`transfer/spare.py`, `transfer/workers.py` and `shards/cluster.py`, mlflow `track/`. webdataset has none: shards are
plain tars, which any WebDataset reader can use and which are written and read here without it. `tests/test_floors.py`
holds both rules.
"""
