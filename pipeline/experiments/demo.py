"""A small ViT on Fashion-MNIST: the demo's largest run.

Command: `make demo`, or `python jobs/pretrain.py demo --processes 2 --data.shards sets/fashion_mnist/train
--data.validation sets/fashion_mnist/test --to runs`
Size: 311,306 parameters, the head's among them.
"""

from pipeline.config import Config, Data, Optim, Vit

config = Config(
    name="demo",
    classes=10,
    model=Vit(width=64, depth=6, heads=2, hidden=256, patch=7, image_size=28),
    data=Data(samples=60_000, lanes=16, crop_area=1.0, eval_crop=1.0, threads=1),
    optim=Optim(lr=4e-3, warmup=100, weight_decay=0.1),
    objective="softmax",
    smoothing=0.1,
    duration=6.0,
    batch=128,
    zero=2,
    precision="fp32",
    save_every=500,
    log_every=20,
)
