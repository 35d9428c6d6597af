"""Makes shard sets from raw pictures and reads them back; knows nothing of models or training.

`sources` yield pictures, `plan` says where each goes, `pack` writes a tar, `build` has Ray do it, `manifest` is what a
reader trusts, `storage` is the one door to folders and buckets.
"""
