"""MaxViT-T on ImageNet, 300 epochs (Tu et al. 2022, table 12).

Command: `ray job submit --working-dir . -- python jobs/pretrain.py maxvit_t_in1k --data.shards s3://... --to s3://...`
Size: 30,916,528 parameters, the head's among them.
Cost: about 12.8 exaFLOPs, some 28 A100-hours at 40 % of the bf16 peak.
Expected: top-1 83.62 % (the paper). Not run here.
"""

from dataclasses import replace

from pipeline.architectures.maxvit import maxvit_t
from pipeline.config import Augment, Config, Data, Optim

config = Config(
    name="maxvit_t_in1k",
    classes=1000,
    model=replace(maxvit_t, stochastic_depth=0.2),
    data=Data(samples=1_281_167, lanes=512, crop_area=0.08),
    augment=Augment(layers=2, magnitude=15.0, mixup=0.8),
    optim=Optim(lr=3e-3, warmup=10_000, decay="cosine", weight_decay=0.05, decayed="matrices", clip=1.0),
    objective="softmax",
    smoothing=0.1,
    duration=300.0,
    micro_batch=128,
)
