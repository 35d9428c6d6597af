"""From a shard to a trained, compared model.

The floors of the building; imports go down only:

    jobs                                    what a person types
    pipeline.launch                         Ray Train
    pipeline.train, transfer, insight       a run, its fine-tunings, the comparison of runs
    pipeline.data, models, objectives,      neighbours that do not know each other
             optim, track
    pipeline.config, seed, world            what a run is, chance, who one is among many
    shards                                  makes and reads shard sets; knows nothing of models

Each heavy dependency has one door: deepspeed in `train/engine.py`, ray in `launch.py`, `transfer/sweep.py` and
`shards/build.py`, mlflow in `track/runs.py`, webdataset in `shards/pack.py`. `tests/test_floors.py` holds both rules.
"""
