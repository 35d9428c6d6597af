"""CMT-S on ImageNet, 300 epochs (Guo et al. 2022; its code's recipe for S).

Command: `ray job submit --working-dir . -- python jobs/pretrain.py cmt_s_in1k --data.shards s3://... --to s3://...`
Size: 26,256,160 parameters, the head's among them.
Cost: about 9.3 exaFLOPs, some 21 A100-hours at 40 % of the bf16 peak.
Expected: top-1 83.5 % (the paper). Not run here. The code's colour jitter is never applied: timm leaves it out where
there is RandAugment.
"""

from dataclasses import replace

from pipeline.architectures.cmt import cmt_s
from pipeline.config import Augment, Config, Data, Optim

config = Config(
    name="cmt_s_in1k",
    classes=1000,
    model=replace(cmt_s, stochastic_depth=0.1),
    data=Data(samples=1_281_167, lanes=256, crop_area=0.08),
    augment=Augment(layers=2, magnitude=9.0, space="deit", mixup=0.8, cutmix=1.0, erase=0.25, repeats=3),
    optim=Optim(
        lr=1e-3, warmup=25_000, decay="cosine", weight_decay=0.05, decayed="matrices", clip=0.0, average=0.99996
    ),
    objective="softmax",
    smoothing=0.1,
    duration=300.0,
    batch=1024,
    micro_batch=128,
)
